"""Questions to a language model, what its replies mean, and the journal of both."""

from __future__ import annotations

import asyncio
import json
import math
from typing import TYPE_CHECKING, Any

import datasets
import httpx2
import numpy as np
import openai
import pytest

from ad2kit.asking.agreement import agreements
from ad2kit.asking.endpoint import Pace, _check_address, _retry_after
from ad2kit.asking.journal import Journal
from ad2kit.asking.prompts import Prompt, Question, Reply, parsed
from ad2kit.asking.records import Agreement, Answer, AskJob, Usage
from ad2kit.asking.requests import Asker, Costs
from ad2kit.run.ask_section import AskRecipe, wrong_ask
from ad2kit.run.errors import RecipeError, RunError, UserError
from ad2kit.run.recipe import load_recipe
from ad2kit.run.sections import DataRecipe
from ad2kit.scoring.output import OutputFolder
from ad2kit.scoring.parts import BlockWorker, open_tables
from ad2kit.scoring.records import InputFile

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

ASK = {"prompt": "Which?\n{labels}", "text": "{text}"}
DATA = {
    "source": "embedded://opinions",
    "text_columns": ["text"],
    "label_column": "label",
    "max_length_tokens": 64,
    "labels": ["a", "ab", "abc"],
}


def section(**changes: Any) -> AskRecipe:
    return AskRecipe.model_validate_json(json.dumps(ASK | changes))


def data(**changes: Any) -> DataRecipe:
    return DataRecipe.model_validate_json(json.dumps(DATA | changes))


def reply(tokens: dict[str, float], **message: Any) -> bytes:
    top = [{"token": token, "logprob": math.log(share)} for token, share in tokens.items()]
    choice = {
        "message": {"content": "A", **message},
        "logprobs": {"content": [{"top_logprobs": top}]},
    }
    return json.dumps({"model": "m", "choices": [choice]}).encode()


@pytest.mark.parametrize(
    ("ask", "changes", "reason"),
    [
        ({}, {"labels": None}, "set data.labels"),
        ({}, {"labels": None, "task": "regression"}, "data.task is regression"),
        ({}, {"labels": [f"l{n}" for n in range(21)]}, "at most 20 log-probabilities"),
        ({"descriptions": {"d": "x"}}, {}, "'d' is none of data.labels"),
        ({"examples": [{"texts": ["x"], "label": "d"}]}, {}, "'d' is none of data.labels"),
        ({"examples": [{"texts": ["x", "y"], "label": "a"}]}, {}, "expected 1 texts"),
        ({"prompt": "Which?"}, {}, "prompt: expected {labels} in it"),
        ({"text": "{sentence}"}, {}, "text: expected {text} in it"),
        ({"text": "{text}"}, {"text_columns": ["text", "b"]}, "text: expected {b} in it"),
        ({"extra": {"n": 3}}, {}, "ad2kit sets 'n' itself"),
        ({}, {"task": "multi_label"}, "prompt: expected {label} in it"),
    ],
)
def test_a_section_that_does_not_fit_the_data(
    ask: dict[str, Any], changes: dict[str, Any], reason: str
) -> None:
    assert reason in wrong_ask(section(**ask), data(**changes))


def test_a_section_that_fits_and_one_that_every_command_refuses() -> None:
    assert wrong_ask(section(), data()) == ""
    labels = [f"l{n}" for n in range(21)]
    assert wrong_ask(section(answer="samples"), data(labels=labels)) == ""
    with pytest.raises(RecipeError, match="ask: it needs the names of the labels"):
        load_recipe("smoke", ["ask.prompt='{labels}'", "ask.text='{text}'"])


def answer_to(prompt: Prompt, content: bytes) -> Answer:
    """What a prompt takes from the reply of a server."""
    found = parsed(content)
    assert isinstance(found, Reply)
    return prompt.answer(found)


def test_the_distribution_is_that_of_the_letters() -> None:
    prompt = Prompt(section(), data())
    reply_of_letters = {"A": 0.4, " A": 0.1, "C": 0.2, "The": 0.2, "AB": 0.05, "a": 0.05}
    answer = answer_to(prompt, reply(reply_of_letters))
    assert answer.probabilities == pytest.approx({"a": 5 / 7, "abc": 2 / 7})
    assert answer.mass == pytest.approx(0.7)
    outside = answer_to(prompt, reply({"The": 0.6, "A": 0.4}))
    assert not outside.probabilities
    assert "first token 'The', 0.40 of the probability" in outside.reason


def test_another_seed_is_another_order_and_the_text_comes_last() -> None:
    first, other = Prompt(section(), data()), Prompt(section(seed=1), data())
    bodies = [p.request(Question(("x {labels}",)), 2) for p in (first, other)]
    assert bodies[0]["messages"][0]["content"].startswith("Which?\nA. a\nB. ab\nC. abc\n\n")
    assert set(other.choices) == set(first.choices)
    assert other.choices != first.choices
    assert [body["messages"][-1]["content"] for body in bodies] == ["x {labels}"] * 2
    assert [body["seed"] for body in bodies] == [2, 1002]
    assert first.fingerprint != other.fingerprint
    assert first.fingerprint == Prompt(section(input_price=3.0), data()).fingerprint


@pytest.mark.parametrize(
    ("content", "label"),
    [
        ('{"label": "ab"}', "ab"),
        (' {"label": "abc", "why": 1}', "abc"),
        ('{"label": "AB"}', None),
        ('{"label": ["ab"]}', None),
        ('"ab"', None),
        ("ab", None),
        (None, None),
    ],
)
def test_a_structured_output_is_one_of_the_labels_or_outside(
    content: str | None, label: str | None
) -> None:
    prompt = Prompt(section(answer="label"), data())
    answer = answer_to(prompt, reply({"A": 1.0}, content=content))
    assert answer.probabilities == ({label: 1.0} if label else {})
    assert bool(answer.reason) == (label is None)


NO_CHOICE = b'{"model": "m", "choices": []}'


@pytest.mark.parametrize("content", [b"", b"{}", NO_CHOICE, reply({"A": 1})[:50]])
def test_half_a_reply_is_none(content: bytes) -> None:
    assert parsed(content) is None


def test_a_journal_keeps_what_was_sent_and_how_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    answer = Answer(probabilities={"a": 1.0})
    with journal.writing():
        for name in ("x", "y", "z"):
            journal.sent(name)
        journal.failed("x", "429")
        journal.sent("x")
        journal.got("x", answer, Usage(prompt_tokens=7, completion_tokens=2), "m")
        journal.got("z", Answer(reason="refused"), Usage(prompt_tokens=1), "m")
    with path.open("ab") as file:
        file.write(b'{"got": "y", "answ')
    again = Journal(path)
    assert again.answers == journal.answers == {"x": answer, "z": Answer(reason="refused")}
    assert (again.lost, dict(again.failures), again.model) == (1, {"429": 1}, "m")
    assert again.tokens == Usage(prompt_tokens=8, completion_tokens=2)
    with again.writing():
        again.sent("y")
        again.got("y", answer, Usage(), "m")
    assert Journal(path).lost == 1  # the first try of y has no end, and stays counted
    assert path.read_bytes().count(b"\n") == 9
    path.write_bytes(b"[]\n" + path.read_bytes())
    with pytest.raises(RunError, match="line 1: expected an event"):
        Journal(path)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7.0),
        ({"retry-after": "7", "retry-after-ms": "1500"}, 1.5),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
    ],
)
def test_how_long_the_server_asks_to_wait(headers: dict[str, str], seconds: float | None) -> None:
    response = httpx2.Response(429, headers=headers, request=httpx2.Request("POST", "http://x"))
    error = openai.RateLimitError("slow down", response=response, body=None)
    assert _retry_after(error) == seconds


@pytest.mark.parametrize(
    ("pace", "tokens", "starts"),
    [
        (Pace(None, None), 1e6, [100.0, 100.0, 100.0]),
        (Pace(120, None), 9.0, [100.0, 100.5, 101.0]),
        (Pace(None, 6000), 50.0, [100.0, 100.5, 101.0]),
        (Pace(120, 6000), 100.0, [100.0, 101.0, 102.0]),
    ],
)
def test_requests_keep_the_limits_of_a_minute(
    pace: Pace, tokens: float, starts: list[float]
) -> None:
    assert [pace.start(100.0, tokens) for _ in starts] == starts
    assert pace.start(1000.0, tokens) == 1000.0  # nothing is saved up, and nothing is owed


class Said(BlockWorker):
    """Answers every row with the label that its text begins with."""

    def answers(self, texts: Sequence[Any], _refuse: Any) -> dict[str, Any]:
        return {"teacher_label": np.array([row[0].split()[0] for row in texts], dtype=str)}


def agreement_of(source: Path, folder: Path, recipe: DataRecipe) -> list[Agreement]:
    """Write the parts of a job without asking, and compare them with the labels of its table."""
    output = OutputFolder(str(folder))
    tables = open_tables(
        str(source), output, ("text",), "doubled", ("teacher_label",), recipe.labels or (), 4096
    )
    worker = Said(output.url, tables.layout)
    for number, block in tables.blocks:
        worker(number, block)
    job = AskJob(
        text_columns=("text",),
        prefix="teacher_",
        block_rows=4096,
        inputs=tables.files,
        base_url="http://127.0.0.1/v1",
        model="m",
        ask={},
        labels=recipe.labels or (),
        task=recipe.task,
    )
    return list(agreements(recipe, job, tables, folder, None))


@pytest.mark.parametrize("source", ["classes", "labels.txt"])
def test_ids_are_compared_by_the_names_of_their_table(tmp_path: Path, source: str) -> None:
    names = ["abc", "a", "ab"]  # the recipe has another order
    texts = [f"{names[n % 3]} text {n}" for n in range(9)]
    columns: dict[str, Any] = {"text": texts, "label": [n % 3 for n in range(9)]}
    if source == "classes":
        path = tmp_path / "in.parquet"
        kind = datasets.ClassLabel(names=names)
        features = datasets.Features(text=datasets.Value("string"), label=kind)
        datasets.Dataset.from_dict(columns, features).to_parquet(path)
    else:
        path = tmp_path / "in.jsonl"
        lines = zip(columns["text"], columns["label"], strict=True)
        path.write_text("".join(json.dumps({"text": t, "label": n}) + "\n" for t, n in lines))
        (tmp_path / "labels.txt").write_text("".join(f"{n}\t{x}\n" for n, x in enumerate(names)))
    (found,) = agreement_of(path, tmp_path / "out", data())
    assert (found.rows, found.equal, found.left_out) == (9, 9, 0)


def json_lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_without_a_label_are_not_compared(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "a 1"},
        {"text": "a 2", "label": "a"},
        {"text": "ab 3", "label": " "},
    ]
    for number, order in enumerate((rows, rows[::-1])):
        source = json_lines(tmp_path / f"{number}.jsonl", *order)
        (found,) = agreement_of(source, tmp_path / f"out{number}", data())
        assert (found.rows, found.equal, found.left_out) == (1, 1, 0)
    source = json_lines(tmp_path / "none.jsonl", rows[0])
    assert agreement_of(source, tmp_path / "out", data()) == []


@pytest.mark.parametrize("missing", ["refuse", "accept"])
def test_a_row_whose_label_columns_are_all_empty_has_no_label(tmp_path: Path, missing: str) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "a 1", "teacher_labels": ["a"], "a": 1, "b": 0},
        {"text": "a 2", "teacher_labels": ["a"], "a": None, "b": ""},
        {"text": "a 3", "teacher_labels": ["a"]},
    ]
    output = tmp_path / "out"
    output.mkdir()
    json_lines(output / "part-00000000.jsonl", *rows)
    recipe = data(
        task="multi_label", labels=["a", "b"], label_column=["a", "b"], missing_labels=missing
    )
    tables = open_tables(
        str(json_lines(tmp_path / "in.jsonl", *({"text": row["text"]} for row in rows))),
        OutputFolder(str(output)),
        *(("text",), "doubled", ("teacher_labels",), ("a", "b"), 4096),
    )
    job = AskJob.model_construct(
        text_columns=("text",), csv_quotes="doubled", prefix="teacher_", task="multi_label"
    )
    (found,) = agreements(recipe, job, tables, output, None)
    assert (found.rows, found.equal, found.left_out) == (1, 1, 0)


class Server:
    """An endpoint that answers each request with the same letter, after all that wait with it."""

    base_url = "http://127.0.0.1/v1"

    def __init__(self, token: str) -> None:
        self.token = token
        self.sent = 0

    async def __aenter__(self) -> Server:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    async def reply(self, *_: Any, on_try: Any, **__: Any) -> Any:
        self.sent += 1
        on_try()
        await asyncio.sleep(0.001)
        content = json.loads(reply({self.token: 0.99}))
        usage = {"prompt_tokens": 1000, "completion_tokens": 0}
        return parsed(json.dumps(content | {"usage": usage}).encode())


def ask_all(server: Server, path: Path, texts: int, max_cost: float | None = None) -> Journal:
    """Ask about texts, fifty at once; a request is a thousand tokens of a price of 1 for each."""
    ask = section(input_price=1e6, output_price=1e6, prompt="x" * 3980 + "{labels}")
    journal, prompt = Journal(path), Prompt(ask, data())
    costs = Costs(ask)
    costs.prompt_tokens_of = lambda _: 1000.0  # type: ignore[method-assign, assignment]
    costs.completion_tokens = 0.0
    asker = Asker(server, prompt, journal, costs, max_cost, lambda _: None)  # type: ignore[arg-type]
    with journal.writing():
        asyncio.run(asker.ask([(f"text {n}",) for n in range(texts)], 50))
    return journal


def test_no_more_than_the_first_answers_are_paid_for_if_none_is_a_label(tmp_path: Path) -> None:
    server = Server("Q")
    for _ in range(2):  # the same command again pays for none
        with pytest.raises(UserError, match="none of the first 20 answers"):
            ask_all(server, tmp_path / "journal", 100)
        assert server.sent == 20
    good = Server("A")
    assert len(ask_all(good, tmp_path / "other", 100).answers) == good.sent == 100


def test_a_request_in_flight_is_counted_once_in_the_cost(tmp_path: Path) -> None:
    assert len(ask_all(Server("A"), tmp_path / "journal", 100, max_cost=10_500.0).answers) == 10
    # A request that a killed command has lost is counted still.
    with Journal(tmp_path / "lost").writing():
        (tmp_path / "lost").write_text('{"sent": "x"}\n')
    assert len(ask_all(Server("A"), tmp_path / "lost", 100, max_cost=10_500.0).answers) == 9


def test_requests_that_are_written_otherwise_are_those_of_another_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def job(**changes: Any) -> AskJob:
        values = {
            "text_columns": ("text",),
            "prefix": "teacher_",
            "block_rows": 4096,
            "inputs": (),
            "base_url": "http://127.0.0.1/v1",
            "model": "m",
            "ask": Prompt(section(), data()).settings,
            "labels": ("a", "ab", "abc"),
            "task": "single_label",
            "prompt_fingerprint": Prompt(section(), data()).fingerprint,
        }
        return AskJob.model_validate(values | changes)

    now = job()
    table = InputFile(url="other.csv", size_bytes=1, version="1")
    assert now.differences(job(inputs=(table,))) == []
    (older,) = now.differences(job(prompt_fingerprint=""))
    assert "is not known: it has no fingerprint; the version of ad2kit that made it" in older
    with monkeypatch.context() as patch:
        patch.setattr(Prompt, "_described", lambda _, label: f"<{label}>")
        (other,) = now.differences(job())
    assert "written otherwise into the requests" in other
    (model,) = now.differences(job(model="n", prompt_fingerprint=""))
    assert model == "model: n there, m now"


@pytest.mark.parametrize(
    "url",
    [
        "http//me:word@proxy:1",
        "me:w@rd@proxy:1",
        "ftp://me:word@proxy",
        "http://me:word@proxy:8o",
    ],
)
def test_a_mistyped_address_keeps_its_password(url: str) -> None:
    with pytest.raises(
        UserError, match=r"--proxy: expected an address .*\[user\]@proxy"
    ) as refused:
        _check_address("--proxy", url)
    assert not any(part in refused.value.message for part in ("me:", "word", "w@rd"))
