"""Inference with an exported student: tokenizers and onnxruntime, without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ad2kit.data.labels import answers, scores
from ad2kit.data.texts import is_text
from ad2kit.exporting.records import OnnxArtifact
from ad2kit.exporting.tokenise import Tokenise
from ad2kit.run.errors import MissingExtra, ModelError, UserError
from ad2kit.run.files import check_sha256
from ad2kit.run.machine import available_cpus

try:
    import onnxruntime
    from tokenizers import Tokenizer
except ModuleNotFoundError as error:
    raise MissingExtra(error.name or "onnxruntime", extra="cpu") from error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ad2kit.exporting.tokenise import Tokens
    from ad2kit.run.sections import Provider


Text = str | tuple[str, str]
"""One text, or the two texts of a sentence-pair model."""

MODEL_FILE = "model.onnx"
PROVIDERS: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}


@dataclass(frozen=True, slots=True)
class Prediction:
    """The answer for one text; which fields are set depends on the task of the model.

    ``label`` and its probability ``score`` of a single-label model; all ``labels`` whose
    probability is above one half of a multi-label one; the ``value`` of a regression. ``scores``
    are the probabilities of all labels, in label order; a regression has none.
    """

    tokens: int
    truncated: bool
    label: str | None = None
    score: float | None = None
    labels: tuple[str, ...] | None = None
    value: float | None = None
    scores: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that are set, as plain data."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: value for name, value in found.items() if value is not None and value != {}}


def read_artifact(folder: Path) -> OnnxArtifact:
    """Read the manifest of a variant and compare every file with its sha256.

    Raises:
        ModelError: a file is missing, or is not the one that was exported.
    """
    if not (folder / OnnxArtifact.file_name).is_file():
        raise ModelError(
            f"{folder} has no {OnnxArtifact.file_name}",
            hint="give a folder that `ad2kit export` wrote, such as runs/NAME/onnx/int8",
        )
    artifact = OnnxArtifact.read(folder / OnnxArtifact.file_name)
    again = f"restore the file, or delete {folder} and run `ad2kit export` again"
    check_sha256(folder, artifact.files, hint=again)
    return artifact


def open_session(graph: Path, threads: int, provider: Provider) -> onnxruntime.InferenceSession:
    """Load a graph for one provider, with so many intra-op threads.

    Raises:
        ModelError: the provider is absent, or cannot run it.
    """
    options, name = onnxruntime.SessionOptions(), PROVIDERS[provider]
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    available = onnxruntime.get_available_providers()
    if name not in available:
        raise ModelError(
            f"provider '{provider}' was asked for, but this onnxruntime has no {name}, only "
            f"{', '.join(available)}",
            hint="`ad2kit doctor` says what is installed and what to do; for CUDA install "
            "'ad2kit[gpu]' without onnxruntime, or set export.provider=cpu",
        )
    # On the CPU the node that this makes is slower than the two nodes that it replaces.
    slower = ["SkipLayerNormFusion"] if provider == "cpu" else []
    try:
        session = onnxruntime.InferenceSession(
            graph, options, providers=[name], disabled_optimizers=slower
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
        threads: intra-op threads; all cores that this process may use if None. Always set
            explicitly, because ONNX Runtime's own default ignores the limits of a container.
        provider: what executes the graph, "cpu", "cuda", "tensorrt" or "openvino"; the one that
            it was judged on if None. There is no fallback to another.
        graph: another graph to run instead of the folder's, which is not checked.

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
        self.input_names = [item.name for item in self.session.get_inputs()]
        self.tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        self.tokenise = Tokenise(
            self.tokenizer,
            self.artifact.tokenisation,
            self.artifact.max_length_tokens,
            self.artifact.text_columns,
        )

    def encode(self, texts: Sequence[Text], first: int = 0) -> list[Tokens]:
        """Tokenise texts, cut to the model's maximum length.

        Args:
            texts: the texts, or the pairs of them.
            first: the number of the first text, for what is said of one that is refused.

        Raises:
            UserError: not a list of texts, an empty text, or one text where the model needs two.
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
        return self.tokenise(examples)

    def run(self, encodings: Sequence[Tokens], *, left: bool = False) -> NDArray[np.float32]:
        """Return the logits of one batch, padded on the right or ``left``; float32 [texts, labels].

        What is padded on the left means nothing to a model that was trained on the right, but all
        faithful graphs of it agree about it.
        """
        return self.forward(self.feed(encodings, left=left))

    def forward(self, feed: dict[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        """Return the logits of the inputs that :meth:`feed` made."""
        if self.provider in ("cuda", "tensorrt"):
            return self.forward_bound(feed)
        (logits,) = self.session.run(["logits"], {name: feed[name] for name in self.input_names})
        return np.asarray(logits)

    def forward_bound(self, feed: dict[str, NDArray[np.int64]]) -> NDArray[np.float32]:
        """Do as :meth:`forward` does, by IO binding: one copy to the device, and one back."""
        binding = self.session.io_binding()
        for name in self.input_names:
            binding.bind_cpu_input(name, feed[name])
        binding.bind_output("logits")
        self.session.run_with_iobinding(binding)
        return np.asarray(binding.copy_outputs_to_cpu()[0])

    def feed(
        self, encodings: Sequence[Tokens], *, width: int | None = None, left: bool = False
    ) -> dict[str, NDArray[np.int64]]:
        """Return the inputs of a batch, int64 [texts, width]; the longest text's width if None."""
        width = width or max(len(encoding.ids) for encoding in encodings)
        shape = (len(encodings), width)
        padding = self.artifact.tokenisation
        ids = np.full(shape, padding.pad_token_id, dtype=np.int64)
        mask = np.zeros(shape, dtype=np.int64)
        types = np.full(shape, padding.pad_type_id if padding.segment_ids else 0, dtype=np.int64)
        for row, encoding in enumerate(encodings):
            length = len(encoding.ids)
            places = slice(width - length, width) if left else slice(length)
            ids[row, places] = encoding.ids
            mask[row, places] = 1
            types[row, places] = encoding.type_ids
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}

    def run_sorted(self, encodings: Sequence[Tokens], batch_size: int) -> NDArray[np.float32]:
        """Return logits in the given order, computed in batches of similar length."""
        logits = np.empty((len(encodings), len(self.labels)), dtype=np.float32)
        order = sorted(range(len(encodings)), key=lambda row: len(encodings[row].ids))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            logits[rows] = self.run([encodings[row] for row in rows])
        return logits

    def predictions(self, encodings: Sequence[Tokens], logits: NDArray[Any]) -> list[Prediction]:
        """Turn logits, shape [texts, outputs], into predictions."""
        task, found = self.artifact.task, []
        probabilities = scores(task, logits / self.artifact.temperature)
        rows = zip(encodings, answers(task, logits), probabilities, strict=True)
        for encoding, answer, row in rows:
            named = dict(zip(self.labels, row.tolist(), strict=True))
            facts: dict[str, Any] = {"scores": named}
            if task == "single_label":
                facts |= {"label": self.labels[int(answer)], "score": float(row[int(answer)])}
            elif task == "multi_label":
                facts["labels"] = tuple(
                    name for name, on in zip(self.labels, answer, strict=True) if on
                )
            else:
                facts = {"value": float(answer)}
            found.append(
                Prediction(tokens=len(encoding.ids), truncated=encoding.truncated, **facts)
            )
        return found

    def logits(self, texts: Sequence[Text], batch_size: int = 32) -> NDArray[np.float32]:
        """Return the logits of texts, float32 [texts, labels]."""
        return self.run_sorted(self.encode(texts), batch_size)

    def predict(self, texts: Sequence[Text], batch_size: int = 32) -> list[Prediction]:
        """Return one prediction per text, in order."""
        encodings = self.encode(texts)
        return self.predictions(encodings, self.run_sorted(encodings, batch_size))
