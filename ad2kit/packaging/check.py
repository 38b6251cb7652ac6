"""Question 4 of parity: does a service answer, over HTTP, what the artefact computes? No torch."""

from __future__ import annotations

import http.client
import ipaddress
import json
import math
import urllib.error
import urllib.request
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from ad2kit.data import splits
from ad2kit.exporting.classifier import OnnxClassifier
from ad2kit.run.errors import GateFailed, RunError, UserError
from ad2kit.tables.texts import text_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from ad2kit.run.folder import RunDir

TEXTS = 100
# Raised for no connection, an error status, an invalid URL, or an invalid JSON body.
_NO_ANSWER = (OSError, http.client.HTTPException, ValueError)
# Scores are sent as float64 JSON of float32 logits; the graph and the batch size are the same.
MAX_SCORE_GAP = 1e-5


@dataclass(frozen=True)
class ServiceAnswers:
    """How a service differs from its artefact: label flips and largest score gap of some texts."""

    texts: int
    flips: int
    gap: float

    def check_same(self, consequence: str) -> None:
        """Stop unless the service answers what the artefact computes.

        Raises:
            GateFailed: with ``consequence`` at the end of its message.
        """
        if self.flips or not self.gap <= MAX_SCORE_GAP:
            raise GateFailed(
                f"the service does not answer what the artefact computes: {self.flips} label flips "
                f"and a score gap of {self.gap:.1e} on {self.texts} texts, expected 0 and at most "
                f"{MAX_SCORE_GAP:.0e}; {consequence}",
                hint="run `ad2kit doctor`; another version of onnxruntime may be serving",
            )


def judge_service(run: RunDir, address: str, key: str | None = None) -> ServiceAnswers:
    """Compare a running service with the variant of a run that the service says it serves.

    Args:
        run: the run that has this variant.
        address: such as http://localhost:3000.
        key: one of the service's API keys; None if it has none.

    Raises:
        UserError: no service answers there, or another than an ad2kit service.
        RunError: the run has no such variant.
    """
    variants = run.recipe.export.variants
    try:
        variant = json.loads(fetch(f"{address}/info", key=key))["variant"]
    except (*_NO_ANSWER, KeyError, TypeError) as error:
        raise _no_service(address, error) from error
    if variant not in variants:
        raise RunError(
            f"the service at {address} serves the variant {variant!r:.40}, and {run.path} has "
            f"{', '.join(variants)}",
            hint="name the run that its Bento was made from",
        )
    return compare_service(run, run.onnx(variant), address, key)


def compare_service(
    run: RunDir, folder: Path, address: str, key: str | None = None
) -> ServiceAnswers:
    """Send validation texts of a run to a service, and compare with the variant in ``folder``.

    Each request holds one text: the activations of an int8 graph are quantised over the whole
    batch, so only equal batches must give equal answers.
    """
    recipe = run.recipe
    validation = splits.load_data(recipe.data, recipe.seed, run.shared).validation
    texts = [text_of(row) for row in validation.texts]
    by_length = sorted(texts, key=lambda text: len(str(text)))
    rows = np.unique(np.linspace(0, len(texts) - 1, TEXTS).astype(int))
    chosen = [by_length[row] for row in rows]
    expected = OnnxClassifier(folder, threads=recipe.compute.threads).predict(chosen, batch_size=1)
    answers = [ask(address, [text], key)[0] for text in chosen]
    # The expected predictions go through JSON as well, which turns a tuple into a list.
    predictions = [json.loads(json.dumps(prediction.as_dict())) for prediction in expected]
    pairs = list(zip(answers, predictions, strict=True))
    flips = sum(
        answer.get(field) != prediction.get(field)
        for answer, prediction in pairs
        for field in ("label", "labels")
    )
    scores = [(_numbers(answer), _numbers(prediction)) for answer, prediction in pairs]
    gaps = [
        abs(expected_scores[name] - service_scores.get(name, math.nan))
        for service_scores, expected_scores in scores
        for name in expected_scores
    ]
    # `max` could hide a NaN.
    gap = math.inf if any(map(math.isnan, gaps)) else max(gaps)
    return ServiceAnswers(len(chosen), flips, gap)


def ask(address: str, texts: Sequence[Any], key: str | None = None) -> list[dict[str, Any]]:
    """POST texts to a running service and return its predictions, with all scores.

    Raises:
        UserError: an error status, or an answer without one prediction for each text.
    """
    body = json.dumps({"texts": texts, "scores": True}).encode()
    try:
        predictions = list(json.loads(fetch(f"{address}/classify", body, key=key))["predictions"])
    except (*_NO_ANSWER, KeyError, TypeError) as error:
        raise _no_service(address, error) from error
    if len(predictions) != len(texts) or not all(isinstance(row, dict) for row in predictions):
        raise _no_service(address, ValueError(f"{predictions!r:.80} for {len(texts)} text(s)"))
    return predictions


def fetch(
    url: str, body: bytes | None = None, *, key: str | None = None, timeout_s: float = 30
) -> bytes:
    """GET a URL, or POST JSON to it; requests to this machine's own addresses use no proxy.

    Args:
        url: http or https.
        body: JSON to POST; GET if None.
        key: sent as ``Authorization: Bearer KEY``, but not to the target of a redirection.
        timeout_s: longest wait for an answer.

    Raises:
        OSError: no answer, or an error status.
        ValueError: not a URL of http or https.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{url} does not begin with http:// or https://")
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})  # noqa: S310
    if key is not None:
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    # The proxy that http_proxy names cannot reach this machine's own addresses.
    handlers = [urllib.request.ProxyHandler({})] if _is_here(url) else []
    with urllib.request.build_opener(*handlers).open(request, timeout=timeout_s) as response:
        return bytes(response.read())


def _is_here(url: str) -> bool:
    """Tell whether a URL leads to this machine."""
    host = urlsplit(url).hostname or ""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def _no_service(address: str, error: Exception) -> UserError:
    if isinstance(error, urllib.error.HTTPError) and error.code == HTTPStatus.UNAUTHORIZED:
        hint = (
            "it asks for a key, and none or another one was sent: give --api-keys-file FILE, or "
            "set AD2KIT_API_KEYS to one of its keys"
        )
    else:
        hint = (
            "give an address such as http://localhost:3000, where `bentoml serve` listens; a "
            "status of 429 means that it is too busy to be asked now"
        )
    return UserError(
        f"expected an ad2kit service at {address}, found {type(error).__name__}: {error}",
        hint=hint,
    )


def _numbers(answer: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of an answer by name: the value of a regression, else the scores."""
    if "value" in answer:
        return {"value": answer["value"]}
    return dict(answer.get("scores") or {})
