"""What is a text to classify: the one rule of training, bulk scoring and service."""

from __future__ import annotations

import re

VISIBLE = (
    r"[^\s\u0000-\u001f\u007f-\u009f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f"
    r"\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
"""A character that shows, as a pattern for Python and for JSON Schema.

Those that do not are Unicode's White_Space, control characters, Default_Ignorable_Code_Point (soft
hyphens, joiners, variation selectors, fillers, marks of direction), the marks of annotations, and
the blank of Braille. They are listed because Python's own tables differ from version to version.
"""

_VISIBLE = re.compile(VISIBLE)
SURROGATE = re.compile("[\ud800-\udfff]")


def is_text(column: object) -> bool:
    """Tell whether this is a text to classify: something shows, and no surrogate is alone.

    Callers in Python and over HTTP, and rows of files, can hold anything. No tokenizer takes a lone
    surrogate; of what does not show it often leaves no token at all.
    """
    return (
        isinstance(column, str)
        and _VISIBLE.search(column) is not None
        # The first answer costs nothing, and the second reads the text.
        and (column.isascii() or SURROGATE.search(column) is None)
    )
