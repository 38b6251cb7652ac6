"""Does the answer to a text depend on the texts beside it, and what does it cost that it does not?

    python -m bench.company runs/demo-FINGERPRINT --seconds 60

In process, on the validation texts of the run: the CPU time of each 8-bit variant over that of
`int8`, in turns, for texts in batches of 32 and alone; the root mean square of what it moves the
logits of fp32; and the largest change of a logit between a text alone and in a batch. Beside the
run's variants stands `MatMulNBits`, ONNX Runtime's operator with blocks of 64 weights (it needs
`pip install onnx-ir`). Then each variant is served, and three clients send requests of mixed sizes
and lengths: counted are the texts whose label differs from that of the artefact for the text alone,
and the largest change of a score. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

from ad2kit.data.splits import load_data
from ad2kit.exporting.classifier import MODEL_FILE, OnnxClassifier
from ad2kit.exporting.fuse import fused_copy
from ad2kit.packaging.bento import served
from ad2kit.packaging.check import ask
from ad2kit.run.folder import RunDir
from ad2kit.run.machine import environment
from ad2kit.tables.texts import text_of

CHECKOUT = Path(__file__).parents[1]
VARIANTS = ("int8", "steady", "fused")
_CLIENTS, _SIZES = 3, (1, 1, 2, 7, 32)
_ROUNDS = 7


def in_blocks(fp32: Path, target: Path) -> None:
    """Write a copy of an fp32 graph whose products are `MatMulNBits`."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.getLogger().setLevel(logging.WARNING)  # importing the quantizer sets it to INFO
    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)
    fused = fused_copy(fp32, keep_products=True)
    fused.topological_sort()
    quantizer = MatMulNBitsQuantizer(
        fused.model, bits=8, block_size=64, is_symmetric=True, accuracy_level=4
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(target))


def in_process(run: RunDir, texts: list[Any], folder: Path) -> dict[str, dict[str, float]]:
    """Return the cost, the error and the effect of company of each variant."""
    classifiers = {name: OnnxClassifier(run.onnx(name), threads=1) for name in VARIANTS}
    try:
        in_blocks(run.onnx("fp32") / MODEL_FILE, folder / "blocks.onnx")
    except ModuleNotFoundError as error:
        print(f"without MatMulNBits: {error}")
    else:
        classifiers["MatMulNBits"] = OnnxClassifier(
            run.onnx("fp32"), threads=1, graph=folder / "blocks.onnx"
        )
    encodings = classifiers["int8"].encode(texts)
    fp32 = OnnxClassifier(run.onnx("fp32"), threads=1).run_sorted(encodings, 32)
    seconds: dict[tuple[str, int], list[float]] = {}
    logits = {}
    for _ in range(_ROUNDS):
        for name, classifier in classifiers.items():
            for size in (1, 32):
                start = time.process_time()
                logits[name, size] = classifier.run_sorted(encodings, size)
                seconds.setdefault((name, size), []).append(time.process_time() - start)
    base = {size: np.array(seconds["int8", size]) for size in (1, 32)}
    return {
        name: {
            "cost_alone": float(np.median(np.array(seconds[name, 1]) / base[1])),
            "cost_in_batches": float(np.median(np.array(seconds[name, 32]) / base[32])),
            "rms_error": float(np.sqrt(np.square(logits[name, 32] - fp32).mean())),
            "company": float(np.abs(logits[name, 32] - logits[name, 1]).max()),
        }
        for name in classifiers
    }


def over_http(folder: Path, texts: list[Any], seconds: float) -> dict[str, float]:
    """Serve a variant to three clients, and compare each answer with that to the text alone."""
    alone = OnnxClassifier(folder, threads=1).predict(texts, batch_size=1)
    changes: list[float] = []
    flips: list[bool] = []

    def client(number: int, address: str, end: float) -> None:
        generator = random.Random(number)  # noqa: S311  (repeatable, not secret)
        while time.monotonic() < end:
            rows = generator.sample(range(len(texts)), generator.choice(_SIZES))
            for row, answer in zip(rows, ask(address, [texts[row] for row in rows]), strict=True):
                flips.append(answer["label"] != alone[row].label)
                scores = alone[row].scores
                changes.append(max(abs(answer["scores"][name] - scores[name]) for name in scores))

    settings = {**os.environ, "AD2KIT_MODEL": str(folder.resolve())}
    with (
        tempfile.TemporaryDirectory() as scratch,
        served(CHECKOUT, Path(scratch), environment=settings) as address,
    ):
        end = time.monotonic() + seconds
        clients = [
            threading.Thread(target=client, args=(number, address, end))
            for number in range(_CLIENTS)
        ]
        for each in clients:
            each.start()
        for each in clients:
            each.join()
    return {
        "texts": len(flips),
        "texts_per_s": len(flips) / seconds,
        "flips": sum(flips),
        "largest_change": max(changes),
    }


def main() -> None:
    """Measure, and print two tables and a line of JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--seconds", type=float, default=60.0, help="of the load on each variant")
    options = parser.parse_args()
    run = RunDir(options.run)
    validation = load_data(run.recipe.data, run.recipe.seed, run.shared).validation
    texts: list[Any] = [text_of(row) for row in validation.texts]
    with tempfile.TemporaryDirectory() as scratch:
        found = in_process(run, texts, Path(scratch))
    print(f"{'variant':<12} {'alone':>6} {'batch':>6} {'error':>7} {'company':>8}")
    for name, row in found.items():
        print(
            f"{name:<12} {row['cost_alone']:>6.2f} {row['cost_in_batches']:>6.2f} "
            f"{row['rms_error']:>7.4f} {row['company']:>8.5f}"
        )
    if len(run.recipe.data.text_columns) == 1:  # and some that are longer
        texts += [" ".join(texts[row : row + 8]) for row in range(0, len(texts) - 8, 16)]
    answers = {name: over_http(run.onnx(name), texts, options.seconds) for name in VARIANTS}
    for name, row in answers.items():
        print(
            f"{name:<12} {row['texts']:,} texts over HTTP, {row['texts_per_s']:,.0f} per second: "
            f"{row['flips']:,} other labels, a score moved by at most {row['largest_change']:.5f}"
        )
    facts = {"in_process": found, "over_http": answers, "environment": environment(threads=1)}
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
