"""Asking: which requests are still to send, so many at once, until all are answered or a limit."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ad2kit.asking.endpoint import Unanswered
from ad2kit.asking.prompts import OUTSIDE
from ad2kit.asking.records import Answer, Usage
from ad2kit.run.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ad2kit.asking.endpoint import Endpoint
    from ad2kit.asking.journal import Journal
    from ad2kit.asking.prompts import Prompt, Question
    from ad2kit.run.ask_section import AskRecipe

# English has about 4 bytes of UTF-8 a token, Chinese and Arabic 3 to 4, in tokenizers of 2024 on.
_BYTES_PER_TOKEN = 4.0
# What a chat template adds to each message.
_TOKENS_PER_MESSAGE = 4
# A JSON object with one label.
_TOKENS_OF_A_LABEL = 12.0
# So many requests in a row without an answer show that the server is down, and not one bad text.
_MOST_IN_A_ROW = 5
# A prompt is wrong if so many first answers are all outside of the labels, or all refused.
_FIRST_ANSWERS = 20


class Costs:
    """Tokens and what they cost, estimated before the answers and counted after them."""

    def __init__(self, ask: AskRecipe) -> None:
        self._prices = (ask.input_price, ask.output_price)
        self.completion_tokens = 1.0 if ask.answer == "logprobs" else _TOKENS_OF_A_LABEL
        if ask.answer != "logprobs" and ask.max_output_tokens is not None:
            self.completion_tokens = float(ask.max_output_tokens)

    def prompt_tokens_of(self, body: dict[str, Any]) -> float:
        """Estimate the tokens of a request from its bytes, with an output format if it has one."""
        texts = [message["content"] for message in body["messages"]]
        if "response_format" in body:
            texts.append(json.dumps(body["response_format"], ensure_ascii=False))
        size = sum(len(text.encode()) for text in texts)
        return size / _BYTES_PER_TOKEN + len(body["messages"]) * _TOKENS_PER_MESSAGE

    def of(self, prompt_tokens: float, completion_tokens: float) -> float | None:
        """Return the price of tokens; None without prices."""
        input_price, output_price = self._prices
        if input_price is None or output_price is None:
            return None
        return (prompt_tokens * input_price + completion_tokens * output_price) / 1e6

    def spent(self, journal: Journal, in_flight: int = 0) -> float | None:
        """Return what the requests of a journal cost; a lost one counts as an average one.

        Of the requests without an end so many are in flight: they are not lost, and left out.
        """
        answered = len(journal.answers)
        scale = 1 + (journal.lost - in_flight) / answered if answered else 1.0
        tokens = journal.tokens
        return self.of(tokens.prompt_tokens * scale, tokens.completion_tokens * scale)


@dataclass(frozen=True)
class Progress:
    """Requests of the job, those answered, those answered by this command, and what was spent.

    ``failures`` is the number of tries without an answer.
    """

    requests: int
    answered: int
    answered_here: int
    failures: int
    cost: float | None
    seconds: float


class Asker:
    """Sends the requests that have no answer yet.

    Attributes:
        unanswered: the reason for each request that got no answer in all its tries.
        stopped_by: the option that ended the job before its last request; "" if none did.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        prompt: Prompt,
        journal: Journal,
        costs: Costs,
        max_cost: float | None,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self.unanswered: dict[str, str] = {}
        self.stopped_by = ""
        self._endpoint = endpoint
        self._prompt = prompt
        self._journal = journal
        self._costs = costs
        self._max_cost = max_cost
        self._on_progress = on_progress
        self._reserved = 0.0
        self._in_flight = self._in_a_row = 0
        self._fits = any(answer.probabilities for answer in journal.answers.values())
        self._end_of_one = asyncio.Condition()
        self._lost_before = journal.lost
        self._answered_before = len(journal.answers)
        self._requests = 0
        self._start = time.monotonic()

    async def ask(self, texts: Sequence[tuple[str, ...]], concurrency: int) -> None:
        """Send all requests about some texts, so many at once; the first one alone.

        Raises:
            UserError: no request would be answered, or another model answers.
        """
        prompt = self._prompt
        draws = prompt.ask.draws
        self._requests = draws * len(texts) * (len(prompt.labels) if prompt.several else 1)
        self._show()
        self._check_first_answers()
        remaining = (
            (question, draw)
            for row in texts
            for question in prompt.questions(row)
            for draw in range(draws)
            if question.id(draw) not in self._journal.answers
        )
        async with self._endpoint:
            for question, draw in remaining:
                await self._one(question, draw)
                break  # what is wrong with all of them shows here
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(concurrency):
                        group.create_task(self._work(remaining))
            except* Exception as errors:  # a group would hide what it is
                raise errors.exceptions[0] from None

    async def _work(self, remaining: Iterator[tuple[Question, int]]) -> None:
        for question, draw in remaining:
            if self.stopped_by:
                return
            async with self._end_of_one:
                await self._end_of_one.wait_for(self._may_send)
                self._in_flight += 1
            try:
                await self._one(question, draw)
            finally:
                async with self._end_of_one:
                    self._in_flight -= 1
                    self._end_of_one.notify_all()

    def _may_send(self) -> bool:
        """Tell whether one more request can be paid for: until a label, only the first ones."""
        return self._fits or len(self._journal.answers) + self._in_flight < _FIRST_ANSWERS

    async def _one(self, question: Question, draw: int) -> None:
        """Send one request, and write its end into the journal."""
        name, journal = question.id(draw), self._journal
        body = self._prompt.request(question, draw)
        tokens = self._costs.prompt_tokens_of(body)
        written = self._costs.completion_tokens
        if journal.answers:  # a model that reasons writes far more than its answer
            written = max(written, journal.tokens.completion_tokens / len(journal.answers))
        price = self._costs.of(tokens, written) or 0.0
        if self._max_cost is not None:
            spent = (self._spent() or 0.0) + self._reserved
            if spent + price > self._max_cost:
                self.stopped_by = "--max-cost"
                return
        self._reserved += price
        try:
            reply = await self._endpoint.reply(
                body,
                tokens + written,
                on_try=lambda: journal.sent(name),
                on_failure=lambda reason: journal.failed(name, reason),
                patient=len(journal.answers) > self._answered_before,
            )
        except Unanswered as end:
            self._end_without_answer(name, end)
            return
        finally:
            self._reserved -= price
        if journal.model not in ("", reply.model):
            journal.failed(name, "another model")
            raise UserError(
                f"{self._endpoint.base_url} answers as '{reply.model}' now, and has answered as "
                f"'{journal.model}': that is another teacher",
                hint="name the exact version with --model, and a new OUTPUT",
            )
        try:
            answer = self._prompt.answer(reply)
        except UserError:
            journal.failed(name, "no log-probabilities")
            raise
        journal.got(name, answer, reply.tokens, reply.model)
        self._fits = self._fits or bool(answer.probabilities)
        self._in_a_row = 0
        self._check_first_answers()
        self._show()

    def _end_without_answer(self, name: str, end: Unanswered) -> None:
        """Keep the reason for a request without an answer; stop if the server answers nothing."""
        if end.final:
            self._journal.got(name, Answer(reason=end.reason), Usage(), self._journal.model)
            self._check_first_answers()
        else:
            self.unanswered[name] = end.reason
            self._in_a_row += 1
            if self._in_a_row == _MOST_IN_A_ROW:
                raise UserError(
                    f"{self._endpoint.base_url} gave no answer to {_MOST_IN_A_ROW} requests in a "
                    f"row; the last one: {end.reason}",
                    hint="look at the server, then run the same command again; answers are kept",
                )
        self._show()

    def _check_first_answers(self) -> None:
        """Stop if the first answers hold no label at all: all others would cost as much.

        Raises:
            UserError: the prompt or the model does not fit.
        """
        answers = self._journal.answers
        if len(answers) >= _FIRST_ANSWERS and not self._fits:
            reason = next(reversed(answers.values())).reason
            advice = "ask for a shorter answer" if OUTSIDE in reason else "change the request"
            raise UserError(
                f"none of the first {_FIRST_ANSWERS} answers is one of the labels; the last one: "
                f"{reason}",
                hint=f"{advice} in the section 'ask' of the recipe, and name a new OUTPUT",
            )

    def _spent(self) -> float | None:
        """Return what was spent, without the requests that are in flight now."""
        return self._costs.spent(self._journal, self._journal.lost - self._lost_before)

    def _show(self) -> None:
        journal = self._journal
        self._on_progress(
            Progress(
                requests=self._requests,
                answered=len(journal.answers),
                answered_here=len(journal.answers) - self._answered_before,
                failures=journal.failures.total(),
                cost=self._spent(),
                seconds=time.monotonic() - self._start,
            )
        )
