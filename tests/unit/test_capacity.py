"""Capacity and cost from measured cells, by hand."""

from __future__ import annotations

import json

from ad2kit.records import LatencyCell, LatencyReport
from ad2kit.tables import capacity_lines


def cell(system: str, batch: int, length: int, p99_ms: float, texts_per_s: float) -> LatencyCell:
    return LatencyCell(
        system=system, batch_size=batch, length_tokens=length, calls=10, p50_ms=p99_ms / 2,
        p90_ms=p99_ms, p99_ms=p99_ms, texts_per_s=texts_per_s,
    )  # fmt: skip


REPORT = LatencyReport(
    inputs="", artifacts={}, threads=2, environment={}, sizes_bytes={"teacher": 4, "int8": 1},
    p99_target_ms=20.0, price_per_hour=0.18,
    cells=(
        cell("teacher", 1, 16, 9.0, 100.0), cell("teacher", 8, 16, 20.0, 400.0),
        cell("teacher", 32, 16, 20.01, 500.0), cell("teacher", 1, 128, 30.0, 40.0),
        cell("int8", 1, 16, 1.0, 1000.0), cell("int8", 8, 16, 5.0, 900.0),
        cell("int8", 1, 128, 10.0, 100.0),
    ),
)  # fmt: skip


def test_the_fastest_batch_within_the_target_counts() -> None:
    """0.18 an hour at 400 texts/s are 0.18 / 1.44 = 0.125 for a million."""
    found = [
        (each.system, each.length_tokens, each.batch_size, each.texts_per_s,
         each.cost_per_million_texts and round(each.cost_per_million_texts, 9))
        for each in REPORT.capacity
    ]  # fmt: skip
    assert found == [
        ("teacher", 16, 8, 400.0, 0.125), ("int8", 16, 1, 1000.0, 0.05),
        ("teacher", 128, None, None, None), ("int8", 128, 1, 100.0, 0.5),
    ]  # fmt: skip


def test_without_a_price_there_is_no_cost() -> None:
    free = REPORT.model_copy(update={"price_per_hour": None})
    assert {each.cost_per_million_texts for each in free.capacity} == {None}
    assert not any("per million" in line or "per hour" in line for line in capacity_lines(free))


def test_it_is_written_and_never_read_back() -> None:
    plain = json.loads(REPORT.model_dump_json())
    assert plain["capacity"][0]["texts_per_s"] == 400.0
    plain["capacity"][0]["texts_per_s"] = 1e9
    assert LatencyReport.parse(json.dumps(plain).encode(), "") == REPORT
    for name in ("p99_target_ms", "price_per_hour", "capacity"):
        del plain[name]  # as reports were before capacity was stated
    older = LatencyReport.parse(json.dumps(plain).encode(), "")
    assert (older.p99_target_ms, older.price_per_hour) == (50.0, None)


def test_the_lines_say_target_rate_and_cost() -> None:
    head, *lines, last = capacity_lines(REPORT)
    assert head == "capacity of this machine at a p99 of at most 20 ms:"
    words = [" ".join(line.split()) for line in lines]
    assert words[0] == "teacher 16 tokens 400 texts/s in batches of 8 0.1250 per million texts"
    assert words[2] == "teacher 128 tokens no measured batch is answered in time"
    assert last == "at 0.18 per hour, for a machine that is never idle"
