"""Shared fixtures: everything is offline, on one thread, and real (tiny models, real runs)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

# Before any library reads them: no hub, no telemetry, and a Bento store of our own.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["BENTOML_DO_NOT_TRACK"] = "true"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# As in ad2kit.run.ray_cluster; else whatever runs beside the tests comes first.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112  (Ray's own name)
os.environ["BENTOML_HOME"] = tempfile.mkdtemp(prefix="ad2kit-tests-bentoml-")

import pytest
from hypothesis import HealthCheck, settings

from ad2kit.__main__ import main
from ad2kit.run import recipe as recipes
from ad2kit.run.folder import RunDir, open_run
from tests.warm import warm_process

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ad2kit.gate.records import BentoRecord
    from ad2kit.run.recipe import Recipe
    from tests.warm import Warm

# Real data lies beside the checkout on the machines of the developers.
SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"

RECIPES = {path.stem for path in (Path(__file__).parents[1] / "recipes").glob("*.yaml")}

# The smoke recipe, shortened: seconds for the whole chain.
QUICK = (
    "distill.epochs=1",
    "bench.seconds_per_cell=0.02",
    "bench.lengths_tokens=[16]",
    "parity.min_retained=0.5",
    "parity.min_retained_lower=0.3",
)


# One student of one layer, as small as one can be trained.
TINY_STEPS = (
    "data.max_train_rows=80",
    "data.max_length_tokens=40",
    "student.layers=[0]",
    "teacher.finetune.epochs=1",
    "distill.epochs=1",
    "distill.alpha=0",
    "compute.threads=1",
)


# The same examples each time, and no more than the suite has time for; `make soak` takes many.
_SLOW_IS_FINE = (HealthCheck.too_slow, HealthCheck.function_scoped_fixture)
settings.register_profile(
    "suite", derandomize=True, max_examples=60, deadline=None, suppress_health_check=_SLOW_IS_FINE
)
settings.register_profile(
    "soak", max_examples=3000, deadline=None, suppress_health_check=_SLOW_IS_FINE
)
settings.load_profile("suite")

HEADLESS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
)


@pytest.fixture(scope="session", autouse=True)
def _remove_the_bento_store() -> Iterator[None]:
    yield
    shutil.rmtree(os.environ["BENTOML_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def ray_here() -> Iterator[None]:
    """One Ray for the whole suite, whatever cluster a developer may have running."""
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def quick_recipe() -> Recipe:
    return recipes.load_recipe("smoke", QUICK)


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, quick_recipe: Recipe) -> RunDir:
    """A quick smoke run that is distilled, exported, judged and measured. Do not change it."""
    from ad2kit.exporting.export import export
    from ad2kit.gate.latency import measure
    from ad2kit.gate.parity import judge
    from ad2kit.training.distill import distill

    run = open_run(quick_recipe, tmp_path_factory.mktemp("runs"))
    distill(run)
    export(run)
    assert judge(run).passed
    measure(run)
    return run


@pytest.fixture(scope="session")
def packaged(
    finished_run: RunDir, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunDir, BentoRecord]:
    """A copy of the finished run and the record of its Bento. Do not change them."""
    from ad2kit.packaging.bento import package

    folder = tmp_path_factory.mktemp("packaged") / finished_run.path.name
    shutil.copytree(finished_run.path, folder)
    run = RunDir(folder)
    return run, package(run)


@pytest.fixture
def copied_run(finished_run: RunDir, tmp_path: Path) -> RunDir:
    """A copy of the finished run that a test may damage."""
    folder = tmp_path / "runs" / finished_run.path.name
    shutil.copytree(finished_run.path, folder)
    return RunDir(folder)


@pytest.fixture(scope="session")
def warm() -> Iterator[Warm]:
    """Run commands in processes of their own that need not import anything first."""
    with warm_process() as process:
        yield process


class Outcome:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def ad2kit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command line in this process."""

    def call(*arguments: str | Path) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["ad2kit", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), captured.out, captured.err)

    return call


class Both(NamedTuple):
    """What check and distill said of the same arguments."""

    code: int
    err: str

    @property
    def hint(self) -> str:
        return self.err.rpartition("\n  -> ")[2]


@pytest.fixture
def both(ad2kit: Callable[..., Outcome], tmp_path: Path) -> Callable[..., Both]:
    """Call check and distill with the same arguments, and insist that they agree."""

    def call(*overrides: str, teacher: str = f"{tmp_path}/teacher", recipe: str = "smoke") -> Both:
        arguments = [recipe, *TINY_STEPS, f"teacher.model={teacher}", *overrides]
        runs = tmp_path / "runs"
        checked = ad2kit("check", *arguments)
        distilled = ad2kit("distill", *arguments, "--runs-dir", runs)
        assert "Traceback" not in checked.err + distilled.err
        trained = list(runs.glob("*/*.jsonl"))
        shutil.rmtree(runs, ignore_errors=True)
        said = [outcome.err.rpartition("ad2kit: ")[2] for outcome in (checked, distilled)]
        assert (distilled.code, bool(trained)) == (checked.code, checked.code == 0), said
        if checked.code:
            assert said[0] == said[1]
        return Both(checked.code, said[0])

    return call


@pytest.fixture
def shared_data() -> Callable[[str], Path]:
    """Return the folder of a real task, or skip the test where there is none."""

    def folder(task: str) -> Path:
        path = SHARED_DATA / task
        if not path.is_dir():
            pytest.skip(f"the real data of '{task}' is not on this machine")
        return path

    return folder


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that loads a page: its DOM after loading, and what the console said."""
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on this machine")
    profile = tmp_path_factory.mktemp("chromium")

    def load(address: str, *options: str) -> tuple[str, list[str]]:
        done = subprocess.run(
            [path, *HEADLESS, *options, f"--user-data-dir={profile}", "--dump-dom", address],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return load
