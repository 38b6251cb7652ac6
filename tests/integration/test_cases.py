"""The inputs of strangers that broke ad2kit, each typed as its README says.

They lie beside the checkout, and these tests skip where they are absent; the kind of each fault has
a test of its own elsewhere, which makes its input by code. A number is the one of the folder.
What is asked of a service (27) stands in test_service.py, and of teachers in test_opening.py.
"""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pyarrow import parquet

from ad2kit.exporting.classifier import OnnxClassifier
from ad2kit.tables import formats

if TYPE_CHECKING:
    from collections.abc import Callable

    from ad2kit.run.folder import RunDir

CASES = Path(__file__).parents[2].parent / "shared" / "cases"


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Return a function that goes into the folder of a case, or skips the test."""

    def enter(name: str) -> Path:
        folder = CASES / name
        if not folder.is_dir():
            pytest.skip(f"the case {name} is not on this machine")
        monkeypatch.chdir(folder)
        return folder

    return enter


def made(runs: Path) -> Path:
    """Return the run of a folder that was made last."""
    return max(runs.glob("tiny*"), key=lambda run: (run / "recipe.json").stat().st_mtime)


def parity_of(runs: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((made(runs) / "parity.json").read_text())
    return found


def int8_of(runs: Path) -> OnnxClassifier:
    return OnnxClassifier(made(runs) / "onnx" / "int8", threads=1)


def table(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


class TestLabels:
    def test_01_whole_numbers_are_in_the_order_of_numbers(
        self, case: Callable[[str], Path], ad2kit: Any, tmp_path: Path
    ) -> None:
        folder = case("01-label-order-generic-teacher")
        assert ad2kit("distill", "../tiny.yaml", "--runs-dir", tmp_path).code == 0
        assert ad2kit("export", "--runs-dir", tmp_path).code == 0
        assert parity_of(tmp_path)["teacher_score"] == 1.0
        rows = table(folder / "data" / "validation.csv")[1:]
        answers = int8_of(tmp_path).predict([text for text, _ in rows])
        right = [answer.label == label for answer, (_, label) in zip(answers, rows, strict=True)]
        assert sum(right) >= 0.97 * len(rows)

    def test_01_names_that_say_nothing_need_an_order(
        self, case: Callable[[str], Path], ad2kit: Any, tmp_path: Path
    ) -> None:
        case("01-label-order-generic-teacher/c-ratings-1-to-10")
        options = ("../../tiny.yaml", "distill.epochs=8", "--runs-dir", tmp_path)
        refused = ad2kit("distill", *options)
        assert refused.code == 2
        assert "data.labels" in refused.err
        assert "labels.txt" in refused.err
        order = "data.labels=[1,2,3,4,5,6,7,8,9,10]"
        assert ad2kit("distill", *options, order).code == 0
        assert ad2kit("export", "--runs-dir", tmp_path).code == 0
        assert parity_of(tmp_path)["teacher_score"] == 1.0

    def test_01_an_order_that_is_wrong_is_seen_before_the_training(
        self, case: Callable[[str], Path], ad2kit: Any, tmp_path: Path
    ) -> None:
        case("01-label-order-generic-teacher/c-ratings-1-to-10")
        wrong = "data.labels=[1,10,2,3,4,5,6,7,8,9]"
        refused = ad2kit("distill", "../../tiny.yaml", wrong, "--runs-dir", tmp_path)
        assert refused.code == 2
        assert '["1", "2", "3", "4", "5", "6", "7", "8", "9", "10"]' in refused.err
        assert not (made(tmp_path) / "student").exists()

    def test_02_rows_of_zeros_and_ones(
        self, case: Callable[[str], Path], ad2kit: Any, tmp_path: Path
    ) -> None:
        case("02-multi-hot-labels")
        options = ("data.task=multi_label", "data.label_column=labels", "distill.epochs=20")
        labels = "data.labels=[toxic,insult,threat]"
        assert ad2kit("distill", "../tiny.yaml", *options, labels, "--runs-dir", tmp_path).code == 0
        assert ad2kit("export", "--runs-dir", tmp_path).code == 0
        assert parity_of(tmp_path)["teacher_score"] == 1.0
        # Nobody can say what the places mean without their names.
        assert ad2kit("check", "../tiny.yaml", *options).code == 2

    def test_04_a_number_beside_numbers_is_no_position(
        self, case: Callable[[str], Path], ad2kit: Any
    ) -> None:
        case("04-stray-number-label")
        refused = ad2kit("check", "../tinyr.yaml")
        assert refused.code == 2
        assert "label '0' is not in the label set (1, 2, 3, 4, 5)" in refused.err

    def test_06_lists_of_python_in_text(self, case: Callable[[str], Path], ad2kit: Any) -> None:
        case("06-python-list-labels-csv")
        refused = ad2kit("check", "../tinyr.yaml", "data.task=multi_label")
        assert refused.code == 2
        assert "['toxic']" in refused.err

    def test_30_one_label_in_two_spellings(self, case: Callable[[str], Path], ad2kit: Any) -> None:
        case("30-nfc-nfd-labels")
        checked = ad2kit("check", "../tinyr.yaml", "--json")
        if checked.code == 0:
            assert len(json.loads(checked.out)["labels"]) == 4
        else:
            assert checked.code == 2
            assert "looks like" in checked.err


class TestTables:
    def test_05_quotation_marks_are_read_strictly(
        self, case: Callable[[str], Path], ad2kit: Any
    ) -> None:
        case("05-csv-backslash-and-unclosed-quotes")
        refused = ad2kit("check", "../tinyr.yaml")
        assert refused.code == 2
        assert "train.csv, line 2" in refused.err

    def test_15_texts_of_any_arrow_type(
        self, case: Callable[[str], Path], ad2kit: Any, tmp_path: Path, finished_run: RunDir
    ) -> None:
        folder = case("15-score-string-view-nulls")
        for name in ("a", "view"):
            output, run = tmp_path / name, finished_run.path
            done = ad2kit("score", f"{name}.parquet", output, "--prefix", "p_", "--run", run)
            nulls = parquet.read_table(folder / f"{name}.parquet")["text"].null_count
            assert done.code == (2 if nulls else 0), done.err
            rows = parquet.read_table(folder / f"{name}.parquet").num_rows
            (part,) = output.glob("part-*.parquet")
            assert parquet.read_table(part).num_rows == rows - nulls

    def test_16_a_link_to_nothing(
        self, case: Callable[[str], Path], ad2kit: Any, tmp_path: Path, finished_run: RunDir
    ) -> None:
        case("16-score-broken-symlink")
        refused = ad2kit(
            "score", "in", tmp_path / "out", "--prefix", "p_", "--run", finished_run.path
        )
        assert refused.code == 2
        assert "broken.parquet" in refused.err

    @pytest.mark.parametrize(
        "name", ["17-score-crlf-cells/crlf.csv", "32-score-bare-carriage-return/cr.csv"]
    )
    def test_17_and_32_cells_stay_as_they_are(
        self,
        case: Callable[[str], Path],
        ad2kit: Any,
        tmp_path: Path,
        finished_run: RunDir,
        name: str,
    ) -> None:
        folder, _, file = name.partition("/")
        path = case(folder) / file
        output = tmp_path / "out"
        command = ("--prefix", "p_", "--run", finished_run.path)
        assert ad2kit("score", file, output, *command).code == 0
        before, after = table(path), table(output / "part-00000000.csv")
        assert [row[: len(before[0])] for row in after] == before
        # What was written can be read again.
        again = ("--prefix", "q_", "--run", finished_run.path)
        assert ad2kit("score", output / "part-00000000.csv", tmp_path / "again", *again).code == 0

    def test_25_a_file_from_windows_for_predict(
        self, case: Callable[[str], Path], ad2kit: Any, tmp_path: Path
    ) -> None:
        case("25-predict-bom")
        # Its teacher was never trained, and a bag of words is better.
        refused = ad2kit("distill", "../tiny.yaml", "--runs-dir", tmp_path)
        assert (refused.code, "teacher.accept=true" in refused.err) == (1, True)
        options = ("teacher.accept=true", "--runs-dir", tmp_path)
        assert ad2kit("distill", "../tiny.yaml", *options).code == 0
        assert ad2kit("export", "--runs-dir", tmp_path).code == 0
        done = ad2kit("predict", "--run", made(tmp_path), "--file", "pf2.txt")
        assert done.code == 0
        tokens = [json.loads(line)["tokens"] for line in done.out.splitlines()]
        texts = ["never dull", "boring plot", "last line without end"]
        assert tokens == [answer.tokens for answer in int8_of(tmp_path).predict(texts)]

    @pytest.mark.parametrize("name", [".", "spark", "shards"])
    def test_28_what_other_systems_leave(
        self, case: Callable[[str], Path], ad2kit: Any, name: str
    ) -> None:
        case(f"28-save-to-disk-and-shards/{name}")
        # Its validation texts are its training texts.
        checked = ad2kit("check", CASES / "tinyr.yaml", "data.max_leakage=1", "--json")
        assert checked.code == 0, checked.err
        assert json.loads(checked.out)["splits"]["train"]["rows"] > 0

    def test_26_unlabelled_lines_of_windows(self, case: Callable[[str], Path]) -> None:
        case("26-unlabelled-crlf")
        rows = [row["text"] for _, row in formats.read_rows(Path("more.txt"), ("text",))]
        assert rows
        assert not [text for text in rows if text != text.strip()]


class TestTokenizers:
    def test_03_texts_are_cut_where_the_tokenizer_cuts_them(
        self, case: Callable[[str], Path], ad2kit: Any, tmp_path: Path
    ) -> None:
        case("03-truncation-side-left")
        assert (
            ad2kit("distill", "../tiny.yaml", "distill.epochs=12", "--runs-dir", tmp_path).code == 0
        )
        assert ad2kit("export", "--runs-dir", tmp_path).code == 0
        filler = " ".join(["staff", "line", "call", "bank", "price", "food"] * 10)
        names = {"topicaa": "alpha", "topicab": "beta", "topicac": "delta", "topicad": "gamma"}
        answers = int8_of(tmp_path).predict([f"{filler} {word}" for word in names])
        assert [answer.label for answer in answers] == list(names.values())
        assert all(answer.truncated for answer in answers)

    def test_19_segments_that_training_did_not_read(
        self, case: Callable[[str], Path], ad2kit: Any, tmp_path: Path
    ) -> None:
        case("19-pair-without-token-type-ids")
        options = ("data.text_columns=[s1,s2]", "data.max_length_tokens=64", "distill.epochs=8")
        assert ad2kit("distill", "../tiny.yaml", *options, "--runs-dir", tmp_path).code == 0
        assert ad2kit("export", "--runs-dir", tmp_path).code == 0
        fp32 = next(v for v in parity_of(tmp_path)["variants"] if v["variant"] == "fp32")
        gaps = [check["value"] for check in fp32["checks"] if "logit gap" in check["name"]]
        assert gaps
        assert max(gaps) < 1e-5


class TestTeachers:
    def test_13_the_code_of_a_folder_is_not_run(
        self,
        case: Callable[[str], Path],
        ad2kit: Any,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        # The code writes a file beside itself, if it is run.
        folder = tmp_path / "13"
        shutil.copytree(case("13-custom-code-prompt"), folder)
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
        recipe = CASES / "tiny.yaml"
        refused = ad2kit("distill", recipe, "--runs-dir", tmp_path / "runs")
        assert refused.code == 2
        assert "custom code" in refused.err
        assert not list(folder.rglob("CODE_RAN"))
        assert ad2kit("check", recipe).code == 2
