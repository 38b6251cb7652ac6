"""The ask command: get a language model's answers to the rows of tables, and write both.

First the distinct texts are asked, in the order of their fingerprints: a stop at any moment leaves
the answers to a random sample of them. Each answer goes into the journal at once. Then every block
of rows becomes a part, as in bulk scoring, with the answers of the journal. So a part depends on
the answers alone, and not on how often the command was stopped.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ad2kit.asking.agreement import agreements, other_answers
from ad2kit.asking.endpoint import Endpoint, Pace
from ad2kit.asking.journal import NAME, Journal
from ad2kit.asking.prompts import OUTSIDE, REFUSED, Prompt
from ad2kit.asking.records import AskJob, AskReport
from ad2kit.asking.requests import Asker, Costs, Progress
from ad2kit.asking.results import Results, added_columns
from ad2kit.run.errors import RecipeError, UserError
from ad2kit.scoring.output import OutputFolder
from ad2kit.scoring.parts import open_tables

if TYPE_CHECKING:
    from collections.abc import Callable

    from ad2kit.run.recipe import Recipe
    from ad2kit.scoring.parts import Tables

PREFIX = "teacher_"
# A part of so many rows; they are written after the last answer, and cost nothing.
_BLOCK_ROWS = 4096


@dataclass(frozen=True)
class Limits:
    """What a command may ask for; None for no limit. The cost is that of the whole job."""

    concurrency: int = 8
    max_rows: int | None = None
    max_cost: float | None = None
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    timeout_s: float = 120.0


@dataclass(frozen=True)
class Estimate:
    """What asking would cost: counts, estimated tokens, and the first request as it would be sent.

    ``cost`` is None without prices.
    """

    rows: int
    bad_rows: int
    texts: int
    requests: int
    prompt_tokens: float
    completion_tokens: float
    cost: float | None
    first_request: dict[str, Any]


def estimate(recipe: Recipe, input_url: str, output_url: str, limits: Limits) -> Estimate:
    """Count what would be asked, and estimate its tokens; nothing is asked or written.

    Raises:
        RecipeError, DataError: see :func:`ask`.
    """
    prompt = _prompt(recipe)
    costs = _costs(prompt, limits)
    output = OutputFolder(output_url)
    tables = _tables(recipe, prompt, input_url, output, PREFIX)
    with closing(Results(output, tables.layout, prompt)) as results:
        results.read_texts(tables.blocks, limits.max_rows)
    draws = prompt.ask.draws
    bodies = (prompt.request(q, 0) for t in results.texts for q in prompt.questions(t))
    first: dict[str, Any] = {}
    count, prompt_tokens = 0, 0.0
    for body in bodies:
        first = first or body
        count += draws
        prompt_tokens += draws * costs.prompt_tokens_of(body)
    completion_tokens = count * costs.completion_tokens
    return Estimate(
        rows=sum(results.rows_of.values()),
        bad_rows=results.bad_rows,
        texts=len(results.texts),
        requests=count,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        cost=costs.of(prompt_tokens, completion_tokens),
        first_request=first,
    )


def ask(
    recipe: Recipe,
    input_url: str,
    output_url: str,
    *,
    base_url: str,
    model: str,
    limits: Limits,
    prefix: str = PREFIX,
    proxy: str | None = None,
    against: Path | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> AskReport:
    """Ask a model about every row of a table; return the report, which is written, too.

    Args:
        recipe: a recipe with an ``ask`` section.
        input_url: a file, folder or glob of tables, at any fsspec address.
        output_url: a folder of this machine, new or of the same job.
        base_url: the address of an OpenAI-compatible endpoint.
        model: the model to ask.
        limits: how much may be asked, and how fast.
        prefix: the prefix of the names of the added columns.
        proxy: the address of a proxy.
        against: the folder of another job, whose answers to the same texts are compared.
        on_progress: called at the start and after each answer.

    Raises:
        RecipeError: the recipe has no ``ask`` section, or no prices for a limit of the cost.
        DataError: an input or a column is missing, would occur twice, or cannot be read.
        RunError: the folder holds another job, or another process works in it.
        UserError: the endpoint cannot be used, or is another teacher than before.
    """
    prompt = _prompt(recipe)
    costs = _costs(prompt, limits)
    output = OutputFolder(output_url)
    if not output.is_local:
        raise UserError(
            f"expected a folder of this machine for OUTPUT, found {output_url}: each answer is "
            "added to a file there at once",
            hint="copy the folder when it is done",
        )
    tables = _tables(recipe, prompt, input_url, output, prefix)
    job = _job(recipe, prompt, tables, base_url, model, prefix)
    other = None if against is None else other_answers(against, job)
    pace = Pace(limits.requests_per_minute, limits.tokens_per_minute)
    endpoint = Endpoint(
        base_url,
        model,
        concurrency=limits.concurrency,
        pace=pace,
        timeout_s=limits.timeout_s,
        proxy=proxy,
    )
    start = time.monotonic()
    with output.claimed(job), closing(Results(output, tables.layout, prompt)) as results:
        journal = Journal(Path(output.path) / NAME)
        results.read_texts(tables.blocks, limits.max_rows)
        asker = Asker(endpoint, prompt, journal, costs, limits.max_cost, on_progress)
        asked_before = len(journal.answers)
        try:
            with journal.writing():
                asyncio.run(asker.ask(results.texts, limits.concurrency))
        except BaseException:
            _forget_job_without_answers(output, journal)
            raise
        results.write(tables.blocks, journal, asker.unanswered)
        report = _report(results, tables, job, journal, costs, prompt).model_copy(
            update={
                "requests_here": len(journal.answers) - asked_before,
                "seconds": time.monotonic() - start,
                "stopped_by": asker.stopped_by,
                "agreements": tuple(agreements(recipe.data, job, tables, Path(output.path), other)),
            }
        )
        output.write(AskReport.file_name, report.model_dump_json(indent=2).encode() + b"\n")
        return report


def _forget_job_without_answers(output: OutputFolder, journal: Journal) -> None:
    """Empty the folder if nothing was answered: what was wrong may be part of the job."""
    names = {AskJob.file_name, NAME}
    if not journal.answers and output.names() == names:
        for name in names:
            (Path(output.path) / name).unlink()


def _prompt(recipe: Recipe) -> Prompt:
    """Return the questions of a recipe."""
    if recipe.ask is None:
        raise RecipeError(
            f"recipe '{recipe.name}' has no section 'ask', which says what to ask for",
            hint="copy it from the recipe 'llm'; docs/guides/language-model.md explains it",
        )
    return Prompt(recipe.ask, recipe.data)


def _costs(prompt: Prompt, limits: Limits) -> Costs:
    """Return the prices of a recipe, which a limit of the cost needs."""
    prices = (prompt.ask.input_price, prompt.ask.output_price)
    if limits.max_cost is not None and (None in prices or prices == (0, 0)):
        raise RecipeError(
            "expected prices above 0 for --max-cost, found ask.input_price="
            f"{prices[0]} and ask.output_price={prices[1]}",
            hint="set both, of a million tokens; or limit the rows with --max-rows",
        )
    return Costs(prompt.ask)


def _tables(
    recipe: Recipe, prompt: Prompt, input_url: str, output: OutputFolder, prefix: str
) -> Tables:
    """Find the tables of a job."""
    data = recipe.data
    added = added_columns(data.task, prompt.ask.answer, prefix)
    return open_tables(
        input_url,
        output,
        data.text_columns,
        data.csv_quotes,
        added,
        prompt.labels,
        _BLOCK_ROWS,
        naming="data.text_columns=[a], or [a,b] for a pair",
    )


def _job(
    recipe: Recipe, prompt: Prompt, tables: Tables, base_url: str, model: str, prefix: str
) -> AskJob:
    """Return what the answers depend on; other rows or tables keep the answers."""
    return AskJob(
        text_columns=recipe.data.text_columns,
        csv_quotes=recipe.data.csv_quotes,
        prefix=prefix,
        block_rows=_BLOCK_ROWS,
        inputs=tables.files,
        base_url=base_url,
        model=model,
        ask=prompt.settings,
        labels=prompt.labels,
        task=recipe.data.task,
        prompt_fingerprint=prompt.fingerprint,
    )


def _report(
    results: Results, tables: Tables, job: AskJob, journal: Journal, costs: Costs, prompt: Prompt
) -> AskReport:
    """Return the report of all commands that worked at a job."""
    kinds = Counter(answer.reason.partition(":")[0] for answer in journal.answers.values())
    tokens = journal.tokens
    masses = [answer.mass for answer in journal.answers.values() if answer.probabilities]
    return AskReport(
        output=results.output.url,
        base_url=job.base_url,
        model=job.model,
        reported_model=journal.model,
        prompt_fingerprint=prompt.fingerprint,
        first_answer=journal.first_answer,
        last_answer=journal.last_answer,
        rows=tables.rows,
        answered_rows=results.answered_rows,
        unasked_rows=tables.rows - results.answered_rows - results.bad_rows,
        bad_rows=results.bad_rows,
        texts=len(results.texts),
        requests=len(journal.answers),
        refused=kinds[REFUSED],
        outside=kinds[OUTSIDE],
        lost=journal.lost,
        failures=dict(sorted(journal.failures.items())),
        prompt_tokens=tokens.prompt_tokens,
        completion_tokens=tokens.completion_tokens,
        cost=costs.spent(journal),
        mean_mass=float(np.mean(masses)) if masses else 0.0,
        requests_here=0,
        seconds=0.0,
    )
