"""Quantisation of a float ONNX graph to int8: the ways, and the search for the fastest that passes.

Each way is judged on the rows of ``select``.
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

from ad2kit.exporting.conversion import (
    POINTS_LOST,
    company_checks,
    company_of,
    conversion_cost,
    mostly_8_bits,
)
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
# Lookups are quantised, too, because the embedding table is most of a small student.
_QUANTISED = ("MatMul", "Gemm", "Attention", "Gather", "EmbedLayerNormalization")


logger = logging.getLogger(__name__)
_BATCH = 32
# The number of rows for the search of the nodes that cost most, and for the timing.
_SAMPLE, _TIMED = 128, 64
_ROUNDS = 3
# The greatest error of a candidate to take, as a multiple of the least error of those that pass.
# On the demo's 640 validation rows the four dynamic ways by channel had errors of 0.12 to 0.15 and
# flipped 56 labels (in batches and one by one, added up). The ways by tensor had errors of 0.18 to
# 0.23 and flipped 84 labels.
_MOST_ERROR = 1.25


@dataclass(frozen=True, slots=True)
class Way:
    """A way to quantise.

    ``activations`` says how the range of activations is found: for each batch (``dynamic``), or
    once from training texts. ``weights`` is the type of the weights. ``per_channel`` gives each
    output its own scale. ``fused`` starts from the fused graph. ``in_float`` names the nodes that
    are not quantised.
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


# The most promising ways come first: they keep most of the quality, and later ways are seldom
# better.
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

    The weights of matrix products and the largest embedding table become 8-bit. The smaller tables
    (positions, segments) stay in float if they can be identified: they have a hundredth of its
    size, and their embeddings are added to its embeddings, so that the rounding errors would add.

    Args:
        source: the float graph; the fused one if ``way.fused``.
        target: the graph to write.
        way: the way to quantise.
        calibration: inputs of equal shape, for a way that is not dynamic.
    """
    options: dict[str, Any] = {
        "op_types_to_quantize": list(_QUANTISED),
        # The quantiser splits a Gemm into a product and a sum first, and gives it another name.
        "nodes_to_exclude": [
            *_small_tables(source),
            *way.in_float,
            *(f"{name}_MatMul" for name in way.in_float),
        ],
        "per_channel": way.per_channel,
        "weight_type": QuantType.QInt8 if way.weights == "int8" else QuantType.QUInt8,
        # The tracer omits some intermediate types; all of them are float.
        "extra_options": {"DefaultTensorType": onnx.TensorProto.FLOAT},
    }
    # The root logger advises to preprocess, which changes nothing for these graphs.
    with without_message(None, "pre-processing before quantization"):
        if way.activations == "dynamic":
            quantize_dynamic(source, target, **options)
            return
        # Calibrate on one input at a time, which needs less memory than all inputs at once.
        options["extra_options"] |= {"CalibStridedMinMax": 1}
        # Calibration ignores tensors without a type, and fused nodes get one only by inference.
        typed_model = SymbolicShapeInference.infer_shapes(onnx.load(source), auto_merge=True)
        with contextlib.redirect_stdout(io.StringIO()):  # the calibrator prints as it goes
            quantize_static(
                typed_model,
                target,
                _Reader(calibration),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8,
                calibrate_method=_METHODS[way.activations],
                **options,
            )


def nodes_to_quantize(path: Path) -> list[str]:
    """Return the names of the nodes that :func:`quantize` would quantise."""
    graph = onnx.load(path).graph
    small_tables = set(_small_tables(path))
    constants = {tensor.name for tensor in graph.initializer}
    return [
        node.name
        for node in graph.node
        if node.op_type in _QUANTISED
        and node.name not in small_tables
        and any(name in constants for name in node.input)
    ]


def weights_in_8_bits(path: Path) -> tuple[float, tuple[str, ...]]:
    """Return the share of a graph's weights in 8 bits, and the names of the large float nodes.

    Weights are matrices and tables; biases and the parameters of norms do not count. A large float
    node holds at least a hundredth of all weights in float. The largest node comes first.
    """
    graph = onnx.load(path).graph
    tensors = [tensor for tensor in graph.initializer if _is_weight(tensor)]
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in tensors}
    in_8_bits = {tensor.name for tensor in tensors if tensor.data_type in _8_BITS}
    weight_count = sum(sizes.values())
    float_weights = {
        node.name: sum(sizes.get(name, 0) for name in node.input if name not in in_8_bits)
        for node in graph.node
    }
    large_nodes = [name for name, size in float_weights.items() if 100 * size >= weight_count]
    large_nodes.sort(key=lambda name: -float_weights[name])
    share = sum(size for name, size in sizes.items() if name in in_8_bits) / weight_count
    return share, tuple(large_nodes)


def _is_weight(tensor: onnx.TensorProto) -> bool:
    """Whether this is a matrix of weights, in float or in 8 bits."""
    return len(tensor.dims) > 1 and tensor.data_type in {*_8_BITS, onnx.TensorProto.FLOAT}


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    """The inputs of a calibration; the quantiser reads ranges of them."""

    def __init__(self, feeds: Sequence[Feed]) -> None:
        self._feeds = feeds
        self._range = iter(feeds)

    def __len__(self) -> int:
        return len(self._feeds)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._range = iter(self._feeds[start_index:end_index])

    def get_next(self) -> Feed | None:
        return next(self._range, None)


def _small_tables(path: Path) -> list[str]:
    """Return the names of the lookup nodes of all embedding tables but the largest."""
    graph = onnx.load(path).graph
    sizes = {tensor.name: math.prod(tensor.dims) for tensor in graph.initializer}
    lookups = [node for node in graph.node if node.op_type == "Gather" and node.input[0] in sizes]
    lookups.sort(key=lambda node: sizes[node.input[0]])
    return [node.name for node in lookups[:-1]]


@dataclass(frozen=True, eq=False)
class QuantisedGraph:
    """A candidate: the graph of one way, its checks of question 2, its cost and its error.

    ``cost`` is the ratio of its time to that of fp32, for a text in batches and for a text alone.
    ``error`` is the root mean square of the differences of its logits from those of fp32: the
    greater value of batches and of texts one by one.
    """

    way: Way
    graph: Path
    checks: tuple[Check, ...]
    cost: tuple[float, float]
    error: float

    @property
    def passed(self) -> bool:
        """Whether all values keep within their thresholds on ``select``, without their intervals.

        The gate tests the intervals of the candidate that is taken.
        """
        return all(check.reached for check in self.checks)

    @property
    def agreement(self) -> float:
        """The agreement with fp32: the lesser value of batches and of texts one by one."""
        return min(check.value for check in self.checks if "with fp32" in check.name)

    def trial(self, batch_ms: float, alone_ms: float) -> QuantisationTrial:
        """Return the record of this candidate.

        Args:
            batch_ms: the time of fp32 for a text in batches.
            alone_ms: the time of fp32 for a text alone.
        """
        return QuantisationTrial(
            way=str(self.way),
            agreement=self.agreement,
            rms_error=self.error,
            points_lost=next(check.value for check in self.checks if check.name == POINTS_LOST),
            failures=tuple(check.name for check in self.checks if not check.reached),
            size_bytes=self.graph.stat().st_size,
            batch_ms=self.cost[0] * batch_ms,
            alone_ms=self.cost[1] * alone_ms,
        )


@dataclass(frozen=True)
class Int8Search:
    """A search for the int8 graph, with the inputs that candidates are made from and judged by.

    Only one candidate is open at a time, beside the ``reference``, because an open graph keeps its
    weights and the activations of its largest batch in memory.

    ``graphs`` holds the plain float graph (False) and the fused one, if there is one (True).
    ``reference`` is the open plain graph, and ``classifier_of`` opens another graph. ``encodings``
    and ``rows`` are those of ``select``. ``calibration`` holds inputs from training texts.
    ``scratch`` is a folder for the candidates.
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
        """Write the fastest graph that passes; return its way, and all trials.

        Among many candidates, some pass on a few hundred rows by chance. So the graph must pass by
        one standard error of its agreement. Its error of the logits must also be little more than
        the least error of these candidates: a few hundred rows have too few flips to compare
        candidates, and a graph with a greater error flips more labels of unseen texts. If no graph
        passes in this way, the one with the greatest agreement is written, and the gate decides.

        Args:
            target: the graph to write.
            seconds: the time after which no further way is tried. 0 means no limit of time: the
                search ends at the first graph that passes, so it finds the same graph each time.

        Raises:
            ModelError: no way can quantise this graph.
        """
        deadline = time.monotonic() + seconds if seconds else math.inf
        candidates: list[QuantisedGraph] = []
        impossible: list[QuantisationTrial] = []
        fp32 = self.reference.run_sorted(self.encodings, _BATCH)
        for way in self._ways(candidates, fp32, deadline):
            try:
                candidate = self._try(way, fp32, f"{len(candidates)}.onnx")
            except Exception as error:
                # onnxruntime's quantiser and sessions share no class of exceptions. A way that does
                # not fit a graph must not stop the others; the table of trials shows its error.
                if no_room_left(error):
                    raise
                logger.warning("int8, %s: impossible: %s", way, error)
                impossible.append(_impossible(way, error))
                continue
            candidates.append(candidate)
            failed = "" if candidate.passed else ", failed"
            logger.info("int8, %s: agreement %.4f%s", way, candidate.agreement, failed)
            if time.monotonic() > deadline or (not seconds and self._safe(candidate)):
                break
        if not candidates:
            raise ModelError(
                f"none of {len(impossible)} ways to quantise {self.graphs[False].name} worked; "
                f"the first: {impossible[0].failures[0]}",
                hint="leave int8 out of export.variants",
            )
        best = self._best(candidates)
        batch_ms, alone_ms = self._milliseconds()
        trials = [candidate.trial(batch_ms, alone_ms) for candidate in candidates]
        shutil.move(best.graph, target)
        return str(best.way), (*trials, *impossible)

    def _best(self, candidates: Sequence[QuantisedGraph]) -> QuantisedGraph:
        """Return the candidate to take, as :meth:`write` says."""
        safe = [candidate for candidate in candidates if self._safe(candidate)]
        least_error = min((candidate.error for candidate in safe), default=0.0)
        exact = [candidate for candidate in safe if candidate.error <= _MOST_ERROR * least_error]
        if exact:
            return min(exact, key=lambda candidate: math.prod(candidate.cost))
        return max(candidates, key=lambda candidate: (candidate.passed, candidate.agreement))

    def _safe(self, candidate: QuantisedGraph) -> bool:
        """Whether a candidate passes; if its agreement is a share, by one standard error."""
        agreement = candidate.agreement
        standard_error = 0.0
        if self.rows.task != "regression":
            standard_error = math.sqrt(agreement * (1 - agreement) / len(self.rows.labels))
        return candidate.passed and agreement - standard_error >= self.thresholds.min_agreement

    def _ways(
        self, candidates: list[QuantisedGraph], fp32: Logits, deadline: float
    ) -> Iterator[Way]:
        """Yield the ways to try; the caller adds each candidate to ``candidates``.

        All dynamic ways come first. If none is safe, the best of them follows with more and more
        nodes in float. The static ways come last.
        """
        ways = [way for way in WAYS if way.fused in self.graphs]
        yield from (way for way in ways if way.activations == "dynamic")
        if candidates and not any(map(self._safe, candidates)):
            best = max(candidates, key=lambda candidate: candidate.agreement).way
            worst_first = self._by_damage(best, fp32, deadline)
            for count in range(1, len(worst_first)):
                if any(map(self._safe, candidates)):
                    break
                yield replace(best, in_float=tuple(worst_first[:count]))
        yield from (way for way in ways if way.activations != "dynamic")

    def _try(self, way: Way, fp32: Logits, name: str) -> QuantisedGraph:
        graph = self.scratch / name
        quantize(self.graphs[way.fused], graph, way, self.calibration)
        classifier = self.classifier_of(graph)
        batched, alone = (classifier.run_sorted(self.encodings, size) for size in (_BATCH, 1))
        of_texts = [
            self.reference.by_text(self.encodings, logits) for logits in (batched, alone, fp32)
        ]
        checks = conversion_cost(of_texts[0], of_texts[1], of_texts[2], self.rows, self.thresholds)
        company = company_of(
            self.rows.task,
            of_texts[1],
            of_texts[0],
            temperature=classifier.artifact.temperature,
            spread=self.rows.spread,
        )
        checks += company_checks(company, self.rows.task, self.thresholds)
        checks += (mostly_8_bits(weights_in_8_bits(graph)[0]),)
        error = max(math.sqrt(np.square(logits - fp32).mean()) for logits in (batched, alone))
        return QuantisedGraph(way, graph, checks, self._cost(classifier), error)

    def _by_damage(self, way: Way, fp32: Logits, deadline: float) -> list[str]:
        """Return the nodes that a way quantises, by the damage of each node.

        The damage is the mean square error of the logits if only this node is quantised. The
        greatest damage comes first. A node that was not tried by the deadline, or
        cannot be quantised alone, comes last.
        """
        nodes = nodes_to_quantize(self.graphs[way.fused])
        graph = self.scratch / "one-node.onnx"
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
        """Return the ratios of the times to those of fp32, for a text in batches and alone.

        Both graphs take turns, so that a slow moment of the machine affects both. Because of the
        ratios, candidates can be compared that were never open together.
        """
        pair = (classifier, self.reference)
        rounds = np.array([[self._seconds(graph) for graph in pair] for _ in range(_ROUNDS)])
        ratios = np.median(rounds[:, 0] / rounds[:, 1], axis=0)
        return float(ratios[0]), float(ratios[1])

    def _milliseconds(self) -> tuple[float, float]:
        """Return the times of fp32 in ms, of a text in batches and of a text alone."""
        median = np.median([self._seconds(self.reference) for _ in range(_ROUNDS)], axis=0)
        return float(1e3 * median[0]), float(1e3 * median[1])

    def _seconds(self, classifier: OnnxClassifier) -> tuple[float, float]:
        """Return the times of a classifier in s, of a text in batches and of a text alone."""
        sample = self.encodings[:_TIMED]
        seconds: list[float] = []
        for size in (_BATCH, 1):
            start = time.perf_counter()
            classifier.run_sorted(sample, size)
            seconds.append((time.perf_counter() - start) / len(sample))
        return seconds[0], seconds[1]


def _impossible(way: Way, error: Exception) -> QuantisationTrial:
    """Return the record of a way that could not quantise the graph."""
    return QuantisationTrial(
        way=str(way),
        agreement=math.nan,
        rms_error=math.nan,
        points_lost=math.nan,
        failures=(f"impossible: {error}",),
        size_bytes=0,
        batch_ms=math.nan,
        alone_ms=math.nan,
    )
