"""The fast path of the service below HTTP: what is read, for how long, and what is passed on."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from ad2kit.batcher import Batcher
from ad2kit.error_contract import Problem
from ad2kit.http_api import Classify, Direct, Stages

if TYPE_CHECKING:
    from ad2kit.error_contract import Message

SCOPE: dict[str, Any] = {"type": "http", "method": "POST", "path": "/classify", "headers": []}


class Echo(Classify):
    """Answers with what it read."""

    def __init__(self) -> None: ...

    def insist_on_room(self) -> None: ...

    async def answer(self, body: bytes) -> tuple[bytes, Stages]:
        return body, Stages()


async def passed_on(*_: object) -> None:
    raise AssertionError("this was not for the application behind")


def ask(parts: list[bytes], pause_s: float, read_s: float) -> list[Message]:
    """Send a body in parts, with a pause before each, and return what was answered."""
    sent, waiting = list[Any](), list(parts)

    async def receive() -> Message:
        if not waiting:
            await asyncio.sleep(60)
        await asyncio.sleep(pause_s)
        return {"type": "http.request", "body": waiting.pop(0), "more_body": bool(waiting)}

    async def send(message: Message) -> None:
        sent.append(message)

    api = Direct(passed_on, path="/classify", handler=Echo, read_s=read_s)
    asyncio.run(api(dict(SCOPE), receive, send))
    return sent


def test_a_body_in_pieces_is_put_together() -> None:
    start, body = ask([b"one ", b"two ", b"three"], pause_s=0, read_s=5)
    assert (start["status"], body["body"]) == (200, b"one two three")


def test_a_body_that_trickles_in_is_given_up() -> None:
    with pytest.raises(Problem) as problem:
        ask([b"a"] * 50, pause_s=0.02, read_s=0.2)
    assert problem.value.status == 408
    assert "0.2 s" in problem.value.detail


def test_what_comes_while_the_service_drains_is_told_so() -> None:
    async def ask_late() -> None:
        batcher = Batcher(lambda rows: np.zeros((len(rows), 2)), max_batch_tokens=8,
                          max_queue_texts=8)  # fmt: skip
        await batcher.close()
        api = Classify(Tokens(), batcher, deadline_s=1.0, metrics=Uncounted())  # type: ignore[arg-type]
        await api.answer(b'{"texts": ["late"]}')

    with pytest.raises(Problem) as problem:
        asyncio.run(ask_late())
    assert problem.value.status == 503


class Tokens:
    """A tokenizer of one token for each text."""

    def encode(self, texts: list[str]) -> list[SimpleNamespace]:
        return [SimpleNamespace(ids=[1]) for _ in texts]


class Uncounted:
    def tokenised(self, seconds: float) -> None: ...


def test_stage_times_are_written_as_the_standard_says() -> None:
    stages = Stages(start=0.0, tokenise_s=0.0012, total_s=0.01)
    stages.timing.queue_s, stages.timing.inference_s = 0.002, 0.0034567
    assert (
        stages.header() == b"tokenise;dur=1.2, queue;dur=2.0, inference;dur=3.457, total;dur=10.0"
    )
