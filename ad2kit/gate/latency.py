"""The bench stage: latency and throughput of teacher, student and every ONNX variant.

A call is one forward pass from token ids to logits. All systems run on the CPU with the same number
of threads, in one process and one run. Tokenising and HTTP are not timed, because they are the same
for all systems. The systems take turns in rounds, so that a slow moment of the machine affects them
alike, and ratios are taken round by round. The smallest and the largest ratio of six rounds enclose
the median ratio with a probability of 1 - 2 / 2^6 = 97 %, whatever the distribution is.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import numpy as np
import torch

from ad2kit.exporting.classifier import OnnxClassifier
from ad2kit.exporting.records import OnnxArtifact
from ad2kit.gate.records import P99_TARGET_MS, LatencyCell, LatencyReport
from ad2kit.gate.shipping import passed_variants
from ad2kit.models import text_model
from ad2kit.models.records import is_given
from ad2kit.run.files import fingerprint, sha256_of, write_record
from ad2kit.run.folder import exclusive
from ad2kit.run.machine import available_cpus, environment
from ad2kit.training.records import DistillReport

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from onnxruntime import InferenceSession

    from ad2kit.models.text_model import TextModel
    from ad2kit.run.folder import RunDir

    Call = Callable[[NDArray[np.int64]], object]

logger = logging.getLogger(__name__)

TEACHER, STUDENT = "teacher (PyTorch)", "student (PyTorch)"
_ROUNDS = 6
_WARM_UP_CALLS = 2
# Threads of the previous system may spin for this long, and take a core from the next system.
# Without this warm-up one call of nine took more than twice the median.
_WARM_UP_S = 0.05
_LEAST_CALLS = 12
# With fewer calls the 99th percentile would be the slowest call.
_CALLS_FOR_P99 = 100


@exclusive
def measure(
    run: RunDir,
    *,
    again: bool = True,
    p99_target_ms: float = P99_TARGET_MS,
    price_per_hour: float | None = None,
) -> LatencyReport:
    """Measure every system of a run at every shape of the recipe, write the report, return it.

        report = ad2kit.measure(run)

    Variants that failed the gate are left out. If none has passed yet, all are measured.

    Args:
        run: a run with exported variants.
        again: measure even if there is a report for the same artefacts and settings.
        p99_target_ms: the target of the capacity, see :class:`~ad2kit.gate.records.Capacity`.
        price_per_hour: the price of this machine, for the cost of a million texts.

    Raises:
        RunError: nothing is exported yet.
        ModelError: the student has too few positions for a length of the recipe.
    """
    recipe = run.recipe
    distilled = DistillReport.read(run.distill_report)
    folders = _folders_to_measure(run)
    threads = recipe.compute.threads or available_cpus()
    current_environment = environment(threads)
    artifacts = {folder.name: sha256_of(folder / OnnxArtifact.file_name) for folder in folders}
    inputs = fingerprint(
        artifacts,
        distilled.teacher_sha256,
        recipe.bench.model_dump(mode="json"),
        current_environment,
    )
    if not again and run.latency_report.is_file():
        report = LatencyReport.read(run.latency_report)
        if report.inputs == inputs:
            logger.info("latency is already measured: %s", run.latency_report)
            return report

    sizes, cells = _timed(run, distilled, folders, threads)
    report = LatencyReport(
        inputs=inputs,
        artifacts=artifacts,
        threads=threads,
        environment=current_environment,
        sizes_bytes=sizes,
        cells=tuple(cells),
        p99_target_ms=p99_target_ms,
        price_per_hour=price_per_hour,
    )
    write_record(run.latency_report, report)
    if report.busy:
        logger.warning(
            "the machine was busy: rounds of the same calls differ by up to %.1f times; "
            "measure again when it is idle: ad2kit bench %s",
            report.spread,
            run.path,
        )
    return report


def _timed(
    run: RunDir, distilled: DistillReport, folders: Sequence[Path], threads: int
) -> tuple[dict[str, int], list[LatencyCell]]:
    """Time teacher, student and variants at every shape; return their bytes and their cells."""
    recipe = run.recipe
    torch.set_num_threads(threads)
    student = text_model.load_model(run.student, distilled.labels, distilled.task)
    calls: dict[str, Call] = {}
    sizes: dict[str, int] = {}
    if is_given(run.teacher):
        logger.info("bench: the teacher is given by its answers, and is not measured")
    else:
        teacher = text_model.load_model(run.teacher, distilled.labels, distilled.task)
        calls[TEACHER], sizes[TEACHER] = torch_call(teacher), _weights_bytes(run.teacher)
    calls[STUDENT], sizes[STUDENT] = torch_call(student), _weights_bytes(run.student)
    for folder in folders:
        classifier = OnnxClassifier(folder, threads=threads)
        calls[folder.name] = onnx_call(classifier)
        sizes[folder.name] = classifier.artifact.model_bytes

    generator = np.random.default_rng(recipe.seed)
    cells = []
    for length in recipe.bench_lengths_tokens:
        for batch_size in recipe.bench.batch_sizes:
            ids = generator.integers(
                student.module.config.vocab_size, size=(batch_size, length), dtype=np.int64
            )
            seconds = time_rounds(calls, ids, recipe.bench.seconds_per_cell)
            cells += [cell_of(name, ids, rounds) for name, rounds in seconds.items()]
            logger.info("bench: batch %d, %d tokens done", batch_size, length)
    return sizes, cells


def _folders_to_measure(run: RunDir) -> list[Path]:
    """Return the folders of the variants that passed the gate, or of all if none has passed.

    Raises:
        RunError: a variant of the recipe is not exported yet.
    """
    folders = [run.onnx(variant) for variant in run.recipe.export.variants]
    for folder in folders:
        run.require(folder / OnnxArtifact.file_name, command="export")
    passed = passed_variants(run)
    return [folder for folder in folders if not passed or folder in passed]


def torch_call(model: TextModel) -> Call:
    """Return the forward pass of a PyTorch model; it takes token ids, int64 [texts, tokens]."""
    model.module.eval()

    @torch.inference_mode()
    def call(ids: NDArray[np.int64]) -> object:
        tensor = torch.from_numpy(ids)
        return model.module(input_ids=tensor, attention_mask=torch.ones_like(tensor)).logits

    return call


def onnx_call(classifier: OnnxClassifier) -> Call:
    """Return the forward pass of an exported variant; it takes token ids, int64 [texts, tokens]."""
    return session_call(classifier.session)


def session_call(session: InferenceSession) -> Call:
    """Return the forward pass of an ONNX graph; it takes token ids, int64 [texts, tokens]."""
    names = [graph_input.name for graph_input in session.get_inputs()]

    def call(ids: NDArray[np.int64]) -> object:
        feed = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "token_type_ids": np.zeros_like(ids),
        }
        return session.run(["logits"], {name: feed[name] for name in names})

    return call


def time_rounds(
    systems: dict[str, Call],
    ids: NDArray[np.int64],
    seconds: float,
) -> dict[str, list[list[float]]]:
    """Return the seconds of each call of each system, round by round.

    Every second round runs the systems in reverse order. So the after-effects of a system, such as
    threads that still spin, do not always fall on the same other system.

    Args:
        systems: the forward pass of each system by its name.
        ids: token ids of one batch, int64 [texts, tokens].
        seconds: the time for each system, over all rounds.
    """
    rounds: dict[str, list[list[float]]] = {name: [] for name in systems}
    names = list(systems)
    for number in range(_ROUNDS):
        for name in names if number % 2 == 0 else reversed(names):
            call = systems[name]
            warm_up_end = time.perf_counter() + min(_WARM_UP_S, seconds / _ROUNDS)
            warm_up_calls = 0
            while warm_up_calls < _WARM_UP_CALLS or time.perf_counter() < warm_up_end:
                call(ids)
                warm_up_calls += 1
            end = time.perf_counter() + seconds / _ROUNDS
            times: list[float] = []
            while len(times) * _ROUNDS < _LEAST_CALLS or time.perf_counter() < end:
                start = time.perf_counter()
                call(ids)
                times.append(time.perf_counter() - start)
            rounds[name].append(times)
    return rounds


def cell_of(system: str, ids: NDArray[np.int64], rounds: list[list[float]]) -> LatencyCell:
    """Return the latency cell of one system.

    Args:
        system: its name.
        ids: the token ids of the timed batch, int64 [texts, tokens].
        rounds: the seconds of its calls, round by round.
    """
    ms = 1e3 * np.concatenate(rounds)
    p50, p90, p99 = np.percentile(ms, [50, 90, 99])
    return LatencyCell(
        system=system,
        batch_size=ids.shape[0],
        length_tokens=ids.shape[1],
        calls=len(ms),
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99 if len(ms) >= _CALLS_FOR_P99 else None,
        max_ms=ms.max(),
        rounds_ms=tuple(1e3 * float(np.median(times)) for times in rounds),
        texts_per_s=1e3 * ids.shape[0] * len(ms) / ms.sum(),
    )


def _weights_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
