"""Long texts in windows: cut, averaged, and read alike by classifier, service and bulk scoring."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ad2kit.data import windows
from ad2kit.exporting.classifier import OnnxClassifier
from ad2kit.exporting.records import OnnxArtifact
from ad2kit.run.errors import RecipeError, TextTooLong
from ad2kit.run.files import write_record
from ad2kit.run.recipe import load_recipe
from ad2kit.run.sections import TextLength
from ad2kit.scoring.score import score
from ad2kit.service.batcher import Batcher, BatchFacts
from ad2kit.service.errors import Problem
from ad2kit.service.http import Classify
from tests.unit.test_http_api import Uncounted

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ad2kit.run.folder import RunDir

LENGTH = TextLength(16, "windows", 4, 6)
ROOM = 14  # beside [CLS] and [SEP]
# The last word stands in the last window alone.
LONG = "the film is dull and slow " * 5 + "but never a disappointment at all"
TOLERANCE = 1e-6


@given(st.integers(1, 40), st.integers(1, 12), st.data())
def test_windows_hold_every_token_in_order(count: int, room: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, room - 1))
    ids = list(range(count))
    found = windows.cut(ids, room, overlap)
    assert len(found) == windows.window_count(count, room, overlap)
    assert found[0] + [token for window in found[1:] for token in window[overlap:]] == ids
    assert all(len(window) == room for window in found[:-1])
    assert all(
        first[len(first) - overlap :] == second[:overlap]
        for first, second in itertools.pairwise(found)
    )
    # The last window says something that no window before it has said.
    assert len(found) == 1 or overlap < len(found[-1]) <= room


def test_the_mean_is_weighted_by_tokens() -> None:
    logits = np.array([[1.0, 0.0], [4.0, 8.0], [0.1, 0.3], [3.0, 0.0], [0.0, 9.0]], np.float32)
    tokens = [10, 5, 7, 6, 3]
    found = windows.average(logits, tokens, [0, 2, 3])
    np.testing.assert_allclose(found, [[2.0, 40 / 15], [0.1, 0.3], [2.0, 3.0]], rtol=1e-6)
    assert found[1].tobytes() == logits[2].tobytes()
    assert found.dtype == np.float32
    np.testing.assert_allclose(
        windows.shares(tokens, [0, 2, 3]), [2 / 3, 1 / 3, 1, 2 / 3, 1 / 3], rtol=1e-6
    )
    assert windows.average(logits, tokens, range(5)) is logits


def test_a_recipe_says_how_long_texts_are_read() -> None:
    def length(*overrides: str) -> TextLength:
        return load_recipe("smoke", list(overrides)).data.length

    assert length() == TextLength(64)
    assert length().facts == (64,)  # as before there were windows
    assert length("data.long_texts=refuse") == TextLength(64, "refuse")
    assert length("data.long_texts=windows") == TextLength(64, "windows", 8, 32)
    given = ("data.window_overlap_tokens=32", "data.max_windows=3")
    assert length("data.long_texts=windows", *given) == TextLength(64, "windows", 32, 3)
    with pytest.raises(RecipeError, match="is 33: expected at most half of 'max_length_tokens', 3"):
        length("data.long_texts=windows", "data.window_overlap_tokens=33")
    with pytest.raises(RecipeError, match=r"'long_texts' is 'cut': set data\.long_texts=windows"):
        length("data.window_overlap_tokens=8")


@pytest.fixture(scope="module")
def artefact(
    finished_run: RunDir, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[TextLength], Path]:
    """Return the folder of the fp32 variant that reads long texts in some way."""

    def make(length: TextLength) -> Path:
        folder = tmp_path_factory.mktemp("artefact") / "fp32"
        shutil.copytree(finished_run.onnx("fp32"), folder)
        manifest = OnnxArtifact.read(folder / OnnxArtifact.file_name)
        manifest = manifest.model_copy(update=length._asdict())
        write_record(folder / OnnxArtifact.file_name, manifest)
        return folder

    return make


@pytest.fixture(scope="module")
def windowed(artefact: Callable[[TextLength], Path]) -> OnnxClassifier:
    return OnnxClassifier(artefact(LENGTH), threads=1)


def test_an_artefact_of_an_older_version_cuts(finished_run: RunDir) -> None:
    text = (finished_run.onnx("fp32") / OnnxArtifact.file_name).read_text()
    plain = json.loads(text)
    for name in ("long_texts", "window_overlap_tokens", "max_windows"):
        del plain[name]
    assert OnnxArtifact.parse(json.dumps(plain).encode(), "old").length == TextLength(64)
    assert OnnxArtifact.parse(text.encode(), "new").length == TextLength(64)


def test_the_answer_to_a_long_text_is_the_mean_over_its_windows(windowed: OnnxClassifier) -> None:
    texts = ["fine", LONG, "never dull"]
    ids = windowed.tokenizer.encode(LONG, add_special_tokens=False).ids
    parts = windows.cut(ids, ROOM, LENGTH.window_overlap_tokens)
    assert 3 <= len(parts) <= 6
    start, *_, end = windowed.tokenizer.encode("fine").ids
    inputs = [[start, *part, end] for part in parts]
    logits = np.concatenate(
        [
            windowed.session.run(
                ["logits"],
                {
                    "input_ids": np.array([row]),
                    "attention_mask": np.ones((1, len(row)), np.int64),
                    "token_type_ids": np.zeros((1, len(row)), np.int64),
                },
            )[0]
            for row in inputs
        ]
    )
    lengths = [len(row) for row in inputs]
    expected = (logits * np.array(lengths)[:, None]).sum(axis=0) / sum(lengths)
    assert np.abs(logits - expected).max() > 100 * TOLERANCE  # else any mean would do
    for batch_size in (1, 2, 32):
        found = windowed.logits(texts, batch_size)
        np.testing.assert_allclose(found[1], expected, rtol=0, atol=TOLERANCE)
        alone = windowed.logits(["never dull"])
        np.testing.assert_allclose(found[2:], alone, rtol=0, atol=TOLERANCE)
    first, second, _ = (each.as_dict() for each in windowed.predict(texts))
    assert (first["tokens"], first["windows"], first["truncated"]) == (6, 1, False)
    assert (second["tokens"], second["windows"], second["truncated"]) == (
        sum(lengths),
        len(parts),
        False,
    )
    assert windowed.predict([]) == []


def test_a_model_that_cuts_says_nothing_of_windows(finished_run: RunDir) -> None:
    (answer,) = OnnxClassifier(finished_run.onnx("fp32"), threads=1).predict([LONG])
    assert set(answer.as_dict()) == {"label", "score", "scores", "tokens", "truncated"}


@pytest.mark.parametrize(
    ("length", "reason"),
    [
        (LENGTH, "text 1: expected at most 6 windows of 16 tokens, found 7"),
        (TextLength(16, "refuse"), "text 1: expected at most 16 tokens, found"),
    ],
)
def test_a_text_that_is_too_long_is_refused(
    artefact: Callable[[TextLength], Path], length: TextLength, reason: str
) -> None:
    classifier = OnnxClassifier(artefact(length), threads=1)
    long = LONG + LONG
    with pytest.raises(TextTooLong, match=reason) as refused:
        classifier.predict(["fine", long, "dull"])
    # The advice works: shorter, or in parts.
    assert refused.value.hint == "shorten the text, or send its parts as texts of their own"
    words = long.split()
    parts = [" ".join(words[first : first + 7]) for first in range(0, len(words), 7)]
    assert len(classifier.predict(parts)) == len(parts)


def classify(
    classifier: OnnxClassifier, *bodies: Any, **limits: int
) -> tuple[list[Any], list[BatchFacts]]:
    """Ask a service below HTTP, at once; return each answer or error, and what was computed."""
    seen = list[BatchFacts]()
    limits = {"max_batch_tokens": 64, "max_queue_texts": 100} | limits

    async def ask() -> list[Any]:
        batcher = Batcher(
            classifier.run,
            observe=seen.append,
            **limits,
        )
        api = Classify(classifier, batcher, deadline_s=20.0, metrics=Uncounted())  # type: ignore[arg-type]
        try:
            requests = [api.answer(json.dumps(body).encode()) for body in bodies]
            return await asyncio.gather(*requests, return_exceptions=True)
        finally:
            api.close()
            await batcher.close()

    return asyncio.run(ask()), seen


def test_the_service_counts_every_window_and_answers_as_the_artefact(
    windowed: OnnxClassifier,
) -> None:
    texts = [LONG, "fine", LONG + " dull", *["never dull"] * 20, LONG]
    body = {"texts": texts, "scores": True}
    answers, facts = classify(windowed, body, body)
    for content, _ in answers:
        found = json.loads(content)["predictions"]
        expected = [prediction.as_dict() for prediction in windowed.predict(texts, 1)]
        for answer, prediction in zip(found, expected, strict=True):
            assert answer["scores"] == pytest.approx(prediction["scores"], abs=TOLERANCE)
            for name in ("label", "tokens", "windows", "truncated"):
                assert answer[name] == prediction[name]
    items = len(windowed.encode(texts))
    assert items > len(texts)
    assert sum(each.texts for each in facts) == 2 * items
    assert max(each.padded_tokens for each in facts) <= 64


def test_what_is_too_long_for_the_service_is_told_so(windowed: OnnxClassifier) -> None:
    (too_long,), _ = classify(windowed, {"texts": ["fine"] * 17 + [LONG + LONG]})
    assert isinstance(too_long, Problem)
    assert (too_long.status, too_long.kind) == (413, "too_large")
    assert too_long.detail == "text 17: expected at most 6 windows of 16 tokens, found 7"
    assert too_long.hint == "shorten the text, or send its parts as texts of their own"
    # What the empty queue does not hold would never be answered, however often it came again.
    body = {"texts": [LONG] * 5}
    count = len(windowed.encode(body["texts"]))
    for limits in ({"max_queue_texts": count - 1}, {"max_queue_tokens": 16 * 5}):
        (too_much,), _ = classify(windowed, body, **limits)
        assert isinstance(too_much, Problem)
        assert too_much.status == 413
        assert f"found {count} with " in too_much.detail
        assert too_much.hint == "send fewer texts in one request"
        ((content, _),), _ = classify(windowed, {"texts": [LONG]}, **limits)
        assert json.loads(content)["predictions"][0]["windows"] == count // 5


def test_bulk_scoring_reads_windows_and_lists_what_is_too_long(
    artefact: Callable[[TextLength], Path], tmp_path: Path
) -> None:
    folder = artefact(LENGTH)
    rows = ["fine", LONG + LONG, LONG, "never dull", LONG * 900, "dull"]
    table = tmp_path / "rows.jsonl"
    table.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    report = score(folder, table, tmp_path / "out", text_columns=("text",), workers=1, batch_size=4)
    assert (report.rows, report.bad_rows) == (6, 2)
    (part,) = (tmp_path / "out").glob("part-*")
    found = [json.loads(line) for line in part.read_text().splitlines()]
    kept = [rows[0], *rows[2:4], rows[5]]
    assert [row["text"] for row in found] == kept
    expected = OnnxClassifier(folder, threads=1).predict(kept, 4)
    assert [row["score"] for row in found] == pytest.approx([each.score for each in expected])
    assert [row["label"] for row in found] == [each.label for each in expected]
    assert not any(row["truncated"] for row in found)
    (errors,) = (tmp_path / "out" / "_errors").iterdir()
    bad = [json.loads(line) for line in errors.read_text().splitlines()]
    assert [row["row"] for row in bad] == [2, 5]
    assert bad[0]["reason"] == "expected at most 6 windows of 16 tokens, found 7"
    assert bad[1]["reason"].startswith("expected at most 6 windows of 16 tokens, found at least ")
