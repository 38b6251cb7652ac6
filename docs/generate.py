"""Write the pages of docs/reference/ from the code: `python docs/generate.py`.

Commands come from Typer, recipe keys from the pydantic models, the HTTP interface from the OpenAPI
document, settings from their model, and the Python interface from signatures and docstrings.
"""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import typer
from pydantic import BaseModel

import ad2kit
from ad2kit.cli.app import app
from ad2kit.exporting.classifier import OnnxClassifier, Prediction
from ad2kit.run.recipe import Recipe
from ad2kit.run.sections import Section
from ad2kit.service.openapi import document
from ad2kit.service.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from pydantic.fields import FieldInfo

REFERENCE = Path(__file__).parent / "reference"
NOTE = "<!-- Written by `make reference`. Change the code, not this page. -->"


def pages() -> dict[str, str]:
    """Return the text of each page by its file name."""
    made = {
        "commands.md": _commands(),
        "recipe.md": _recipe(),
        "http.md": _http(),
        "settings.md": _settings(),
        "python.md": _python(),
    }
    return {name: "\n".join([NOTE, "", *lines]).rstrip() + "\n" for name, lines in made.items()}


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """Yield the lines of a Markdown table and an empty one; nothing if there are no rows."""
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    if cells:
        names = list(head)
        for row in (names, ["---"] * len(names), *cells):
            yield f"| {' | '.join(row)} |"
        yield ""


def markdown(text: str | None) -> str:
    """Return a docstring as Markdown: roles and double backticks become code."""
    text = inspect.cleandoc(text or "")
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
    return re.sub(r"``(.+?)``", r"`\1`", text, flags=re.DOTALL)


def _commands() -> Iterator[str]:
    yield from ("# Commands", "")
    yield from ("Every command of `ad2kit`. `ad2kit COMMAND --help` prints the same.", "")
    yield from ("| Exit code | Meaning |", "|---|---|")
    yield from ("| 0 | The command succeeded. |", "| 1 | A gate failed. |")
    yield "| 2 | Input or options are wrong, or `ad2kit score` could not score some rows. |"
    yield from ("| 3 | An extra is not installed. |", "| 70 | ad2kit has a defect. |")
    yield from ("| 130 | The command was interrupted. |", "")
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        yield from (f"## {name}", "", inspect.cleandoc(command.help or ""), "")
        arguments = [item for item in command.params if item.param_type_name == "argument"]
        options = [item for item in command.params if item.param_type_name == "option"]
        words = [_metavar(item) for item in arguments]
        usage = ["ad2kit", name, "[OPTIONS]" if options else "", *words]
        yield from ("```text", " ".join(filter(None, usage)), "```", "")
        yield from table(
            ("Argument", "Required", "Meaning"),
            (
                (
                    f"`{_metavar(item).strip('[].')}`",
                    "yes" if item.required else "no",
                    item.help or "",
                )
                for item in arguments
            ),
        )
        yield from table(
            ("Option", "Default", "Meaning"),
            ((_option(item), _default(item), item.help or "") for item in options),
        )


def _metavar(item: Any) -> str:
    name = str(item.metavar or item.name.upper()).strip("[].")
    name = name if item.required else f"[{name}]"
    return f"{name}..." if item.nargs != 1 else name


def _option(item: Any) -> str:
    if item.is_flag:
        return f"`{item.opts[0]}`"
    kind = item.type_descriptor.annotation
    choices = get_args(kind)
    return f"`{item.opts[0]} {item.metavar or '|'.join(choices) or kind.__name__.upper()}`"


def _default(item: Any) -> str:
    if item.required:
        return "required"
    return "" if item.default in (None, False, ()) else f"`{item.default}`"


def _recipe() -> Iterator[str]:
    yield from ("# Recipe keys", "")
    yield from ("A recipe is one YAML file. Every key can also be set on the command line:", "")
    yield from ("```sh", "ad2kit run custom data.source=my/folder distill.epochs=4", "```", "")
    yield from ("A key that does not exist is an error. The error names the nearest key.", "")
    yield from _section("", Recipe, set())


def _section(path: str, model: type[BaseModel], told: set[type[BaseModel]]) -> Iterator[str]:
    inherited = any(base in told for base in model.__mro__[1:])
    told.add(model)
    yield from (f"## {path or 'Top level'}", "", markdown(model.__doc__), "")
    if inherited:
        yield from ("The other keys mean the same as those of `teacher.finetune`.", "")
    inner, rows = list[tuple[str, type[BaseModel]]](), list[tuple[str, str, str]]()
    schema = model.model_json_schema()["properties"]
    for name, field in model.model_fields.items():
        key = f"{path}.{name}" if path else name
        kinds = (field.annotation, *get_args(field.annotation))
        found = next((k for k in kinds if isinstance(k, type) and issubclass(k, Section)), None)
        if found is not None:
            inner.append((key, found))
        if found is None or type(None) in kinds:
            kind = _schema(schema[name]) if found is None else "section or null"
            rows.append((f"`{key}`", kind, _value(field)))
    yield from table(("Key", "Type", "Default"), rows)
    for key, section in inner:
        yield from _section(key, section, told)


def _value(field: FieldInfo) -> str:
    """Return the default of a field as YAML writes it."""
    if field.is_required():
        return "required"
    return f"`{_yaml(field.default)}`"


def _yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _http() -> Iterator[str]:
    whole = document({"": 1}, keys=True, max_texts=Settings().max_texts)
    yield from ("# HTTP", "")
    yield "The running service returns this as an OpenAPI document at `/docs.json`."
    yield from ("This page shows it for a model of one text and with API keys.", "")
    for path, methods in whole["paths"].items():
        for method, operation in methods.items():
            yield from (f"## {method.upper()} {path}", "", f"{operation['summary']}.", "")
            if operation.get("security") == []:
                yield from ("This path needs no API key.", "")
            yield from table(
                ("Header", "Meaning"),
                (
                    (f"`{item['name']}`", item["description"])
                    for item in operation.get("parameters", ())
                ),
            )
            if "requestBody" in operation:
                schema = operation["requestBody"]["content"]["application/json"]["schema"]
                yield from (f"Body: {_schema(schema)}.", "")
            yield from table(
                ("Status", "Meaning", "Hint"),
                (
                    (status, answer["description"], _hint(answer))
                    for status, answer in operation["responses"].items()
                ),
            )
    yield from ("## Bodies", "")
    for name, schema in whole["components"]["schemas"].items():
        yield from (f"### {name}", "", markdown(schema.get("description")), "")
        required = schema.get("required", ())
        yield from table(
            ("Field", "Type", "Always there"),
            (
                (f"`{field}`", _schema(kind), "yes" if field in required else "no")
                for field, kind in schema["properties"].items()
            ),
        )


def _hint(answer: dict[str, Any]) -> str:
    content = answer.get("content", {}).get("application/json", {})
    return str(content.get("example", {}).get("error", {}).get("hint", ""))


def _schema(schema: dict[str, Any]) -> str:
    """Return the type that a JSON schema describes, in words."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(map(_schema, schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array" and "items" in schema:
        return f"list{_bounds(schema, 'minItems', 'maxItems')} of {_schema(schema['items'])}"
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_schema(schema['additionalProperties'])}"
    return f"{schema.get('type', 'any')}{_bounds(schema, 'minimum', 'maximum')}"


def _bounds(schema: dict[str, Any], least: str, most: str) -> str:
    signs = {least: "≥", most: "≤", "exclusiveMinimum": ">", "exclusiveMaximum": "<"}
    said = [f"{sign} {_yaml(schema[key])}" for key, sign in signs.items() if key in schema]
    return f" ({', '.join(said)})" if said else ""


def _settings() -> Iterator[str]:
    _, _, meaning = markdown(Settings.__doc__).partition("\n\n")
    yield from ("# Service settings", "", "The environment sets a Bento and a checkout alike.", "")
    yield from (meaning, "")
    yield "In a checkout, `bentoml serve --arg NAME=VALUE` sets the same. API keys are"
    yield from ("the exception, because other users of the machine can read a command line.", "")
    schema = Settings.model_json_schema()["properties"]
    yield from table(
        ("Variable", "Type", "Default"),
        (
            (f"`AD2KIT_{name.upper()}`", _schema(schema[name]), _value(field))
            for name, field in Settings.model_fields.items()
        ),
    )


def _python() -> Iterator[str]:
    yield from (
        "# Python",
        "",
        "These names are the public interface. Everything else may change.",
        "",
    )
    for name in ad2kit.__all__:
        if not name.startswith("__"):
            yield from _object(f"ad2kit.{name}", getattr(ad2kit, name))
    yield from ("## What load returns", "")
    yield from _object("OnnxClassifier", OnnxClassifier, "###")
    yield from _object("OnnxClassifier.predict", OnnxClassifier.predict, "####")
    yield from _object("Prediction", Prediction, "###")


def _object(name: str, found: Any, level: str = "##") -> Iterator[str]:
    signature = inspect.signature(found)
    returns = signature.return_annotation
    end = f") -> {returns}" if isinstance(returns, str) and returns != "None" else ")"
    yield from (
        f"{level} {name}",
        "",
        "```text",
        f"{name}(",
        *_parameters(signature),
        end,
        "```",
        "",
    )
    yield from _sections(markdown(found.__doc__))


def _parameters(signature: inspect.Signature) -> Iterator[str]:
    starred = False
    for item in signature.parameters.values():
        if item.kind is item.KEYWORD_ONLY and not starred:
            yield "    *,"
            starred = True
        if item.name != "self":
            default = "" if item.default is item.empty else f" = {item.default!r}"
            shown = re.sub(r"<f.*>", "...", default)  # a function or a factory
            yield f"    {item.name}: {str(item.annotation).strip(chr(39))}{shown},"


def _sections(text: str) -> Iterator[str]:
    """Yield a docstring of Google's style: `Args:` and `Raises:` as lists, examples as code."""
    text = re.sub(r"(?m)^(Args|Raises|Returns|Yields):$", r"**\1**\n", text)
    lines, code = text.split("\n"), False
    items = False
    for number, line in enumerate(lines):
        if re.match(r"\*\*\w+\*\*$", line):
            items = True
        if items:
            entry = re.match(r"    (\S.*?): (.*)", line)
            yield f"- `{entry[1]}`: {entry[2]}" if entry else line.replace("        ", "  ", 1)
            continue
        if line.startswith("    ") and not code:
            code = True
            yield "```python"
        yield line.removeprefix("    ")
        following = lines[number + 1] if number + 1 < len(lines) else ""
        if code and not following.startswith("    "):
            code = False
            yield "```"
    yield ""


if __name__ == "__main__":
    for page, content in pages().items():
        (REFERENCE / page).write_text(content, encoding="utf-8")
    sys.stdout.write(f"{len(pages())} pages in {REFERENCE}\n")
