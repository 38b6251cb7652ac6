"""The definition of a text to classify, shared by training, bulk scoring and service."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

VISIBLE = (
    r"[^\s\u0000-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f"
    r"\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
"""A visible character, as a pattern for Python and for JSON Schema.

Invisible are Unicode's White_Space, control characters, Default_Ignorable_Code_Point (soft
hyphens, joiners, variation selectors, fillers, marks of direction), the marks of annotations, and
the blank of Braille. They are listed because Python's own tables differ from version to version.
"""

Text = str | tuple[str, str]
"""What a model reads for one row: one text, or the two texts of a pair."""

_VISIBLE = re.compile(VISIBLE)
SURROGATE = re.compile("[\ud800-\udfff]")


def text_of(columns: Sequence[str]) -> Text:
    """Return the one or two columns of a row as a classifier and a service take them."""
    if len(columns) == 1:
        return columns[0]
    first, second = columns
    return first, second


def is_text(column: object) -> bool:
    """Tell whether this is a text to classify: it has a visible character and no lone surrogate.

    Callers in Python and over HTTP, and rows of files, can hold any value. No tokenizer accepts a
    lone surrogate, and a text of invisible characters often has no token at all.
    """
    if not isinstance(column, str) or _VISIBLE.search(column) is None:
        return False
    # isascii() costs nothing; the search reads the whole text.
    return column.isascii() or SURROGATE.search(column) is None
