"""Float ONNX to int8 ONNX: the ways to quantise, and the search for the fastest that passes.

Each way is judged on ``select``.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import math
import shutil
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.tools.symbolic_shape_infer import SymbolicShapeInference

from ad2kit.exporting.conversion import POINTS_LOST, conversion_cost, mostly_8_bits
from ad2kit.exporting.records import QuantisationTrial
from ad2kit.run.errors import ModelError, no_room_left
from ad2kit.run.machine import without_message

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    Feed = dict[str, NDArray[np.int64]]
    from collections.abc import Callable, Iterator

    from ad2kit.exporting.classifier import OnnxClassifier
    from ad2kit.exporting.conversion import LabelledRows
    from ad2kit.exporting.records import Check
    from ad2kit.exporting.tokenise import Tokens
    from ad2kit.run.sections import ParityRecipe

    Logits = NDArray[np.float32]


Activations = Literal["dynamic", "minmax", "percentile", "entropy"]
_METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "percentile": CalibrationMethod.Percentile,
    "entropy": CalibrationMethod.Entropy,
}
_8_BITS = {onnx.TensorProto.INT8, onnx.TensorProto.UINT8}
# Lookups among them: the embedding table is most of a small student.
_QUANTISED = ("MatMul", "Gemm", "Attention", "Gather", "EmbedLayerNormalization")


@dataclass(frozen=True, slots=True)
class Way:
    """How to quantise.

    ``activations``: their range is found for each batch as it comes (``dynamic``), or once, from
    real texts. ``weights`` is their type; ``per_channel`` gives each output its own scale.
    ``fused`` starts from the fused graph. ``in_float`` names nodes that are left as they are.
    """

    activations: Activations = "dynamic"
    weights: Literal["int8", "uint8"] = "int8"
    per_channel: bool = True
    fused: bool = False
    in_float: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [
            self.activations,
            self.weights,
            "per channel" if self.per_channel else "per tensor",
        ]
        if self.fused:
            parts.append("fused")
        if self.in_float:
            parts.append(f"{len(self.in_float)} nodes in float")
        return ", ".join(parts)


# In the order in which they are worth trying: what keeps most, then what is seldom better.
WAYS = tuple(
    Way(activations, weights, per_channel, fused)  # type: ignore[arg-type]
    for activations, weights, per_channel, fused in itertools.product(
        ("dynamic", "percentile", "minmax", "entropy"),
        ("int8", "uint8"),
        (True, False),
        (False, True),
    )
)


def quantize(source: Path, target: Path, way: Way, calibration: Sequence[Feed] = ()) -> None:
    """Write a quantised copy of a graph.

    Weights of matrix products and the largest embedding table become 8-bit. The smaller tables
    (positions, segments) are added to that one: a hundredth of its size, and their rounding errors
    would come on top of its own; they stay in float where they can be told apart.

    Args:
        source: the float graph; the fused one if the way says so.
        target: the graph to write.
        way: how.
        calibration: inputs of equal shape, for a way that is not dynamic.
    """
    common: dict[str, Any] = {
        "op_types_to_quantize": list(_QUANTISED),
        # The quantiser splits a Gemm into a product and a sum first, and gives it another name.
        "nodes_to_exclude": [
            *_small_tables(source),
            *way.in_float,
            *(f"{name}_MatMul" for name in way.in_float),
        ],
        "per_channel": way.per_channel,
        "weight_type": QuantType.QInt8 if way.weights == "int8" else QuantType.QUInt8,
        # The tracer leaves some intermediate types out; all of them are float.
        "extra_options": {"DefaultTensorType": onnx.TensorProto.FLOAT},
    }
    # The root logger advises to preprocess, which changes nothing for these graphs.
    with without_message(None, "pre-processing before quantization"):
        if way.activations == "dynamic":
            quantize_dynamic(source, target, **common)
            return
        # All activations of one input at a time, and not of all inputs at once.
        common["extra_options"] |= {"CalibStridedMinMax": 1}
        # Calibration sees only what has a type, and fused nodes have none until it is inferred.
        shaped = SymbolicShapeInference.infer_shapes(onnx.load(source), auto_merge=True)
        with contextlib.redirect_stdout(io.StringIO()):  # the calibrator prints as it goes
            quantize_static(
                shaped,
                target,
                _Reader(calibration),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                calibrate_method=_METHODS[way.activations],
                **common,
            )


def nodes_to_quantize(path: Path) -> list[str]:
    """Return the names of the nodes that :func:`quantize` would quantise."""
    graph, small = onnx.load(path).graph, set(_small_tables(path))
    constants = {tensor.name for tensor in graph.initializer}
    return [
        node.name
        for node in graph.node
        if node.op_type in _QUANTISED
        and node.name not in small
        and any(name in constants for name in node.input)
    ]


def weights_in_8_bits(path: Path) -> tuple[float, tuple[str, ...]]:
    """Return the share of a graph's weights that are stored in 8 bits, and where the others are.

    Weights are matrices and tables; biases and the parameters of norms are left out. The nodes are
    those that hold at least a hundredth of all weights in float, the largest first.
    """
    graph = onnx.load(path).graph
    tensors = [tensor for tensor in graph.initializer if _is_weight(tensor)]
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in tensors}
    in_8_bits = {tensor.name for tensor in tensors if tensor.data_type in _8_BITS}
    weights = sum(sizes.values())
    in_float = {
        node.name: sum(sizes.get(name, 0) for name in node.input if name not in in_8_bits)
        for node in graph.node
    }
    large = [name for name, size in in_float.items() if 100 * size >= weights]
    large.sort(key=lambda name: -in_float[name])
    share = sum(size for name, size in sizes.items() if name in in_8_bits) / weights
    return share, tuple(large)


def _is_weight(tensor: onnx.TensorProto) -> bool:
    """Whether this is a matrix of weights, in float or in 8 bits."""
    return len(tensor.dims) > 1 and tensor.data_type in {*_8_BITS, onnx.TensorProto.FLOAT}


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """The inputs of a calibration; the quantiser asks for ranges of them."""

    def __init__(self, feeds: Sequence[Feed]) -> None:
        self._feeds, self._range = feeds, iter(feeds)

    def __len__(self) -> int:
        return len(self._feeds)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._range = iter(self._feeds[start_index:end_index])

    def get_next(self) -> Feed | None:
        return next(self._range, None)


def _small_tables(path: Path) -> list[str]:
    """Return the names of the nodes that look something up in any table but the largest."""
    graph = onnx.load(path).graph
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
    lookups = [node for node in graph.node if node.op_type == "Gather" and node.input[0] in sizes]
    lookups.sort(key=lambda node: sizes[node.input[0]])
    return [node.name for node in lookups[:-1]]


logger = logging.getLogger(__name__)

_BATCH = 32
# So many rows are read to find the nodes that lose most, and so many are timed.
_SAMPLE, _TIMED = 128, 64
_ROUNDS = 3
# Over the least error of those that pass. On the demo's 640 validation rows the four dynamic ways
# by channel moved the logits by 0.12 to 0.15 and flipped 56 labels, in batches and one by one added
# up; those by tensor moved them by 0.18 to 0.23 and flipped 84.
_MOST_ERROR = 1.25


@dataclass(frozen=True, eq=False)
class QuantisedGraph:
    """A graph that was made in some way, what question 2 says of it, and its time over fp32's.

    ``cost`` is of a text in batches, and of a text alone; ``error`` is the root of the mean square
    of what the logits differ from those of fp32, in batches or one by one, whichever is more.
    """

    way: Way
    graph: Path
    checks: tuple[Check, ...]
    cost: tuple[float, float]
    error: float

    @property
    def passed(self) -> bool:
        """Whether it keeps within all thresholds, as far as ``select`` can tell.

        Whether so many rows show it is for the gate to say, of the one that is taken.
        """
        return all(check.reached for check in self.checks)

    @property
    def agreement(self) -> float:
        """Agreement with fp32: in batches or one by one, whichever is less."""
        return min(check.value for check in self.checks if "with fp32" in check.name)


@dataclass(frozen=True)
class Int8Search:
    """What the candidates are made from and judged by.

    One candidate is open at a time, beside the ``reference``: an open graph holds its weights, and
    the activations of the largest batch that it has seen.

    ``graphs`` are the plain float graph (False) and the fused one, if there is one (True);
    ``reference`` is the plain one, open; ``classifier_of`` opens any other;
    ``encodings`` and ``rows`` are of ``select``; ``calibration`` are inputs made of training
    texts; ``scratch`` is a folder for the candidates.
    """

    graphs: dict[bool, Path]
    reference: OnnxClassifier
    classifier_of: Callable[[Path], OnnxClassifier]
    encodings: Sequence[Tokens]
    rows: LabelledRows
    thresholds: ParityRecipe
    calibration: Sequence[Feed]
    scratch: Path

    def write(self, target: Path, seconds: float) -> tuple[str, tuple[QuantisationTrial, ...]]:
        """Write the fastest graph that passes; return its way, and all that was tried.

        The fastest of many that pass on a few hundred rows has been lucky on them. So it must pass
        by one standard error of its agreement, and move the logits little more than the best of
        those that do: on so few rows there are too few flips to compare them, and what moves the
        logits further flips more of the texts that were not seen. If none passes so, the one that
        agrees most is written, and the gate will say whether that is enough.

        Args:
            target: of the graph.
            seconds: when to stop trying. 0 stops at the first that passes, whenever that is, and
                so finds the same graph each time.

        Raises:
            ModelError: there is no way to quantise this graph at all.
        """
        deadline = time.monotonic() + seconds if seconds else math.inf
        tried, impossible = list[QuantisedGraph](), list[QuantisationTrial]()
        fp32 = self.reference.run_sorted(self.encodings, _BATCH)
        for way in self._ways(tried, fp32, deadline):
            try:
                last = self._try(way, fp32, f"{len(tried)}.onnx")
            except Exception as error:
                # onnxruntime's quantiser and sessions share no class of exceptions. One way that
                # does not fit a graph must not cost the others; the table tells of it.
                if no_room_left(error):
                    raise
                logger.warning("int8, %s: impossible: %s", way, error)
                impossible.append(_impossible(way, error))
                continue
            tried.append(last)
            logger.info(
                "int8, %s: agreement %.4f%s", way, last.agreement, "" if last.passed else ", failed"
            )
            if time.monotonic() > deadline or (not seconds and self._safe(last)):
                break
        if not tried:
            raise ModelError(
                f"none of {len(impossible)} ways to quantise {self.graphs[False].name} worked; "
                f"the first: {impossible[0].failures[0]}",
                hint="leave int8 out of export.variants",
            )
        safe = [candidate for candidate in tried if self._safe(candidate)]
        least = min((candidate.error for candidate in safe), default=0.0)
        exact = [candidate for candidate in safe if candidate.error <= _MOST_ERROR * least]
        taken = (
            min(exact, key=lambda candidate: math.prod(candidate.cost))
            if exact
            else max(tried, key=lambda candidate: (candidate.passed, candidate.agreement))
        )
        batch_ms, alone_ms = self._milliseconds()
        trials = tuple(
            QuantisationTrial(
                way=str(candidate.way),
                agreement=candidate.agreement,
                rms_error=candidate.error,
                points_lost=next(c.value for c in candidate.checks if c.name == POINTS_LOST),
                failures=tuple(check.name for check in candidate.checks if not check.reached),
                size_bytes=candidate.graph.stat().st_size,
                batch_ms=candidate.cost[0] * batch_ms,
                alone_ms=candidate.cost[1] * alone_ms,
            )
            for candidate in tried
        )
        trials = (*trials, *impossible)
        shutil.move(taken.graph, target)
        return str(taken.way), trials

    def _safe(self, candidate: QuantisedGraph) -> bool:
        """Whether a candidate passes, and by a standard error where agreement is a share."""
        share, error = candidate.agreement, 0.0
        if self.rows.task != "regression":
            error = math.sqrt(share * (1 - share) / len(self.encodings))
        return candidate.passed and share - error >= self.thresholds.min_agreement

    def _ways(self, tried: list[QuantisedGraph], fp32: Logits, deadline: float) -> Iterator[Way]:
        """Yield what to try next: all that is dynamic, then less of the best, then the rest."""
        ways = [way for way in WAYS if way.fused in self.graphs]
        yield from (way for way in ways if way.activations == "dynamic")
        if tried and not any(map(self._safe, tried)):
            best = max(tried, key=lambda candidate: candidate.agreement).way
            worst_first = self._by_damage(best, fp32, deadline)
            for count in range(1, len(worst_first)):
                if any(map(self._safe, tried)):
                    break
                yield replace(best, in_float=tuple(worst_first[:count]))
        yield from (way for way in ways if way.activations != "dynamic")

    def _try(self, way: Way, fp32: Logits, name: str) -> QuantisedGraph:
        graph = self.scratch / name
        quantize(self.graphs[way.fused], graph, way, self.calibration)
        classifier = self.classifier_of(graph)
        batched, alone = (classifier.run_sorted(self.encodings, size) for size in (_BATCH, 1))
        checks = conversion_cost(batched, alone, fp32, self.rows, self.thresholds)
        checks += (mostly_8_bits(weights_in_8_bits(graph)[0]),)
        error = max(math.sqrt(np.square(each - fp32).mean()) for each in (batched, alone))
        return QuantisedGraph(way, graph, checks, self._cost(classifier), error)

    def _by_damage(self, way: Way, fp32: Logits, deadline: float) -> list[str]:
        """Return the nodes that a way quantises, by how far each alone moves the logits.

        Those that the time did not suffice for come last.
        """
        nodes, graph = nodes_to_quantize(self.graphs[way.fused]), self.scratch / "one-node.onnx"
        sample, expected = self.encodings[:_SAMPLE], fp32[:_SAMPLE]
        damage = {}
        for node in nodes:
            if time.monotonic() > deadline:
                break
            others = tuple(name for name in nodes if name != node)
            try:
                quantize(self.graphs[way.fused], graph, replace(way, in_float=others))
                logits = self.classifier_of(graph).run_sorted(sample, _BATCH)
            except Exception as error:
                if no_room_left(error):
                    raise
                logger.warning("int8, %s alone: impossible: %s", node, error)
                continue
            damage[node] = float(np.square(np.nan_to_num(logits) - expected).mean())
        return sorted(nodes, key=lambda node: -damage.get(node, -math.inf))

    def _cost(self, classifier: OnnxClassifier) -> tuple[float, float]:
        """Return the time of a text in batches and of a text alone, over that of fp32.

        They take turns, so that a slow moment of the machine hits them alike. So candidates can be
        compared that were never open together.
        """
        rounds = np.array(
            [[self._seconds(each) for each in (classifier, self.reference)] for _ in range(_ROUNDS)]
        )
        ratios = np.median(rounds[:, 0] / rounds[:, 1], axis=0)
        return float(ratios[0]), float(ratios[1])

    def _milliseconds(self) -> tuple[float, float]:
        """Return the milliseconds of fp32, of a text in batches and of a text alone."""
        median = np.median([self._seconds(self.reference) for _ in range(_ROUNDS)], axis=0)
        return float(1e3 * median[0]), float(1e3 * median[1])

    def _seconds(self, classifier: OnnxClassifier) -> tuple[float, float]:
        """Return the seconds of a text in batches, and of a text alone."""
        sample, seconds = self.encodings[:_TIMED], list[float]()
        for size in (_BATCH, 1):
            start = time.perf_counter()
            classifier.run_sorted(sample, size)
            seconds.append((time.perf_counter() - start) / len(sample))
        return seconds[0], seconds[1]


def _impossible(way: Way, error: Exception) -> QuantisationTrial:
    nothing = math.nan
    return QuantisationTrial(
        way=str(way),
        agreement=nothing,
        rms_error=nothing,
        points_lost=nothing,
        failures=(f"impossible: {error}",),
        size_bytes=0,
        batch_ms=nothing,
        alone_ms=nothing,
    )
