"""Inference with an exported student: tokenizers and onnxruntime, without torch."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ad2kit.data import windows
from ad2kit.exporting.records import OnnxArtifact
from ad2kit.exporting.tokenise import Tokenise, stop_at_long_text
from ad2kit.run.errors import MissingExtra, ModelError, UserError
from ad2kit.run.files import check_sha256
from ad2kit.run.machine import available_cpus, may_overflow_8_bits
from ad2kit.statistics.logits import answers, scores
from ad2kit.tables.texts import is_text

try:
    import onnxruntime
    from tokenizers import Tokenizer
except ModuleNotFoundError as error:
    raise MissingExtra(error.name or "onnxruntime", extra="cpu") from error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ad2kit.exporting.tokenise import Refuse, Tokens
    from ad2kit.run.sections import Provider
    from ad2kit.tables.texts import Text


MODEL_FILE = "model.onnx"
PROVIDERS: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer for one text; the task of the model decides which fields are set.

    A single-label model sets ``label`` and its probability ``score``. A multi-label model sets
    ``labels``, all labels with a probability above one half. A regression sets ``value``.
    ``scores`` holds the probabilities of all labels, in label order; a regression has none.
    ``tokens`` counts what the model read, special tokens included; ``windows`` is set by a model
    that reads long texts in windows.
    """

    tokens: int
    truncated: bool
    windows: int | None = None
    label: str | None = None
    score: float | None = None
    labels: tuple[str, ...] | None = None
    value: float | None = None
    scores: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that are set, as plain data."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in values.items() if value is not None and value != {}}


def read_artifact(folder: Path) -> OnnxArtifact:
    """Read the manifest of a variant and compare every file with its sha256.

    Raises:
        ModelError: a file is missing, or differs from the exported one.
    """
    if not (folder / OnnxArtifact.file_name).is_file():
        raise ModelError(
            f"{folder} has no {OnnxArtifact.file_name}",
            hint="give a folder that `ad2kit export` wrote, such as runs/NAME/onnx/int8",
        )
    artifact = OnnxArtifact.read(folder / OnnxArtifact.file_name)
    hint = f"restore the file, or delete {folder} and run `ad2kit export` again"
    check_sha256(folder, artifact.files, hint=hint)
    return artifact


def open_session(graph: Path, threads: int, provider: Provider) -> onnxruntime.InferenceSession:
    """Load a graph for one provider, with ``threads`` intra-op threads.

    Raises:
        ModelError: the provider is absent, or cannot run the graph.
    """
    name = PROVIDERS[provider]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if may_overflow_8_bits():
        options.add_session_config_entry("session.x64quantprecision", "1")
    available = onnxruntime.get_available_providers()
    if name not in available:
        raise ModelError(
            f"provider '{provider}' was asked for, but this onnxruntime has no {name}, only "
            f"{', '.join(available)}",
            hint="`ad2kit doctor` says what is installed and what to do; for CUDA install "
            "'ad2kit[gpu]' without onnxruntime, or set export.provider=cpu",
        )
    # On the CPU the fused node is slower than the two nodes that it replaces.
    disabled_optimizers = ["SkipLayerNormFusion"] if provider == "cpu" else []
    try:
        session = onnxruntime.InferenceSession(
            graph, options, providers=[name], disabled_optimizers=disabled_optimizers
        )
    except Exception as error:
        # onnxruntime's exceptions share no base class of their own.
        raise ModelError(
            f"onnxruntime cannot load {graph}: {error}",
            hint="export it again with the installed versions: `ad2kit export`",
        ) from error
    if session.get_providers()[0] != name:
        raise ModelError(
            f"{name} was asked for, but the session runs on {session.get_providers()[0]}",
            hint="see `ad2kit doctor` for the libraries that the provider lacks",
        )
    return session


class OnnxClassifier:
    """A text classifier on ONNX Runtime. Safe to call from several threads.

    Args:
        folder: one exported variant, with its manifest.
        threads: the number of intra-op threads; if None, all cores that this process may use. ONNX
            Runtime's own default is never used, because it ignores the limits of a container.
        provider: the execution provider, "cpu", "cuda", "tensorrt" or "openvino"; if None, the one
            that the variant was judged on. There is no fallback to another provider.
        graph: a graph to run instead of the folder's; its sha256 is not checked.

    Raises:
        ModelError: a file is damaged, or the provider is absent.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        threads: int | None = None,
        provider: Provider | None = None,
        graph: Path | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.artifact = read_artifact(self.folder)
        self.labels = self.artifact.labels
        self.threads = threads or available_cpus()
        self.provider = provider or self.artifact.provider
        self.session = open_session(graph or self.folder / MODEL_FILE, self.threads, self.provider)
        self.input_names = [graph_input.name for graph_input in self.session.get_inputs()]
        self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        self.tokenise = Tokenise(
            self.tokenizer,
            self.artifact.tokenisation,
            self.artifact.length,
            self.artifact.text_columns,
        )
        self._has_windows = self.artifact.long_texts == "windows"

    def encode(
        self, texts: Sequence[Text], first: int = 0, refuse: Refuse = stop_at_long_text
    ) -> list[Tokens]:
        """Tokenise texts; a long text is cut, refused or divided into windows, as in the recipe.

        Args:
            texts: the texts, or pairs of texts.
            first: the number of the first text, for the message about a refused text.
            refuse: called with the number of each text that is too long, and the reason. If it
                returns, the text has no tokens in the result.

        Returns:
            The inputs of the model: of each text its windows one after the other, or one.

        Raises:
            UserError: ``texts`` is no list of texts, a text is empty, or the model needs pairs.
            TextTooLong: from ``refuse``.
        """
        if isinstance(texts, str):
            raise UserError("expected a list of texts, found one str", hint="pass [text]")
        examples: list[tuple[str, ...]] = []
        for position, text in enumerate(texts, first):
            columns = tuple(text) if isinstance(text, (tuple, list)) else (text,)
            if len(columns) != self.artifact.text_columns:
                raise UserError(
                    f"text {position}: this model reads {self.artifact.text_columns} text(s) per "
                    f"example, found {len(columns)}",
                    hint="pass a str, or a pair of str for a sentence-pair model",
                )
            if not all(is_text(column) for column in columns):
                raise UserError(
                    f"text {position}: expected at least one visible character and no lone "
                    f"surrogate, found {text!r:.50}",
                    hint="leave empty texts out, and mend those that were decoded wrongly",
                )
            examples.append(columns)
        return self.tokenise(examples, lambda position, reason: refuse(first + position, reason))

    def run(self, encodings: Sequence[Tokens], *, left: bool = False) -> NDArray[np.float32]:
        """Return the logits of one batch, padded on the right or ``left``; float32 [texts, labels].

        Logits of a batch with padding on the left have no meaning for a model that was trained with
        padding on the right. But all faithful graphs of the model give the same ones.
        """
        return self.forward(self.feed(encodings, left=left))

    def forward(self, feed: dict[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        """Return the logits of the inputs of :meth:`feed`, float32 [texts, labels]."""
        if self.provider in ("cuda", "tensorrt"):
            return self.forward_bound(feed)
        (logits,) = self.session.run(["logits"], {name: feed[name] for name in self.input_names})
        return np.asarray(logits)

    def forward_bound(self, feed: dict[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        """Like :meth:`forward`, but with IO binding: one copy to the device, and one back."""
        binding = self.session.io_binding()
        for name in self.input_names:
            binding.bind_cpu_input(name, feed[name])
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        return np.asarray(binding.copy_outputs_to_cpu()[0])

    def feed(
        self, encodings: Sequence[Tokens], *, width: int | None = None, left: bool = False
    ) -> dict[str, NDArray[np.int64]]:
        """Return the inputs of a batch by name, int64 [texts, width].

        ``width`` is in tokens; None is the length of the longest text. Padding is on the right, or
        on the left if ``left``.
        """
        width = width or max(len(encoding.ids) for encoding in encodings)
        shape = (len(encodings), width)
        padding = self.artifact.tokenisation
        ids = np.full(shape, padding.pad_token_id, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        types = np.full(shape, padding.pad_type_id if padding.segment_ids else 0, dtype=np.int64)
        for row, encoding in enumerate(encodings):
            length = len(encoding.ids)
            columns = slice(width - length, width) if left else slice(length)
            ids[row, columns] = encoding.ids
            mask[row, columns] = 1
            types[row, columns] = encoding.type_ids
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}

    def run_sorted(self, encodings: Sequence[Tokens], batch_size: int) -> NDArray[np.float32]:
        """Return logits, float32 [texts or windows, labels], in the order of ``encodings``.

        Texts of similar length share a batch.
        """
        logits = np.empty((len(encodings), len(self.labels)), dtype=np.float32)
        order = sorted(range(len(encodings)), key=lambda row: len(encodings[row].ids))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            logits[rows] = self.run([encodings[row] for row in rows])
        return logits

    def by_text(self, encodings: Sequence[Tokens], logits: NDArray[Any]) -> NDArray[Any]:
        """Return the logits of texts, [texts, outputs], from those of :meth:`run_sorted`."""
        if not self._has_windows:
            return logits
        tokens = [len(encoding.ids) for encoding in encodings]
        return windows.average(logits, tokens, _first_windows(encodings))

    def predictions(self, encodings: Sequence[Tokens], logits: NDArray[Any]) -> list[Prediction]:
        """Return the predictions for logits of shape [texts or windows, outputs]."""
        task = self.artifact.task
        predictions = []
        logits = self.by_text(encodings, logits)
        probabilities = scores(task, logits / self.artifact.temperature)
        rows = zip(self._read(encodings), answers(task, logits), probabilities, strict=True)
        for read, answer, row in rows:
            score_by_label = dict(zip(self.labels, row.tolist(), strict=True))
            fields: dict[str, Any] = {"scores": score_by_label}
            if task == "single_label":
                fields |= {"label": self.labels[int(answer)], "score": float(row[int(answer)])}
            elif task == "multi_label":
                fields["labels"] = tuple(
                    name for name, on in zip(self.labels, answer, strict=True) if on
                )
            else:
                fields = {"value": float(answer)}
            predictions.append(Prediction(*read, **fields))
        return predictions

    def _read(self, encodings: Sequence[Tokens]) -> list[tuple[int, bool, int | None]]:
        """Return the fields ``tokens``, ``truncated`` and ``windows`` of each text."""
        if not self._has_windows:
            return [(len(encoding.ids), encoding.truncated, None) for encoding in encodings]
        edges = [*_first_windows(encodings), len(encodings)]
        return [
            (sum(len(window.ids) for window in encodings[first:end]), False, end - first)
            for first, end in itertools.pairwise(edges)
        ]

    def logits(self, texts: Sequence[Text], batch_size: int = 32) -> NDArray[np.float32]:
        """Return the logits of texts, float32 [texts, labels]."""
        encodings = self.encode(texts)
        return self.by_text(encodings, self.run_sorted(encodings, batch_size))

    def predict(self, texts: Sequence[Text], batch_size: int = 32) -> list[Prediction]:
        """Return one prediction per text, in order."""
        encodings = self.encode(texts)
        return self.predictions(encodings, self.run_sorted(encodings, batch_size))


def _first_windows(encodings: Sequence[Tokens]) -> list[int]:
    """Return the position of the first window of each text."""
    return [index for index, window in enumerate(encodings) if not window.continues]
