"""What is a text: the same for training, bulk scoring and service."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ad2kit.data.splits import load_split
from ad2kit.exporting.classifier import OnnxClassifier
from ad2kit.run.errors import DataError, UserError
from ad2kit.scoring.parts import _wrong
from ad2kit.service.openapi import document
from ad2kit.tables.texts import is_text

if TYPE_CHECKING:
    from pathlib import Path

    from ad2kit.run.folder import RunDir

INVISIBLE = (
    "",
    " ",
    "\t\r\n",
    "\0",
    "\x1f\x7f\x9f",
    "\xa0",
    "\u3000",
    "\u2028\u2029",
    "\u00ad",
    "\u200b",
    "\u200c\u200d",
    "\u200e\u200f\u202a\u202e\u2066\u2069",
    "\u2060",
    "\ufeff",
    "\u034f",
    "\u061c",
    "\u115f\u1160",
    "\u3164",
    "\uffa0",
    "\u17b4",
    "\u180e",
    "\ufe0f",
    "\u2800",
    "\ufff9\ufffb",
    "\U000e0041\U000e007f",
    "\U0001d173",
    "\U0001bca0",
    "\ufeff \u200b\n",
)
VISIBLE = (
    "a",
    ".",
    "0",
    "\u200bb",
    "\u4e2d",
    "\u0301",
    "\u0928\u094d",
    "👩\u200d👩\u200d👧",
    "🏴\U000e0067\U000e007f",
    "€",
    " \u00ad-",
    "\ufffc",
    "\ufffd",
    "\ue000",
    "\u0600",
    "\U0001d54f",
    "\u1680.",
    "\u3164\u3131",
    "x\0",
)


@pytest.mark.parametrize("text", INVISIBLE, ids=ascii)
def test_what_does_not_show_is_no_text(text: str) -> None:
    assert not is_text(text)


@pytest.mark.parametrize("text", VISIBLE, ids=ascii)
def test_what_shows_is_one(text: str) -> None:
    assert is_text(text)


def test_letters_numbers_marks_and_signs_show_and_blanks_and_controls_do_not() -> None:
    """Against Python's own tables, of whichever version: the few that differ are listed above."""
    fillers = set("\u115f\u1160\u3164\uffa0\u2800\u034f\u17b4\u17b5\u180b\u180c\u180d\u180f")
    selectors = {
        chr(code)
        for start, end in ((0xFE00, 0xFE10), (0xE0100, 0xE01F0))
        for code in range(start, end)
    }
    for code in (*range(0xD800), *range(0xE000, 0x110000)):
        character = chr(code)
        category = unicodedata.category(character)
        if category in ("Zs", "Zl", "Zp", "Cc"):
            assert not is_text(character), ascii(character)
        elif category[0] in "LMNPS" and character not in fillers | selectors:
            assert is_text(character), ascii(character)


@pytest.mark.parametrize("column", [None, 5, b"a", ["a"], "a\ud800", "\udfffa"])
def test_what_is_no_text_at_all(column: object) -> None:
    assert not is_text(column)


@pytest.mark.parametrize("text", ["\u200b", "\ufeff ", "\u00ad\u2060", "\0\x1f"], ids=ascii)
def test_training_scoring_and_prediction_refuse_the_same(
    text: str, finished_run: RunDir, tmp_path: Path
) -> None:
    recipe = finished_run.recipe.data
    column, label = recipe.text_columns[0], recipe.label_column
    file = tmp_path / "rows.jsonl"
    rows = [{column: "fine", label: "positive"}, {column: text, label: "negative"}]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    with pytest.raises(DataError, match="at least one visible character"):
        load_split(file, recipe, ("negative", "positive"))
    assert "at least one visible character" in _wrong((text,), (column,))
    classifier = OnnxClassifier(finished_run.onnx("fp32"), threads=1)
    with pytest.raises(UserError, match="text 1: expected at least one visible character"):
        classifier.predict(["fine", text])
    # What is said of a text in a piece of a list counts from the list's first.
    with pytest.raises(UserError, match="text 17: expected at least one visible character"):
        classifier.encode(["fine", text], first=16)
    assert np.isfinite(classifier.logits([f"{text}fine"])).all()


def test_the_published_pattern_is_this_rule() -> None:
    schemas = document({"": 1}, keys=False, max_texts=9)["components"]["schemas"]
    one, _ = schemas["ClassifyRequest"]["properties"]["texts"]["anyOf"]
    pattern = re.compile(json.loads(json.dumps(one["pattern"])))
    for text in INVISIBLE + VISIBLE:
        assert bool(pattern.search(text)) == is_text(text)
