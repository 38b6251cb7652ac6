r"""Tables that Spark itself has written, with texts that its CSV makes hard.

Where PySpark and Java are installed, ``python tests/spark.py`` writes
``tests/fixtures/spark-VERSION.tar.xz``: ``rows.json`` with the rows, and a folder of parts for each
way of writing them. Spark cuts spaces and tabs from the ends of a cell of a CSV if it is not told
otherwise.
"""

from __future__ import annotations

import json
import random
import tarfile
import tempfile
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parent / "fixtures"
KEPT = {"ignoreLeadingWhiteSpace": False, "ignoreTrailingWhiteSpace": False}
# The options of the writer by the name of the folder: the format comes first.
WRITERS: dict[str, tuple[str, dict[str, Any]]] = {
    "csv": ("csv", {"header": True}),
    "csv-gzip": ("csv", {"header": True, "compression": "gzip"}),
    "csv-as-it-is": ("csv", {"header": True, "emptyValue": "", **KEPT}),
    "csv-all-quoted": ("csv", {"header": True, "quoteAll": True, **KEPT}),
    "csv-doubled": ("csv", {"header": True, "escape": '"', **KEPT}),
    "json": ("json", {}),
    "parquet": ("parquet", {}),
}
BY_HAND = (
    "plain",
    'he said "never, dull" to me',
    'ends "so"',
    '"begins" so',
    "a, comma",
    "two\nlines",
    "cr\r\nlf",
    "C:\\new in a plain cell",
    "C:\\new, with a comma",
    'a \\" mark after a backslash',
    "ends with a backslash\\",
    "ends, with a backslash\\",
    "",
    " spaces ",
    "semi; colon | bar\ttab",
    "# no comment",
    "ümlaut — dash 😀",
    '""',
    "\\",
    '\\"',
    "'single'",
    "a line separator\u2028in between",
)


def rows() -> list[tuple[str, str]]:
    """The texts, some by hand and some of random marks, with a letter each."""
    drawn = random.Random(0)  # noqa: S311  (texts of a test)
    inside = ["x{}y".format("".join(drawn.choices('",\n\r\\ab;|\t ', k=8))) for _ in range(200)]
    alone = ["".join(drawn.choices('",\\ab', k=6)) for _ in range(200)]
    return [(text, "ab"[number % 2]) for number, text in enumerate((*BY_HAND, *inside, *alone))]


def main() -> None:
    """Write the fixture with the version of Spark that is installed."""
    from pyspark.sql import SparkSession

    spark = SparkSession.builder.master("local[1]").getOrCreate()
    numbered = [(number, *row) for number, row in enumerate(rows())]
    frame = spark.createDataFrame(numbered, "id long, text string, other string")
    with tempfile.TemporaryDirectory() as folder:
        for name, (form, options) in WRITERS.items():
            writer = frame.repartitionByRange(2, "id").write.format(form).options(**options)
            writer.save(f"{folder}/{name}")
        Path(folder, "rows.json").write_text(json.dumps(rows()), encoding="utf-8")
        with tarfile.open(FIXTURES / f"spark-{spark.version}.tar.xz", "w:xz") as archive:
            archive.add(folder, arcname=".")


if __name__ == "__main__":
    main()
