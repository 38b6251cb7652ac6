"""Asking a language model as a user meets it: a real server of the protocol on this machine.

The server answers by a classifier of words, and counts what it is asked.
"""

from __future__ import annotations

import csv
import json
import math
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pytest
import yaml
from pyarrow import parquet

from ad2kit.data import demo_reviews
from ad2kit.run.recipe import recipes_folder
from bench.language_model import LanguageModel, served

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

LABELS = ("negative", "positive")
PROMPT = "Is the review negative or positive?\n{labels}"
KEY = "sk-none-of-the-files-holds-this"


def of_words(text: str) -> dict[str, float]:
    """A classifier of words: the log-probability of each label."""
    bad = sum(word in text for word in ("not", "hated", "dull", "never", "worst", "n't"))
    share = 1 / (1 + math.exp(1.2 * bad - 1 + len(text) % 7 / 10))
    return {"negative": math.log(1 - share), "positive": math.log(share)}


@pytest.fixture
def model() -> LanguageModel:
    return LanguageModel(of_words)


@pytest.fixture
def url(model: LanguageModel) -> Iterator[str]:
    with served(model) as address:
        yield address


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """The smoke recipe with a section that asks for log-probabilities."""
    return write_recipe(tmp_path, {"prompt": PROMPT, "text": "{text}"})


def write_recipe(folder: Path, ask: Mapping[str, Any], **data: Any) -> Path:
    plain = yaml.safe_load((recipes_folder() / "smoke.yaml").read_text())
    plain["data"] |= {"labels": list(LABELS), **data}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(plain | {"ask": dict(ask)}))
    return path


def reviews(rows: int) -> list[str]:
    return [text for text, _ in demo_reviews.opinions(seed=11).train[:rows]]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_csv(folder: Path) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    for part in sorted(folder.glob("part-*.csv")):
        with part.open(newline="", encoding="utf-8") as file:
            rows += csv.DictReader(file)
    return rows


def parts(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("part-*")}


def at(url: str) -> tuple[str, ...]:
    return ("--base-url", url, "--model", "tiny")


def test_a_row_gets_the_distribution_of_the_model(
    ad2kit: Any, model: LanguageModel, url: str, recipe: Path, tmp_path: Path
) -> None:
    texts = [*reviews(20), 'a "quoted", text', reviews(1)[0]]
    rows = [{"id": str(n), "text": text} for n, text in enumerate(texts)]
    source = write_csv(tmp_path / "in.csv", rows)
    outcome = ad2kit("ask", recipe, source, tmp_path / "out", *at(url))
    assert outcome.code == 0, outcome.err
    assert "22 of 22 rows have an answer of tiny" in outcome.out
    found = read_csv(tmp_path / "out")
    assert [{"id": row["id"], "text": row["text"]} for row in found] == rows
    for row in found:
        shares = {name: math.exp(log) for name, log in of_words(row["text"]).items()}
        assert json.loads(row["teacher_probabilities"]) == pytest.approx(shares)
        assert row["teacher_label"] == max(shares, key=shares.__getitem__)
        assert float(row["teacher_confidence"]) == pytest.approx(max(shares.values()))
    assert model.asked.total() == len(model.asked) == 21  # the equal text once
    report = json.loads((tmp_path / "out/_asked.json").read_text())
    assert (report["requests"], report["outside"], report["lost"]) == (21, 0, 0)
    assert report["mean_mass"] == pytest.approx(0.98)
    assert report["completion_tokens"] == 21
    assert report["first_answer"] <= report["last_answer"]
    # The same command again asks nothing and changes nothing.
    before = parts(tmp_path / "out")
    assert ad2kit("ask", recipe, source, tmp_path / "out", *at(url)).code == 0
    assert (parts(tmp_path / "out"), model.asked.total()) == (before, 21)


def test_every_format_holds_the_same_answers(
    ad2kit: Any, url: str, recipe: Path, tmp_path: Path
) -> None:
    texts = reviews(6)
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    parquet.write_table(pa.table({"text": texts}), tmp_path / "in.parquet")
    (tmp_path / "in.tsv").write_text("text\n" + "".join(f"{text}\n" for text in texts))
    for ending in ("jsonl", "parquet", "tsv"):
        outcome = ad2kit("ask", recipe, tmp_path / f"in.{ending}", tmp_path / ending, *at(url))
        assert outcome.code == 0, outcome.err
    lines = (tmp_path / "jsonl/part-00000000.jsonl").read_text().splitlines()
    objects = [json.loads(line)["teacher_probabilities"] for line in lines]
    assert [sum(each.values()) for each in objects] == pytest.approx([1.0] * 6)
    table = parquet.read_table(tmp_path / "parquet/part-00000000.parquet").to_pylist()
    assert [json.loads(row["teacher_probabilities"]) for row in table] == objects
    tsv = (tmp_path / "tsv/part-00000000.tsv").read_text().splitlines()[1:]
    assert [json.loads(line.split("\t")[1]) for line in tsv] == objects


def kill(arguments: list[str], journal: Path, answers: int) -> None:
    """Start a job, and kill it once the journal holds so many answers."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            if journal.is_file() and journal.read_bytes().count(b'{"got"') >= answers:
                break
            time.sleep(0.005)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL, "it had ended already"


def test_killed_three_times_each_text_and_draw_is_asked_once(
    ad2kit: Any, model: LanguageModel, url: str, tmp_path: Path
) -> None:
    ask = {"prompt": PROMPT, "text": "{text}", "answer": "samples", "samples": 2}
    recipe = write_recipe(tmp_path, ask)
    texts = reviews(300)
    rows = [{"text": text} for text in [*texts, *texts[:50]]]
    source = write_csv(tmp_path / "in.csv", rows)
    model.delay_s = 0.01
    model.fault = lambda number, _: "500" if number % 97 == 5 else ""
    output, journal = tmp_path / "out", tmp_path / "out/_answers.jsonl"
    arguments = ["ask", str(recipe), str(source), str(output), *at(url), "--concurrency", "8"]
    command = [sys.executable, "-m", "ad2kit", *arguments]
    for answers in (60, 200, 410):
        kill(command, journal, answers)
        with journal.open("ab") as file:
            file.write(b'{"got": "half')  # as after a full disk
    assert not parts(output)
    outcome = ad2kit(*arguments, "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert (report["rows"], report["answered_rows"], report["requests"]) == (350, 350, 600)
    assert len(model.asked) == 600
    # A process can be killed between its note of a request and the request, so fewer may arrive.
    repeated = model.asked.total() - 600 - report["failures"]["500"]
    assert 0 <= repeated <= report["lost"] <= 3 * 8
    assert all(count for count in model.answered.values())
    model.fault = lambda _number, _body: ""
    straight = tmp_path / "straight"
    assert ad2kit("ask", recipe, source, straight, *at(url)).code == 0
    assert parts(output) == parts(straight)
    shares = [json.loads(row["teacher_probabilities"])["positive"] for row in read_csv(output)]
    assert {0.0, 0.5, 1.0} == set(shares)


def test_a_label_alone_and_a_label_that_begins_another(ad2kit: Any, tmp_path: Path) -> None:
    names = ("refund", "refund status", "1")

    def logs(text: str) -> dict[str, float]:
        return {name: 0.0 if name == text else -30.0 for name in names}

    ask = {"prompt": "What is it about?\n{labels}", "text": "{text}", "temperature": 0.0}
    source = write_csv(tmp_path / "in.csv", [{"text": name} for name in names])
    with served(LanguageModel(logs)) as url:
        for answer in ("label", "logprobs", "samples"):
            recipe = write_recipe(tmp_path, {**ask, "answer": answer}, labels=list(names))
            outcome = ad2kit("ask", recipe, source, tmp_path / answer, *at(url))
            assert outcome.code == 0, outcome.err
            found = read_csv(tmp_path / answer)
            assert [row["teacher_label"] for row in found] == list(names)
            assert ("teacher_confidence" in found[0]) == (answer != "label")


def test_each_of_several_labels_is_a_question_of_its_own(ad2kit: Any, tmp_path: Path) -> None:
    ask = {
        "prompt": "Is the review about <{label}>?",
        "text": "{text}",
        "descriptions": {"price": "what it costs"},
    }
    recipe = write_recipe(tmp_path, ask, task="multi_label", labels=["price", "taste"])
    texts = ("the price is high", "price and taste", "a long wait")
    source = write_csv(tmp_path / "in.csv", [{"text": text} for text in texts])
    model = LanguageModel(
        lambda text: {name: math.log(0.9 if name in text else 0.2) for name in ("price", "taste")}
    )
    with served(model) as url:
        outcome = ad2kit("ask", recipe, source, tmp_path / "out", *at(url))
    assert outcome.code == 0, outcome.err
    found = read_csv(tmp_path / "out")
    labels = [json.loads(row["teacher_labels"]) for row in found]
    assert labels == [["price"], ["price", "taste"], []]
    shares = json.loads(found[0]["teacher_probabilities"])
    assert shares == pytest.approx({"price": 0.9, "taste": 0.2})
    assert len(model.bodies) == 6
    system = {body["messages"][0]["content"] for body in model.bodies}
    assert "Is the review about <price: what it costs>?\n\nA. yes\nB. no" in min(system)


def test_the_texts_of_a_pair_and_examples(ad2kit: Any, tmp_path: Path) -> None:
    ask = {
        "prompt": "Does the second text follow?\n{labels}",
        "text": "First: {a}\nSecond: {b}",
        "examples": [{"texts": ["{b}", "x"], "label": "positive"}],
    }
    recipe = write_recipe(tmp_path, ask, text_columns=["a", "b"])
    rows = [{"a": "{b} {labels}", "b": "never"}, {"a": "so", "b": "never"}, {"a": "", "b": "x"}]
    source = write_csv(tmp_path / "in.csv", rows)
    model = LanguageModel(of_words)
    with served(model) as url:
        outcome = ad2kit("ask", recipe, source, tmp_path / "out", *at(url))
    assert (outcome.code, "1 of 3 rows got no answer" in outcome.err) == (2, True)
    messages = [[m["content"] for m in body["messages"][1:]] for body in model.bodies]
    assert sorted(messages) == [
        ["First: {b}\nSecond: x", "B", "First: so\nSecond: never"],
        ["First: {b}\nSecond: x", "B", "First: {b} {labels}\nSecond: never"],
    ]
    errors = (tmp_path / "out/_errors/part-00000000.jsonl").read_text()
    assert json.loads(errors)["row"] == 3


def test_what_a_model_says_outside_of_the_labels_is_listed(
    ad2kit: Any, model: LanguageModel, url: str, recipe: Path, tmp_path: Path
) -> None:
    """Nothing is guessed; the same command does not ask again, and the list stays."""
    faults = {1: "tokens", 2: "refusal", 3: "filter", 4: "400"}
    model.fault = lambda number, _: faults.get(number, "")
    source = write_csv(tmp_path / "in.csv", [{"text": text} for text in reviews(12)])
    for _ in range(2):
        outcome = ad2kit("ask", recipe, source, tmp_path / "out", *at(url), "--concurrency", "1")
        assert outcome.code == 2
        assert "4 of 12 rows got no answer" in outcome.err
        assert "1 outside of the labels, 3 refused" in outcome.out
        lines = (tmp_path / "out/_errors/part-00000000.jsonl").read_text().splitlines()
        reasons = sorted(json.loads(line)["reason"] for line in lines)
        assert [reason[:40] for reason in reasons] == [
            "the model answered outside of the labels",
            "the model refused: 'I cannot help with t",
            "the model refused: 'content filter'",
            "the model refused: 400: Error code: 400 ",
        ]
        assert len(read_csv(tmp_path / "out")) == 8
        assert model.asked.total() == 12
    model.fault = lambda _number, _body: "outside"
    ask = {"prompt": PROMPT, "text": "{text}", "answer": "label"}
    recipe = write_recipe(tmp_path, ask)
    source = write_csv(tmp_path / "more.csv", [{"text": text} for text in reviews(40)])
    outcome = ad2kit("ask", recipe, source, tmp_path / "none", *at(url), "--concurrency", "1")
    assert outcome.code == 2
    assert "none of the first 20 answers is one of the labels" in outcome.err
    assert "rather talk about something else" in outcome.err
    assert model.asked.total() == 32


@pytest.mark.parametrize("fault", ["429", "500", "503", "408", "half"])
def test_what_passes_is_tried_again_and_counted(
    fault: str, ad2kit: Any, model: LanguageModel, url: str, recipe: Path, tmp_path: Path
) -> None:
    model.fault = lambda number, _: fault if number in (0, 3) else ""
    source = write_csv(tmp_path / "in.csv", [{"text": text} for text in reviews(8)])
    outcome = ad2kit("ask", recipe, source, tmp_path / "out", *at(url), "--json")
    assert outcome.code == 0, outcome.err
    name = "half a reply" if fault == "half" else fault
    assert json.loads(outcome.out)["failures"] == {name: 2}
    assert model.asked.total() == 10


def test_a_request_that_takes_too_long_is_tried_again(
    ad2kit: Any, model: LanguageModel, url: str, recipe: Path, tmp_path: Path
) -> None:
    model.fault = lambda number, _: {1: "hang", 2: "drip"}.get(number, "")
    source = write_csv(tmp_path / "in.csv", [{"text": text} for text in reviews(6)])
    arguments = ("ask", recipe, source, tmp_path / "out", *at(url), "--timeout-s", "0.5", "--json")
    outcome = ad2kit(*arguments)
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["failures"] == {"timeout": 2}


def test_a_server_that_gives_up_is_not_asked_for_ever(
    ad2kit: Any, model: LanguageModel, url: str, recipe: Path, tmp_path: Path
) -> None:
    """One text that the server cannot answer is listed; a server that answers nothing stops it."""
    texts = reviews(30)
    model.fault = lambda _, body: "500" if body["messages"][-1]["content"] == texts[7] else ""
    source = write_csv(tmp_path / "in.csv", [{"text": text} for text in texts])
    arguments = ("ask", recipe, source, tmp_path / "out", *at(url))
    outcome = ad2kit(*arguments)
    assert outcome.code == 2
    (line,) = (tmp_path / "out/_errors/part-00000000.jsonl").read_text().splitlines()
    assert json.loads(line)["row"] == 8
    assert "no answer in 6 tries, at last: Error code: 500" in json.loads(line)["reason"]
    model.fault = lambda _number, _body: ""
    assert ad2kit(*arguments).code == 0  # asked again
    assert not (tmp_path / "out/_errors").exists()
    model.fault = lambda number, _: "503" if number > 45 else ""
    more = write_csv(tmp_path / "more.csv", [{"text": text} for text in reviews(80)])
    outcome = ad2kit("ask", recipe, more, tmp_path / "other", *at(url))
    assert outcome.code == 2
    assert "gave no answer to 5 requests in a row" in outcome.err
    model.fault = lambda _number, _body: ""
    assert ad2kit("ask", recipe, more, tmp_path / "other", *at(url)).code == 0


@pytest.mark.parametrize(
    ("fault", "message", "hint"),
    [
        ("401", "refuses the key: Error code: 401", "AD2KIT_ASK_KEY, which is not set"),
        ("404", "does not know the path or the model 'tiny'", "correct --base-url"),
        ("302", "does not know the path or the model", "correct --base-url"),
        ("silent", "the server sent none: models that reason give none", "ask.answer=samples"),
    ],
)
def test_what_stays_wrong_stops_at_the_first_request(
    fault: str,
    message: str,
    hint: str,
    ad2kit: Any,
    model: LanguageModel,
    url: str,
    recipe: Path,
    tmp_path: Path,
) -> None:
    model.fault = lambda _number, _body: fault
    source = write_csv(tmp_path / "in.csv", [{"text": text} for text in reviews(20)])
    outcome = ad2kit("ask", recipe, source, tmp_path / "out", *at(url))
    assert outcome.code == 2
    assert message in outcome.err
    assert hint in outcome.err.rpartition("\n  -> ")[2]
    assert model.asked.total() == 1
    model.fault = lambda _number, _body: ""  # mended: the same command works
    assert ad2kit("ask", recipe, source, tmp_path / "out", *at(url)).code == 0


def test_an_endpoint_that_is_not_there(ad2kit: Any, recipe: Path, tmp_path: Path) -> None:
    source = write_csv(tmp_path / "in.csv", [{"text": text} for text in reviews(3)])
    arguments = ("ask", recipe, source, tmp_path / "out")
    outcome = ad2kit(*arguments, *at("http://127.0.0.1:9/v1"))
    assert (outcome.code, "cannot reach http://127.0.0.1:9/v1" in outcome.err) == (2, True)
    outcome = ad2kit(*arguments, *at("http://127.0.0.1:8/v1"), "--proxy", "http://127.0.0.1:9")
    assert (outcome.code, "or give --proxy" in outcome.err) == (2, True)
    with served(LanguageModel(of_words)) as url:  # corrected, as the hint says
        assert ad2kit(*arguments, *at(url)).code == 0
    for wrong in ("127.0.0.1:8000", "ftp://x/v1", "http://me:word@127.0.0.1/v1"):
        outcome = ad2kit(*arguments, *at(wrong))
        assert (outcome.code, "--base-url: expected an address" in outcome.err) == (2, True)
        assert "word" not in outcome.err.replace("password", "")


def test_another_model_is_another_teacher(
    ad2kit: Any, model: LanguageModel, url: str, recipe: Path, tmp_path: Path
) -> None:
    source = write_csv(tmp_path / "in.csv", [{"text": text} for text in reviews(10)])
    arguments = ("ask", recipe, source, tmp_path / "out", "--base-url", url)
    assert ad2kit(*arguments, "--model", "tiny", "--max-rows", "4").code == 0
    model.fault = lambda _number, _body: "model tiny-2"
    outcome = ad2kit(*arguments, "--model", "tiny")
    assert outcome.code == 2
    assert "answers as 'tiny-2' now, and has answered as 'tiny'" in outcome.err
    outcome = ad2kit(*arguments, "--model", "huge")
    assert (outcome.code, "model: tiny there, huge now" in outcome.err) == (2, True)
    changed = ad2kit(*arguments, "--model", "tiny", "ask.prompt=Choose.\n{labels}")
    assert (changed.code, "ask.prompt: Is the review" in changed.err) == (2, True)
    assert model.asked.total() == 5


def test_more_rows_take_the_same_and_more(
    ad2kit: Any, model: LanguageModel, url: str, recipe: Path, tmp_path: Path
) -> None:
    texts = reviews(40)
    source = write_csv(tmp_path / "in.csv", [{"text": text} for text in texts])
    arguments = ("ask", recipe, source, tmp_path / "out", *at(url))
    asked: set[str] = set()
    for rows in (5, 12, 40):
        outcome = ad2kit(*arguments, "--max-rows", rows, "--json")
        assert outcome.code == 0, outcome.err
        report = json.loads(outcome.out)
        assert (report["answered_rows"], report["unasked_rows"]) == (rows, 40 - rows)
        now = {row["text"] for row in read_csv(tmp_path / "out")}
        assert asked < now
        asked = now
    assert model.asked.total() == 40
    assert [row["text"] for row in read_csv(tmp_path / "out")] == texts


def test_other_tables_keep_the_answers_and_leave_no_old_part(
    ad2kit: Any, model: LanguageModel, url: str, recipe: Path, tmp_path: Path
) -> None:
    texts = reviews(20)
    large = write_csv(tmp_path / "large.csv", [{"text": text} for text in texts * 250])
    output = tmp_path / "out"
    assert ad2kit("ask", recipe, large, output, *at(url)).code == 0
    assert len(parts(output)) == 2
    small = tmp_path / "small.jsonl"
    small.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:5]))
    outcome = ad2kit("ask", recipe, small, output, *at(url), "--json")
    assert outcome.code == 0, outcome.err
    assert set(parts(output)) == {"part-00000000.jsonl"}
    assert len(parts(output)["part-00000000.jsonl"].splitlines()) == 5
    assert (json.loads(outcome.out)["rows"], json.loads(outcome.out)["requests_here"]) == (5, 0)
    assert model.asked.total() == 20


def test_a_limit_of_the_cost_is_kept_and_can_be_raised(
    ad2kit: Any, model: LanguageModel, url: str, tmp_path: Path
) -> None:
    ask = {"prompt": PROMPT, "text": "{text}", "input_price": 100.0, "output_price": 400.0}
    recipe = write_recipe(tmp_path, ask)
    source = write_csv(tmp_path / "in.csv", [{"text": text} for text in reviews(60)])
    arguments = ("ask", recipe, source, tmp_path / "out", *at(url), "--json")
    outcome = ad2kit(*arguments, "--max-cost", "0.1")
    assert outcome.code == 0, outcome.err
    first = json.loads(outcome.out)
    assert 0.05 < first["cost"] <= 0.1
    assert first["stopped_by"] == "--max-cost"
    assert 0 < first["answered_rows"] == len(read_csv(tmp_path / "out")) < 60
    second = json.loads(ad2kit(*arguments, "--max-cost", "5").out)
    assert (second["answered_rows"], second["stopped_by"]) == (60, "")
    assert second["cost"] == pytest.approx(
        (second["prompt_tokens"] * 100 + second["completion_tokens"] * 400) / 1e6
    )
    assert model.asked.total() == 60
    outcome = ad2kit(*arguments, "--max-cost", "5", "ask.input_price=0", "ask.output_price=0")
    assert outcome.code == 2
    assert "expected prices above 0 for --max-cost" in outcome.err
    # A price of 0 without a limit is that of one's own server.
    report = json.loads(ad2kit(*arguments, "ask.input_price=0", "ask.output_price=0").out)
    assert report["cost"] == 0


def test_a_dry_run_asks_nothing_and_writes_nothing(
    ad2kit: Any, model: LanguageModel, url: str, tmp_path: Path
) -> None:
    ask = {"prompt": PROMPT, "text": "{text}", "input_price": 100.0, "output_price": 400.0}
    recipe = write_recipe(tmp_path, ask | {"answer": "samples", "samples": 3})
    source = write_csv(tmp_path / "in.csv", [{"text": text} for text in reviews(40)])
    arguments = ("ask", recipe, source, tmp_path / "out", *at(url))
    outcome = ad2kit(*arguments, "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "requests: 120" in outcome.out
    assert "Is the review negative or positive?\n- negative\n- positive" in outcome.out
    estimated = json.loads(ad2kit(*arguments, "--dry-run", "--json").out)
    assert not (tmp_path / "out").exists()
    assert model.asked.total() == 0
    assert estimated["requests"] == 120
    assert 0.1 < estimated["cost"] < 10
    # What all requests share is counted in each: here an example of 400 bytes, of 4 a token.
    example = {"texts": ["x" * 400], "label": "positive"}
    more = write_recipe(tmp_path, ask | {"answer": "samples", "samples": 3, "examples": [example]})
    shared = json.loads(ad2kit("ask", more, *arguments[2:], "--dry-run", "--json").out)
    tokens = (shared["prompt_tokens"] - estimated["prompt_tokens"]) / estimated["requests"]
    assert 100 < tokens < 120


def test_the_key_is_sent_and_kept_nowhere(
    ad2kit: Any,
    model: LanguageModel,
    url: str,
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model.key = KEY
    source = write_csv(tmp_path / "in.csv", [{"text": text} for text in reviews(4)])
    arguments = ("ask", recipe, source, tmp_path / "out", *at(url))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)  # that of another endpoint is not sent
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert "refuses the key" in ad2kit(*arguments).err
    monkeypatch.setenv("AD2KIT_ASK_KEY", KEY)
    outcome = ad2kit(*arguments)
    assert outcome.code == 0, outcome.err
    assert KEY not in outcome.out + outcome.err
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) == 5
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-A: b")
    assert "unset OPENAI_CUSTOM_HEADERS" in ad2kit(*arguments).err


def test_a_second_pass_and_labels_say_how_good_the_teacher_is(
    ad2kit: Any, model: LanguageModel, url: str, recipe: Path, tmp_path: Path
) -> None:
    texts = reviews(40)
    labels = [max(logs, key=logs.__getitem__) for logs in map(of_words, texts)]
    labels[:3] = ["", "neither", "negative" if labels[2] == "positive" else "positive"]
    rows = [{"text": t, "label": label} for t, label in zip(texts, labels, strict=True)]
    source = write_csv(tmp_path / "in.csv", rows)
    first, second = tmp_path / "first", tmp_path / "second"
    outcome = ad2kit("ask", recipe, source, first, *at(url))
    assert outcome.code == 0, outcome.err
    assert "agreement with label: 97.4% of 38 rows (95 % interval 86.2% to 99.9%)" in outcome.out
    assert "1 cells are no label: " in outcome.out
    # Another order of the labels; this server is moved by none, but one text has changed its mind.
    flipped = next(row["text"] for row in read_csv(first) if row["teacher_label"] == "positive")
    model.log_probabilities = lambda text: (
        {"negative": 0.0, "positive": -9.0} if text == flipped else of_words(text)
    )
    more = ("ask.seed=1", "--max-rows", "40", "--against", first, "--json")
    outcome = ad2kit("ask", recipe, source, second, *at(url), *more)
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)["agreements"][1]
    assert (found["with_what"], found["rows"], found["equal"]) == (str(first), 40, 39)
    orders = {body["messages"][0]["content"].split("\n")[1] for body in model.bodies}
    assert orders == {"A. negative", "A. positive"}
    other = write_recipe(tmp_path, {"prompt": PROMPT, "text": "{text}"}, labels=["negative", "b"])
    outcome = ad2kit("ask", other, source, tmp_path / "third", *at(url), "--against", first)
    assert (outcome.code, "has other labels" in outcome.err) == (2, True)
    outcome = ad2kit("ask", recipe, source, second, *at(url), "--against", tmp_path)
    assert (outcome.code, "expected the output of `ad2kit ask`" in outcome.err) == (2, True)


def test_an_output_of_something_else_is_refused(
    ad2kit: Any, url: str, recipe: Path, tmp_path: Path
) -> None:
    source = write_csv(tmp_path / "in.csv", [{"text": text} for text in reviews(3)])
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    outcome = ad2kit("ask", recipe, source, tmp_path / "out", *at(url))
    assert (outcome.code, "no job of `ad2kit ask`" in outcome.err) == (2, True)
    outcome = ad2kit("ask", recipe, source, "memory://out", *at(url))
    assert (outcome.code, "expected a folder of this machine" in outcome.err) == (2, True)
    outcome = ad2kit("ask", "smoke", source, tmp_path / "new", *at(url))
    assert (outcome.code, "has no section 'ask'" in outcome.err) == (2, True)
    assert ad2kit("ask", recipe, source, tmp_path / "new", *at(url)).code == 0
    journal = tmp_path / "new/_answers.jsonl"
    journal.write_bytes(journal.read_bytes().replace(b'"got"', b'"cot"', 1))
    outcome = ad2kit("ask", recipe, source, tmp_path / "new", *at(url))
    assert (outcome.code, "line 2: expected an event of `ad2kit ask`" in outcome.err) == (2, True)
