"""The sections of a recipe: frozen, strictly typed, and closed to unknown keys."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NotNegative = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
AboveZero = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


METRICS_OF: dict[Task, tuple[Metric, ...]] = {
    "single_label": ("accuracy", "f1", "macro_f1", "matthews"),
    "multi_label": ("micro_f1", "macro_f1", "accuracy"),
    "regression": ("pearson", "spearman"),
}


def _as_text(value: Any) -> Any:
    """Return a whole number as text, so that class 3 in a recipe matches class 3 in a table."""
    return str(value) if type(value) is int else value


LabelName = Annotated[str, BeforeValidator(_as_text)]
Variant = Literal["fp32", "fused", "fp16", "steady", "int8"]
Provider = Literal["cpu", "cuda", "tensorrt", "openvino"]
Task = Literal["single_label", "multi_label", "regression"]
Metric = Literal["accuracy", "f1", "macro_f1", "micro_f1", "matthews", "pearson", "spearman"]
LongTexts = Literal["cut", "refuse", "windows"]


class TextLength(NamedTuple):
    """The maximum length of a text with its special tokens, and the treatment of longer texts.

    See :class:`DataRecipe`. Only ``windows`` uses the overlap and the number of windows.
    """

    max_length_tokens: int
    long_texts: LongTexts = "cut"
    window_overlap_tokens: int = 0
    max_windows: int = 1

    @property
    def words(self) -> str:
        """What happens to a long text, as a sentence."""
        return {
            "cut": f"texts are cut to {self.max_length_tokens} tokens",
            "refuse": f"texts of more than {self.max_length_tokens} tokens are refused",
            "windows": f"texts of more than {self.max_length_tokens} tokens are read in windows",
        }[self.long_texts]

    @property
    def facts(self) -> tuple[int | str, ...]:
        """The settings that decide how a text is read, for fingerprints."""
        return self[:1] if self.long_texts == "cut" else tuple(self)


class Section(BaseModel):
    """A part of a recipe: frozen, strictly typed, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class DataRecipe(Section):
    """Where the texts lie and how they are read.

    ``source`` is a folder of tables (:mod:`ad2kit.tables.formats`), ``hub://owner/name`` or
    ``hub://owner/name/config``, with ``@revision`` at the end for one branch, tag or commit, or
    ``embedded://opinions``. ``train`` and ``validation`` then name its files (without suffix) or
    splits; null stands for "train" and "validation". Without a source both are paths of files.
    ``unlabelled`` lists files (also .txt, one text a line) or
    ``hub://owner/name[/config][@revision]#split``: on these texts the teacher alone teaches the
    student. ``labels`` lists the names in the order of the teacher's outputs. This is also the
    order of their ids, unless the source names the ids. Null takes the names from the source, or
    else from the rows, sorted.

    ``task`` is ``single_label`` (one of several classes), ``multi_label`` (any number of labels:
    a list, names separated by commas, or 0 or 1 for each of ``labels``) or ``regression`` (a
    number). The mean of ``metrics`` judges a model; null stands for accuracy, micro-F1, or Pearson
    and Spearman correlation. ``select_from`` says which rows choose the kept update: rows taken
    from the training rows, or, as in many papers, the rows of ``validation``, which makes the
    scores on them too good. ``max_leakage`` is the largest share of the validation texts that may
    also be training texts.

    A text of more than ``max_length_tokens`` tokens (with the special tokens) is a long text.
    ``long_texts`` says what happens to it, in training, gate, service and bulk scoring alike:
    ``cut`` cuts it to the maximum length, on the side that the tokenizer says. ``refuse`` refuses
    it. ``windows`` reads it in windows of the maximum length; its logits are the mean of their
    logits, weighted by their tokens. A window shares ``window_overlap_tokens`` tokens with the
    window before; null stands for an eighth of the maximum length. A text of more than
    ``max_windows`` windows is refused. The windows of a pair go over its second text; each holds
    the whole first text.

    ``label_column`` may list several columns, one for each label, with 0 or 1 in each cell.
    ``label_separator`` stands between several labels in one cell.

    A row with an empty cell in the label column is an error with ``missing_labels: refuse``. With
    ``accept`` it has no label; with ``label_column: null`` no row has one. Such rows teach by the
    answers of the teacher alone, and are judged by them: see :mod:`ad2kit.gate.questions`.

    ``max_unlabelled_rows`` is the largest number of rows of ``unlabelled``, all entries together.
    If it is set, data sets of the hub among them are read as streams, and are not downloaded.

    ``csv_quotes`` says how a quotation mark inside of a quoted cell of CSV is written: ``doubled``,
    or with a ``backslash`` before it, as Spark writes it. A row that cannot be read is an error
    with ``bad_rows: refuse``; with ``skip`` it is left out and listed in the run folder.
    """

    source: str | None = None
    train: str | None = None
    validation: str | None = None
    unlabelled: tuple[str, ...] = ()
    task: Task = "single_label"
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1)] | None = None
    text_columns: Annotated[tuple[str, ...], Field(min_length=1, max_length=2)]
    label_column: str | Annotated[tuple[str, ...], Field(min_length=2)] | None
    label_separator: Annotated[str, Field(min_length=1)] = ","
    labels: Annotated[tuple[LabelName, ...], Field(min_length=2)] | None = None
    missing_labels: Literal["refuse", "accept"] = "refuse"
    max_length_tokens: Annotated[int, Field(ge=8)]
    long_texts: LongTexts = "cut"
    window_overlap_tokens: Annotated[int, Field(ge=0)] | None = None
    max_windows: Positive = 32
    max_train_rows: Positive | None = None
    max_unlabelled_rows: Positive | None = None
    select_from: Literal["train", "validation"] = "train"
    max_leakage: Fraction = 0.1
    csv_quotes: Literal["doubled", "backslash"] = "doubled"
    bad_rows: Literal["refuse", "skip"] = "refuse"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.source is None and None in (self.train, self.validation):
            msg = "give 'source', or both of 'train' and 'validation'"
            raise ValueError(msg)
        embedded = (self.source or "").startswith("embedded://")
        if embedded and (self.train, self.validation) != (None, None):
            msg = "an embedded source has no other splits: leave 'train' and 'validation' out"
            raise ValueError(msg)
        task_metrics = METRICS_OF[self.task]
        for metric in self.metrics or ():
            if metric not in task_metrics:
                msg = (
                    f"metric '{metric}' does not fit a {self.task} task: {', '.join(task_metrics)}"
                )
                raise ValueError(msg)
        names = self.labels or ()
        for name in names:
            if name != name.strip() or not name:
                msg = f"labels: {name!r} is empty, or has blanks around it"
                raise ValueError(msg)
            if names.count(name) > 1:
                msg = f"labels: {name!r} is there twice"
                raise ValueError(msg)
        if self.task != "multi_label" and len(self.label_columns) > 1:
            msg = "several columns of labels are for the task multi_label"
            raise ValueError(msg)
        if self.task == "regression" and self.labels is not None:
            msg = "a regression task has a number and no 'labels'"
            raise ValueError(msg)
        if self.label_column is None and self.task != "regression" and self.labels is None:
            msg = "without a 'label_column' nothing else names the labels: give 'labels'"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _windows_advance(self) -> Self:
        overlap = self.window_overlap_tokens
        if overlap is None:
            return self
        if self.long_texts != "windows":
            msg = (
                f"'window_overlap_tokens' belongs to windows, and 'long_texts' is "
                f"'{self.long_texts}': set data.long_texts=windows, or leave it out"
            )
            raise ValueError(msg)
        if overlap > self.max_length_tokens // 2:
            msg = (
                f"'window_overlap_tokens' is {overlap}: expected at most half of "
                f"'max_length_tokens', {self.max_length_tokens // 2}"
            )
            raise ValueError(msg)
        return self

    @property
    def length(self) -> TextLength:
        """The maximum length of a text, and what happens to a longer one."""
        if self.long_texts != "windows":
            return TextLength(self.max_length_tokens, self.long_texts)
        overlap = self.window_overlap_tokens
        if overlap is None:
            overlap = self.max_length_tokens // 8
        return TextLength(self.max_length_tokens, "windows", overlap, self.max_windows)

    @property
    def label_columns(self) -> tuple[str, ...]:
        """The one column of the label, or a column for each label; none without labels."""
        if self.label_column is None:
            return ()
        return (self.label_column,) if isinstance(self.label_column, str) else self.label_column

    @property
    def may_lack_labels(self) -> bool:
        """Whether a row may be without a label."""
        return self.label_column is None or self.missing_labels == "accept"

    @property
    def judged_by(self) -> tuple[Metric, ...]:
        """The metrics of the recipe, or the usual metrics of the task if it names none."""
        usual: dict[Task, tuple[Metric, ...]] = {
            "single_label": ("accuracy",),
            "multi_label": ("micro_f1",),
            "regression": ("pearson", "spearman"),
        }
        return self.metrics or usual[self.task]


class TrainRecipe(Section):
    """Optimisation: AdamW, linear warm-up and decay, gradient-norm clipping.

    The training lasts ``epochs`` epochs, and at least ``min_updates`` updates. ``lr`` is the peak
    learning rate; null computes it from the width of the encoder
    (:func:`ad2kit.training.schedule.rate_of_width`). The rate rises over the share ``warmup_ratio``
    of the updates and falls over the last share ``decay_ratio``; 1 makes it fall from the warm-up
    on. The model is evaluated ``evaluations`` times at equal distances; null evaluates it at the
    end of each epoch. After ``patience`` evaluations without an improvement the rate begins to fall
    early; null disables this. ``start_head`` fits the last layer by regression before the first
    update (:mod:`ad2kit.models.head`).

    ``class_weights: balanced`` gives rare classes the same weight as frequent ones in the loss of
    the hard labels: a row of class c gets n / (k n_c), for n rows, k classes, and n_c rows of c.
    With several labels each label is such a choice between two classes
    (:func:`ad2kit.training.losses.balanced_weights`).
    """

    epochs: Positive
    min_updates: Annotated[int, Field(ge=0)] = 0
    batch_size: Positive
    accumulation_steps: Positive = 1
    lr: AboveZero | None
    warmup_ratio: Fraction = 0.1
    decay_ratio: Fraction = 1.0
    evaluations: Annotated[int, Field(ge=1, le=20)] | None = None
    patience: Positive | None = None
    start_head: bool = False
    weight_decay: NotNegative = 0.01
    max_grad_norm: AboveZero = 1.0
    checkpoint_every_steps: Positive = 200
    class_weights: Literal["none", "balanced"] = "none"

    @property
    def rate(self) -> float:
        """The peak learning rate; ``lr`` must be set."""
        if self.lr is None:
            msg = "the learning rate by the width of the encoder was not filled in"
            raise ValueError(msg)
        return self.lr

    @property
    def parts(self) -> int:
        """The number of parts in which progress is counted, about one per evaluation."""
        return self.evaluations or self.epochs

    @model_validator(mode="after")
    def _patience_has_something_to_end(self) -> Self:
        if self.patience is not None and self.decay_ratio == 1:
            msg = "'patience' begins the last part early: give a 'decay_ratio' below 1, such as 0.2"
            raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _micro_batches_are_whole(self) -> Self:
        if self.batch_size % self.accumulation_steps:
            msg = (
                f"batch_size {self.batch_size} is not a multiple of "
                f"accumulation_steps {self.accumulation_steps}"
            )
            raise ValueError(msg)
        return self


class PlanRecipe(Section):
    """The plan that `--max-minutes` made before the first update; a record without any effect.

    The planned epochs and rows are in their own sections. ``seconds_per_update`` and ``updates``
    have the keys ``teacher`` (if it is fine-tuned) and ``student``. ``read_seconds`` is the time in
    which the teacher reads all training texts, and both models read `select`. ``minutes`` is the
    sum.
    """

    max_minutes: AboveZero
    rows: Positive
    updates: dict[str, Positive]
    seconds_per_update: dict[str, AboveZero]
    read_seconds: AboveZero
    minutes: AboveZero


class AnswersRecipe(Section):
    """Answers of a teacher to the texts of a recipe: from tables, or from a finished classifier.

    ``files`` lists tables, or ``hub://owner/name[/config][@revision]#split``. An empty list stands
    for the tables of the data section. A row is joined to a text by ``text_columns`` (null: those
    of the data), or by the column ``key``, which is then in the tables of the data too.

    One of these keys names the columns of an answer:

    - ``probabilities``: one column for each label, in the order of ``data.labels``; or one column
      that holds a JSON list in this order, or a JSON object of labels and their probabilities. Of a
      class that the object leaves out the probability is an equal share of what is missing to 1.
    - ``logits``: the same without probabilities: any finite numbers, one for each label.
    - ``label``: the label alone, written as in the label column, or the number of a regression.
      ``confidence`` names the column of its probability, if there is one; an empty cell stands for
      certainty. The other classes share the rest.

    ``model`` is a finished classifier, written like ``teacher.model``, and takes the place of all
    other keys. ``weight`` is the weight of these answers in the mean of several.
    """

    files: tuple[str, ...] = ()
    key: str | None = None
    text_columns: Annotated[tuple[str, ...], Field(min_length=1, max_length=2)] | None = None
    probabilities: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    logits: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    label: str | None = None
    confidence: str | None = None
    model: str | None = None
    weight: AboveZero = 1.0

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that hold an answer."""
        cells = (self.label, self.confidence)
        return self.probabilities or self.logits or tuple(each for each in cells if each)

    def __str__(self) -> str:
        return self.model or ", ".join(self.files) or "the tables of the data"

    @model_validator(mode="after")
    def _has_one_kind(self) -> Self:
        kinds = ("probabilities", "logits", "label", "model")
        given = [kind for kind in kinds if getattr(self, kind) is not None]
        if len(given) != 1:
            msg = f"give one of {', '.join(kinds)}, found {' and '.join(given) or 'none'}"
            raise ValueError(msg)
        if self.confidence is not None and self.label is None:
            msg = "'confidence' belongs to 'label'"
            raise ValueError(msg)
        tables = (self.files, self.key, self.text_columns)
        if self.model is not None and tables != ((), None, None):
            msg = "a 'model' reads the texts itself: leave 'files', 'key' and 'text_columns' out"
            raise ValueError(msg)
        if self.key is not None and (self.text_columns is not None or not self.files):
            msg = "'key' joins 'files' to the data: give files, and leave 'text_columns' out"
            raise ValueError(msg)
        return self


class TeacherRecipe(Section):
    """The model to distil: ``hub://owner/name[@revision]``, ``package://module/folder``,
    ``random://bert`` (tiny, built from the seed), or a folder. ``finetune`` is null for a
    teacher that is a finished classifier. With ``accept`` the run goes on even if a simpler model
    is far better than the teacher; ``accept`` changes no weight.

    With ``model: null`` the ``answers`` are the teacher: what any system has answered to each text,
    or the mean of the probabilities of several. ``student.model`` is then required.
    """  # noqa: D205

    model: str | None
    finetune: TrainRecipe | None
    answers: tuple[AnswersRecipe, ...] = ()
    accept: bool = False

    @property
    def title(self) -> str:
        """The model, or where the answers come from, for messages and reports."""
        return self.model or f"answers of {' and '.join(map(str, self.answers))}"

    @model_validator(mode="after")
    def _is_a_model_or_answers(self) -> Self:
        if (self.model is None) != bool(self.answers):
            msg = "give a 'model', or model=null and 'answers'"
            raise ValueError(msg)
        if self.answers and self.finetune is not None:
            msg = "'finetune' trains a 'model', and 'answers' are given: set finetune=null"
            raise ValueError(msg)
        return self


class StudentRecipe(Section):
    """The student before distillation: some layers of an encoder.

    ``layers`` are zero-based indices into the layers of ``model``; null takes all layers. ``model``
    is written like the teacher's; null takes the teacher itself. A student from another checkpoint
    may have another width, depth and tokenizer. Each layer keeps the ``attention_heads`` heads and
    ``feed_forward`` neurons that are most important to the teacher
    (see :mod:`ad2kit.training.students`); null keeps all.
    """

    model: str | None = None
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] | None = None
    attention_heads: Positive | None = None
    feed_forward: Positive | None = None

    @property
    def narrower(self) -> bool:
        """Whether heads or neurons are cut out of the layers."""
        return (self.attention_heads, self.feed_forward) != (None, None)

    @model_validator(mode="after")
    def _is_not_the_teacher(self) -> Self:
        if self.model is None and self.layers is None:
            msg = "give 'layers' of the teacher, or the 'model' to start from"
            raise ValueError(msg)
        if self.model is not None and self.narrower:
            msg = "'attention_heads' and 'feed_forward' cut the teacher's layers: leave 'model' out"
            raise ValueError(msg)
        return self


class AdversaryRecipe(Section):
    """The inner maximisation of AD2: projected gradient ascent on the word embeddings.

    ``radius`` and ``step_size`` are in units of the embeddings: per coordinate for ``linf``, and of
    the Euclidean norm over an example's real tokens for ``l2``. Each adversarial pass draws its
    ``own`` dropout masks, or the masks of the clean pass are ``replayed``.
    """

    norm: Literal["linf", "l2"] = "linf"
    radius: NotNegative = 1e-5
    step_size: NotNegative = 1e-3
    steps: Positive = 1
    start: Literal["zero", "random"] = "zero"
    dropout: Literal["own", "replayed"] = "own"


class IntermediateRecipe(Section):
    """Weights of the terms on intermediate states of student and teacher; 0 leaves a term out.

    ``pkd``: normalised [CLS] states of the layers below the last (Sun et al., EMNLP 2019).
    ``hidden_states`` and ``attentions``: every layer, as in TinyBERT (Jiao et al., Findings of
    EMNLP 2020). ``value_relations``: the last layer (MiniLMv2, Wang et al., Findings of ACL 2021);
    the only term that lets widths differ.
    """

    pkd: NotNegative = 0.0
    hidden_states: NotNegative = 0.0
    attentions: NotNegative = 0.0
    value_relations: NotNegative = 0.0

    @property
    def any(self) -> bool:
        """Whether the teacher has to run beside the student."""
        return any(weight > 0 for _, weight in self)


class DistillRecipe(TrainRecipe):
    """Distillation: a weighted sum of loss terms; a term of weight 0 is left out.

    ``kd_weight * kd + alpha * adversarial + hard_label_weight * supervised + intermediate``.

    ``seed`` seeds only the order and the dropout of the student's training; null takes the seed of
    the recipe. So students of several seeds can share their data and their teacher.
    """

    seed: Seed | None = None
    temperature: AboveZero = 1.0
    kd_weight: NotNegative = 1.0
    alpha: NotNegative = 1.0
    hard_label_weight: NotNegative = 0.0
    intermediate: IntermediateRecipe = IntermediateRecipe()
    adversary: AdversaryRecipe = AdversaryRecipe()

    @property
    def imitates(self) -> bool:
        """Whether any term but the one of the hard labels has a weight."""
        return self.kd_weight > 0 or self.alpha > 0 or self.intermediate.any

    @model_validator(mode="after")
    def _learns_something(self) -> Self:
        if not self.imitates and not self.hard_label_weight:
            msg = "all loss terms have weight 0: there is nothing to learn from"
            raise ValueError(msg)
        return self


class ExportRecipe(Section):
    """The ONNX variants to write, and where they run.

    optimum exports ``fp32`` (``torch.onnx`` where optimum is absent), and the other variants are
    made from it. ``fused`` has ONNX Runtime's transformer fusions. ``fp16``, for GPUs, is made from
    ``fused``. ``steady`` and ``int8``, for CPUs, have weights of 8 bits. In ``steady`` each token
    has its own scale, so that the answer to a text does not depend on the texts beside it. ``int8``
    is the fastest passing graph among the ways of ONNX Runtime to quantise that could be tried in
    ``search_seconds``. With 0 the first passing graph is taken; this needs no clock and so gives
    the same graph each time.
    ``provider`` executes the variants in parity, bench and service; an absent provider is an error.
    ``calibrate`` fits one temperature to the labels of ``select``: the student's probabilities get
    better calibrated, and its answers do not change. ``ship`` chooses among the variants that pass
    the gate: ``steady`` is the fastest of those whose answer to a text does not depend on the texts
    beside it (of all, if there is none); ``fastest`` is the fastest of all; ``smallest`` is the one
    with the smallest file. Times are those of the latency report; before there is one, the smallest
    counts as the fastest.
    """

    variants: Annotated[tuple[Variant, ...], Field(min_length=1)] = ("fp32", "fused", "steady")
    search_seconds: NotNegative = 60.0
    provider: Provider = "cpu"
    calibrate: bool = False
    ship: Literal["steady", "fastest", "smallest"] = "steady"

    @model_validator(mode="after")
    def _fp32_is_the_reference(self) -> Self:
        if "fp32" not in self.variants:
            msg = "'fp32' must be among the variants: the others are compared with it"
            raise ValueError(msg)
        if "fp16" in self.variants and "fused" not in self.variants:
            msg = "'fp16' is made from the fused graph: add 'fused' to the variants"
            raise ValueError(msg)
        if len(set(self.variants)) < len(self.variants):
            msg = f"variants are named twice: {', '.join(self.variants)}"
            raise ValueError(msg)
        return self


class ParityRecipe(Section):
    """The thresholds of the parity gate; agreement and retention are fractions.

    Each estimate from validation rows has a target for its value and a limit for its 95 %
    interval: ``min_retained`` and ``min_retained_lower``, ``min_agreement`` and
    ``min_agreement_lower``, ``max_points_lost`` and ``max_points_lost_upper``. Where rows lack
    labels, ``min_teacher_agreement`` and ``min_teacher_agreement_lower`` judge the student by the
    answers of its teacher.

    ``max_company_flips`` is the largest share of texts whose answer may change with the texts that
    share their batch, and ``max_company_shift`` the largest change of a probability (of a
    regression, in standard deviations of the labels). With null, a probability has no bound, and a
    regression 0.5.
    """

    max_logit_gap: NotNegative = 1e-4
    max_label_flips: Annotated[int, Field(ge=0)] = 0
    min_retained: Fraction = 0.97
    min_retained_lower: Fraction = 0.95
    min_teacher_agreement: Fraction = 0.9
    min_teacher_agreement_lower: Fraction = 0.87
    min_agreement: Fraction = 0.985
    min_agreement_lower: Fraction = 0.97
    max_points_lost: NotNegative = 1.0
    max_points_lost_upper: NotNegative = 3.0
    max_company_flips: Fraction = 0.03
    max_company_shift: NotNegative | None = None
    bootstrap_samples: Annotated[int, Field(ge=100)] = 2_000


class BenchRecipe(Section):
    """Batch sizes and text lengths of the latency report.

    ``lengths_tokens`` null takes those of 16, 32 and 128 that ``data.max_length_tokens`` allows,
    because no text is longer than that.
    """

    batch_sizes: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1, 8, 32)
    lengths_tokens: Annotated[tuple[Positive, ...], Field(min_length=1)] | None = None
    seconds_per_cell: AboveZero = 1.0


class ComputeRecipe(Section):
    """Hardware: ``auto`` takes the accelerator if there is one; null threads takes all cores.

    ``compile`` compiles the layers with torch.compile. ``gradient_checkpointing`` recomputes
    activations in the backward pass instead of keeping them: less memory, a third more time.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    threads: Positive | None = None
    compile: bool = False
    gradient_checkpointing: bool = False
