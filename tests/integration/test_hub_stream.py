"""Texts without labels come from the hub as a stream, up to a number of rows, and only once."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pyarrow as pa
import pytest
from pyarrow import parquet

from tests import hub as hubs
from tests.hub import ad2kit, environment

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from pathlib import Path

    from tests.hub import Hub

NOWHERE = "http://127.0.0.1:9"
NAME = "someone/many-texts"
SHARDS = 4
SHARD_ROWS = 200


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """A hub with a data set in four files."""
    folder = tmp_path_factory.mktemp("files")
    files = {"README.md": b"---\nlicense: apache-2.0\n---\n"}
    for shard in range(SHARDS):
        path = folder / "part.parquet"
        texts = [f"text {shard} {row}" for row in range(SHARD_ROWS)]
        parquet.write_table(pa.table({"text": texts, "n": range(SHARD_ROWS)}), path)
        files[f"data/train-{shard:05}-of-{SHARDS:05}.parquet"] = path.read_bytes()
    with hubs.serving_hub() as served:
        served.repository("datasets", NAME).commit(files)
        yield served


def check(
    hub: Hub, folder: Path, rows: int, *settings: str, reference: str = NAME, endpoint: str = ""
) -> subprocess.CompletedProcess[str]:
    env = environment(endpoint or hub.address, folder / "home")
    unlabelled = [f"data.unlabelled=[hub://{reference}]", f"data.max_unlabelled_rows={rows}"]
    return ad2kit("check", "smoke", *unlabelled, *settings, "--json", env=env, cwd=folder)


def test_no_more_is_read_than_is_asked_for(hub: Hub, tmp_path: Path) -> None:
    done = check(hub, tmp_path, 250)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["splits"]["unlabelled"]
    assert (told["rows"], told["example"]) == (250, ["text 0 0"])
    assert told["duplicates"] == 0
    assert not list((tmp_path / "home").rglob("*.arrow"))  # nothing was downloaded and prepared
    # The rows are kept: they need no hub any more.
    (kept,) = tmp_path.glob("runs/.shared/tables/*/unlabelled.arrow")
    again = check(hub, tmp_path, 250, endpoint=NOWHERE)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["splits"]["unlabelled"] == told
    kept.unlink()


def test_what_cannot_be_read_is_the_users_to_mend(hub: Hub, tmp_path: Path) -> None:
    done = check(hub, tmp_path, 9, reference=f"{NAME}#held-out")
    assert done.returncode == 2
    assert "it has no split 'held-out', only train" in done.stderr
    assert "#train" in done.stderr
    done = check(hub, tmp_path, 9, "data.text_columns=[words]")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    done = check(hub, tmp_path, 9, reference="someone/none")
    assert done.returncode == 2
    assert "someone/none" in done.stderr
    (tmp_path / "elsewhere").mkdir()
    done = check(hub, tmp_path / "elsewhere", 9, endpoint=NOWHERE)
    assert done.returncode == 2
    assert "cannot load the data set" in done.stderr
