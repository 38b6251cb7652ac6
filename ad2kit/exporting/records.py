"""The records of an export: a variant, its tokenisation, the search for int8, and checks."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import (
    Field,
    computed_field,
)

from ad2kit.run.records import Part, Record
from ad2kit.run.sections import LongTexts, Provider, Task, TextLength

Verdict = Literal["passed", "FAILED", "not shown"]
"""``not shown``: there are too few validation rows to say whether the check passed or failed."""


class QuantisationTrial(Part):
    """One way to quantise, tried on the rows of ``select``.

    ``agreement`` is the share of labels that equal those of fp32 (a correlation for a regression):
    the lesser value of batches and of texts one by one. ``rms_error`` is the root mean square of
    the differences of the logits from those of fp32: the greater value of both. ``batch_ms`` is the
    time of a text in batches of 32, ``alone_ms`` that of a text alone.
    """

    way: str
    agreement: float
    rms_error: float
    points_lost: float
    failures: tuple[str, ...]
    size_bytes: int
    batch_ms: float
    alone_ms: float


class QuantisationSearch(Record):
    """The trials of the search for int8, in order, and the way that was taken."""

    # Version 1 had no error of the logits.
    schema_version: Literal[2] = 2  # type: ignore[assignment]
    inputs: str
    rows: int
    seconds: float
    taken: str
    trials: tuple[QuantisationTrial, ...]


class RowsNeeded(Part):
    """The number of ``rows`` that show that a check passes; ``present`` is the number at hand.

    Four of five samples of ``rows`` rows pass if the true value is ``truth``. ``rows`` is null if
    no number of rows is enough.
    """

    truth: float
    rows: int | None
    present: int

    @property
    def words(self) -> str:
        """A sentence on the number of rows that would show the check."""
        if self.rows is None:
            return f"no number of validation rows would show a true value of {self.truth:.4g}"
        need = f"about {self.rows:,} validation rows show a true value of {self.truth:.4g}"
        if self.rows > self.present:
            return f"{need} (with 80 % power), and these are {self.present:,}"
        return (
            f"{need} (with 80 % power), and these are {self.present:,}: more rows alone will "
            "hardly show it"
        )


class Check(Part):
    """One threshold of the gate, the measured value, and a ``note`` on a possible cause.

    An estimate from validation rows also has a 95 % ``interval``. The check passes if the value
    keeps within the threshold and the interval keeps within the ``limit``. It fails if the whole
    interval misses the threshold. Otherwise the rows show neither, and ``needed`` says how many
    rows would. A value that is no estimate has no interval, and passes or fails.
    """

    question: Literal["export fidelity", "conversion cost", "distillation quality"]
    name: str
    value: float
    bound: Literal["at most", "at least"]
    threshold: float
    interval: tuple[float, float] | None = None
    limit: float | None = None
    needed: RowsNeeded | None = None
    note: str | None = None

    @property
    def reached(self) -> bool:
        """Whether the value keeps within its threshold, without its interval; NaN does not."""
        return self._within(self.value, self.threshold)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def verdict(self) -> Verdict:
        """Whether the rows show that the check passed, or that it failed, or neither."""
        if self.interval is None:
            return "passed" if self.reached else "FAILED"
        low, high = self.interval
        worst, best = (low, high) if self.bound == "at least" else (high, low)
        if self.reached and (self.limit is None or self._within(worst, self.limit)):
            return "passed"
        return "not shown" if self._within(best, self.threshold) else "FAILED"

    @computed_field  # type: ignore[prop-decorator]
    @property
    def passed(self) -> bool:
        """Whether it is shown that the value keeps within its threshold."""
        return self.verdict == "passed"

    def _within(self, value: float, threshold: float) -> bool:
        return value <= threshold if self.bound == "at most" else value >= threshold

    @property
    def measured(self) -> str:
        """The value and its interval."""
        if self.interval is None:
            return f"{self.value:.4g}"
        low, high = self.interval
        return f"{self.value:.4g} [{low:.4g}, {high:.4g}]"

    @property
    def expected(self) -> str:
        """The threshold, and the limit of the interval if there is one."""
        words = f"{self.bound} {self.threshold:g}"
        if self.limit is None:
            return words
        side = "from" if self.bound == "at least" else "up to"
        return f"{words}, its interval {side} {self.limit:g}"

    @property
    def words(self) -> str:
        """The check as a sentence: the measured and expected value, the rows needed, the note."""
        notes = [] if self.note is None else [self.note]
        if self.verdict == "not shown" and self.needed is not None:
            notes.insert(0, f"not shown: {self.needed.words}")
        return "; ".join([f"{self.name} is {self.measured}, expected {self.expected}", *notes])


class Company(Part):
    """How much the answers of a variant depend on the texts that share a batch.

    ``texts`` were answered alone and in batches of random others. ``flips`` is the share of them
    whose answer changed, and ``shift`` is the largest change of a probability. For a regression
    ``shift`` is in standard deviations of the labels, and only answers that are not finite flip.
    """

    texts: int
    flips: float
    shift: float


class Tokenisation(Part):
    """The settings of tokenisation beside ``tokenizer.json``; see :mod:`ad2kit.exporting.tokenise`.

    A text that is cut loses its end, or its beginning if ``truncation_side`` is "left". The
    model gets the segment ids of a pair if ``segment_ids``, else zeros.
    """

    truncation_side: Literal["left", "right"]
    segment_ids: bool
    split_special_tokens: bool
    pad_token_id: int
    pad_type_id: int


class OnnxArtifact(Record):
    """``manifest.json`` of one ONNX variant: the contents of the folder and their origin.

    ``long_texts`` says what happens to a text of more than ``max_length_tokens`` tokens, as in the
    recipe; an artefact of an older version cuts it. ``provider`` is the default execution provider.
    ``nodes`` counts the nodes of each fused kind.
    The logits are divided by ``temperature`` before they become probabilities. For steady and int8,
    ``weights_in_8_bits`` is the share of the weights in 8 bits, and ``in_float`` names the nodes
    that keep a hundredth or more of all weights in float.
    """

    file_name: ClassVar[str] = "manifest.json"
    cure: ClassVar[str] = "run `ad2kit export` on its run again, then `ad2kit parity`"

    variant: str
    inputs: str
    task: Task
    labels: tuple[str, ...]
    max_length_tokens: int
    long_texts: LongTexts = "cut"
    window_overlap_tokens: int = Field(default=0, ge=0)
    max_windows: int = Field(default=1, ge=1)
    tokenisation: Tokenisation
    text_columns: int
    provider: Provider
    nodes: dict[str, int]
    temperature: float = Field(gt=0, allow_inf_nan=False)
    files: dict[str, str]
    model_bytes: int
    weights_in_8_bits: float | None = None
    in_float: tuple[str, ...] = ()
    lineage: dict[str, str]

    @property
    def length(self) -> TextLength:
        """The maximum length of a text, and what happens to a longer one."""
        return TextLength(
            self.max_length_tokens, self.long_texts, self.window_overlap_tokens, self.max_windows
        )
