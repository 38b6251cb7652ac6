"""The commands that drive several stages. They translate options; heavy imports sit inside."""

from __future__ import annotations

from ad2kit.cli import options


def run(
    recipe_name: options.RecipeName,
    overrides: options.Overrides = None,
    runs_dir: options.RunsDir = options.RUNS,
    run: options.RunOption = None,
    max_minutes: options.MaxMinutes = None,
    allow_inexact: options.Inexact = False,
    as_json: options.Json = False,
) -> None:
    """Take a recipe all the way to a Bento.

    The stages are distill, export, parity, bench and package; a stage that is done is skipped.
    """
    from ad2kit.campaigns.run import run_all
    from ad2kit.cli.show import next_steps, print_result, print_table, start_run, training_progress

    folder = start_run(recipe_name, overrides, runs_dir, run, max_minutes)
    with training_progress() as on_step:
        record = run_all(folder, on_step=on_step, allow_inexact=allow_inexact)
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
    from ad2kit.campaigns import compare as campaign
    from ad2kit.cli.show import print_comparison, show_messages, training_progress
    from ad2kit.run.recipe import load_recipe

    show_messages()
    recipe = load_recipe(recipe_name, overrides or ())
    names = methods.replace(" ", "").split(",")
    with training_progress() as on_step:
        report, folder = campaign.compare(
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
    from ad2kit.campaigns.sweep import sweep as campaign
    from ad2kit.cli.show import print_sweep, show_messages
    from ad2kit.run.recipe import load_recipe

    show_messages()
    report, folder = campaign.sweep(
        load_recipe(recipe_name, overrides or ()),
        runs_dir,
        address=address,
        storage=storage,
        allow_inexact=allow_inexact,
    )
    print_sweep(report, folder, as_json=as_json)


def fit(
    recipe_name: options.RecipeName,
    retain: options.Retain,
    overrides: options.Overrides = None,
    p99_ms: options.P99Ms = None,
    max_mb: options.MaxMb = None,
    speedup: options.Speedup = None,
    margin: options.Margin = None,
    batch: options.Batch = 1,
    length: options.Length = 64,
    device: options.Device = None,
    layers: options.Layers = None,
    heads: options.Heads = None,
    feed_forward: options.FeedForward = None,
    runs_dir: options.RunsDir = options.RUNS,
    allow_inexact: options.Inexact = False,
    as_json: options.Json = False,
) -> None:
    """Find the cheapest student that meets a target on this machine.

    All shapes are measured untrained. The shapes that can meet the target are distilled, cheapest
    first, until one passes the gate. Exit code 1 if none does.
    """
    from ad2kit.campaigns.fit import fit as campaign
    from ad2kit.campaigns.fit.records import Target, check_found
    from ad2kit.campaigns.records import Grid
    from ad2kit.cli.show import print_fit, show_messages, training_progress
    from ad2kit.run.recipe import load_recipe

    show_messages()
    provider = [] if device is None else [f"export.provider={device}"]
    recipe = load_recipe(recipe_name, [*(overrides or ()), *provider])
    recipe_margin = recipe.parity.min_retained - recipe.parity.min_retained_lower
    target = Target(
        retain=retain,
        margin=max(0.0, recipe_margin) if margin is None else margin,
        p99_ms=p99_ms,
        max_mb=max_mb,
        speedup=speedup,
        batch_size=batch,
        length_tokens=length,
    )
    grid = Grid(
        layers=options.numbers("--layers", layers),
        attention_heads=options.numbers("--heads", heads),
        feed_forward=options.numbers("--feed-forward", feed_forward),
    )
    with training_progress() as on_step:
        report, folder = campaign.fit(
            recipe, target, grid, runs_dir, on_step=on_step, allow_inexact=allow_inexact
        )
    print_fit(report, folder, as_json=as_json)
    check_found(report, folder)
