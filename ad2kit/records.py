"""The frozen types that a run writes to disk, and nothing else.

Each file carries ``schema_version``; a file of another version is refused, not guessed at.
Numbers carry their unit in their name. Fractions lie in [0, 1].
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    computed_field,
    model_validator,
)

from ad2kit.errors import RunError
from ad2kit.sections import (  # noqa: TC001  (pydantic reads them at run time)
    Metric,
    Provider,
    Task,
)

if TYPE_CHECKING:
    from pathlib import Path

SCHEMA_VERSION: Literal[1] = 1

P99_TARGET_MS = 50.0
"""For which capacity is stated where nothing else was asked for."""

BUSY_SPREAD = 1.3
"""Rounds of the same calls that differ by more than this were not alone on the machine."""


class Part(BaseModel):
    """A piece of a record: frozen, closed to unknown keys.

    What is computed from other fields is written for readers and never read back: a verdict in
    an edited file has no effect, only the values have. A value that is no number is written as
    "NaN" or "Infinity", because JSON has no such number and null would not be one again.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="strings")

    @model_validator(mode="before")
    @classmethod
    def _compute_again(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if key not in cls.model_computed_fields}


class Record(Part):
    """Base of everything that is a file, or a line of one, of its own."""

    cure: ClassVar[str] = "delete it and run its stage again"
    schema_version: Literal[1] = SCHEMA_VERSION

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read and check one record.

        Raises:
            RunError: the file is missing, not a record of this type, or of another version.
        """
        try:
            content = path.read_bytes()
        except FileNotFoundError as error:
            raise RunError(
                f"{path} is missing", hint="run the stage that writes it: `ad2kit run` does all"
            ) from error
        return cls.parse(content, str(path))

    @classmethod
    def parse(cls, content: bytes, where: str) -> Self:
        """Check the content of one record, which came from ``where``.

        Raises:
            RunError: it is not a record of this type, or of another version.
        """
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            raise RunError(
                f"{where} is not a {cls.__name__} of schema version "
                f"{cls.model_fields['schema_version'].default}: "
                f"{key}: {first['msg']}",
                hint=f"the file was edited or comes from another version of ad2kit; {cls.cure}",
            ) from error


class StepRecord(Record):
    """One update of the training loop.

    ``terms`` holds the loss terms in nats, before their weights. ``grad_norm`` is the global
    Euclidean norm before clipping. ``seconds`` is of the update alone. The rest is set where the
    model was evaluated after this update: ``select_score`` and, for a student, ``select_distance``
    (from its teacher); with an adversary ``inner_loss_before`` and ``inner_loss_after``, the
    distance on some rows of ``select`` without and with what the ascent finds, without dropout.
    """

    cure: ClassVar[str] = "delete it, and what is left of its training (`checkpoint` beside it)"

    # 1 had the adversary's gain of each update.
    schema_version: Literal[2] = 2  # type: ignore[assignment]
    phase: Literal["teacher", "student"]
    step: int
    total_steps: int
    epoch: int
    lr: float
    loss: float
    terms: dict[str, float]
    grad_norm: float
    examples: int
    seconds: float
    inner_loss_before: float | None = None
    inner_loss_after: float | None = None
    select_score: float | None = None
    select_distance: float | None = None

    @property
    def adversarial_gain(self) -> float | None:
        """How much the ascent raised the distance."""
        if self.inner_loss_before is None or self.inner_loss_after is None:
            return None
        return self.inner_loss_after - self.inner_loss_before


class SelectPoint(Part):
    """A model on ``select`` after one update: its score, and a student's distance from its teacher.

    ``constant`` says that it gives every row the same answer.
    """

    step: int
    score: float
    distance: float | None = None
    constant: bool = False


class Selection(Part):
    """Which update of a training was kept, and why; see :mod:`ad2kit.selection`.

    ``best_step`` has the best score; ``good_enough`` counts the updates that came into question.
    ``points`` holds both curves, and ends with the last update.
    """

    kept_step: int
    best_step: int
    good_enough: int
    points: tuple[SelectPoint, ...]
    reason: str

    @property
    def kept(self) -> SelectPoint:
        """The point of the kept update."""
        return next(point for point in self.points if point.step == self.kept_step)


class SplitFacts(Part):
    """What one split holds: its size, its class counts, and how many texts were truncated."""

    rows: int
    class_counts: dict[str, int]
    truncated: int
    sha256: str


class DistillReport(Record):
    """What the distill stage did, and on which inputs.

    ``train_seconds`` sums the student's updates; teacher, evaluation and saving are not in it.
    ``learning_rates`` are the highest of teacher and student, those of the recipe or by the width
    of the encoder. ``mean_clean_kl`` and ``mean_adversarial_gain`` are means over the evaluations
    (see :class:`StepRecord`), the first over the updates where there is no adversary.
    ``selection`` is None where there was nothing to train.
    """

    # 1 knew which update was the best, and not why.
    schema_version: Literal[2] = 2  # type: ignore[assignment]
    inputs: str
    labels: tuple[str, ...]
    splits: dict[str, SplitFacts]
    teacher_sha256: str
    student_sha256: str
    teacher_parameters: int
    student_parameters: int
    task: Task
    metrics: tuple[Metric, ...]
    teacher_select_score: float
    student_select_score: float
    learning_rates: dict[str, float]
    selection: Selection | None
    steps: int
    train_seconds: float
    examples_per_s: float
    peak_memory_mb: dict[str, float]
    mean_clean_kl: float
    mean_adversarial_gain: float | None
    verdict: str
    environment: dict[str, str]


class ModelManifest(Record):
    """``sha256.json`` of a saved teacher or student: what it was made from, and its files."""

    inputs: str
    files: dict[str, str]


class Tokenisation(Part):
    """What makes ids of a text beside ``tokenizer.json``; see :mod:`ad2kit.tokenise`.

    A text that is too long loses its end, or its beginning where ``truncation_side`` is "left".
    The model is fed the segments of a pair if ``segment_ids``, else zeros.
    """

    truncation_side: Literal["left", "right"]
    segment_ids: bool
    split_special_tokens: bool
    pad_token_id: int
    pad_type_id: int


class OnnxArtifact(Record):
    """``manifest.json`` of one ONNX variant: what the folder holds and where it comes from.

    ``provider`` executes it unless told otherwise; ``nodes`` counts the fused kinds of nodes; the
    logits are divided by ``temperature`` before they become probabilities. Of int8,
    ``weights_in_8_bits`` is the share of its weights, and ``in_float`` names the nodes that keep
    theirs in float.
    """

    file_name: ClassVar[str] = "manifest.json"
    cure: ClassVar[str] = "run `ad2kit export` on its run again, then `ad2kit parity`"

    variant: str
    inputs: str
    task: Task
    labels: tuple[str, ...]
    max_length_tokens: int
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


class LatencyCell(Part):
    """Timed calls of one system at one shape; the percentiles are of whole calls.

    ``p99_ms`` is None where fewer than 100 calls were timed: it would be the slowest of them, which
    is ``max_ms``. ``rounds_ms`` holds the median of each round, in which the systems took turns.
    """

    system: str
    batch_size: int
    length_tokens: int
    calls: int
    p50_ms: float
    p90_ms: float
    p99_ms: float | None
    max_ms: float | None = None
    rounds_ms: tuple[float, ...] = ()
    texts_per_s: float

    @property
    def tail_ms(self) -> float:
        """What 99 of 100 calls keep within; the slowest call where there are fewer than 100."""
        known = self.p99_ms if self.p99_ms is not None else self.max_ms
        return math.inf if known is None else known

    @property
    def spread(self) -> float:
        """The slowest round over the fastest; 1 where the rounds are not known."""
        return max(self.rounds_ms, default=1.0) / min(self.rounds_ms, default=1.0)


class Capacity(Part):
    """What one system sustains at one length within the target of its p99.

    Of the measured batch sizes whose calls keep within the target, the one with the most texts/s:
    those of a single caller that sends the next batch when the last one is answered, on all threads
    of the report. Tokenising, HTTP and queues are not in it. Batch size, rate and cost are None if
    no measured batch size keeps within the target. ``cost_per_million_texts`` is in the currency
    of the price, of a machine that is never idle.
    """

    system: str
    length_tokens: int
    batch_size: int | None = None
    texts_per_s: float | None = None
    cost_per_million_texts: float | None = None


class LatencyReport(Record):
    """Latency of the PyTorch models and of every ONNX variant, measured in one run.

    ``artifacts`` holds the sha256 of each variant's manifest. ``price_per_hour`` is what the user
    pays for this machine.
    """

    inputs: str
    artifacts: dict[str, str]
    threads: int
    environment: dict[str, str]
    sizes_bytes: dict[str, int]
    cells: tuple[LatencyCell, ...]
    p99_target_ms: float = P99_TARGET_MS
    price_per_hour: float | None = None

    @property
    def spread(self) -> float:
        """The slowest round over the fastest of the cell where they are furthest apart."""
        return max((cell.spread for cell in self.cells), default=1.0)

    @property
    def busy(self) -> bool:
        """Whether others used the machine meanwhile: rounds of the same calls differ too much."""
        return self.spread > BUSY_SPREAD

    @computed_field  # type: ignore[prop-decorator]
    @property
    def capacity(self) -> tuple[Capacity, ...]:
        """What every system sustains at every measured length."""
        lengths = sorted({cell.length_tokens for cell in self.cells})
        return tuple(
            self._capacity(system, length) for length in lengths for system in self.sizes_bytes
        )

    def _capacity(self, system: str, length: int) -> Capacity:
        within = [
            cell
            for cell in self.cells
            if (cell.system, cell.length_tokens) == (system, length)
            and cell.tail_ms <= self.p99_target_ms
        ]
        if not within:
            return Capacity(system=system, length_tokens=length)
        best = max(within, key=lambda cell: cell.texts_per_s)
        cost = self.price_per_hour and self.price_per_hour / (best.texts_per_s * 3600) * 1e6
        return Capacity(
            system=system, length_tokens=length, batch_size=best.batch_size,
            texts_per_s=best.texts_per_s, cost_per_million_texts=cost,
        )  # fmt: skip


class BentoRecord(Record):
    """The published Bento and what its service answered before it was published."""

    inputs: str
    tag: str
    variant: str
    forced: bool
    service_texts: int
    service_label_flips: int
    service_score_gap: float
