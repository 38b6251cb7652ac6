"""Questions to a language model, and what its replies mean.

A question is about the texts of one row, and about one label if a row may have several. Its choices
are the labels, or yes and no. With ``ask.answer: logprobs`` they have letters, which every
tokenizer holds as one token each: so no choice is the beginning of another one. Otherwise the reply
is a JSON object whose label is one of an enumeration.
"""

from __future__ import annotations

import json
import math
import random
import re
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, ValidationError

from ad2kit.asking.records import Answer, Usage
from ad2kit.run.ask_section import MOST_LETTERS
from ad2kit.run.errors import UserError
from ad2kit.run.files import fingerprint

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ad2kit.run.ask_section import AskRecipe
    from ad2kit.run.sections import DataRecipe

YES, NO = "yes", "no"
# Choices with less of the probability than this are not what the model wanted to say.
_LEAST_MASS = 0.5
# Seeds of the requests of one question differ by its draws, and those of two passes by this.
_SEEDS_OF_A_PASS = 1000


class Question(NamedTuple):
    """The texts of a row; if it may have several labels, the label that is asked about."""

    texts: tuple[str, ...]
    label: str = ""

    def id(self, draw: int) -> str:
        """Return the name of one draw in the journal: equal texts have equal names."""
        return f"{fingerprint(list(self.texts), self.label)[:32]}:{draw}"


class Prompt:
    """The messages of a recipe, and how a reply is read.

    Args:
        ask: the section ``ask``.
        data: names the columns of the texts, and the labels.
    """

    def __init__(self, ask: AskRecipe, data: DataRecipe) -> None:
        self.ask = ask
        self.labels = data.labels or ()
        self.columns = data.text_columns
        self.several = data.task == "multi_label"
        self.choices = (YES, NO) if self.several else self.labels
        if self.ask.seed:
            shuffled = list(self.choices)
            random.Random(self.ask.seed).shuffle(shuffled)  # noqa: S311  (an order, no secret)
            self.choices = tuple(shuffled)
        self.letters = dict(zip(ascii_uppercase, self.choices, strict=False))
        self._by_letter = self.ask.answer == "logprobs"

    @property
    def settings(self) -> dict[str, Any]:
        """The section as plain data, without the prices."""
        return self.ask.model_dump(mode="json", exclude={"input_price", "output_price"})

    @property
    def fingerprint(self) -> str:
        """The fingerprint of everything that decides what is asked, but the texts.

        One request stands for how the others are written: another version may write them otherwise.
        """
        example = next(self.questions(tuple(f"text {column}" for column in self.columns)))
        return fingerprint(
            self.settings,
            list(self.labels),
            self.several,
            list(self.columns),
            self.request(example, 0),
        )

    def questions(self, texts: tuple[str, ...]) -> Iterator[Question]:
        """Yield the questions about a row: one, or one for each of several labels."""
        if self.several:
            for label in self.labels:
                yield Question(texts, label)
        else:
            yield Question(texts)

    def request(self, question: Question, draw: int) -> dict[str, Any]:
        """Return the body of a request, without the model."""
        ask = self.ask
        body: dict[str, Any] = {"messages": self._messages(question)}
        if self._by_letter:
            body |= {"logprobs": True, "top_logprobs": MOST_LETTERS, "max_completion_tokens": 1}
        else:
            body["response_format"] = self._format()
        if ask.max_output_tokens is not None:
            body["max_completion_tokens"] = ask.max_output_tokens
        if ask.temperature is not None:
            body["temperature"] = ask.temperature
        body["seed"] = ask.seed * _SEEDS_OF_A_PASS + draw
        return body | ask.extra

    def _messages(self, question: Question) -> list[dict[str, str]]:
        """Return the messages; what all rows share comes first, so that servers can cache it."""
        names = {"label": self._described(question.label)} if self.several else {}
        if self._by_letter:
            lines = [f"{letter}. {self._described(name)}" for letter, name in self.letters.items()]
            how = "Answer with the letter of one choice, and with nothing else."
        else:
            lines = [f"- {self._described(name)}" for name in self.choices]
            how = 'Answer with a JSON object {"label": NAME}, where NAME is one of the choices.'
        names["labels"] = "\n".join(lines)
        template = f"{self.ask.prompt}\n\n{{labels}}" if self.several else self.ask.prompt
        system = _filled(template, names)
        messages = [{"role": "system", "content": f"{system.rstrip()}\n\n{how}"}]
        for example in self.ask.examples:
            messages.append({"role": "user", "content": self._text(example.texts)})
            messages.append({"role": "assistant", "content": self._answer(example.label)})
        messages.append({"role": "user", "content": self._text(question.texts)})
        return messages

    def _described(self, label: str) -> str:
        description = self.ask.descriptions.get(label)
        return f"{label}: {description}" if description else label

    def _text(self, texts: tuple[str, ...]) -> str:
        return _filled(self.ask.text, dict(zip(self.columns, texts, strict=True)))

    def _answer(self, label: str) -> str:
        if self._by_letter:
            return ascii_uppercase[self.choices.index(label)]
        return json.dumps({"label": label}, ensure_ascii=False)

    def _format(self) -> dict[str, Any]:
        """Return the structured output: an object with one of the choices."""
        label = {"type": "string", "enum": list(self.choices)}
        schema = {
            "type": "object",
            "properties": {"label": label},
            "required": ["label"],
            "additionalProperties": False,
        }
        answer = {"name": "answer", "strict": True, "schema": schema}
        return {"type": "json_schema", "json_schema": answer}

    def answer(self, reply: Reply) -> Answer:
        """Read a reply; one that is no choice has a reason.

        Raises:
            UserError: the reply has no log-probabilities.
        """
        choice = reply.choices[0]
        if choice.finish_reason == "content_filter" or choice.message.refusal:
            said = choice.message.refusal or "content filter"
            return Answer(reason=f"{REFUSED}: {said!r:.200}")
        if self._by_letter:
            return self._by_probabilities(choice)
        content = choice.message.content or ""
        try:
            label = json.loads(content)["label"]
        except (ValueError, TypeError, KeyError):
            label = None
        if label not in self.choices:
            cut = ", and was cut" if choice.finish_reason == "length" else ""
            return Answer(reason=f"{OUTSIDE}: {content!r:.200}{cut}")
        return Answer(probabilities={label: 1.0})

    def _by_probabilities(self, choice: Choice) -> Answer:
        """Read the distribution over the letters from the alternatives of the first token."""
        tokens = choice.logprobs.content if choice.logprobs else None
        if not tokens or not tokens[0].top_logprobs:
            raise UserError(
                "expected the log-probabilities of the first token, and the server sent none: "
                "models that reason give none, and some servers have none",
                hint="ask for draws or for the label alone: ask.answer=samples or ask.answer=label",
            )
        masses: dict[str, float] = {}
        for each in tokens[0].top_logprobs:
            name = self.letters.get(each.token.strip())
            if name is not None:  # "A" and " A" are two tokens for one choice
                masses[name] = masses.get(name, 0.0) + math.exp(min(each.logprob, 0.0))
        mass = math.fsum(masses.values())
        if mass < _LEAST_MASS:
            token = tokens[0].top_logprobs[0].token
            share = f"{mass:.2f} of the probability is on the letters"
            return Answer(mass=mass, reason=f"{OUTSIDE}: first token {token!r:.60}, {share}")
        probabilities = {name: masses[name] / mass for name in self.choices if name in masses}
        return Answer(probabilities=probabilities, mass=mass)


REFUSED = "the model refused"
OUTSIDE = "the model answered outside of the labels"


class _Loose(BaseModel):
    """A part of a reply: what is not needed may be anything."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Alternative(_Loose):
    """A token that the model could have said."""

    token: str
    logprob: float


class Token(_Loose):
    """A token of the reply."""

    top_logprobs: tuple[Alternative, ...] = ()


class Logprobs(_Loose):
    """The tokens of a reply with their alternatives."""

    content: tuple[Token, ...] | None = None


class Message(_Loose):
    """The text of a reply."""

    content: str | None = None
    refusal: str | None = None


class Choice(_Loose):
    """One reply of several; ad2kit asks for one."""

    message: Message
    finish_reason: str | None = None
    logprobs: Logprobs | None = None


class Tokens(_Loose):
    """What the server counts."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class Reply(_Loose):
    """A completion of the protocol, as far as it is read."""

    model: str
    choices: tuple[Choice, ...]
    usage: Tokens | None = None

    @property
    def tokens(self) -> Usage:
        """The tokens of the request; zeros if the server does not count them."""
        usage = self.usage or Tokens()
        return Usage(prompt_tokens=usage.prompt_tokens, completion_tokens=usage.completion_tokens)


def parsed(content: bytes) -> Reply | None:
    """Return the reply in the body of a response; None if it is none, or half of one."""
    try:
        reply = Reply.model_validate_json(content)
    except ValidationError:
        return None
    return reply if reply.choices else None


def _filled(template: str, names: Mapping[str, str]) -> str:
    """Return a template with the named placeholders filled; what a text holds is not looked at."""
    if not names:
        return template
    pattern = "|".join(re.escape(f"{{{name}}}") for name in names)
    return re.sub(pattern, lambda match: names[match[0][1:-1]], template)
