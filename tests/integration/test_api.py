"""The public functions, as their docstrings show them: each call runs, and runs a second time."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

import ad2kit
from tests.conftest import QUICK

if TYPE_CHECKING:
    from pathlib import Path

# In the order of the work; `open_run` comes first.
STAGES = ("distill", "export", "judge", "measure", "package", "load", "score")


def example_of(name: str) -> list[str]:
    """The indented lines under the first one of a docstring."""
    lines = (inspect.getdoc(getattr(ad2kit, name)) or "").splitlines()[2:]
    return [line.strip() for line in lines[: lines.index("")]]


def test_each_function_shows_a_call() -> None:
    assert {*STAGES, "open_run", "__version__"} == set(ad2kit.__all__) == set(dir(ad2kit))
    for name in (*STAGES, "open_run"):
        assert any(f"ad2kit.{name}(" in line for line in example_of(name)), name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        ad2kit.nonsense  # noqa: B018


@pytest.mark.slow
def test_the_calls_run_twice_in_one_process(tmp_path: Path) -> None:
    (opened,) = example_of("open_run")
    opened = re.sub(r'"demo", overrides=\[.*\]', f'"smoke", overrides={list(QUICK)}', opened)
    calls = [line for name in STAGES for line in example_of(name)]
    twice = [f"        {line}" for line in calls]
    script = [
        "import ad2kit",
        "if __name__ == '__main__':",
        f"    {opened}",
        "    for number in range(2):",
        *twice,
        "        print(number, report.rows, tag, label)",
    ]
    (tmp_path / "script.py").write_text("\n".join(script))
    (tmp_path / "reviews.csv").write_text("sentence\nnever dull\nnot at all convincing\n")
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()[-2:]
    assert first.startswith("0 2 ad2kit-smoke:")
    assert first[2:] == second[2:]
    assert (tmp_path / "scored").is_dir()
