"""The output of `ad2kit ask`: what it would cost, its progress, and a summary."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from ad2kit.cli.show_progress import Shown

if TYPE_CHECKING:
    from ad2kit.asking import ask, requests
    from ad2kit.asking.records import Agreement, AskReport


def estimate_words(found: ask.Estimate) -> str:
    """Return what asking would cost, and the first request, in words."""
    cost = "no prices in the recipe: set ask.input_price and ask.output_price"
    if found.cost is not None:
        cost = f"about {found.cost:,.4g}"
    bad = f", and {found.bad_rows:,} bad rows" if found.bad_rows else ""
    messages = "\n".join(
        f"--- {message['role']}\n{message['content']}"
        for message in found.first_request.get("messages", ())
    )
    rest = {key: value for key, value in found.first_request.items() if key != "messages"}
    return (
        f"rows: {found.rows:,}, with {found.texts:,} different texts{bad}\n"
        f"requests: {found.requests:,}\n"
        f"tokens, estimated from the bytes: {found.prompt_tokens:,.0f} in, "
        f"{found.completion_tokens:,.0f} out\n"
        f"cost: {cost}\n"
        f"the first request:\n{messages}\n--- {json.dumps(rest, ensure_ascii=False)}\n"
        "nothing was asked"
    )


def summary(report: AskReport) -> str:
    """Return a summary of a finished command in words."""
    who = report.reported_model or report.model
    cost = "" if report.cost is None else f", cost {report.cost:,.4g}"
    now = f"{report.requests_here:,} of them in these {report.seconds:,.0f} s"
    lines = [
        f"{report.answered_rows:,} of {report.rows:,} rows have an answer of {who}",
        f"output: {report.output}",
        f"requests: {report.requests:,}, {now}",
        f"tokens: {report.prompt_tokens:,} in, {report.completion_tokens:,} out{cost}",
    ]
    counts = {
        "outside of the labels": report.outside,
        "refused": report.refused,
        "lost when a command was stopped": report.lost,
        **{f"tried again after {name}": count for name, count in report.failures.items()},
    }
    said = [f"{count:,} {name}" for name, count in counts.items() if count]
    if said:
        lines.append(", ".join(said))
    if report.requests and report.mean_mass < 1:
        lines.append(f"the choices had {report.mean_mass:.1%} of the probability on average")
    if report.stopped_by:
        lines.append(f"stopped by {report.stopped_by}: a larger one goes on from here")
    lines += map(_agreement_words, report.agreements)
    return "\n".join(lines)


def _agreement_words(found: Agreement) -> str:
    """Return an agreement as a line."""
    left_out = f"; {found.left_out:,} cells are no label: {found.reason}" if found.left_out else ""
    if not found.rows:
        return f"agreement with {found.with_what}: no row in common{left_out}"
    low, high = found.interval
    return (
        f"agreement with {found.with_what}: {found.share:.1%} of {found.rows:,} rows "
        f"(95 % interval {low:.1%} to {high:.1%}){left_out}"
    )


def shown(progress: requests.Progress) -> Shown:
    """Return what is shown of a progress."""
    rate = progress.answered_here / progress.seconds if progress.seconds else 0.0
    remaining = progress.requests - progress.answered
    parts = [f"{progress.answered:,}/{progress.requests:,} requests  {rate:,.1f}/s"]
    if rate and remaining:
        parts.append(f"{remaining / rate:,.0f} s left")
    if progress.cost is not None and progress.answered:
        whole = progress.cost * progress.requests / progress.answered
        parts.append(f"cost {progress.cost:,.4g} of about {whole:,.4g}")
    if progress.failures:
        parts.append(f"{progress.failures:,} tried again")
    return Shown(progress.answered, progress.requests, "  ".join(parts))
