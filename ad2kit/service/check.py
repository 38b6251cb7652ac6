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

if TYPE_CHECKING:
    from pathlib import Path

    from ad2kit.run.folder import RunDir

TEXTS = 100
# No connection, an error status, no URL, no JSON.
_NO_ANSWER = (OSError, http.client.HTTPException, ValueError)
# Scores travel as float64 JSON of float32 logits; the graph is the same, so is the batch size.
MAX_SCORE_GAP = 1e-5


@dataclass(frozen=True)
class ServiceAnswers:
    """How far a service is from its artefact: label flips and largest score gap over some texts."""

    texts: int
    flips: int
    gap: float

    def insist_same(self, consequence: str) -> None:
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
    """Compare a running service with the variant of a run that it says it serves.

    Args:
        run: with that variant.
        address: such as http://localhost:3000.
        key: one of those that the service asks its clients for.

    Raises:
        UserError: nobody answers there, or not an ad2kit service.
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
    """Ask a service for validation texts of a run, and compare with the variant in ``folder``.

    One text per request: the activations of an int8 graph are quantised over the whole batch, so
    only equal batches must give equal answers.
    """
    recipe = run.recipe
    validation = splits.load_data(recipe.data, recipe.seed).validation
    texts: list[Any] = [t[0] if len(t) == 1 else t for t in validation.texts]
    by_length = sorted(texts, key=lambda text: len(str(text)))
    rows = np.unique(np.linspace(0, len(texts) - 1, TEXTS).astype(int))
    chosen = [by_length[row] for row in rows]
    expected = OnnxClassifier(folder, threads=recipe.compute.threads).predict(chosen, batch_size=1)
    found = [ask(address, [text], key)[0] for text in chosen]
    # Through JSON as well: a tuple is a list there.
    sent = [json.loads(json.dumps(each.as_dict())) for each in expected]
    pairs = list(zip(found, sent, strict=True))
    flips = sum(
        answer.get(key) != prediction.get(key)
        for answer, prediction in pairs
        for key in ("label", "labels")
    )
    gaps = [
        abs(ours[name] - theirs.get(name, math.nan))
        for theirs, ours in (
            (_numbers(answer), _numbers(prediction)) for answer, prediction in pairs
        )
        for name in ours
    ]
    # A NaN must not hide in a maximum.
    gap = math.inf if any(map(math.isnan, gaps)) else max(gaps)
    return ServiceAnswers(len(chosen), flips, gap)


def ask(address: str, texts: list[Any], key: str | None = None) -> list[dict[str, Any]]:
    """POST texts to a running service and return its predictions, with all scores.

    Raises:
        UserError: an error status, or something else than one prediction for each text.
    """
    body = json.dumps({"texts": texts, "scores": True}).encode()
    try:
        found = list(json.loads(fetch(f"{address}/classify", body, key=key))["predictions"])
    except (*_NO_ANSWER, KeyError, TypeError) as error:
        raise _no_service(address, error) from error
    if len(found) != len(texts) or not all(isinstance(each, dict) for each in found):
        raise _no_service(address, ValueError(f"{found!r:.80} for {len(texts)} text(s)"))
    return found


def fetch(
    url: str, body: bytes | None = None, *, key: str | None = None, timeout_s: float = 30
) -> bytes:
    """GET a URL, or POST JSON to it; this machine's own addresses are asked without a proxy.

    Args:
        url: http or https.
        body: JSON.
        key: sent as ``Authorization: Bearer KEY``, and not on to where a redirection leads.
        timeout_s: without an answer.

    Raises:
        OSError: no answer, or an error status.
        ValueError: not such a URL.
    """
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"{url} does not begin with http:// or https://")
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})  # noqa: S310
    if key is not None:
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    # What http_proxy names cannot see this machine's own addresses.
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
    refused = isinstance(error, urllib.error.HTTPError) and error.code == HTTPStatus.UNAUTHORIZED
    return UserError(
        f"expected an ad2kit service at {address}, found {type(error).__name__}: {error}",
        hint="it asks for a key, and none or another one was sent: give --api-keys-file FILE, or "
        "set AD2KIT_API_KEYS to one of its keys"
        if refused
        else "give an address such as http://localhost:3000, where `bentoml serve` listens; a "
        "status of 429 means that it is too busy to be asked now",
    )


def _numbers(answer: dict[str, Any]) -> dict[str, float]:
    scores = answer.get("scores")
    return {"value": answer["value"]} if "value" in answer else dict(scores or {})
