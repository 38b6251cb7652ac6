"""What the project says of itself in several files is the same in all of them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

import ad2kit

CHECKOUT = Path(ad2kit.__file__).parents[1]


def read(name: str) -> Any:
    return yaml.safe_load((CHECKOUT / name).read_text(encoding="utf-8"))


def project() -> Any:
    return tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_workflow_tests_the_pythons_that_the_classifiers_name() -> None:
    job = read(".github/workflows/test.yml")["jobs"]["test"]
    named = [
        line.rpartition(" ")[2] for line in project()["classifiers"] if re.search(r":: 3\.", line)
    ]
    assert job["strategy"]["matrix"]["python"] == named
    assert [step["run"] for step in job["steps"] if "run" in step] == ["make test PYTHON=python"]


def test_commits_are_checked_by_the_tools_of_make_lint() -> None:
    lint = (CHECKOUT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    tools = re.findall(r"\$\(BIN\)/([\w-]+)(?: (check|format))?", lint)
    hooks = read(".pre-commit-config.yaml")["repos"][0]["hooks"]
    assert [hook["entry"].split()[0] for hook in hooks] == [
        f".venv/bin/{tool}" for tool, _ in tools
    ]


def test_the_citation_is_of_this_version() -> None:
    citation = read("CITATION.cff")
    assert citation["version"] == ad2kit.__version__
    assert citation["license"] == project()["license"]
    (paper,) = citation["references"]
    assert paper["doi"] in (CHECKOUT / "ad2kit/training/ad2.py").read_text()
