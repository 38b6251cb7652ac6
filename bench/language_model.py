"""A language model to ask: a real server of the OpenAI protocol on the loopback interface.

    python -m bench.language_model RUN --port 8000

It answers chat completions by a classifier: with temperature, log-probabilities, draws and
structured outputs, and on request with the faults that real servers have. It reads the choices from
the system message (``A. NAME``, or the enumeration of the response format), and the text from the
last message. It counts every request, so that a test can say what was asked how often.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import re
import threading
import time
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping

    from starlette.requests import Request

    Fault = Callable[[int, Mapping[str, Any]], str]

_LETTER = re.compile(r"(?m)^([A-Z])\. (.*)$")
# The label of a question about one of several: <NAME>, or <NAME: its description>.
_ONE_LABEL = re.compile(r"<([^:>]+)")
# What a model that may say anything thinks of besides: the share of the tokens without a choice.
_OTHER_TOKENS = {"The": 0.6, "\n": 0.3, "I": 0.1}
# Half a reply ends in the middle of its first bytes.
_HALF = 0.5


class LanguageModel:
    """The application, what it was asked, and how it behaves.

    Args:
        log_probabilities: returns the log-probability of each label for a text.
        fault: returns the fault of a request by its number (from 0) and body; "" for none. Faults
            are a status such as ``429``, ``hang``, ``drip``, ``half``, ``refusal``, ``filter``,
            ``outside``, ``silent`` (no log-probabilities), ``tokens`` (of other words) and
            ``model NAME``.
        delay_s: how long each reply takes.
        key: the key to insist on; "" for none.

    Attributes:
        asked: how often each pair of a text and a seed was asked.
        answered: how often each pair was answered in full.
        bodies: the request bodies in their order.
    """

    def __init__(
        self,
        log_probabilities: Callable[[str], Mapping[str, float]],
        *,
        fault: Fault = lambda _number, _body: "",
        delay_s: float = 0.0,
        key: str = "",
    ) -> None:
        self.log_probabilities = log_probabilities
        self.fault = fault
        self.delay_s = delay_s
        self.key = key
        self.asked = Counter[tuple[str, int]]()
        self.answered = Counter[tuple[str, int]]()
        self.bodies: list[dict[str, Any]] = []
        self.app = Starlette(
            routes=[Route("/v1/chat/completions", self.completions, methods=["POST"])]
        )

    async def completions(self, request: Request) -> Response:
        """Answer one request, or fail as it was told to."""
        body = await request.json()
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return _error(401, "Incorrect API key provided")
        number = len(self.bodies)
        self.bodies.append(body)
        pair = (body["messages"][-1]["content"], body.get("seed", 0))
        self.asked[pair] += 1
        await asyncio.sleep(self.delay_s)
        fault = self.fault(number, body)
        if fault.isdecimal():
            return _error(int(fault), "told to fail", {"retry-after-ms": "5"})
        if fault == "hang":
            await asyncio.sleep(3600)
        content = json.dumps(self._completion(body, fault)).encode()
        if fault == "half":
            return Response(content[: int(len(content) * _HALF)], media_type="application/json")
        if fault == "drip":
            return StreamingResponse(_drip(content), media_type="application/json")
        self.answered[pair] += 1
        return Response(content, media_type="application/json")

    def _completion(self, body: Mapping[str, Any], fault: str) -> dict[str, Any]:
        """Return a completion of the protocol."""
        choices = _choices(body)
        probabilities = self._of_choices(body, list(choices.values()))
        name = _drawn(probabilities, body)
        message: dict[str, Any] = {"role": "assistant", "refusal": None}
        if "response_format" in body:
            message["content"] = json.dumps({"label": name}, ensure_ascii=False)
        else:
            message["content"] = next(letter for letter, c in choices.items() if c == name)
        if fault == "outside":
            message["content"] = "I would rather talk about something else."
        if fault == "refusal":
            message |= {"content": None, "refusal": "I cannot help with that."}
        choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": "stop"}
        if fault == "filter":
            choice["finish_reason"] = "content_filter"
        choice["logprobs"] = None
        if body.get("logprobs") and fault != "silent":
            choice["logprobs"] = _logprobs(choices, probabilities, fault == "tokens")
        prompt_tokens = sum(len(each["content"].split()) for each in body["messages"])
        return {
            "id": f"chatcmpl-{len(self.bodies)}",
            "object": "chat.completion",
            "created": 1,
            "model": fault.removeprefix("model ") if fault.startswith("model ") else body["model"],
            "choices": [choice],
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": 1,
                "total_tokens": prompt_tokens + 1,
            },
        }

    def _of_choices(self, body: Mapping[str, Any], choices: list[str]) -> dict[str, float]:
        """Return the probability of each choice: of a label, or of yes and no for one."""
        logs = dict(self.log_probabilities(body["messages"][-1]["content"]))
        if sorted(choices) == ["no", "yes"] and "yes" not in logs:
            asked = _ONE_LABEL.search(body["messages"][0]["content"])
            assert asked is not None, "expected <LABEL> in the system message"
            share = math.exp(logs[asked[1]])
            return {name: share if name == "yes" else 1 - share for name in choices}
        return {choice: math.exp(logs[choice]) for choice in choices}


def _choices(body: Mapping[str, Any]) -> dict[str, str]:
    """Return the choices of a request by their letters."""
    if "response_format" in body:
        schema = body["response_format"]["json_schema"]["schema"]
        return {str(n): name for n, name in enumerate(schema["properties"]["label"]["enum"])}
    found = _LETTER.findall(body["messages"][0]["content"])
    return {letter: described.partition(": ")[0] for letter, described in found}


def _drawn(probabilities: Mapping[str, float], body: Mapping[str, Any]) -> str:
    """Draw a choice at the temperature of a request; its seed and text decide."""
    temperature = body.get("temperature", 1.0)
    if temperature == 0:
        return max(probabilities, key=probabilities.__getitem__)
    weights = [p ** (1 / temperature) for p in probabilities.values()]
    chance = random.Random(f"{body.get('seed')}:{body['messages'][-1]['content']}")  # noqa: S311
    return chance.choices(list(probabilities), weights)[0]


def _logprobs(
    choices: Mapping[str, str], probabilities: Mapping[str, float], others_alone: bool
) -> dict[str, Any]:
    """Return the alternatives of the first token: letters with and without a blank, and words."""
    shares = {} if others_alone else {key: probabilities[name] for key, name in choices.items()}
    tokens = {
        word: share * (1.0 if others_alone else 0.02) for word, share in _OTHER_TOKENS.items()
    }
    for letter, share in shares.items():
        tokens[letter] = 0.78 * share
        tokens[f" {letter}"] = 0.2 * share
    top = sorted(tokens, key=tokens.__getitem__, reverse=True)[:20]
    alternatives = [
        {"token": token, "logprob": math.log(max(tokens[token], 1e-30)), "bytes": None}
        for token in top
    ]
    return {"content": [{**alternatives[0], "top_logprobs": alternatives}]}


async def _drip(content: bytes) -> AsyncIterator[bytes]:
    """Yield half of a reply, and nothing after it for an hour."""
    yield content[: len(content) // 2]
    await asyncio.sleep(3600)
    yield content[len(content) // 2 :]


def _error(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """Return an error of the protocol."""
    error = {"message": message, "type": "error", "code": None, "param": None}
    return JSONResponse({"error": error}, status_code=status, headers=headers)


@contextmanager
def served(model: LanguageModel, port: int = 0) -> Iterator[str]:
    """Serve a model in a thread of this process; yield its base URL."""
    config = uvicorn.Config(
        model.app,
        host="127.0.0.1",
        port=port,
        log_level="critical",
        lifespan="off",
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        number = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{number}/v1"
    finally:
        server.should_exit = True
        thread.join()


def main() -> None:
    """Serve the classifier of a run until it is interrupted."""
    import ad2kit

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    classifier = ad2kit.load(options.run, threads=1)

    def log_probabilities(text: str) -> dict[str, float]:
        (prediction,) = classifier.predict([text])
        assert prediction.scores is not None, "this task has no probabilities"
        return {label: math.log(max(p, 1e-30)) for label, p in prediction.scores.items()}

    with served(LanguageModel(log_probabilities), options.port) as url:
        print(url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
