"""The student that ad2kit ships, beside the same student through other runtimes, in one run.

    pip install openvino
    ad2kit run sst2-minilm data.source=FOLDER data.max_train_rows=8000
    python bench/inference.py runs/sst2-minilm-FINGERPRINT

Each system computes logits from token ids, on the CPU with the same number of threads, in turns.
Peers are given the best that they take: optimum's ORT model the int8 artefact, which it loads as it
is; torch.compile the PyTorch student with static shapes; OpenVINO the fp32 graph, and an int8 one
that was quantised statically, because it cannot run activations that are quantised as they come.
The `plain` rows are int8 of the unfused graph, with what ad2kit does to it taken back: the last
layer computed whole, or ONNX Runtime left to fuse Add and LayerNormalization into one node.
`ratio` is the median time of the system over that of ad2kit's int8, so more than 1 is slower. A
peer that cannot be run is said to fail, with its reason. Ends with JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime
import torch

from ad2kit.exporting.classifier import MODEL_FILE, OnnxClassifier
from ad2kit.exporting.fuse import read_first_token_only
from ad2kit.exporting.int8 import Way, quantize
from ad2kit.gate.latency import onnx_call, time_rounds, torch_call
from ad2kit.models import text_model
from ad2kit.run.folder import RunDir
from ad2kit.run.machine import available_cpus, environment
from ad2kit.training.records import DistillReport

if TYPE_CHECKING:
    from collections.abc import Callable

    from ad2kit.gate.latency import Call

OURS = "ad2kit int8"
SHAPES = ((1, 16), (1, 128), (32, 16), (32, 128))


def inputs(ids: np.ndarray[Any, Any], names: list[str]) -> dict[str, np.ndarray[Any, Any]]:
    """Return the inputs of full texts, by the names that a model wants."""
    feed = {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
    }
    return {name: feed[name] for name in names}


def optimum(folder: Path, threads: int) -> Call:
    """Return optimum's own wrapper of the artefact."""
    from optimum.onnxruntime import ORTModelForSequenceClassification

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = ORTModelForSequenceClassification.from_pretrained(
        folder, session_options=options, trust_remote_code=False
    )
    names = list(model.input_names)

    def call(ids: np.ndarray[Any, Any]) -> object:
        return model(**{k: torch.from_numpy(v) for k, v in inputs(ids, names).items()}).logits

    return call


def compiled(student: text_model.TextModel) -> Call:
    """Return the PyTorch student behind torch.compile."""
    module: Any = torch.compile(student.module.eval(), dynamic=False)

    @torch.inference_mode()
    def call(ids: np.ndarray[Any, Any]) -> object:
        tensor = torch.from_numpy(ids)
        return module(input_ids=tensor, attention_mask=torch.ones_like(tensor)).logits

    return call


def openvino(graph: Path, threads: int) -> Call:
    """Return OpenVINO's CPU plugin on an ONNX graph, tuned for latency."""
    import openvino as ov

    core = ov.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    model = core.compile_model(str(graph), "CPU", settings)
    names = [port.any_name for port in model.inputs]
    request = model.create_infer_request()

    def call(ids: np.ndarray[Any, Any]) -> object:
        return request.infer(inputs(ids, names))

    return call


def static_int8(run: RunDir, folder: Path, words: int) -> Path:
    """Return the int8 graph that OpenVINO can run; its ranges are of random texts."""
    generator = np.random.default_rng(1)
    names = OnnxClassifier(run.onnx("fp32"), threads=1).input_names
    feeds = [inputs(generator.integers(999, words, size=(16, 32)), names) for _ in range(4)]
    quantize(run.onnx("fp32") / MODEL_FILE, folder / "static.onnx", Way("minmax"), feeds)
    return folder / "static.onnx"


def plain_int8(run: RunDir, folder: Path, threads: int) -> dict[str, Callable[[], Call]]:
    """Return int8 graphs of the unfused fp32 that differ in one thing each."""
    source = run.onnx("fp32") / MODEL_FILE

    def graph(*, first_token: bool) -> Path:
        model, path = onnx.load(source), folder / f"first-{first_token}.onnx"
        if first_token:
            read_first_token_only(model)
        onnx.save(model, path)
        quantize(path, folder / f"int8-{path.name}", Way())
        return folder / f"int8-{path.name}"

    def by_ad2kit(path: Path) -> Call:
        return onnx_call(OnnxClassifier(run.onnx("fp32"), threads=threads, graph=path))

    def by_default(path: Path) -> Call:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        names = [item.name for item in session.get_inputs()]
        return lambda ids: session.run(["logits"], inputs(ids, names))

    return {
        "plain int8": lambda: by_ad2kit(graph(first_token=True)),
        "plain int8, whole last layer": lambda: by_ad2kit(graph(first_token=False)),
        "plain int8, SkipLayerNorm": lambda: by_default(graph(first_token=True)),
    }


def main() -> None:
    """Print a table of each shape, and a last line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--threads", type=int, default=available_cpus())
    parser.add_argument("--seconds", type=float, default=3.0, help="for each system and shape")
    arguments = parser.parse_args()
    threads, run = arguments.threads, RunDir(arguments.run)
    torch.set_num_threads(threads)
    distilled = DistillReport.read(run.distill_report)
    student = text_model.load_model(run.student, distilled.labels, distilled.task)
    teacher = text_model.load_model(run.teacher, distilled.labels, distilled.task)

    def ours(variant: str) -> Call:
        return onnx_call(OnnxClassifier(run.onnx(variant), threads=threads))

    temporary = tempfile.TemporaryDirectory()
    makers: dict[str, Callable[[], Call]] = {
        OURS: lambda: ours("int8"),
        "ad2kit fused": lambda: ours("fused"),
        "ad2kit fp32": lambda: ours("fp32"),
        "optimum ORT, int8": lambda: optimum(run.onnx("int8"), threads),
        "torch.compile": lambda: compiled(student),
        "OpenVINO, fp32 graph": lambda: openvino(run.onnx("fp32") / MODEL_FILE, threads),
        "OpenVINO, static int8": lambda: openvino(
            static_int8(run, Path(temporary.name), student.module.config.vocab_size), threads
        ),
        **plain_int8(run, Path(temporary.name), threads),
        "PyTorch student": lambda: torch_call(student),
        "PyTorch teacher": lambda: torch_call(teacher),
    }
    generator = np.random.default_rng(0)
    systems: dict[str, Call] = {}
    for name, make in makers.items():
        try:
            call = make()
            call(generator.integers(999, size=SHAPES[0]))
        except Exception as error:  # whatever a peer raises, its reason is printed
            print(f"{name} failed: {type(error).__name__}: {str(error).splitlines()[0]:.120}")
            continue
        systems[name] = call
    found: dict[str, dict[str, float]] = {}
    for batch, length in SHAPES:
        ids = generator.integers(999, student.module.config.vocab_size, size=(batch, length))
        rounds = time_rounds(systems, ids, arguments.seconds)
        seconds = {name: np.concatenate(each) for name, each in rounds.items()}
        medians = {name: float(np.median(times)) for name, times in seconds.items()}
        print(
            f"\nbatch {batch}, {length} tokens{'p50 ms':>20}{'p99 ms':>9}{'texts/s':>10}"
            f"{'ratio':>8}"
        )
        for name, times in sorted(seconds.items(), key=lambda item: medians[item[0]]):
            ratio, p99_ms = medians[name] / medians[OURS], 1e3 * np.percentile(times, 99)
            print(
                f"{name:<26}{1e3 * medians[name]:>15.2f}{p99_ms:>9.2f}"
                f"{batch / medians[name]:>10.0f}{ratio:>8.2f}"
            )
        found[f"{batch}x{length}"] = {name: ms / medians[OURS] for name, ms in medians.items()}
    print(json.dumps({"over_ad2kit_int8": found, "environment": environment(threads)}))


if __name__ == "__main__":
    main()
