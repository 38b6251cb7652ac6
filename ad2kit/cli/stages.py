"""The commands of the single stages, and those that only look: recipes, check, doctor, cache.

They translate options. Heavy imports sit inside.
"""

from __future__ import annotations

import dataclasses
import functools
import shlex
from pathlib import Path
from typing import Annotated

import typer

from ad2kit.cli import options
from ad2kit.run.errors import UserError
from ad2kit.run.machine import is_first_process


def recipes(as_json: options.Json = False) -> None:
    """List the shipped recipes."""
    from ad2kit.cli.show import print_json
    from ad2kit.run.recipe import load_recipe, recipe_names

    shipped = [load_recipe(name) for name in recipe_names()]
    if as_json:
        print_json({recipe.name: recipe.description for recipe in shipped})
        return
    width = max(len(recipe.name) for recipe in shipped)
    for recipe in shipped:
        typer.echo(f"{recipe.name:<{width}}  {recipe.description}")


def check(
    recipe_name: options.RecipeName,
    overrides: options.Overrides = None,
    runs_dir: options.RunsDir = options.RUNS,
    verbose: options.Verbose = False,
    as_json: options.Json = False,
) -> None:
    """Check a recipe, its data and its models, without training.

    Shows what the data hold, what the gate can prove with them, and what the training will cost.
    The rows of large tables are kept with the runs, so that the training does not read them again.
    """
    from ad2kit.cli.show import print_json
    from ad2kit.data.splits import load_data
    from ad2kit.planning import check as planning
    from ad2kit.run.recipe import load_recipe
    from ad2kit.training.opening import open_models

    recipe = load_recipe(recipe_name, overrides or ())
    data = load_data(recipe.data, recipe.seed, runs_dir / ".shared")
    report = planning.check(recipe, data, *open_models(recipe, data))
    if as_json:
        plain = recipe.model_dump(mode="json")
        print_json({"recipe": plain, **report.model_dump(mode="json")})
        return
    if verbose:
        typer.echo(recipe.model_dump_json(indent=2))
    typer.echo(planning.check_words(report))


def init(
    table: options.Table,
    validation: options.Validation = None,
    text: options.TextOfTable = None,
    label: options.LabelOfTable = None,
    csv_quotes: options.CsvQuotes = None,
    name: options.NewName = None,
    as_json: options.Json = False,
) -> None:
    """Look at a table and write an annotated recipe for it: NAME.yaml in this folder.

    Text, label, task and lengths are guessed from the training rows. Columns that cannot be guessed
    have to be given. No recipe is overwritten.
    """
    from ad2kit.cli.show import print_json
    from ad2kit.planning import init as planning

    recipe = Path(f"{name or planning.recipe_name(table)}.yaml")
    guess = planning.init(
        table,
        recipe,
        validation=validation,
        text=options.columns(text) or (),
        label=options.columns(label) or (),
        csv_quotes=csv_quotes or "doubled",
    )
    next_command = f"ad2kit check {recipe}"
    if as_json:
        print_json(
            {
                "recipe": str(recipe),
                "data": guess.data,
                "notes": guess.notes,
                "doubts": guess.doubts,
                "next": next_command,
            }
        )
        return
    typer.echo(planning.guess_words(guess))
    typer.echo(f"written: {recipe}\nnext: {next_command}")


def doctor(as_json: options.Json = False) -> None:
    """Show what this machine offers and what it lacks."""
    from ad2kit.cli.show import print_json
    from ad2kit.planning.doctor import examine

    findings = examine()
    if as_json:
        print_json([finding.model_dump() for finding in findings])
        return
    for finding in findings:
        typer.echo(f"{finding.name}: {finding.value}")
        if finding.advice:
            typer.echo(f"  -> {finding.advice}")


def cache(
    runs_dir: options.RunsDir = options.RUNS,
    clear: options.Clear = False,
    as_json: options.Json = False,
) -> None:
    """Show what runs keep of tables, tokens and logits, and how large it is; or clear it.

    No result of a run is lost. The next command reads, tokenises or computes again what it needs.
    """
    from ad2kit.cli.show import print_json
    from ad2kit.planning import cache as planning

    shared = runs_dir / ".shared"
    kept = planning.contents(shared)
    busy = planning.clear(shared) if clear else []
    if as_json:
        print_json(
            {
                "folder": str(shared),
                "kept": [each.model_dump() for each in kept],
                "cleared": clear,
                "busy": list(map(str, busy)),
            }
        )
        return
    typer.echo(f"{'cleared' if clear else 'kept'} in {shared}:")
    for each in kept:
        size = f"{each.size_bytes / 1e6:,.1f} MB"
        typer.echo(f"{each.kind:<7} {each.entries:>5}  {size:>14}  {each.content}")
    for entry in busy:
        typer.echo(f"left, as another process is writing it: {entry}")


def distill(
    recipe_name: options.RecipeName,
    overrides: options.Overrides = None,
    runs_dir: options.RunsDir = options.RUNS,
    run: options.RunOption = None,
    max_minutes: options.MaxMinutes = None,
    allow_inexact: options.Inexact = False,
    as_json: options.Json = False,
) -> None:
    """Fine-tune the teacher if the recipe asks for it; distil the student."""
    import ad2kit
    from ad2kit.cli.show import print_result, start_run, training_progress
    from ad2kit.gate.summary import teacher_report

    folder = start_run(recipe_name, overrides, runs_dir, run, max_minutes)
    with training_progress() as on_step:
        report = ad2kit.distill(folder, on_step=on_step, allow_inexact=allow_inexact)
    # Of several processes, the others may be here before the first has written the files.
    teacher = teacher_report(folder) if is_first_process() else None
    baselines = "".join(
        f"{baseline.name} {baseline.select_score:.4f}, "
        for baseline in (teacher.baselines if teacher else ())
    )
    reason = f"\n{report.selection.reason}" if report.selection else ""
    print_result(
        report,
        f"select {' and '.join(report.metrics)}: {baselines}teacher "
        f"{report.teacher_select_score:.4f}, student {report.student_select_score:.4f}{reason}"
        "\nnext: ad2kit export",
        as_json=as_json,
    )


def export(
    run: options.RunArgument = None,
    runs_dir: options.RunsDir = options.RUNS,
    no_parity: options.NoParity = False,
    teacher: options.OfTeacher = False,
    as_json: options.Json = False,
) -> None:
    """Export the student to ONNX, then judge it by the parity gate."""
    import ad2kit
    from ad2kit.cli.show import print_json, use_run
    from ad2kit.cli.show_parity import judge_run

    folder = use_run(runs_dir, run)
    if teacher:
        from ad2kit.campaigns.run import export_teacher

        folder = export_teacher(folder)
        judge_run(folder, as_json=as_json)
        shadow = shlex.quote(str(folder.path.resolve()))
        typer.echo(f"as a shadow: AD2KIT_SHADOW={shadow} bentoml serve", err=True)
        return
    with folder.locked() as held:
        artifacts = ad2kit.export(held)
        if not no_parity:
            judge_run(held, as_json=as_json)
            return
    if as_json:
        print_json([artifact.model_dump(mode="json") for artifact in artifacts])


def parity(
    arguments: options.RunOrOverrides = None,
    against_service: options.Service = None,
    api_keys_file: options.ApiKeysFile = None,
    model: options.Model = None,
    teacher: options.Teacher = None,
    data: options.DataFile = None,
    recipe_name: options.RecipeOption = None,
    runs_dir: options.RunsDir = options.RUNS,
    as_json: options.Json = False,
) -> None:
    """Judge the variants of a run, or any ONNX model with --model; exit code 1 if none passes.

    The verdict on a variant is passed, FAILED, or not shown: there are too few validation rows to
    show that it is good enough. A variant that is not shown does not ship either; the verdict says
    how many rows would show it.
    """
    from ad2kit.cli.show import use_run
    from ad2kit.cli.show_parity import judge_model, judge_run, judge_service, one_run

    if api_keys_file is not None and against_service is None:
        raise UserError(
            "expected --against-service beside --api-keys-file, which nothing else reads",
            hint="ad2kit parity RUN --against-service URL --api-keys-file FILE",
        )
    if model is not None and against_service is None:
        judge_model(model, teacher, data, recipe_name, arguments or (), as_json=as_json)
        return
    only_for_a_model = {
        "--model": model,
        "--teacher": teacher,
        "--data": data,
        "--recipe": recipe_name,
    }
    folder = use_run(runs_dir, one_run(arguments, only_for_a_model))
    if against_service is not None:
        judge_service(folder, against_service, api_keys_file, as_json=as_json)
        return
    judge_run(folder, as_json=as_json)


def bench(
    run: options.RunArgument = None,
    runs_dir: options.RunsDir = options.RUNS,
    p99_ms: options.P99 = 50.0,
    price_per_hour: options.Price = None,
    as_json: options.Json = False,
) -> None:
    """Measure latency, throughput, capacity and cost of all models.

    They are measured again each time, also if the run holds measurements already.
    """
    import ad2kit
    from ad2kit.cli.show import print_result, use_run
    from ad2kit.gate.summary import capacity_lines, latency_lines

    folder = use_run(runs_dir, run)
    report = ad2kit.measure(folder, p99_target_ms=p99_ms, price_per_hour=price_per_hour)
    lines = [*latency_lines(report), *capacity_lines(report)]
    print_result(report, "\n".join(lines), as_json=as_json)


def package(
    run: options.RunArgument = None,
    runs_dir: options.RunsDir = options.RUNS,
    variant: options.VariantName = None,
    allow_failed_parity: options.Forced = False,
    as_json: options.Json = False,
) -> None:
    """Build a Bento, test it over HTTP, publish its tag.

    The tag is published only if the service answers what the artefact computes.
    """
    import ad2kit
    from ad2kit.cli.show import next_steps, print_result, use_run

    folder = use_run(runs_dir, run)
    record = ad2kit.package(folder, variant=variant, allow_failed_parity=allow_failed_parity)
    print_result(record, next_steps(record.tag, folder), as_json=as_json)


def push(
    repository: options.Repository,
    run: options.RunArgument = None,
    runs_dir: options.RunsDir = options.RUNS,
    variant: options.VariantName = None,
    private: options.Private = False,
) -> None:
    """Upload a run's variant to the hub, with a model card; only if it passed its gate."""
    from ad2kit.cli.show import use_run
    from ad2kit.gate import hub

    folder = use_run(runs_dir, run)
    typer.echo(hub.push(folder, repository, variant=variant, private=private))


def report(run: options.RunArgument = None, runs_dir: options.RunsDir = options.RUNS) -> None:
    """Print the table of a run and write its report.html."""
    from ad2kit.cli.show import print_table, use_run
    from ad2kit.gate.report import report as write_report

    folder = use_run(runs_dir, run)
    write_report(folder)
    print_table(folder)


def predict(
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; else --file or stdin.")] = None,
    run: options.RunOption = None,
    runs_dir: options.RunsDir = options.RUNS,
    file: options.TextFile = None,
    text_columns: options.TextColumns = None,
    csv_quotes: options.CsvQuotes = None,
) -> None:
    """Classify texts, and print a JSON line for each.

    The two texts of a pair are separated by a tab, or stand in two columns of a table.
    """
    import ad2kit
    from ad2kit.cli.show import answer_lines, typed_texts, use_servable
    from ad2kit.gate.shipping import servable_artifact, table_settings

    folder = servable_artifact(use_servable(runs_dir, run))
    classifier = ad2kit.load(folder)
    settings = functools.partial(
        table_settings, folder, classifier.artifact, options.columns(text_columns), csv_quotes
    )
    for answer in answer_lines(classifier, iter(texts) if texts else typed_texts(file, settings)):
        typer.echo(answer)


def score(
    input_url: options.Input,
    output_url: options.Output,
    run: options.RunOption = None,
    runs_dir: options.RunsDir = options.RUNS,
    text_columns: options.TextColumns = None,
    csv_quotes: options.CsvQuotes = None,
    prefix: options.Prefix = "",
    engine: options.Engine = "process",
    address: options.Address = None,
    workers: options.Workers = None,
    block_rows: options.BlockRows = 4096,
    batch_size: options.BatchSize = 32,
    as_json: options.Json = False,
) -> None:
    """Add label and score to every row of a table, of any size.

    The same command goes on where it was stopped. Rows that cannot be read are listed in
    OUTPUT/_errors, and the exit code is 2 if there are any.
    """
    import ad2kit
    from ad2kit.cli.show import print_result, show_messages, use_servable
    from ad2kit.cli.show_progress import check_all_rows, showing
    from ad2kit.cli.show_score import shown, summary

    show_messages()
    model = use_servable(runs_dir, run)
    with showing(shown) as on_progress:
        report = ad2kit.score(
            model,
            input_url,
            output_url,
            text_columns=options.columns(text_columns),
            csv_quotes=csv_quotes,
            prefix=prefix,
            engine=engine,
            address=address,
            workers=workers,
            block_rows=block_rows,
            batch_size=batch_size,
            on_progress=on_progress,
        )
    print_result(report, summary(report), as_json=as_json)
    check_all_rows(report)


def ask(
    recipe_name: options.RecipeName,
    input_url: options.Input,
    output_url: options.Output,
    base_url: options.BaseUrl,
    model: options.AskedModel,
    overrides: options.Overrides = None,
    concurrency: options.Concurrency = 8,
    max_rows: options.MaxRows = None,
    max_cost: options.MaxCost = None,
    requests_per_minute: options.RequestsPerMinute = None,
    tokens_per_minute: options.TokensPerMinute = None,
    timeout_s: options.Timeout = 120.0,
    proxy: options.Proxy = None,
    prefix: options.TeacherPrefix = "teacher_",
    against: options.Against = None,
    dry_run: options.DryRun = False,
    as_json: options.Json = False,
) -> None:
    """Ask a language model about every row of a table: the answers of a teacher.

    The section `ask` of the recipe says what is asked. The key is that of the environment variable
    AD2KIT_ASK_KEY. Each answer is kept at once, and the same command goes on where it was stopped.
    Rows that get no answer are listed in OUTPUT/_errors, and the exit code is 2 if there are any.
    """
    from ad2kit.asking import ask as asking
    from ad2kit.cli import show_ask
    from ad2kit.cli.show import print_json, print_result, show_messages
    from ad2kit.cli.show_progress import check_all_rows, showing
    from ad2kit.run.recipe import load_recipe

    show_messages()
    recipe = load_recipe(recipe_name, overrides or ())
    limits = asking.Limits(
        concurrency=concurrency,
        max_rows=max_rows,
        max_cost=max_cost,
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        timeout_s=timeout_s,
    )
    if dry_run:
        found = asking.estimate(recipe, input_url, output_url, limits)
        if as_json:
            print_json(dataclasses.asdict(found))
        else:
            typer.echo(show_ask.estimate_words(found))
        return
    with showing(show_ask.shown) as on_progress:
        report = asking.ask(
            recipe,
            input_url,
            output_url,
            base_url=base_url,
            model=model,
            limits=limits,
            prefix=prefix,
            proxy=proxy,
            against=against,
            on_progress=on_progress,
        )
    print_result(report, show_ask.summary(report), as_json=as_json)
    check_all_rows(report)
