"""Capacity and cost from measured cells, by hand."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from ad2kit.gate.latency import cell_of, time_rounds
from ad2kit.gate.records import LatencyCell, LatencyReport
from ad2kit.gate.summary import busy_words, capacity_lines, latency_lines, tail, times_as_fast

if TYPE_CHECKING:
    from ad2kit.gate.latency import Call


def cell(system: str, batch: int, length: int, p99_ms: float, texts_per_s: float) -> LatencyCell:
    return LatencyCell(
        system=system,
        batch_size=batch,
        length_tokens=length,
        calls=10,
        p50_ms=p99_ms / 2,
        p90_ms=p99_ms,
        p99_ms=p99_ms,
        texts_per_s=texts_per_s,
    )


REPORT = LatencyReport(
    inputs="",
    artifacts={},
    threads=2,
    environment={},
    sizes_bytes={"teacher": 4, "int8": 1},
    p99_target_ms=20.0,
    price_per_hour=0.18,
    cells=(
        cell("teacher", 1, 16, 9.0, 100.0),
        cell("teacher", 8, 16, 20.0, 400.0),
        cell("teacher", 32, 16, 20.01, 500.0),
        cell("teacher", 1, 128, 30.0, 40.0),
        cell("int8", 1, 16, 1.0, 1000.0),
        cell("int8", 8, 16, 5.0, 900.0),
        cell("int8", 1, 128, 10.0, 100.0),
    ),
)


def test_the_fastest_batch_within_the_target_counts() -> None:
    """0.18 an hour at 400 texts/s are 0.18 / 1.44 = 0.125 for a million."""
    found = [
        (
            each.system,
            each.length_tokens,
            each.batch_size,
            each.texts_per_s,
            each.cost_per_million_texts and round(each.cost_per_million_texts, 9),
        )
        for each in REPORT.capacity
    ]
    assert found == [
        ("teacher", 16, 8, 400.0, 0.125),
        ("int8", 16, 1, 1000.0, 0.05),
        ("teacher", 128, None, None, None),
        ("int8", 128, 1, 100.0, 0.5),
    ]


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


def timed(system: str, rounds: list[list[float]]) -> LatencyCell:
    """A cell of one text of four tokens from the seconds of its calls."""
    return cell_of(system, np.zeros((1, 4), dtype=np.int64), rounds)


def test_a_percentile_needs_a_hundred_calls() -> None:
    few, many = timed("a", [[0.001] * 10, [0.005] * 2]), timed("a", [[0.001] * 99, [0.005] * 2])
    assert (few.p99_ms, few.max_ms, few.tail_ms, tail(few)) == (None, 5.0, 5.0, "max 5.00")
    assert many.p99_ms == pytest.approx(5.0)
    assert tail(many) == "5.00"
    report = REPORT.model_copy(update={"cells": (few,), "sizes_bytes": {"a": 1}})
    assert "max     5.00 ms" in latency_lines(report)[0]
    # Capacity counts the slowest of few calls: it cannot know that the others are usual.
    slow = report.model_copy(update={"p99_target_ms": 4.0})
    assert (report.capacity[0].batch_size, slow.capacity[0].batch_size) == (1, None)


def test_ratios_are_taken_round_by_round() -> None:
    """A machine that is slower by a factor in one round is so for both, and says nothing."""
    ours = timed("ours", [[0.001] * 60, [0.003] * 60, [0.001] * 60])
    other = timed("other", [[0.002] * 60, [0.0066] * 60, [0.002] * 60])
    assert times_as_fast(ours, other) == "2.0 times (2.0 to 2.2 over 3 rounds)"


def test_a_busy_machine_is_called_so() -> None:
    calm, noisy = timed("a", [[0.001] * 5, [0.0012] * 5]), timed("b", [[0.001] * 5, [0.002] * 5])
    report = REPORT.model_copy(update={"cells": (calm,)})
    assert not report.busy
    assert busy_words(report) == ""
    both = report.model_copy(update={"cells": (calm, noisy)})
    assert both.busy
    assert "differ by up to 2.0 times" in busy_words(both)


def test_systems_take_turns() -> None:
    turns = list[str]()
    ids = np.zeros((1, 4), dtype=np.int64)

    def system(name: str) -> Call:
        return lambda _ids: turns.append(name)

    systems = {name: system(name) for name in ("a", "b", "c")}
    rounds = time_rounds(systems, ids, seconds=1e-9)
    # Two calls to warm up, and two that count; each follows the one and the other.
    assert turns[::4] == ["a", "b", "c", "c", "b", "a"] * (len(rounds["a"]) // 2)
    assert len(turns) == 4 * 3 * len(rounds["a"])
    assert {len(times) for each in rounds.values() for times in each} == {2}
