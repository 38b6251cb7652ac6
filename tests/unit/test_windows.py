"""Long texts in windows: cut, averaged, and read alike by classifier, service and bulk scoring."""

from __future__ import annotations

import asyncio
import itertools
import json
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ad2kit.data import tokens as tokenising
from ad2kit.data import windows
from ad2kit.data.splits import Data, Split, encode
from ad2kit.exporting.classifier import OnnxClassifier
from ad2kit.exporting.records import OnnxArtifact
from ad2kit.models.head import read_vectors
from ad2kit.models.layers import last_linear
from ad2kit.models.text_model import predict_logits, predict_windows
from ad2kit.run.errors import ModelError, RecipeError, TextTooLong
from ad2kit.run.files import write_record
from ad2kit.run.recipe import load_recipe
from ad2kit.run.sections import TextLength
from ad2kit.scoring.score import score
from ad2kit.service.batcher import Batcher, BatchFacts
from ad2kit.service.errors import Problem
from ad2kit.service.http import Classify
from ad2kit.training import opening
from ad2kit.training.ad2 import Batch, distillation
from ad2kit.training.loop import _accumulate
from ad2kit.training.losses import comparison, soft_targets
from tests import families, models
from tests.models import TEXTS, cpu, gradients, settings, split, teacher_logits, tiny_bert
from tests.unit.test_http_api import Uncounted

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ad2kit.data.splits import Encoded
    from ad2kit.models.text_model import TextModel
    from ad2kit.run.folder import RunDir
    from ad2kit.run.sections import Task

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
        api = Classify(
            classifier,
            batcher,
            deadline_s=20.0,
            max_texts=128,
            max_body_bytes=2**20,
            metrics=Uncounted(),  # type: ignore[arg-type]
        )
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


@pytest.mark.parametrize("piece_characters", [2**22, 40, 1])
def test_bulk_scoring_reads_windows_and_lists_what_is_too_long(
    artefact: Callable[[TextLength], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    piece_characters: int,
) -> None:
    monkeypatch.setattr("ad2kit.scoring.workers._PIECE_CHARACTERS", piece_characters)
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


# Windows in training: tests.models' texts and longer ones, in windows of 8 tokens.
TRAINED = TextLength(8, "windows", 2, 8)
LABELS = np.array([1, 0, 0, 1, 1])


@pytest.fixture(scope="module")
def model() -> TextModel:
    return tiny_bert()


@pytest.fixture(scope="module")
def rows(model: TextModel) -> Encoded:
    texts = (TEXTS[0], " ".join(TEXTS[:4]), TEXTS[2], " ".join(TEXTS[3:]), TEXTS[4])
    return encode(Split.of([(text,) for text in texts], LABELS), model.tokenizer, TRAINED)


def test_the_logits_of_a_text_are_the_mean_over_its_windows(
    model: TextModel, rows: Encoded
) -> None:
    device = torch.device("cpu")
    counts = np.diff(np.append(rows.first_windows, len(rows.input_ids)))  # type: ignore[arg-type]
    assert counts.tolist() == [1, 4, 1, 6, 2]
    window_logits = predict_windows(model, rows, device).numpy()
    lengths = [len(ids) for ids in rows.input_ids]
    first = 0
    for text, count in enumerate(counts):
        part = slice(first, first + count)
        expected = np.average(window_logits[part], axis=0, weights=lengths[part])
        np.testing.assert_allclose(
            predict_logits(model, rows, device)[text], expected, rtol=1e-5, atol=1e-6
        )
        assert rows.lengths[text] == sum(lengths[part])
        first += count
    # The head's input of a text is the mean, too: the head of the mean is the mean of the logits.
    vectors = read_vectors(model, rows, device, np.array([3, 0])).head_inputs
    layer = last_linear(model.module)
    with torch.no_grad():
        logits = layer(torch.from_numpy(vectors).float()).numpy()
    np.testing.assert_allclose(
        logits, predict_logits(model, rows, device)[[3, 0]], rtol=1e-4, atol=1e-5
    )


def test_each_window_imitates_its_teacher_and_the_text_has_the_label(
    model: TextModel, rows: Encoded
) -> None:
    seeded = torch.Generator().manual_seed(11)
    teacher = 2 * torch.randn(len(rows.input_ids), 2, generator=seeded)
    chosen = np.array([1, 0, 3])
    batch = Batch.of(model, rows, chosen, teacher, torch.device("cpu"))
    losses = distillation(cpu(), settings(alpha=0.0, hard_label_weight=1.0))(model, batch, 1.0)
    windows_of = [rows.windows_of(chosen[place : place + 1]) for place in range(3)]
    with torch.no_grad():
        logits = predict_windows(model, rows, torch.device("cpu"))
        distances, answers = [], []
        for indices in windows_of:
            weights = torch.tensor([float(len(rows.input_ids[index])) for index in indices])
            weights /= weights.sum()
            target, student = teacher[indices].softmax(-1), logits[indices].log_softmax(-1)
            each = (target * (target.log() - student)).sum(dim=-1)
            distances.append((weights * each).sum())
            answers.append((weights[:, None] * logits[indices]).sum(dim=0))
        hard = torch.nn.functional.cross_entropy(
            torch.stack(answers), torch.from_numpy(LABELS[chosen])
        )
    assert losses.terms["kd"] == pytest.approx(float(torch.stack(distances).mean()), rel=1e-4)
    assert losses.terms["supervised"] == pytest.approx(float(hard), rel=1e-4)
    # Control: windows of equal weight are another loss.
    equal = soft_targets(
        "single_label", logits[np.concatenate(windows_of)], batch.teacher_logits, 1
    )
    assert abs(losses.terms["kd"] - float(equal)) > 1e-3


@pytest.mark.parametrize("task", ["single_label", "multi_label", "regression"])
def test_an_update_in_parts_is_the_update_in_one(task: Task) -> None:
    texts = [(TEXTS[0],), (" ".join(TEXTS[:4]),), (" ".join(TEXTS[3:]),), (TEXTS[2],)]
    changes = {
        "alpha": 1.0,
        "hard_label_weight": 1.0,
        "radius": 0.01,
        "step_size": 0.01,
        "norm": "l2",
        "intermediate": {"value_relations": 0.5, "hidden_states": 0.5},
    }
    found = []
    for parts in (1, 4):
        model = tiny_bert(task=task)
        labels = split(task).labels[:4]
        encoded = encode(Split.of(texts, labels), model.tokenizer, TRAINED)
        outputs = len(model.labels)
        teacher = torch.randn(
            len(encoded.input_ids), outputs, generator=torch.Generator().manual_seed(2)
        )
        recipe = settings(**changes)
        terms = comparison(tiny_bert(seed=5, task=task), model, recipe.intermediate)
        objective = distillation(cpu(), recipe, terms)
        losses = _accumulate(model, encoded, teacher, objective, np.arange(4), parts, cpu())
        found.append((losses.loss, gradients(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-6)


def test_a_pass_reads_no_more_windows_than_a_batch_has_texts(rows: Encoded) -> None:
    counts = [len(rows.windows_of(np.array([row]))) for row in range(len(rows))]
    assert max(counts) > 3
    for most in range(1, sum(counts) + 1):
        batches = rows.batches(np.arange(len(rows)), most)
        assert np.array_equal(np.concatenate(batches), np.arange(len(rows)))
        assert all(len(rows.windows_of(rows_)) <= most or len(rows_) == 1 for rows_ in batches)
        for first, second in itertools.pairwise(batches):  # none is smaller than it has to be
            assert len(rows.windows_of(np.append(first, second[0]))) > most
    assert rows.batches(np.arange(0), 3) == []
    short = encode(split(), tiny_bert().tokenizer, TextLength(32))
    assert [len(batch) for batch in short.batches(np.arange(8), 5)] == [5, 3]


def test_an_update_reads_few_windows_at_once(model: TextModel, rows: Encoded) -> None:
    read = []
    hook = model.module.register_forward_pre_hook(
        lambda _, __, inputs: read.append(len(inputs["input_ids"])), with_kwargs=True
    )
    teacher = torch.zeros(len(rows.input_ids), len(model.labels))
    objective = distillation(cpu(), settings())
    _accumulate(model, rows, teacher, objective, np.arange(5), 1, cpu())
    hook.remove()
    counts = [len(rows.windows_of(np.array([row]))) for row in range(5)]
    assert sum(read) == 2 * sum(counts) > 10  # the clean and the adversarial pass
    assert max(read) == max(5, *counts)


def test_short_texts_are_trained_on_alike_whether_or_not_there_may_be_windows(
    model: TextModel,
) -> None:
    device = torch.device("cpu")
    found = []
    for length in (TextLength(32), TextLength(32, "windows", 4, 8)):
        model.module.zero_grad()
        encoded = encode(split(), model.tokenizer, length)
        batch = Batch.of(model, encoded, np.arange(8), teacher_logits(), device)
        objective = distillation(cpu(), settings(alpha=1.0, radius=0.01, hard_label_weight=1.0))
        losses = objective(model, batch, 1.0)
        found.append((losses.loss, gradients(model)))
        assert np.array_equal(
            predict_logits(model, encoded, device), predict_windows(model, encoded, device)
        )
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-7)


def test_other_windows_than_the_teachers_are_found_in_any_row(tmp_path: Path) -> None:
    """The tokenizers differ in capitals alone, and one text of 301 has some."""
    for name in ("teacher", "student"):
        families.save("bert", tmp_path / name)
    settings = json.loads((tmp_path / "student" / "tokenizer.json").read_text())
    settings["normalizer"]["lowercase"] = False
    (tmp_path / "student" / "tokenizer.json").write_text(json.dumps(settings))
    config = json.loads((tmp_path / "student" / "tokenizer_config.json").read_text())
    config |= {"do_lower_case": False}
    (tmp_path / "student" / "tokenizer_config.json").write_text(json.dumps(config))
    recipe = load_recipe(
        "smoke",
        [
            *(f"{name}.model={tmp_path / name}" for name in ("teacher", "student")),
            *("teacher.finetune=null", "student.layers=null", "data.long_texts=windows"),
            *("data.max_length_tokens=16", "bench.lengths_tokens=null", "compute.threads=1"),
        ],
    )
    plain = [(TEXTS[row % len(TEXTS)],) for row in range(300)]
    for last in ("never dull", "NEVER DULL"):
        rows = Split.of([*plain, (last,)], np.arange(301) % 2)
        nothing = rows.take(np.arange(0))
        short = rows.take(np.arange(100))
        for data in (
            Data("single_label", models.LABELS, rows, short, short, nothing),
            Data("single_label", models.LABELS, short, rows, short, nothing),
            Data("single_label", models.LABELS, short, short, short, rows),
        ):
            if last == "never dull":
                # The tokenizers are two, and no text shows it.
                teacher, student = opening.open_models(recipe, data)
                assert teacher
                assert not tokenising.equal_tokenizers(teacher.tokenizer, student.tokenizer)
                continue
            with pytest.raises(ModelError, match="the student has a tokenizer of its own"):
                opening.open_models(recipe, data)
