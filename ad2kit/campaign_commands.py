"""The commands that drive several stages: options translated. Heavy imports sit inside."""

from __future__ import annotations

from ad2kit import options
from ad2kit.runtime import stage


def run(
    recipe_name: options.RecipeName,
    overrides: options.Overrides = None,
    runs_dir: options.RunsDir = options.RUNS,
    run: options.RunOption = None,
    allow_inexact: options.Inexact = False,
    as_json: options.Json = False,
) -> None:
    """Take a recipe all the way to a Bento.

    distill, export, parity, bench and package, each skipped where it is done.
    """
    from ad2kit.terminal import (
        next_steps,
        print_result,
        print_table,
        start_run,
        training_progress,
    )

    folder = start_run(recipe_name, overrides, runs_dir, run)
    campaign = stage("ad2kit.campaigns.run", "run_all")
    with training_progress() as on_step:
        record = campaign(folder, on_step=on_step, allow_inexact=allow_inexact)
    if not as_json:
        print_table(folder)
    print_result(record, next_steps(record.tag, folder), as_json=as_json)


def compare(
    recipe_name: options.RecipeName,
    overrides: options.Overrides = None,
    methods: options.Methods = "finetune,kd,pkd,ad2",
    seeds: options.Seeds = 5,
    runs_dir: options.RunsDir = options.RUNS,
    allow_inexact: options.Inexact = False,
    as_json: options.Json = False,
) -> None:
    """Train students by several methods from one teacher; test the last against the others."""
    from ad2kit.recipe import load
    from ad2kit.terminal import print_comparison, show_messages, training_progress

    show_messages()
    recipe, names = load(recipe_name, overrides or ()), methods.replace(" ", "").split(",")
    campaign = stage("ad2kit.campaigns.compare", "compare")
    with training_progress() as on_step:
        report, folder = campaign(
            recipe, names, seeds, runs_dir, on_step=on_step, allow_inexact=allow_inexact
        )
    print_comparison(report, folder, as_json=as_json)


def sweep(
    recipe_name: options.RecipeName,
    overrides: options.Overrides = None,
    address: options.Address = None,
    storage: options.Storage = None,
    runs_dir: options.RunsDir = options.RUNS,
    allow_inexact: options.Inexact = False,
    as_json: options.Json = False,
) -> None:
    """Search learning rates, batch sizes and more on Ray; judge the best configuration."""
    from ad2kit.recipe import load
    from ad2kit.terminal import print_sweep, show_messages

    show_messages()
    campaign = stage("ad2kit.campaigns.sweep", "sweep")
    report, folder = campaign(
        load(recipe_name, overrides or ()), runs_dir,
        address=address, storage=storage, allow_inexact=allow_inexact,
    )  # fmt: skip
    print_sweep(report, folder, as_json=as_json)
