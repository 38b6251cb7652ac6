"""The records of `ad2kit ask`: the job, an answer of the model, and the final report."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import computed_field

from ad2kit.run.records import Part, Record
from ad2kit.run.sections import Task
from ad2kit.scoring.records import Job


class AskJob(Job):
    """The job of `ad2kit ask`: who was asked what; ``ask`` is the section without its prices.

    ``prompt_fingerprint`` changes if the same section is written otherwise into a request. An
    answer belongs to a text: the inputs may be others than before, and known texts are not asked
    about again.
    """

    command: ClassVar[str] = "ad2kit ask"

    base_url: str
    model: str
    ask: dict[str, Any]
    labels: tuple[str, ...]
    task: Task
    prompt_fingerprint: str = ""

    def differences(self, previous: Self) -> list[str]:
        """Return a line for each setting that differs, or one if the requests differ alone."""
        alike = previous.model_copy(update={"prompt_fingerprint": self.prompt_fingerprint})
        if lines := self._different_settings(alike):
            return lines
        if previous.prompt_fingerprint == self.prompt_fingerprint:
            return []
        how = "the same section is written otherwise into the requests now"
        if not previous.prompt_fingerprint:
            how = "whether its requests were written as now is not known: it has no fingerprint"
        return [f"{how}; the version of ad2kit that made it can go on with it"]


class Answer(Part):
    """What the model said to one request.

    ``probabilities`` of the choices that it named sum to 1; they are empty if it gave no answer,
    and then ``reason`` says why. ``mass`` is the probability of all choices together, before the
    other tokens were left out; 1 for a structured output.
    """

    probabilities: dict[str, float] = {}  # noqa: RUF012  (pydantic copies it)
    mass: float = 1.0
    reason: str = ""


class Usage(Part):
    """The tokens of one request, as the server counts them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class Agreement(Part):
    """How many of some rows have the same label twice, with the exact 95 % interval of the share.

    ``with_what`` is the column of labels, or the folder of the other answers. ``left_out`` rows
    have a cell there that is no label; ``reason`` is that of the first one. Empty cells are not
    counted.
    """

    with_what: str
    rows: int
    equal: int
    interval: tuple[float, float]
    left_out: int = 0
    reason: str = ""

    @computed_field  # type: ignore[prop-decorator]
    @property
    def share(self) -> float:
        """The share of the rows that agree; NaN without rows."""
        return self.equal / self.rows if self.rows else float("nan")


class AskReport(Record):
    """``_asked.json``: who gave the answers, to how many rows, and at what cost.

    The counts are those of all commands that worked at the job. ``reported_model`` is the model as
    the server names it. ``unasked_rows`` were left out by ``--max-rows`` or ``--max-cost``;
    ``bad_rows`` hold no text, or got no answer. ``failures`` counts the requests that were tried
    again, by reason; ``lost`` those that were in flight when a command was stopped. ``cost`` counts
    lost requests as average ones, and is null without prices. ``mean_mass`` is the mean
    probability that the model gave to all choices together.
    """

    file_name: ClassVar[str] = "_asked.json"

    output: str
    base_url: str
    model: str
    reported_model: str
    prompt_fingerprint: str
    first_answer: str
    last_answer: str
    rows: int
    answered_rows: int
    unasked_rows: int
    bad_rows: int
    texts: int
    requests: int
    refused: int
    outside: int
    lost: int
    failures: dict[str, int]
    prompt_tokens: int
    completion_tokens: int
    cost: float | None
    mean_mass: float
    requests_here: int
    seconds: float
    stopped_by: str = ""
    agreements: tuple[Agreement, ...] = ()
