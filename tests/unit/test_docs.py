"""What the documents say about the code is true: links, commands, Python, recipe keys, files.

Each checker yields what is wrong in one text, and has a control in which it must find something.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import pytest
import typer

import ad2kit
from ad2kit.cli.app import app
from ad2kit.run.recipe import Recipe
from ad2kit.run.sections import Section

if TYPE_CHECKING:
    from types import ModuleType

    from pydantic import BaseModel

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "bench/README.md", *DOCS.rglob("*.md")]
)

_FENCE = re.compile(r"(?ms)^( *)```(\w*)\n(.*?)^\1```")
_INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def blocks(text: str, *languages: str) -> list[str]:
    """Return the code blocks of these languages."""
    return [code for _, language, code in _FENCE.findall(text) if language in languages]


def inline(text: str) -> list[str]:
    """Return what stands in backticks outside of code blocks."""
    return _INLINE.findall(_FENCE.sub("", text))


def anchors(text: str) -> set[str]:
    """Return the anchors of the headings, as GitHub and the site make them."""
    found = re.findall(r"(?m)^#+ (.+)$", _FENCE.sub("", text))
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in found}


def broken_links(text: str, page: Path) -> Iterator[str]:
    """Links to files or headings that do not exist; those of a page of the site stay in docs/."""
    for target in _LINK.findall(_FENCE.sub("", text)):
        if re.match(r"https?://|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists():
            yield f"{target}: no such file"
        elif page.is_relative_to(DOCS) and not file.is_relative_to(DOCS):
            yield f"{target}: the site has no such page"
        elif anchor and anchor not in anchors(file.read_text() if name else text):
            yield f"{target}: no such heading"


def commands(code: str) -> Iterator[list[str]]:
    """The words after `ad2kit` of each command in a shell block."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line.replace("$(", "").replace("…", ""), comments=True)
        while words:
            end = next((i for i, word in enumerate(words) if word in ("&&", "|", ";", "&")), None)
            command = words if end is None else words[:end]
            words = [] if end is None else words[end + 1 :]
            if command[:1] == ["ad2kit"]:
                yield command[1:]
            elif "ad2kit" in command and command[:2] == ["accelerate", "launch"]:
                yield command[command.index("ad2kit") + 1 :]


@cache
def typed() -> Any:
    """The commands, as Typer parses them."""
    return typer.main.get_command(app)


def wrong_command(words: list[str], *, whole: bool) -> str | None:
    """Why these words are no command; one that is not ``whole`` may lack an argument."""
    if not words or words[0] in ("--help", "--version"):
        return None
    if words[0] == words[0].upper():
        return None  # ad2kit COMMAND
    if words[0] not in typed().commands:
        return f"no command {words[0]}"
    if "--help" in words:
        return None
    try:
        with typed().commands[words[0]].make_context(words[0], list(words[1:])):
            return None
    except Exception as error:
        message = str(error) or type(error).__name__
        if not whole and "missing" in (message + type(error).__name__).lower():
            return None
        return message


def wrong_commands(text: str, _page: Path) -> Iterator[str]:
    """Commands in blocks and in backticks that Typer does not parse."""
    for code in blocks(text, "sh"):
        for words in commands(code):
            if (wrong := wrong_command(words, whole=True)) is not None:
                yield f"ad2kit {' '.join(words)}: {wrong}"
    for code in inline(text):
        for words in commands(code):
            if (wrong := wrong_command(words, whole=False)) is not None:
                yield f"ad2kit {' '.join(words)}: {wrong}"


def wrong_python(text: str, _page: Path) -> Iterator[str]:
    """Blocks that do not compile, names that ad2kit does not have, arguments that do not fit."""
    for code in blocks(text, "python"):
        try:
            tree = ast.parse(code)
        except SyntaxError as error:
            yield f"{error}: {code}"
            continue
        for node in ast.walk(tree):
            if (name := of_ad2kit(node)) is not None and name not in ad2kit.__all__:
                yield f"no ad2kit.{name}"
            if isinstance(node, ast.Call) and (name := of_ad2kit(node.func)) in ad2kit.__all__:
                words = {word.arg: None for word in node.keywords if word.arg is not None}
                try:
                    inspect.signature(getattr(ad2kit, name)).bind(*node.args, **words)
                except TypeError as error:
                    yield f"ad2kit.{name}: {error}"
    for name in re.findall(r"`ad2kit\.(\w+)(?:\(\w*\))?`", text):
        if name not in ad2kit.__all__:
            yield f"no ad2kit.{name}"


def of_ad2kit(node: ast.AST) -> str | None:
    """The name X of ``ad2kit.X``."""
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return node.attr if node.value.id == "ad2kit" else None
    return None


@cache
def recipe_keys() -> frozenset[str]:
    """All keys of a recipe, and its sections."""

    def walk(path: str, model: type[BaseModel]) -> Iterator[str]:
        for name, field in model.model_fields.items():
            yield f"{path}{name}"
            for kind in (field.annotation, *get_args(field.annotation)):
                if isinstance(kind, type) and issubclass(kind, Section):
                    yield from walk(f"{path}{name}.", kind)

    return frozenset(walk("", Recipe))


def unknown_keys(text: str, _page: Path) -> Iterator[str]:
    """Keys ``a.b=value`` or ``a.b: value``, and ``a.b`` alone in backticks, that no recipe has."""
    sections = "|".join(name for name in recipe_keys() if f"{name}." in " ".join(recipe_keys()))
    said = list[str]()
    for code in [*blocks(text, "sh"), *inline(text)]:
        said += re.findall(r"(?<![\w./-])([a-z_]+(?:\.[a-z_0-9]+)+)(?==)", code)
    for code in inline(text):
        said += re.findall(rf"^((?:{sections})(?:\.[a-z_]+)+)(?::.*)?$", code)
    files = (".json", ".md", ".svg", ".py", ".html")
    for key in said:
        if key not in {*recipe_keys(), "key.path"} and not key.endswith(files):
            yield f"no key {key}"


@cache
def files() -> frozenset[str]:
    """The files of the repository."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    return frozenset(listed or (str(f.relative_to(ROOT)) for f in ROOT.rglob("*.*")))


def missing_files(text: str, page: Path) -> Iterator[str]:
    """Files of the repository that are named in backticks, or run by python, and do not exist."""
    named = [code for code in inline(text) if re.fullmatch(r"[\w.-]+(?:/[\w.-]+)+", code)]
    for code in [*blocks(text, "sh"), *inline(text)]:
        named += re.findall(r"python ([\w/]+\.py)", code)
        named += [f"bench/{name}.py" for name in re.findall(r"python -m bench\.(\w+)", code)]
    for name in named:
        places = (name, f"ad2kit/{name}", f"{page.parent.relative_to(ROOT)}/{name}")
        suffixes = (".py", ".md", ".yaml", ".json", ".jsonl", ".toml")
        if name.endswith(suffixes) and not files().intersection(places):
            if name.startswith(("my/", "runs/")):
                continue
            yield f"no file {name}"


Checker = Callable[[str, Path], Iterator[str]]
CHECKERS: dict[Checker, tuple[str, ...]] = {
    broken_links: (
        "[x](nowhere.md)",
        "[x](index.md#nowhere)",
        "[x](#nowhere)",
        "![x](nowhere.svg)",
        "[x](../README.md)",
    ),
    wrong_commands: (
        "```sh\nad2kit distil demo\n```",
        "```sh\nad2kit run demo --max-hours 1\n```",
        "```sh\ncd x && ad2kit run\n```",
        "```sh\nad2kit score a b \\\n  --engine spark\n```",
        "`ad2kit evaluate`",
        "`ad2kit fit --retian 0.9`",
        "```sh\naccelerate launch -m ad2kit destill demo\n```",
    ),
    wrong_python: (
        "```python\nx = (\n```",
        "```python\nimport ad2kit\nad2kit.train()\n```",
        "```python\nimport ad2kit\nad2kit.load()\n```",
        "`ad2kit.train`",
        "```python\nimport ad2kit\nad2kit.load('x', thread=1)\n```",
    ),
    unknown_keys: (
        "```sh\nad2kit run demo distill.learning_rate=1\n```",
        "`distill.rate=1`",
        "`parity.min_kept`",
        "`distill.adversary.drop_out: own`",
    ),
    missing_files: (
        "`training/nothing.py`",
        "```sh\npython bench/nothing.py\n```",
        "```sh\npython -m bench.nothing TAG\n```",
    ),
}
CONTROLS = [(checker, text) for checker, texts in CHECKERS.items() for text in texts]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.parametrize("checker", CHECKERS, ids=lambda checker: checker.__name__)
def test_a_page_is_true(checker: Checker, page: Path) -> None:
    assert list(checker(page.read_text(), page)) == []


@pytest.mark.parametrize(("checker", "text"), CONTROLS)
def test_a_checker_finds_what_is_wrong(checker: Checker, text: str) -> None:
    assert list(checker(text, DOCS / "index.md"))


def test_a_checker_passes_what_is_right() -> None:
    text = (
        "[x](start/demo.md#the-data) [y](https://example.org)\n"
        "```sh\nad2kit run demo distill.lr=1e-4 \\\n  --max-minutes 3  # text\n```\n"
        "```python\nimport ad2kit\nad2kit.load('x', threads=1).predict(['y'])\n```\n"
        "`ad2kit fit` `parity.json` `distill.adversary.dropout: own` `training/loop.py`\n"
    )
    assert [wrong for checker in CHECKERS for wrong in checker(text, DOCS / "index.md")] == []


def test_every_command_and_key_is_found_in_the_pages() -> None:
    """The checkers look at something: the pages have many commands, blocks and links."""
    texts = [page.read_text() for page in PAGES]
    assert sum(len(list(commands(code))) for text in texts for code in blocks(text, "sh")) > 30
    assert sum(len(_LINK.findall(text)) for text in texts) > 100
    assert sum(len(blocks(text, "python")) for text in texts) >= 4


@cache
def generator() -> ModuleType:
    return importlib.import_module("docs.generate")


def stale(folder: Path) -> list[str]:
    """The pages of a folder that the generator would write otherwise."""
    made = generator().pages()
    there = {page.name for page in folder.glob("*.md")}
    return sorted(there ^ set(made)) + [
        name for name in there & set(made) if (folder / name).read_text() != made[name]
    ]


def test_the_generated_pages_are_up_to_date(tmp_path: Path) -> None:
    assert stale(DOCS / "reference") == [], "type: make reference"
    for page in (DOCS / "reference").glob("*.md"):
        (tmp_path / page.name).write_text(page.read_text().replace("required", "needed"))
    assert "recipe.md" in stale(tmp_path)
    (tmp_path / "http.md").unlink()
    assert "http.md" in stale(tmp_path)


def test_every_command_key_and_name_has_its_place_in_the_reference() -> None:
    made = generator().pages()
    for name in typed().commands:
        assert f"## {name}\n" in made["commands.md"]
    for key in recipe_keys():
        assert f"`{key}`" in made["recipe.md"] or f"## {key}\n" in made["recipe.md"], key
    for name in ad2kit.__all__:
        assert name.startswith("__") or f"## ad2kit.{name}\n" in made["python.md"]


def test_the_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_page_of_the_site_is_in_its_navigation() -> None:
    said = set(re.findall(r'"([\w/-]+\.md)"', (ROOT / "zensical.toml").read_text()))
    assert said == {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")}


def test_the_plot_of_the_site_is_the_one_that_was_measured() -> None:
    plot = DOCS / "measurements/serve.svg"
    assert plot.read_bytes() == (ROOT / "bench/results/serve.svg").read_bytes()
