"""The ``ask`` section of a recipe: how a language model is asked for its answers."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from ad2kit.run.sections import (
    DataRecipe,
    LabelName,
    NotNegative,
    Positive,
    Section,
    Seed,
)


class AskExample(Section):
    """A labelled row that a language model is shown before it is asked: its texts and its label."""

    texts: Annotated[tuple[str, ...], Field(min_length=1, max_length=2)]
    label: LabelName


class AskRecipe(Section):
    """How `ad2kit ask` gets a teacher's answers from a language model; no other command reads it.

    ``prompt`` is the system message. In it ``{labels}`` stands for the list of the labels and their
    ``descriptions``; for several labels ``{label}`` stands for the one that is asked about.
    ``text`` is the message of a row; in it ``{COLUMN}`` stands for the text of that column.
    ``examples`` are shown as earlier messages with their answers. ``seed`` 0 lists the labels in
    their order, another seed in an order of its own.

    ``answer`` says what is asked for:

    - ``logprobs``: the distribution over at most 20 labels, which get letters, from the
      log-probabilities of the first token. Models that reason give none.
    - ``samples``: the shares of the labels among ``samples`` draws, each a request of its own.
    - ``label``: one label, without a probability.

    The last two ask for a structured output, an enumeration of the labels. Null for ``temperature``
    and ``max_output_tokens`` sends none, so that the server's own count. ``extra`` holds further
    fields of each request. Prices are those of a million tokens, in any currency.
    """

    prompt: str
    text: str
    descriptions: dict[str, str] = Field(default={})
    examples: tuple[AskExample, ...] = ()
    answer: Literal["logprobs", "samples", "label"] = "logprobs"
    samples: Annotated[int, Field(ge=2, le=1000)] = 5
    temperature: NotNegative | None = None
    max_output_tokens: Positive | None = None
    seed: Seed = 0
    extra: dict[str, Any] = Field(default={})
    input_price: NotNegative | None = None
    output_price: NotNegative | None = None

    @property
    def draws(self) -> int:
        """The number of requests for each question."""
        return self.samples if self.answer == "samples" else 1


MOST_LETTERS = 20
"""The most log-probabilities of a token that servers of the protocol return."""

# The fields of a request that ad2kit sets itself.
_OWN_FIELDS = {"model", "messages", "n", "stream", "seed", "logprobs", "top_logprobs"}


def wrong_ask(ask: AskRecipe, data: DataRecipe) -> str:
    """Return what does not fit between the keys of ``ask`` and those of ``data``; else ""."""
    if data.task == "regression":
        return "a language model is asked for labels, and data.task is regression"
    if data.labels is None:
        return "it needs the names of the labels: set data.labels=[...]"
    if ask.answer == "logprobs" and data.task == "single_label" and len(data.labels) > MOST_LETTERS:
        return (
            f"answer: servers return at most {MOST_LETTERS} log-probabilities, and there are "
            f"{len(data.labels)} labels: set ask.answer to samples or label"
        )
    for name in (*ask.descriptions, *(example.label for example in ask.examples)):
        if name not in data.labels:
            return f"descriptions and examples: {name!r} is none of data.labels"
    if own := _OWN_FIELDS.intersection(ask.extra):
        return f"extra: ad2kit sets '{min(own)}' itself, by the other keys of ask"
    return _wrong_examples(ask, data) or _wrong_templates(ask, data)


def _wrong_examples(ask: AskRecipe, data: DataRecipe) -> str:
    """Return what is wrong with the examples; else ""."""
    if data.task == "multi_label" and ask.examples:
        return "examples: each of several labels is a question of its own: describe it instead"
    for example in ask.examples:
        if len(example.texts) != len(data.text_columns):
            return (
                f"examples: expected {len(data.text_columns)} texts, as in data.text_columns, "
                f"found {len(example.texts)} in {example.texts[0]!r:.60}"
            )
    return ""


def _wrong_templates(ask: AskRecipe, data: DataRecipe) -> str:
    """Return what a template lacks; else ""."""
    placeholder = "{label}" if data.task == "multi_label" else "{labels}"
    columns = [f"{{{column}}}" for column in data.text_columns]
    for key, template, names in (
        ("prompt", ask.prompt, [placeholder]),
        ("text", ask.text, columns),
    ):
        for name in names:
            if name not in template:
                return f"{key}: expected {name} in it, found {template!r:.60}"
    return ""
