"""The journal of a job: every request that was sent, and how it ended, in a file of JSON lines.

    {"sent": ID}
    {"failed": ID, "reason": "429"}                       it is tried again
    {"got": ID, "answer": {...}, "tokens": [in, out], "model": "...", "at": "2026-..."}

A line is written with one system call before the next request of its worker, so a process that is
killed at any moment loses none. A request that was sent and has no end was in flight when the
process was killed: it is counted as lost, and sent again. The file is flushed to the disk once a
second and at the end: a machine without power loses one second of answers.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ad2kit.asking.records import Answer, Usage
from ad2kit.run.errors import RunError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAME = "_answers.jsonl"
_SECONDS_BETWEEN_FLUSHES = 1.0


class Journal:
    """What was asked and answered so far; all of it is in memory.

    Attributes:
        answers: the answer of each draw, by :meth:`ad2kit.asking.prompts.Question.id`.
        failures: the number of requests that failed, by reason.
        lost: the number of requests whose end is unknown.
        model: the model as the server named it; "" before the first answer.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, Answer] = {}
        self.failures = Counter[str]()
        self.tokens = Usage()
        self.model = ""
        self.first_answer = self.last_answer = ""
        self._open_requests = Counter[str]()
        self._file = -1
        self._flushed = 0.0
        self._size = self._load()

    @property
    def lost(self) -> int:
        """The number of requests that were sent and have no end."""
        return sum(self._open_requests.values())

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Open the file for appending; half a line at its end is cut off."""
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.ftruncate(self._file, self._size)
            os.lseek(self._file, 0, os.SEEK_END)
            yield
        finally:
            os.fsync(self._file)
            os.close(self._file)

    def sent(self, name: str) -> None:
        """Note that a request is sent now."""
        self._write({"sent": name})

    def failed(self, name: str, reason: str) -> None:
        """Note that a request failed."""
        self._write({"failed": name, "reason": reason})

    def got(self, name: str, answer: Answer, tokens: Usage, model: str) -> None:
        """Note the answer to a request."""
        self._write(
            {
                "got": name,
                "answer": answer.model_dump(exclude_defaults=True),
                "tokens": [tokens.prompt_tokens, tokens.completion_tokens],
                "model": model,
                "at": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )

    def _write(self, event: dict[str, Any]) -> None:
        line = json.dumps(event).encode() + b"\n"
        written = os.write(self._file, line)
        if written < len(line):  # a full disk takes a part of it; the next write says so
            os.write(self._file, line[written:])
        self._apply(event)
        if time.monotonic() - self._flushed > _SECONDS_BETWEEN_FLUSHES:
            os.fsync(self._file)
            self._flushed = time.monotonic()

    def _load(self) -> int:
        """Read the events of earlier commands; return the number of bytes of whole lines."""
        if not self.path.is_file():
            return 0
        size = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    self._apply(json.loads(line))
                except (ValueError, KeyError, TypeError, ValidationError) as error:
                    raise RunError(
                        f"{self.path}, line {number}: expected an event of `ad2kit ask`, found "
                        f"{line!r:.80}",
                        hint="put the file back as it was, or name another OUTPUT and ask anew",
                    ) from error
                size += len(line)
        return size

    def _apply(self, event: dict[str, Any]) -> None:
        if "sent" in event:
            self._open_requests[event["sent"]] += 1
        elif "failed" in event:
            self._end(event["failed"])
            self.failures[event["reason"]] += 1
        else:
            prompt_tokens, completion_tokens = event["tokens"]
            self.answers[event["got"]] = Answer.model_validate(event["answer"])
            self._end(event["got"])
            self.tokens = Usage(
                prompt_tokens=self.tokens.prompt_tokens + prompt_tokens,
                completion_tokens=self.tokens.completion_tokens + completion_tokens,
            )
            self.model = event["model"]
            self.first_answer = self.first_answer or event["at"]
            self.last_answer = event["at"]

    def _end(self, name: str) -> None:
        self._open_requests[name] -= 1
        if not self._open_requests[name]:
            del self._open_requests[name]
