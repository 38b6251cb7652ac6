"""Rows in Arrow are the rows that were written, and a fingerprint does not depend on blocks."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file, save_file

from ad2kit.data import mapped, splits
from ad2kit.data.mapped import TextRows, TokenRows, kept, map_table, write_table
from ad2kit.data.splits import Data, Split, encode, known_rows
from ad2kit.models.text_model import predict_logits
from ad2kit.run.errors import RunError
from ad2kit.run.files import fingerprint
from ad2kit.run.recipe import load_recipe
from ad2kit.run.sections import TextLength
from ad2kit.training import shared
from tests.models import cpu, data, tiny_bert

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

PAIRS = tuple((f'first {number} é\u2028"\\', f"second {number % 7}") for number in range(50))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mapped, "_BLOCK_ROWS", 7)


def digest(*parts: Any) -> str:
    """The fingerprint as ad2kit 0.1.0 computed it, from one string."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.usefixtures("small_blocks")
def test_text_rows_are_a_sequence_of_tuples() -> None:
    rows = TextRows.of(PAIRS)
    order = np.random.default_rng(0).permutation(50)[:30]
    mixed = rows.take(order)
    expected = tuple(PAIRS[place] for place in order)
    assert (len(mixed), tuple(mixed), mixed[3], mixed[-1]) == (
        30,
        expected,
        expected[3],
        expected[-1],
    )
    assert mixed[2:20:3] == expected[2:20:3]
    assert mixed.take(np.array([5, 5, 0])) == (expected[5], expected[5], expected[0])
    assert mixed + rows == expected + PAIRS
    assert (mixed + rows).take(np.arange(28, 33)) == (expected + PAIRS)[28:33]
    assert mixed + rows.take(np.arange(0)) == mixed
    assert mixed != expected[::-1]
    with pytest.raises(IndexError):
        rows[50]


def test_rows_are_taken_without_a_copy_of_the_table() -> None:
    batch = pa.record_batch([pa.array(["text " * 200] * 100, pa.large_string())], ["0"])
    table = pa.Table.from_batches([batch] * 100)
    few = np.arange(9_999, 0, -1_000)
    usual = pa.default_memory_pool()

    def most_bytes(take: Callable[[], object]) -> int:
        pool = pa.proxy_memory_pool(usual)
        pa.set_memory_pool(pool)
        try:
            take()
        finally:
            pa.set_memory_pool(usual)
        return int(pool.max_memory())

    assert most_bytes(lambda: list(TextRows(table, few))) < 100_000
    assert most_bytes(lambda: table.take(few)) > 5_000_000  # the control


@pytest.mark.usefixtures("small_blocks")
def test_equal_rows_have_equal_hashes() -> None:
    twice = TextRows.of((*PAIRS, *PAIRS[::-1]))
    hashes = twice.hashes()
    assert len(np.unique(hashes)) == 50
    assert (hashes[:50] == hashes[50:][::-1]).all()
    swapped = TextRows.of((second, first) for first, second in PAIRS)
    assert not np.isin(swapped.hashes(), hashes).any()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("rows", [0, 1, 6, 7, 8, 50])
def test_a_streamed_fingerprint_is_the_one_of_the_whole_list(rows: int) -> None:
    texts = TextRows.of(PAIRS).take(np.arange(rows))
    assert fingerprint("a", texts.blocks(), 3) == digest("a", PAIRS[:rows], 3)
    for labels in (np.arange(rows), np.linspace(0, 1, rows, dtype=np.float32), np.eye(rows)):
        split = Split(texts, labels)
        assert split.sha256 == digest(PAIRS[:rows], labels.tolist())
    assert fingerprint() == digest()


def test_token_rows_in_several_chunks() -> None:
    lists = [list(range(number % 5)) for number in range(23)]
    chunks = [pa.array(lists[start : start + 4], pa.list_(pa.int32())) for start in range(0, 23, 4)]
    rows = TokenRows(pa.chunked_array(chunks))
    assert list(rows) == lists == list(TokenRows.of(lists))
    assert (rows[-1], rows[3:9]) == (lists[-1], lists[3:9])
    assert rows.lengths.tolist() == [len(row) for row in lists]
    padded = rows.padded(np.array([9, 0, 22]), -1)
    assert padded.tolist() == [[0, 1, 2, 3], [-1] * 4, [0, 1, -1, -1]]
    assert len(TokenRows(pa.chunked_array([], pa.list_(pa.int32())))) == 0


def test_the_validation_texts_that_training_knows() -> None:
    rows = Split.of(PAIRS, np.arange(50))
    parts = [rows.take(np.arange(start, start + 10)) for start in (0, 10, 20, 30)]
    validation = rows.take(np.array([0, 45, 15, 25, 49]))
    found = Data("single_label", ("a",), parts[0], parts[1], validation, parts[2])
    recipe = load_recipe("smoke").data
    assert known_rows(found, recipe).tolist() == [True, False, True, True, False]
    recipe = recipe.model_copy(update={"select_from": "validation"})
    assert known_rows(found, recipe).tolist() == [True, False, False, True, False]


def test_tokens_are_kept_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_bert().tokenizer
    split = Split.of(PAIRS, np.arange(50))
    monkeypatch.setattr(splits, "LARGE_ROWS", 50)
    monkeypatch.setattr("ad2kit.data.tokens._CHUNK_CHARACTERS", 200)
    in_memory = encode(split, tokenizer, TextLength(16))
    first = encode(split, tokenizer, TextLength(16), tmp_path)
    (file,) = tmp_path.rglob("*.arrow")
    written = file.stat().st_mtime_ns
    with monkeypatch.context() as context:
        context.setattr(splits, "token_batches", lambda *_: iter(()))  # not read
        again = encode(split, tokenizer, TextLength(16), tmp_path)
    for found in (first, again):
        assert list(found.input_ids) == list(in_memory.input_ids)
        assert list(found.token_type_ids or ()) == list(in_memory.token_type_ids or ())
        assert found.truncated.tolist() == in_memory.truncated.tolist()
    assert file.stat().st_mtime_ns == written
    # Whatever decides the ids leads to another file; fewer rows are not kept.
    encode(split, tokenizer, TextLength(15), tmp_path)
    tokenizer.truncation_side = "left"
    encode(split, tokenizer, TextLength(16), tmp_path)
    encode(split.take(np.arange(50)[::-1]), tokenizer, TextLength(16), tmp_path)
    encode(split.take(np.arange(49)), tokenizer, TextLength(16), tmp_path)
    assert len(list(tmp_path.rglob("*.arrow"))) == 4


SCHEMA = pa.schema({"text": pa.string()})


def stored(folder: Path, rows: Iterable[pa.RecordBatch]) -> pa.Table:
    path = folder / "rows.arrow"
    kept(folder, path.name, lambda: write_table(path, SCHEMA, rows))
    return map_table(path)


def batches(count: int) -> list[pa.RecordBatch]:
    return [pa.record_batch([[f"row {number}"]], schema=SCHEMA) for number in range(count)]


def test_a_killed_writer_leaves_no_table(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from tests.unit.test_mapped import *\n"
        "def some():\n"
        "    yield from batches(1000)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "stored(Path(sys.argv[1]), some())"
    )
    folder = tmp_path / "key"
    root = Path(__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", script, str(folder)], cwd=root, check=False)
    assert killed.returncode == -9
    (half,) = (path for path in folder.iterdir() if path.name.startswith(".tmp-"))
    assert half.stat().st_size > 10_000
    assert len(stored(folder, batches(3))) == 3
    assert sorted(path.name for path in folder.iterdir()) == [".lock", "rows.arrow"]


def test_a_damaged_table_is_refused_and_the_advice_helps(tmp_path: Path) -> None:
    folder = tmp_path / "key"
    stored(folder, batches(3))
    os.truncate(folder / "rows.arrow", 100)
    with pytest.raises(RunError, match=r"rows\.arrow is damaged") as caught:
        stored(folder, batches(3))
    assert f"delete {folder}" in caught.value.hint
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert len(stored(folder, batches(3))) == 3


def test_logits_are_written_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_bert()
    encoded = encode(data().train, model.tokenizer, TextLength(32))
    whole = predict_logits(model, encoded, torch.device("cpu"), cpu())
    monkeypatch.setattr("ad2kit.models.text_model._PREDICTED_ROWS", 3)
    parts = predict_logits(model, encoded, torch.device("cpu"))
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    path = shared.logits_file(tmp_path, "key")
    shared.write_logits(path, (8, 2), parts.split(3))
    save_file({"logits": parts}, tmp_path / "whole.safetensors")
    assert load_file(path)["logits"].equal(parts)
    assert path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert shared.read_logits(path).equal(parts)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
