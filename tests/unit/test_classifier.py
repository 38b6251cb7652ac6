"""Inference with the exported student of a finished run, and what it refuses."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ad2kit
from ad2kit.data.splits import load_data
from ad2kit.exporting.classifier import OnnxClassifier
from ad2kit.exporting.records import OnnxArtifact
from ad2kit.gate.records import LatencyReport
from ad2kit.gate.shipping import passed_variants
from ad2kit.run.errors import ModelError, RunError, UserError
from ad2kit.run.files import write_record
from ad2kit.statistics.logits import softmax
from ad2kit.tables.texts import is_text

if TYPE_CHECKING:
    from pathlib import Path

    from ad2kit.run.folder import RunDir

TOLERANCE = 1e-5
ALONE = "not dull"


@pytest.fixture(scope="module")
def fp32(finished_run: RunDir) -> OnnxClassifier:
    # int8 quantises activations over a whole batch, so only fp32 owes the same answer everywhere.
    return OnnxClassifier(finished_run.onnx("fp32"), threads=1)


@pytest.fixture(scope="module")
def texts(finished_run: RunDir) -> list[str]:
    validation = load_data(finished_run.recipe.data, finished_run.recipe.seed).validation
    return [ALONE, "fine", *(text[0] for text in validation.texts[:58])]


def edit_json(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def fail_parity(run: RunDir, *variants: str) -> None:
    """Write into parity.json that these variants failed."""

    def change(report: dict[str, Any]) -> None:
        for verdict in report["variants"]:
            if verdict["variant"] in variants:
                verdict["checks"][0] |= {"value": 1.0, "passed": False}  # expected at most 0

    edit_json(run.parity_report, change)


def test_answers_do_not_hang_on_batch_size_or_order(fp32: OnnxClassifier, texts: list[str]) -> None:
    alone = fp32.logits(texts, batch_size=1)
    assert np.ptp(alone[:, 0]) > 20 * TOLERANCE  # else equal answers would prove nothing
    np.testing.assert_allclose(fp32.logits(texts, batch_size=8), alone, rtol=0, atol=TOLERANCE)
    order = np.random.default_rng(3).permutation(len(texts))
    shuffled = fp32.logits([texts[row] for row in order], batch_size=8)
    np.testing.assert_allclose(shuffled, alone[order], rtol=0, atol=TOLERANCE)
    for one, eight in zip(fp32.predict(texts, 1), fp32.predict(texts, 8), strict=True):
        assert one.label == eight.label
        assert (one.tokens, one.truncated) == (eight.tokens, eight.truncated)
        assert one.scores == pytest.approx(eight.scores, abs=TOLERANCE)


def test_answers_do_not_hang_on_padding(fp32: OnnxClassifier, texts: list[str]) -> None:
    short, *others = fp32.encode([ALONE, *texts])
    longest = max(others, key=lambda encoding: len(encoding.ids))
    assert len(longest.ids) > 3 * len(short.ids)
    padded = fp32.run([short, longest])[:1]
    np.testing.assert_allclose(padded, fp32.run([short]), rtol=0, atol=TOLERANCE)


def test_answers_are_the_same_from_several_threads(fp32: OnnxClassifier, texts: list[str]) -> None:
    expected = [prediction.scores for prediction in fp32.predict(texts, batch_size=1)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda text: fp32.predict([text])[0].scores, texts))
    for theirs, mine in zip(found, expected, strict=True):
        assert theirs == pytest.approx(mine, abs=TOLERANCE)


def test_a_prediction_is_the_softmax_of_its_logits(fp32: OnnxClassifier, texts: list[str]) -> None:
    for prediction, row in zip(fp32.predict(texts), fp32.logits(texts), strict=True):
        weights = np.exp(row.astype(np.float64))
        assert tuple(prediction.scores) == fp32.labels
        np.testing.assert_allclose(list(prediction.scores.values()), weights / weights.sum())
        assert prediction.label == fp32.labels[int(row.argmax())]
        assert prediction.score == prediction.scores[prediction.label]
        assert not prediction.truncated


@pytest.mark.parametrize(
    "logits", [[0.0, 0.0, 0.0], [1e4, -1e4, 0.0], [-5e4, -5e4, -5e4], [88.8, 1e-30, 700.0]]
)
def test_softmax_sums_to_one(logits: list[float]) -> None:
    found = softmax(np.array([logits, logits[::-1]], dtype=np.float32))
    np.testing.assert_allclose(found.sum(axis=-1), 1.0, rtol=1e-12)
    assert (found >= 0).all()


def test_a_very_long_text_is_cut_and_says_so(fp32: OnnxClassifier) -> None:
    room = fp32.artifact.max_length_tokens - 2  # [CLS] and [SEP]
    cut, whole = fp32.predict(["dull " * 20_000, "dull " * room])
    assert cut.truncated
    assert not whole.truncated
    assert cut.tokens == whole.tokens == fp32.artifact.max_length_tokens
    assert cut.scores == pytest.approx(whole.scores, abs=TOLERANCE)


def test_no_texts_make_no_predictions(fp32: OnnxClassifier) -> None:
    assert fp32.predict([]) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        pytest.param("not dull", "expected a list", id="a str instead of a list"),
        pytest.param(["fine", ""], "text 1: .*visible", id="empty"),
        pytest.param(["fine", " \t\n\u2003"], "text 1: .*visible", id="blank"),
        pytest.param([("a", "b")], r"text 0: .*1 text\(s\).*found 2", id="a pair"),
        pytest.param([()], r"text 0: .*found 0", id="an empty tuple"),
        pytest.param([None], "text 0: .*found None", id="None"),
        pytest.param(["fine", 5], "text 1: .*found 5", id="a number"),
        pytest.param([b"fine"], "text 0: .*found b'fine'", id="bytes"),
        pytest.param([{"text": "fine"}], "text 0: ", id="a dict"),
        pytest.param(["a\ud800b"], "text 0: .*surrogate", id="a lone high surrogate"),
        pytest.param(["\udfff"], "text 0: .*surrogate", id="a lone low surrogate"),
    ],
)
def test_what_is_no_list_of_texts_is_refused(
    fp32: OnnxClassifier, wrong: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        fp32.predict(wrong)
    assert refused.value.hint


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text(st.characters(), min_size=1, max_size=120))
def test_any_text_is_answered_or_refused(fp32: OnnxClassifier, text: str) -> None:
    if not is_text(text):
        with pytest.raises(UserError):
            fp32.predict([text])
        return
    (prediction,) = fp32.predict([text])
    assert sum(prediction.scores.values()) == pytest.approx(1.0)
    assert 2 <= prediction.tokens <= fp32.artifact.max_length_tokens


def test_a_pair_model_reads_pairs(copied_run: RunDir) -> None:
    folder = copied_run.onnx("fp32")
    edit_json(folder / OnnxArtifact.file_name, lambda manifest: manifest.update(text_columns=2))
    classifier = OnnxClassifier(folder, threads=1)
    as_tuple, as_list = classifier.predict([("not dull", "fine"), ["not dull", "fine"]])  # type: ignore[list-item]
    assert as_tuple == as_list
    first, second = (len(classifier.tokenizer.encode(text).ids) for text in ("not dull", "fine"))
    assert as_tuple.tokens == first + second - 1  # [CLS] a [SEP] b [SEP]
    (encoding,) = classifier.encode([("not dull", "fine")])
    feed = {
        "input_ids": encoding.ids,
        "attention_mask": [1] * len(encoding.ids),
        "token_type_ids": [0] * first + [1] * (second - 1),
    }
    (expected,) = classifier.session.run(None, {k: np.array([v]) for k, v in feed.items()})
    np.testing.assert_allclose(classifier.run([encoding]), expected, rtol=0, atol=TOLERANCE)
    for wrong in (["not dull"], [("a", "b", "c")]):
        with pytest.raises(UserError, match=r"reads 2 text\(s\)"):
            classifier.predict(wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="visible"):
        classifier.predict([("not dull", " ")])


@pytest.mark.parametrize("name", ["model.onnx", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["truncated", "bit flipped", "removed"])
def test_a_damaged_file_is_refused(copied_run: RunDir, name: str, damage: str) -> None:
    path = copied_run.onnx("fp32") / name
    content = bytearray(path.read_bytes())
    if damage == "removed":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    with pytest.raises(ModelError, match="sha256") as refused:
        OnnxClassifier(copied_run.onnx("fp32"))
    assert name in refused.value.message
    assert refused.value.hint


def test_a_tokenizer_that_was_changed_in_meaning_is_refused(copied_run: RunDir) -> None:
    # Still valid, still loads: only the sha256 can notice.
    path = copied_run.onnx("fp32") / "tokenizer.json"
    text = path.read_text()
    assert text.count('"lowercase": true') == 1
    path.write_text(text.replace('"lowercase": true', '"lowercase": false'))
    with pytest.raises(ModelError, match="sha256"):
        ad2kit.load(copied_run.onnx("fp32"))


def test_a_graph_that_matches_its_manifest_but_does_not_load_is_refused(
    copied_run: RunDir,
) -> None:
    from ad2kit.run.files import sha256_of

    folder = copied_run.onnx("fp32")
    (folder / "model.onnx").write_bytes(b"not a graph")

    def update(manifest: dict[str, Any]) -> None:
        manifest["files"]["model.onnx"] = sha256_of(folder / "model.onnx")

    edit_json(folder / OnnxArtifact.file_name, update)
    with pytest.raises(ModelError, match="onnxruntime cannot load"):
        OnnxClassifier(folder)


def test_a_folder_without_manifest_is_refused(copied_run: RunDir, tmp_path: Path) -> None:
    folder = copied_run.onnx("fp32")
    (folder / OnnxArtifact.file_name).unlink()
    for load in (OnnxClassifier, ad2kit.load):
        for path in (folder, tmp_path / "nowhere"):
            with pytest.raises(ModelError, match=r"manifest\.json") as refused:
                load(path)
            assert refused.value.hint


def test_an_absent_provider_is_refused(finished_run: RunDir) -> None:
    wanted = "CUDAExecutionProvider"
    if wanted in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(ModelError, match=f"has no {wanted}") as refused:
        OnnxClassifier(finished_run.onnx("fp32"), provider="cuda")
    assert "CPUExecutionProvider" in refused.value.message


def test_a_session_that_fell_back_to_another_provider_is_refused(
    finished_run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As where onnxruntime-gpu is installed but CUDA's libraries are not: the provider is listed,
    # and the session quietly runs on the CPU.
    class FellBack:
        def __init__(self, *_: object, **__: object) -> None:
            pass

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", FellBack)
    with pytest.raises(ModelError, match="session runs on CPUExecutionProvider"):
        OnnxClassifier(finished_run.onnx("fp32"), provider="cuda")


def test_load_takes_the_smallest_variant_that_passed(copied_run: RunDir) -> None:
    sizes = {
        name: (copied_run.onnx(name) / "model.onnx").stat().st_size
        for name in ("fp32", "steady", "int8")
    }
    assert sizes["steady"] < sizes["int8"] < sizes["fp32"]
    assert ad2kit.load(copied_run.path).folder == copied_run.onnx("steady")
    fail_parity(copied_run, "steady")
    assert ad2kit.load(copied_run.path).folder == copied_run.onnx("int8")
    fail_parity(copied_run, "int8")
    fail_parity(copied_run, "fused")
    assert ad2kit.load(copied_run.path).folder == copied_run.onnx("fp32")


def test_bound_inputs_and_outputs_give_the_same_logits(
    fp32: OnnxClassifier, texts: list[str]
) -> None:
    for batch in (texts[:1], texts[:7]):
        feed = fp32.feed(fp32.encode(batch))
        np.testing.assert_array_equal(fp32.forward_bound(feed), fp32.forward(feed))


def test_the_fastest_that_passed_is_shipped_once_it_is_measured(copied_run: RunDir) -> None:
    def shipped() -> list[str]:
        return [folder.name for folder in passed_variants(copied_run)]

    report = LatencyReport.read(copied_run.latency_report)
    p50_ms = {"fp32": 1.0, "fused": 0.5, "steady": 3.0, "int8": 2.0}
    cells = [c.model_copy(update={"p50_ms": p50_ms.get(c.system, 9.0)}) for c in report.cells]
    write_record(copied_run.latency_report, report.model_copy(update={"cells": tuple(cells)}))
    assert shipped() == ["steady", "int8", "fused", "fp32"]  # smoke wants the smallest
    recipe = copied_run.recipe
    fastest = recipe.export.model_copy(update={"ship": "fastest"})
    write_record(copied_run.recipe_file, recipe.model_copy(update={"export": fastest}))
    assert shipped() == ["fused", "fp32", "int8", "steady"]
    fail_parity(copied_run, "fused", "steady")
    assert shipped() == ["fp32", "int8"]
    stale = report.model_copy(update={"artifacts": report.artifacts | {"fp32": "0" * 64}})
    write_record(copied_run.latency_report, stale)
    assert shipped() == ["int8", "fp32"]  # by size, as long as the times are of something else
    copied_run.latency_report.unlink()
    assert shipped() == ["int8", "fp32"]


def test_load_refuses_a_run_that_failed_its_gate(copied_run: RunDir) -> None:
    fail_parity(copied_run, "fp32", "fused", "steady", "int8")
    with pytest.raises(RunError, match="no variant that passed") as refused:
        ad2kit.load(copied_run.path)
    assert refused.value.hint


def test_load_refuses_a_run_that_was_never_judged(copied_run: RunDir) -> None:
    copied_run.parity_report.unlink()
    with pytest.raises(RunError, match="no variant that passed"):
        ad2kit.load(copied_run.path)


def test_load_does_not_take_a_variant_that_changed_after_it_was_judged(copied_run: RunDir) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["labels"] = manifest["labels"][::-1]

    edit_json(copied_run.onnx("steady") / OnnxArtifact.file_name, change)
    assert ad2kit.load(copied_run.path).folder == copied_run.onnx("int8")
    for name in ("int8", "fused", "fp32"):
        edit_json(copied_run.onnx(name) / OnnxArtifact.file_name, change)
    with pytest.raises(RunError, match="no variant that passed"):
        ad2kit.load(copied_run.path)
