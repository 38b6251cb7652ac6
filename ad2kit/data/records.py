"""Records of the data of a run. No Arrow: reports are read where it is not installed."""

from __future__ import annotations

from ad2kit.run.records import Part


class SplitFacts(Part):
    """Facts about one split: rows, rows per class, truncated texts, and fingerprint."""

    rows: int
    class_counts: dict[str, int]
    truncated: int
    sha256: str
