"""The wheel that users install, away from the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest

import ad2kit
from ad2kit.packaging.bento import copy_package
from tests.conftest import RECIPES

if TYPE_CHECKING:
    from ad2kit.run.folder import RunDir

pytestmark = pytest.mark.slow

CHECKOUT = Path(__file__).parents[2]
MAIN = "from ad2kit.__main__ import main; main()"


class Installed(NamedTuple):
    """The wheel, installed without its dependencies into a folder that shadows the checkout."""

    wheel: Path
    site: Path

    def python(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self.site.parent,
            env={**os.environ, "PYTHONPATH": str(self.site)},
            capture_output=True,
            text=True,
            check=False,
        )

    def ad2kit(self, *arguments: str) -> str:
        """Run the command line and return what it printed."""
        done = self.python("-c", MAIN, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)],
        cwd=CHECKOUT,
        check=True,
        capture_output=True,
    )
    (wheel,) = folder.glob("*.whl")
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--no-index",
            "--target",
            str(folder / "site"),
            str(wheel),
        ],
        check=True,
        capture_output=True,
    )
    return Installed(wheel, folder / "site")


def test_the_wheel_holds_what_an_installation_needs_and_no_more(installed: Installed) -> None:
    assert installed.wheel.name == f"ad2kit-{ad2kit.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(installed.wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        described = archive.read(metadata).decode()
    assert {f"ad2kit/_recipes/{name}.yaml" for name in RECIPES} <= names
    assert {"ad2kit/_serving/service.py", "ad2kit/py.typed", "ad2kit/cli/app.py"} <= names
    modules = {
        path.relative_to(CHECKOUT).as_posix() for path in (CHECKOUT / "ad2kit").rglob("*.py")
    }
    assert modules <= names
    top = {name.split("/")[0] for name in names}
    assert top == {"ad2kit", metadata.split("/")[0]}  # no tests, no bench, no serving
    assert not any("test" in name or "__pycache__" in name for name in names)
    # The base installation must stay light: whatever is heavy belongs to an extra.
    required = [line for line in described.splitlines() if line.startswith("Requires-Dist:")]
    base = [line for line in required if "extra ==" not in line]
    assert base
    assert not [line for line in base if "torch" in line or "transformers" in line]


def test_a_bento_carries_the_same_code(installed: Installed, tmp_path: Path) -> None:
    copy_package(tmp_path / "ad2kit")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    with zipfile.ZipFile(installed.wheel) as archive:
        # What serving does not read: the recipes, and the service, which lies beside the package.
        names = {
            name
            for name in archive.namelist()
            if name.startswith("ad2kit/")
            and not name.startswith(("ad2kit/_recipes", "ad2kit/_serving"))
        }
        assert {str(path.relative_to(tmp_path)) for path in files} == names
        assert {archive.read(str(path.relative_to(tmp_path))) for path in files} == {
            path.read_bytes() for path in files
        }


def test_the_installed_package_shadows_the_checkout(installed: Installed) -> None:
    # The other tests of this file mean nothing where this one fails.
    done = installed.python(
        "-c", "import ad2kit.cli.app; print(ad2kit.__file__, ad2kit.cli.app.__file__)"
    )
    assert done.returncode == 0, done.stderr
    for path in done.stdout.split():
        assert Path(path).is_relative_to(installed.site)


def test_the_installed_command_lists_its_recipes(installed: Installed) -> None:
    listed = installed.ad2kit("recipes")
    assert {line.split()[0] for line in listed.splitlines()} == RECIPES
    assert set(json.loads(installed.ad2kit("recipes", "--json"))) == RECIPES
    assert installed.ad2kit("--version").strip() == ad2kit.__version__
    assert (installed.site / "bin" / "ad2kit").is_file()


def test_the_installed_command_checks_a_recipe(installed: Installed) -> None:
    checked = json.loads(installed.ad2kit("check", "smoke", "--json"))
    assert checked["recipe"]["name"] == "smoke"
    assert all(split["rows"] for split in checked["splits"].values())
    wrong = installed.python("-c", MAIN, "check", "smok")
    assert wrong.returncode == 2
    assert "did you mean 'smoke'?" in wrong.stderr


def test_the_installed_command_predicts_without_torch(
    installed: Installed, finished_run: RunDir
) -> None:
    printed = installed.ad2kit("predict", "--run", str(finished_run.path), "not dull")
    (line,) = printed.splitlines()
    expected = ad2kit.load(finished_run.path, threads=1).predict(["not dull"])[0]
    answer = json.loads(line)
    assert answer["text"] == "not dull"
    assert answer["label"] == expected.label
    assert answer["scores"] == pytest.approx(expected.scores, abs=1e-5)
    assert (answer["tokens"], answer["truncated"]) == (expected.tokens, False)
    code = (
        "import sys, ad2kit\n"
        "ad2kit.load(sys.argv[1]).predict(['not dull'])\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = installed.python("-c", code, str(finished_run.path))
    assert done.stdout.strip() == "[]", done.stderr


def test_the_installed_service_is_found_by_the_package_stage(installed: Installed) -> None:
    code = (
        "from ad2kit.packaging.bento import service_file\n"
        "from ad2kit.run.recipe import recipes_folder\n"
        "print(service_file(), recipes_folder())"
    )
    done = installed.python("-c", code)
    package = installed.site / "ad2kit"
    assert done.stdout.split() == [
        str(package / "_serving" / "service.py"),
        str(package / "_recipes"),
    ], done.stderr
