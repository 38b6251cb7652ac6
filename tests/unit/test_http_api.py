"""The fast path of the service below HTTP: what is read, for how long, and what is passed on."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import importlib
import itertools
import json
import sys
import threading
import time
import tracemalloc
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ad2kit.exporting.classifier import Prediction
from ad2kit.service.access import ApiKeys, Keys, Preflight, Rate
from ad2kit.service.batcher import Batcher
from ad2kit.service.connections import REQUEST
from ad2kit.service.encodings import _readers
from ad2kit.service.errors import ErrorContract, Problem
from ad2kit.service.http import Classify, Direct, RequestTimes, parse
from ad2kit.service.openapi import ClassifyRequest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine
    from pathlib import Path

    from ad2kit.service.errors import Message

SCOPE: dict[str, Any] = {"type": "http", "method": "POST", "path": "/classify", "headers": []}
JSON = [(b"content-type", b"application/json")]


class Echo(Classify):
    """Answers with what it read."""

    def __init__(self) -> None: ...

    async def answer(self, body: bytes, encoding: bytes = b"") -> tuple[bytes, RequestTimes]:
        return encoding + body, RequestTimes()


async def passed_on(*_: object) -> None:
    raise AssertionError("this was not for the application behind")


def ask(
    parts: list[bytes],
    handler: Callable[[str], Classify] = lambda _: Echo(),
    headers: list[tuple[bytes, bytes]] = JSON,
) -> list[Message]:
    """Send a body in parts, and return what was answered."""
    sent, waiting = list[Any](), list(parts)

    async def receive() -> Message:
        if not waiting:
            await asyncio.sleep(60)
        return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}

    async def send(message: Message) -> None:
        sent.append(message)

    api = ErrorContract(Direct(passed_on, path="/classify", handler=handler), max_body_bytes=2**20)
    asyncio.run(api({**SCOPE, "headers": headers}, receive, send))
    return sent


def test_a_body_in_pieces_is_put_together() -> None:
    start, body = ask([b"one ", b"two ", b"three"])
    assert (start["status"], body["body"]) == (200, b"one two three")


@pytest.mark.parametrize(
    "declared",
    [
        [(b"content-type", b"Application/JSON; charset=utf-8")],
        [(b"content-type", b'application/json;charset="UTF-8"; odd')],
        [*JSON, (b"content-encoding", b"identity"), (b"transfer-encoding", b"Chunked")],
    ],
)
def test_plain_json_is_read_however_it_is_said(declared: list[tuple[bytes, bytes]]) -> None:
    assert ask([b"{}"], headers=declared)[0]["status"] == 200


@pytest.mark.parametrize(
    ("declared", "said"),
    [
        ([], "found no Content-Type"),
        ([(b"content-type", b"text/plain")], "found Content-Type text/plain"),
        ([*JSON, (b"content-encoding", b"deflate")], "Content-Encoding deflate is not read"),
        ([*JSON, (b"content-encoding", b"gzip, gzip")], "Content-Encoding gzip, gzip is not"),
        ([*JSON, (b"Content-Encoding", b" BR ")], "Content-Encoding BR is not read"),
        ([*JSON, (b"content-encoding", b"\xff" * 999)], "is not read"),
        ([*JSON, (b"transfer-encoding", b"gzip, chunked")], "Transfer-Encoding gzip, chunked is"),
        ([(b"content-type", b"application/json; charset=latin-1")], "charset latin-1 is not read"),
        ([(b"content-type", b"application/json;CharSet='utf-16'")], "only utf-8"),
    ],
)
def test_a_body_in_an_encoding_that_is_not_read_is_told_so(
    declared: list[tuple[bytes, bytes]], said: str
) -> None:
    start, body = ask([b"{}"], headers=declared)
    error = json.loads(body["body"])["error"]
    assert (start["status"], error["type"]) == (415, "unsupported_media_type")
    assert said in error["message"]
    assert len(error["message"]) < 200
    assert error["hint"].startswith("send the header Content-Type: application/json")


def test_a_browser_is_told_without_a_key_what_a_page_may_send() -> None:
    sent = list[Any]()

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError

    api = Preflight(ApiKeys(passed_on, keys=Keys({"one": ""}), public=()))
    asked = [(b"origin", b"https://a.example"), (b"access-control-request-method", b"POST")]
    asyncio.run(api({**SCOPE, "method": "OPTIONS", "headers": asked}, receive, send))
    start, _ = sent
    assert start["status"] == 204
    headers = dict(start["headers"])
    assert b"Authorization" in headers[b"access-control-allow-headers"]
    for others in ({"method": "OPTIONS"}, {"method": "POST", "headers": asked}):
        with pytest.raises(Problem) as problem:
            asyncio.run(api({**SCOPE, **others}, receive, send))
        assert problem.value.status == 401


PACKERS = {b"gzip": gzip.compress}
PACKED = gzip.compress(b'{"texts": "a"}', mtime=0)
with contextlib.suppress(ImportError):  # whichever of the two there is
    PACKERS[b"zstd"] = importlib.import_module("zstandard").compress
with contextlib.suppress(ImportError):
    PACKERS[b"zstd"] = importlib.import_module("compression.zstd").compress


async def read_packed(encoding: bytes, body: bytes, **more: Any) -> list[str]:
    """The texts that are read of a compressed body."""
    tokens = Tokens()
    async with classifying(tokens, **more) as api:
        await api.answer(body, encoding)
    return tokens.seen


@pytest.mark.parametrize("encoding", PACKERS)
@pytest.mark.parametrize("size", [1, 2**13 - 15, 2**13, 2**16, 2**20 - 15])
def test_a_compressed_body_is_read_as_the_plain_one(encoding: bytes, size: int) -> None:
    text = "x" * size
    assert asyncio.run(read_packed(encoding, PACKERS[encoding](body_of([text])))) == [text]


def test_a_compressed_body_is_measured_by_what_it_holds() -> None:
    """Others wait for a turn by the rate of those before: small bodies of much must not slow it."""
    body = gzip.compress(b'{"texts": "a"}' + b" " * 2**19 + b"\n" * 2**19)

    async def rates() -> tuple[float, float]:
        async with classifying(Tokens(), max_body_bytes=2**21) as api:
            start = time.perf_counter()
            await api.answer(body, b"gzip")
            elapsed_s = time.perf_counter() - start
            return api._huge._bytes_per_s, 2**20 / elapsed_s

    assert len(body) < 2**13
    rate, least = asyncio.run(rates())
    assert rate >= least


def test_the_encoding_that_is_declared_is_handed_on() -> None:
    for declared, encoding in ((b"gzip", b"gzip"), (b" X-GZIP ", b"x-gzip"), (b"identity", b"")):
        start, body = ask([b"{}"], headers=[*JSON, (b"content-encoding", declared)])
        assert (start["status"], body["body"]) == (200, encoding + b"{}")


@pytest.mark.parametrize("encoding", PACKERS)
@pytest.mark.parametrize(("limit", "size"), [(2**10, 2**11), (2**20, 2**20), (2**20, 2**28)])
def test_a_body_that_unpacks_to_more_than_it_may_have_is_refused_before_it_is_unpacked(
    encoding: bytes, limit: int, size: int
) -> None:
    bomb = PACKERS[encoding](b" " * size + b'{"texts": "a"}')
    tracemalloc.start()
    with pytest.raises(Problem) as problem:
        asyncio.run(read_packed(encoding, bomb, max_body_bytes=limit))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert problem.value.status == 413
    assert f"at most {limit} bytes after it is unpacked" in problem.value.detail
    assert most < 4 * 2**20


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "ends too early"),
        (b'{"texts": "a"}', "incorrect header"),
        (PACKED[:-1], "ends too early"),
        (PACKED[:-8] + bytes(8), "incorrect data check"),
        (PACKED + b"more", "incorrect header"),
        (gzip.compress(b"", mtime=0) * 40_000, "more than 16 parts"),
    ],
    ids=["empty", "plain", "cut", "wrong sum", "followed by more", "many members"],
)
def test_a_damaged_body_is_refused(body: bytes, said: str) -> None:
    with pytest.raises(Problem, match=said) as problem:
        asyncio.run(read_packed(b"gzip", body))
    assert problem.value.status == 400
    members = gzip.compress(b'{"texts": ') + gzip.compress(b'"a"}')
    assert asyncio.run(read_packed(b"gzip", members)) == ["a"]


@pytest.mark.skipif(b"zstd" not in PACKERS, reason="needs Python 3.14 or the package zstandard")
@pytest.mark.parametrize(
    "body", [b"", b'{"texts": "a"}', b"\x28\xb5\x2f\xfd\x00\xa8" + bytes(9)], ids=repr
)
def test_a_damaged_body_of_zstd_is_refused(body: bytes) -> None:
    """The last one asks for a window of gigabytes."""
    with pytest.raises(Problem) as problem:
        asyncio.run(read_packed(b"zstd", body))
    assert problem.value.status == 400


def test_without_a_reader_of_zstd_its_bodies_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("compression.zstd", "zstandard"):
        monkeypatch.setitem(sys.modules, name, None)
    _readers.cache_clear()
    try:
        start, body = ask([b"{}"], headers=[*JSON, (b"content-encoding", b"zstd")])
    finally:
        _readers.cache_clear()
    assert start["status"] == 415
    assert b"needs Python 3.14 or the package zstandard" in body["body"]


def test_of_the_bodies_that_are_much_larger_unpacked_only_one_is_unpacked_at_a_time() -> None:
    async def ask_all() -> None:
        tokens = Tokens()
        async with classifying(tokens) as api:
            body = gzip.compress(body_of(["x" * 2**19]))
            tokens.go_on.clear()
            answers = asyncio.gather(*(api.answer(body, b"gzip") for _ in range(8)))
            await asyncio.to_thread(tokens.entered.wait, 10)
            await asyncio.sleep(0.2)  # time for a second one
            tokens.go_on.set()
            await answers
        assert (len(tokens.seen), tokens.most_at_once) == (8, 1)

    asyncio.run(ask_all())


@pytest.mark.parametrize("encoding", PACKERS)
def test_a_compressed_body_does_not_change_what_plain_ones_wait_for(
    encoding: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the clock of this test the turn of each body takes a second."""
    clock = SimpleNamespace(perf_counter=itertools.count(1.0).__next__)
    monkeypatch.setattr("ad2kit.service.http.time", clock)

    async def test() -> None:
        tokens = Tokens()
        async with classifying(tokens, max_wait_s=1.5) as api:
            plain = body_of(["x" * 2**17])
            await api.answer(plain)
            await api.answer(PACKERS[encoding](plain), encoding)
            tokens.entered.clear()
            tokens.go_on.clear()
            first = asyncio.create_task(api.answer(plain))
            await asyncio.to_thread(tokens.entered.wait, 10)
            second = asyncio.create_task(api.answer(plain))  # it waits for one second
            await asyncio.sleep(0)
            with pytest.raises(Problem) as problem:  # it would wait for two
                await api.answer(plain)
            assert problem.value.status == 429
            tokens.go_on.set()
            await asyncio.gather(first, second)

    run(test)


def test_who_asks_is_known_by_the_name_of_the_key() -> None:
    counted = list[str]()

    async def answered(*_: object) -> None: ...

    async def nothing(*_: object) -> Any:
        raise AssertionError

    long = "0123456789abcdef"
    keys = {long: "ann", "plain": ""}
    api = ApiKeys(answered, keys=Keys(keys), public=("/livez",), count=counted.append)

    def name_of(key: str, **more: Any) -> str | None:
        headers = [(b"authorization", f"Bearer {key}".encode())]
        facts: dict[str, str] = {}
        REQUEST.set(facts)
        asyncio.run(api({**SCOPE, "headers": headers, **more}, nothing, nothing))
        return facts.get("key_name")

    assert (name_of(long), name_of("plain")) == ("ann", None)
    assert name_of(long, path="/livez") is None
    for wrong in ("ann", "ann:", f"ann:{long}", f"bob:{long}", f":{long}", ":plain", ""):
        with pytest.raises(Problem):
            name_of(wrong)
    assert counted == ["ann"]


def test_a_rate_is_shared_by_those_who_share_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("ad2kit.service.access.time.monotonic", lambda: now)
    workers = [Rate(tmp_path / "rates", 4.0) for _ in range(2)]

    def let_in(key: int, times: int) -> int:
        found = 0
        for number in range(times):
            with suppress(Problem):
                workers[number % 2].check(key)
                found += 1
        return found

    assert let_in(0, 20) == 5  # those of a second, and one
    assert let_in(1, 20) == 5  # another key
    now += 0.25
    assert let_in(0, 20) == 1
    now += 60.0
    assert let_in(0, 20) == 5  # what was not asked is not saved up
    with pytest.raises(Problem) as problem:
        workers[0].check(0)
    assert problem.value.status == 429
    assert problem.value.headers() == [(b"retry-after", b"1")]
    for worker in workers:
        worker.close()


def test_what_comes_while_the_service_drains_is_told_so() -> None:
    async def ask_late() -> None:
        batcher = Batcher(
            lambda rows: np.zeros((len(rows), 2)), max_batch_tokens=8, max_queue_texts=8
        )
        await batcher.close()
        api = Classify(
            Tokens(),  # type: ignore[arg-type]
            batcher,
            deadline_s=1.0,
            max_texts=9,
            max_body_bytes=2**20,
            metrics=Uncounted(),  # type: ignore[arg-type]
        )
        await api.answer(b'{"texts": ["late"]}')

    with pytest.raises(Problem) as problem:
        asyncio.run(ask_late())
    assert problem.value.status == 503


class Tokens:
    """A tokenizer of one token for each text, which remembers what it was given."""

    artifact = SimpleNamespace(text_columns=1)

    def __init__(self) -> None:
        self.seen = list[str]()
        self.at_once = self.most_at_once = 0
        self.entered, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def encode(self, texts: list[str], first: int = 0) -> list[SimpleNamespace]:
        assert first % 16 == 0  # lists come in pieces
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        self.seen += texts
        self.entered.set()
        assert self.go_on.wait(10)
        self.at_once -= 1
        return [SimpleNamespace(ids=[1]) for _ in texts]

    def run(self, encodings: list[Any]) -> Any:
        return np.zeros((len(encodings), 2))

    def predictions(self, encodings: list[Any], _logits: Any) -> list[Prediction]:
        return [Prediction(tokens=1, truncated=False, label="a") for _ in encodings]


class Uncounted:
    def tokenised(self, seconds: float) -> None: ...

    def predicted(self, predictions: list[Prediction], model: str) -> None: ...

    def answered(self, seconds: float) -> None: ...


@asynccontextmanager
async def classifying(
    tokens: Tokens, *, max_queue_texts: int = 1000, **more: Any
) -> AsyncIterator[Classify]:
    batcher = Batcher(
        lambda rows: np.zeros((len(rows), 2)), max_batch_tokens=64, max_queue_texts=max_queue_texts
    )
    given: dict[str, Any] = {
        "deadline_s": 10.0,
        "max_texts": 128,
        "max_body_bytes": 2**20,
        "metrics": Uncounted(),
        **more,
    }
    api = Classify(tokens, batcher, **given)  # type: ignore[arg-type]
    try:
        yield api
    finally:
        tokens.go_on.set()
        api.close()
        await batcher.close()


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 20))


def body_of(texts: list[str]) -> bytes:
    return json.dumps({"texts": texts}).encode()


def test_large_requests_are_read_beside_the_loop_and_huge_ones_one_at_a_time() -> None:
    async def test() -> None:
        tokens = Tokens()
        async with classifying(tokens) as api:
            tokens.go_on.clear()
            huge = [asyncio.create_task(api.answer(body_of(["a" * 2**17]))) for _ in range(5)]
            await asyncio.to_thread(tokens.entered.wait, 10)
            large = asyncio.create_task(api.answer(body_of(["b" * 2**14])))
            while len(tokens.seen) < 2:  # it does not wait for the huge ones
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            assert sorted(map(len, tokens.seen)) == [2**14, 2**17]
            tokens.go_on.set()
            content, _ = await large
            assert json.loads(content)["predictions"][0]["label"] == "a"
            assert len(await asyncio.gather(*huge)) == 5
        assert tokens.most_at_once == 2

    run(test)


def test_of_a_list_that_was_given_up_no_more_is_tokenised() -> None:
    async def test() -> None:
        tokens = Tokens()
        async with classifying(tokens) as api:
            tokens.go_on.clear()
            first, second = (
                asyncio.create_task(api.answer(body_of([letter * 1000] * 100))) for letter in "ab"
            )
            await asyncio.to_thread(tokens.entered.wait, 10)
            first.cancel()
            second.cancel()
            await asyncio.wait([first, second])
            tokens.go_on.set()
            await api.answer(body_of(["c" * 2**17]))
        # Of one a piece was under way, of the other nothing.
        assert tokens.seen == ["a" * 1000] * 16 + ["c" * 2**17]

    run(test)


def test_a_list_without_room_is_refused_before_it_is_tokenised() -> None:
    async def test() -> None:
        tokens = Tokens()
        async with classifying(tokens, max_queue_texts=100) as api:
            with pytest.raises(Problem) as problem:
                await api.answer(body_of(["a"] * 101))
            assert problem.value.status == 429
            assert tokens.seen == []
            # Room is held for what is tokenised now.
            tokens.go_on.clear()
            large = asyncio.create_task(api.answer(body_of(["b" * 500] * 90)))
            await asyncio.to_thread(tokens.entered.wait, 10)
            with pytest.raises(Problem) as problem:
                await api.answer(body_of(["c"] * 11))
            assert problem.value.status == 429
            assert "c" not in tokens.seen
            tokens.go_on.set()
            await large
            await api.answer(body_of(["c"] * 11))

    run(test)


def test_what_would_wait_too_long_to_be_read_is_refused_at_once() -> None:
    async def test() -> None:
        tokens = Tokens()
        async with classifying(tokens, max_wait_s=0.05) as api:
            tokens.go_on.clear()
            slow = asyncio.create_task(api.answer(body_of(["a" * 2**17])))
            await asyncio.to_thread(tokens.entered.wait, 10)
            await asyncio.sleep(0.2)  # so is the rate known
            tokens.go_on.set()
            await slow
            tokens.go_on.clear()
            waiting = [asyncio.create_task(api.answer(body_of(["a" * 2**17]))) for _ in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(Problem) as problem:
                await api.answer(body_of(["b" * 2**17]))
            assert (problem.value.status, problem.value.retry_after_s) == (429, 1)
            tokens.go_on.set()
            await api.answer(body_of(["small"]))
            statuses = await asyncio.gather(*waiting, return_exceptions=True)
            assert not isinstance(statuses[0], Exception)

    run(test)


def test_the_time_for_a_turn_counts_against_the_deadline() -> None:
    async def test() -> None:
        tokens = Tokens()
        async with classifying(tokens, deadline_s=0.2) as api:
            tokens.go_on.clear()
            asked = (api.answer(body_of([letter * 2**17])) for letter in "ab")
            found = await asyncio.gather(*asked, return_exceptions=True)
            assert [each.status for each in found if isinstance(each, Problem)] == [504, 504]
        assert len(tokens.seen) == 1

    run(test)


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["texts", "scores", "text"]), inner, max_size=3)
    ),
)
NEARLY = st.fixed_dictionaries(
    {
        "texts": st.one_of(VALUES, st.lists(st.text(max_size=2) | st.lists(st.text(max_size=2)))),
    },
    optional={"scores": VALUES | st.booleans()},
)


@given(value=st.one_of(VALUES, NEARLY))
def test_a_body_is_read_as_its_published_model_reads_it(value: Any) -> None:
    body = json.dumps(value).encode()
    try:
        expected = ClassifyRequest.model_validate_json(body)
    except ValidationError:
        with pytest.raises(Problem) as problem:
            parse(body, 1, 128)
        assert problem.value.status == 422
        assert problem.value.detail
        return
    texts, scores = parse(body, 1, 128)
    assert [tuple(each) if isinstance(each, list) else each for each in texts] == expected.as_list()
    assert scores is expected.scores


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b'{"texts": [["a", "b", "c"]]}', 422, "a text or a pair of texts, found 3 texts"),
        (b'{"texts": ["a", ["a", 5]]}', 422, "texts.1.1: expected a text, found a number"),
        (b'{"texts": ["a", {"text": "b"}]}', 422, "texts.1: expected a text, found an object"),
        (b'{"texts": ["a", null]}', 422, "texts.1: expected a text, found null"),
        (b'{"texts": 5}', 422, "texts: expected a text or a list of texts, found a number"),
        (b'{"texts": []}', 422, "texts: expected at least 1 text, found an empty list"),
        (b'{"text": "a"}', 422, "there is no field 'text' (did you mean 'texts'?)"),
        (b'{"texts": "a", "scores": 1}', 422, "scores: expected true or false, found a number"),
        (b"{}", 422, "texts: the field is missing"),
        (b"[]", 422, "expected an object, found a list"),
        (b'{"texts": ["a",]}', 400, "not valid JSON: trailing comma at line 1 column 16"),
        (b'\xef\xbb\xbf{"texts": "a"}', 400, "begins with a byte order mark"),
        (b"\x1f\x8b\x08\x00", 400, "begins with the mark of gzip"),
        (json.dumps({"texts": ["a"] * 129}).encode(), 413, "at most 128 texts, found 129"),
        (json.dumps({"texts": [["a", "b"]] * 200}).encode(), 413, "at most 128 texts, found 200"),
    ],
)
def test_a_client_is_told_of_one_fault_in_words(body: bytes, status: int, said: str) -> None:
    with pytest.raises(Problem) as problem:
        parse(body, 1, 128)
    assert problem.value.status == status
    assert said in problem.value.detail


@pytest.mark.parametrize(
    "body",
    [
        b'{"' + b"k" * 2**20 + b'": 1}',
        json.dumps({str(number): 1 for number in range(50_000)}).encode(),
        b'{"texts": [' + b"[5]," * 200_000 + b"[5]]}",
        b'{"texts": "' + b"a" * 2**20 + b'", "scores": "' + b"b" * 1000 + b'"}',
    ],
)
def test_what_is_said_of_a_body_is_short_however_large_it_is(body: bytes) -> None:
    with pytest.raises(Problem) as problem:
        parse(body, 1, 128)
    assert len(problem.value.content()) < 400


def test_a_model_of_pairs_asks_for_pairs() -> None:
    with pytest.raises(Problem) as problem:
        parse(b'{"texts": [["a"]]}', 2, 128)
    assert problem.value.hint.startswith('send {"texts": [["...", "..."]]} with 1 to 128 pairs')


def test_stage_times_are_written_as_the_standard_says() -> None:
    stages = RequestTimes(start=0.0, tokenise_s=0.0012, total_s=0.01)
    stages.timing.queue_s, stages.timing.inference_s = 0.002, 0.0034567
    assert (
        stages.header() == b"tokenise;dur=1.2, queue;dur=2.0, inference;dur=3.457, total;dur=10.0"
    )
