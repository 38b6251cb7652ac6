"""The command line as a user meets it: results, mistakes, exit codes, and what is on stdout."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import onnxruntime
import pandas as pd
import pytest

from ad2kit.cli.show import next_steps
from ad2kit.exporting import export
from ad2kit.gate.records import ParityReport
from ad2kit.planning import doctor
from ad2kit.run.folder import RunDir
from ad2kit.run.machine import available_cpus
from ad2kit.statistics import sample_size
from tests.conftest import QUICK, RECIPES

if TYPE_CHECKING:
    from pathlib import Path

ALONE = [sys.executable, "-m", "ad2kit"]


def test_recipes_and_version(ad2kit: Any) -> None:
    listed = ad2kit("recipes", "--json")
    assert set(json.loads(listed.out)) == RECIPES
    assert ad2kit("--version").out.strip().count(".") == 2


def test_check_accepts_the_demo_and_prints_it_whole(ad2kit: Any) -> None:
    checked = ad2kit("check", "smoke", "distill.lr=5e-5", "--json")
    assert checked.code == 0
    result = json.loads(checked.out)
    assert result["recipe"]["distill"]["lr"] == 5e-5
    rows = {name: split["rows"] for name, split in result["splits"].items()}
    assert rows == {"train": 2160, "select": 240, "validation": 640}
    assert result["updates"] == {"teacher": 204, "student": 136}  # 3 and 2 epochs of 68


def test_check_is_one_screen(ad2kit: Any, tmp_path: Path) -> None:
    """A small table of somebody: what is in it, and what it can prove."""
    lines = [f"word{n} is {'good ' * (1 + n % 40)},{'yes' if n % 4 else 'no'}" for n in range(200)]
    train = ["tweet,label", *lines, *lines[:50]]
    (tmp_path / "train.csv").write_text("\n".join(train))
    (tmp_path / "validation.csv").write_text(
        "\n".join(
            [
                "tweet,label",
                *lines[190:],
                *(f"other{n} good,{'yes' if n % 2 else 'no'}" for n in range(90)),
            ]
        )
    )
    options = (
        "smoke",
        f"data.source={tmp_path}",
        "data.text_columns=[tweet]",
        "data.max_length_tokens=16",
    )
    checked = ad2kit("check", *options)
    assert checked.code == 0
    shown = checked.out.splitlines()
    assert len(shown) < 16
    assert "labels, in the order of the alphabet: no, yes" in shown
    report = json.loads(ad2kit("check", *options, "--json").out)
    split = report["splits"]["validation"]
    assert (split["rows"], split["known"]) == (100, 0.1)
    assert "validation texts that are also training texts: 10.0%" in shown
    assert 0.1 < report["splits"]["train"]["duplicates"] < 0.25
    assert 0.5 < report["splits"]["train"]["cut"] < 0.9
    # 1.96 * sqrt(0.1 / 100). With min_retained_lower at 0.8, an interval of 24 rows reaches as far
    # as no row of 24 allows: 1 - 0.8 - (1 - 0.025**(1 / 24)) > 0.84 * sqrt(0.1 / 24).
    assert report["half_width"] == pytest.approx(0.062, abs=1e-3)
    assert report["rows_to_pass"] == 24
    (gate,) = [line for line in shown if line.startswith("the gate: ")]
    assert "with 100 validation rows the interval of what is retained will be about ±6.2" in gate
    assert "0.9 can be shown from about 24 rows on" in gate
    # By the gate's own function.
    assert report["rows_to_agree"] == sample_size.rows_for_share(0.975, 0.95, 0.92)
    assert (report["rows_of_a_class"], report["few_rows"]) == (6, [])
    nothing = ad2kit("check", *options, "parity.min_retained=1", "parity.min_agreement_lower=1")
    assert nothing.out.count("by no number of rows") == 2
    assert "student:" not in checked.out
    assert '"text_columns"' in ad2kit("check", *options, "--verbose").out
    refused = ad2kit("check", *options, "data.max_leakage=0.05")
    assert refused.code == 2
    assert "data.max_leakage=0.1" in refused.err


def test_doctor_looks_at_real_things(ad2kit: Any) -> None:
    findings = {f["name"]: f for f in json.loads(ad2kit("doctor", "--json").out)}
    assert findings["CPUExecutionProvider"]["value"] == "makes a session"
    assert "belongs to onnxruntime" in findings["onnxruntime"]["value"]
    assert "torch" in findings["versions"]["value"]
    assert f"{available_cpus()} of {os.cpu_count()} cores" in findings["cpu"]["value"]
    assert findings["exporter"]["value"].startswith(f"{export.exporter()[0]}, because ")


def test_doctor_names_the_exporter_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def exporter() -> str:
        return next(found.value for found in doctor.examine() if found.name == "exporter")

    monkeypatch.setattr(export, "main_export", None)
    monkeypatch.setattr(export, "_NO_OPTIMUM", "No module named 'optimum'")
    assert exporter().startswith("torch.onnx, because optimum")
    assert exporter().endswith("No module named 'optimum'")


def test_doctor_advises_where_something_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def finding(name: str) -> doctor.Finding:
        return next(found for found in doctor.examine() if found.name == name)

    monkeypatch.setattr(doctor, "cpu_flags", lambda: frozenset({"avx2", "fma"}))
    assert "no faster" in finding("int8").advice
    monkeypatch.setattr(doctor, "cpu_flags", lambda: frozenset({"avx2", "avx512_vnni"}))
    assert (finding("int8").value, finding("int8").advice) == ("the CPU has avx512_vnni", "")
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    assert f"OMP_NUM_THREADS={available_cpus()}" in finding("cpu").advice
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    refused = finding("CUDAExecutionProvider")
    assert refused.value.startswith("is built in, but makes none: ")
    assert refused.advice


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["distill", "sst3"], "did you mean 'sst2'"),
        (["distill", "smoke", "distill.leraning_rate=1"], "unknown key 'distill.leraning_rate'"),
        (["distill", "smoke", "distill.lr"], "must look like key.path=value"),
        (["check", "smoke", "data.source=/nowhere"], "no folder '/nowhere'"),
        (["check", "smoke", "data.label_column=lable", "data.source=DATA"], "no column 'lable'"),
        (["check", "smoke", "teacher.model=nowhere"], "write hub://nowhere"),
        (
            ["distill", "smoke", "student.layers=[7]"],
            "of the 'bert' to copy from are 0 to 3",
        ),
        (["check", "sst2"], "data.source=FOLDER"),
        (["export"], "no run under"),
        (["check", "smoke", "export.variants=[fp32,fp16]"], "made from the fused graph"),
        (["check", "smoke", "export.variants=[fp32,fp32]"], "named twice"),
        (["parity", "--recipe", "custom"], "which only --model reads"),
        (["parity", "parity.min_retained=0.1"], "which only --model reads"),
        (["parity", "--model", "x"], "expected --teacher and --data"),
        (["export", "nowhere"], "is not a run folder"),
        (["bench", "--runs-dir", "."], "no run under"),
        (["predict", "text"], "has a variant that passed"),
        (["sweep", "smoke", "sweep.lr=[1e-3]"], "unknown key 'sweep.lr' (did you mean 'lrs'?)"),
        (["sweep", "smoke", "--address", "localhost:1"], "no Ray cluster answers at localhost:1"),
        (["sweep", "smoke", "--storage", "nosuch://x"], "storage 'nosuch://x' cannot be used"),
        (
            ["sweep", "smoke", "distill.accumulation_steps=32"],
            "batch_size 16 is not a multiple of accumulation_steps 32",
        ),
        (["distill"], "Missing argument"),
        (["distil", "smoke"], "No such command"),
        (["distill", "smoke", "--fast"], "No such option"),
    ],
)
def test_a_mistake_is_named_and_ends_with_2(
    ad2kit: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    expected: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("train", "validation"):
        (tmp_path / "data" / f"{name}.tsv").write_text("text\tlabel\ngood\t1\nbad\t0\n")
    outcome = ad2kit(*(a.replace("DATA", "data") for a in arguments))
    assert (outcome.code, outcome.out) == (2, "")
    assert expected in outcome.err
    assert "Traceback" not in outcome.err


def test_export_takes_the_most_recent_run_and_ends_with_the_verdict(
    ad2kit: Any, copied_run: RunDir
) -> None:
    older = copied_run.path.parent / "older"
    shutil.copytree(copied_run.path, older)
    os.utime(older / "recipe.json", (1, 1))
    exported = ad2kit("export", "--runs-dir", copied_run.path.parent)
    assert exported.code == 0
    assert f"run: {copied_run.path} (the most recent)" in exported.err
    assert "parity: passed" in exported.err
    assert "int8 (ONNX)" in exported.out


def test_a_command_that_failed_does_not_hide_a_finished_run(
    ad2kit: Any, copied_run: RunDir
) -> None:
    runs = copied_run.path.parent
    assert ad2kit("distill", "smoke", "student.layers=[9]", "--runs-dir", runs).code == 2
    assert f"run: {copied_run.path}" in ad2kit("parity", "--runs-dir", runs).err


def test_a_damaged_run_is_the_users_to_mend_and_no_defect(ad2kit: Any, copied_run: RunDir) -> None:
    (copied_run.onnx("int8") / "model.onnx").unlink()
    assert "sha256 expected" in ad2kit("export", copied_run.path).err
    assert ad2kit("predict", "--run", copied_run.onnx("fp32"), "fine").code == 0
    copied_run.recipe_file.write_text("{")
    outcome = ad2kit("export", copied_run.path)
    assert (outcome.code, "is damaged" in outcome.err) == (2, True)
    (copied_run.path.parent / "file").write_text("")
    outcome = ad2kit("distill", "smoke", "--runs-dir", copied_run.path.parent / "file")
    assert (outcome.code, "cannot make the run folder" in outcome.err) == (2, True)


def test_json_is_alone_on_stdout(ad2kit: Any, copied_run: RunDir) -> None:
    assert json.loads(ad2kit("parity", copied_run.path, "--json").out)["rows"] == 640
    artifacts = json.loads(ad2kit("export", copied_run.path, "--no-parity", "--json").out)
    assert [a["variant"] for a in artifacts] == ["fp32", "fused", "steady", "int8"]
    assert json.loads(ad2kit("bench", copied_run.path, "--json").out)["threads"] == 1


def test_a_gate_that_fails_ends_with_1_and_leaves_its_report(
    ad2kit: Any, copied_run: RunDir
) -> None:
    recipe = json.loads(copied_run.recipe_file.read_text())
    recipe["parity"]["min_retained"] = 1.0
    recipe["parity"]["min_retained_lower"] = 1.0
    copied_run.recipe_file.write_text(json.dumps(recipe))
    outcome = ad2kit("export", copied_run.path)
    assert outcome.code == 1
    assert "the parity gate of" in outcome.err
    assert "expected at least 1" in outcome.err
    verdicts = {each.verdict for each in ParityReport.read(copied_run.parity_report).variants}
    assert "passed" not in verdicts
    assert all(verdict in outcome.out for verdict in verdicts)
    assert json.loads(copied_run.parity_report.read_text())["variants"]
    assert ad2kit("package", copied_run.path).code == 1


def test_report_and_bench_print_what_was_measured(ad2kit: Any, copied_run: RunDir) -> None:
    assert "95 % interval" in ad2kit("report", copied_run.path).out
    assert "label flips" in copied_run.report.read_text()
    measured = ad2kit("bench", copied_run.path, "--price-per-hour", "0.17", "--p99-ms", "1e4")
    assert "capacity of this machine at a p99 of at most 10000 ms" in measured.out
    assert measured.out.count("per million texts") == 6
    assert json.loads(copied_run.latency_report.read_text())["price_per_hour"] == 0.17


def test_predict_reads_arguments_a_file_and_stdin(
    ad2kit: Any, finished_run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["never dull", "hardly a disappointment"]
    given = ad2kit("predict", *texts, "--run", finished_run.path)
    lines = [json.loads(line) for line in given.out.splitlines()]
    assert [line["text"] for line in lines] == texts
    assert {"label", "score", "scores", "tokens", "truncated"} <= set(lines[0])
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(texts) + "\n")
    assert ad2kit("predict", "--file", file, "--run", finished_run.path).out == given.out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(file.read_bytes())))
    assert ad2kit("predict", "--run", finished_run.path).out == given.out


def test_predict_names_the_line_that_is_wrong(
    ad2kit: Any, finished_run: RunDir, tmp_path: Path
) -> None:
    file = tmp_path / "texts.txt"
    file.write_bytes(b"good\ncaf\xe9\n")
    outcome = ad2kit("predict", "--file", file, "--run", finished_run.path)
    assert outcome.code == 2
    assert "line 2: not UTF-8" in outcome.err


def test_predict_leaves_out_empty_lines_and_says_which(
    ad2kit: Any, finished_run: RunDir, tmp_path: Path
) -> None:
    file = tmp_path / "texts.txt"
    file.write_text("\ngood\n \nbad\n\u200b\n\n", encoding="utf-8")
    outcome = ad2kit("predict", "--file", file, "--run", finished_run.path)
    assert outcome.code == 0
    assert [json.loads(line)["text"] for line in outcome.out.splitlines()] == ["good", "bad"]
    assert f"{file}: left out 4 empty lines: 1, 3, 5, 6" in outcome.err


@pytest.mark.parametrize("name", ["in.csv", "in.jsonl.gz", "in.json", "parts"])
def test_predict_reads_tables(ad2kit: Any, finished_run: RunDir, tmp_path: Path, name: str) -> None:
    (column,) = finished_run.recipe.data.text_columns
    rows = [{"id": 1, column: "never dull"}, {"id": 2, column: " "}, {"id": 3, column: "so; so"}]
    file = tmp_path / name
    if name == "in.csv":
        pd.DataFrame(rows).to_csv(file, index=False, sep=";")
    elif name == "parts":
        file.mkdir()
        for part in range(3):
            pd.DataFrame(rows[part : part + 1]).to_parquet(file / f"part-{part}.parquet")
    else:
        pd.DataFrame(rows).to_json(file, orient="records", lines=name != "in.json")
    given = ad2kit("predict", "never dull", "so; so", "--run", finished_run.path)
    read = ad2kit("predict", "--file", file, "--run", finished_run.path)
    assert (read.code, read.out) == (0, given.out)
    assert re.search(r"left out 1 empty (lines: [23]|rows: [12])", read.err)
    refused = ad2kit(
        "predict", "--file", file, "--run", finished_run.path, "--text-columns", "nothing"
    )
    assert refused.code == 2
    assert "no column 'nothing'" in refused.err


def test_predict_declares_a_text_that_was_cut(ad2kit: Any, finished_run: RunDir) -> None:
    answer = json.loads(ad2kit("predict", "dull " * 20_000, "--run", finished_run.path).out)
    assert (answer["truncated"], answer["tokens"]) == (True, 64)


def test_a_full_disk_ends_with_2_and_the_same_command_goes_on(
    tmp_path: Path, finished_run: RunDir
) -> None:
    """A limit on the size of a file stands for the full disk: the write fails half-way."""
    command = [*ALONE, "distill", "smoke", *QUICK, "--runs-dir", str(tmp_path)]

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))

    full = subprocess.run(
        command, capture_output=True, text=True, preexec_fn=small_files, check=False
    )
    assert full.returncode == 2, full.stderr
    assert "the disk is full, or a file is larger than allowed" in full.stderr
    assert "Traceback" not in full.stderr
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    (folder,) = tmp_path.glob("smoke-*")
    ours, theirs = (r.student / "model.safetensors" for r in (RunDir(folder), finished_run))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    ("module", "command", "extra"), [("torch", "parity", "cpu"), ("ray", "sweep smoke", "scale")]
)
def test_a_missing_extra_ends_with_3_and_names_it(
    finished_run: RunDir, module: str, command: str, extra: str
) -> None:
    arguments = ["ad2kit", *command.split(), "--runs-dir", str(finished_run.path.parent)]
    script = (
        f"import sys; sys.modules[{module!r}] = None\n"
        f"sys.argv = {arguments!r}\n"
        "from ad2kit.__main__ import main; main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert result.returncode == 3, result.stderr
    assert f"pip install 'ad2kit[{extra}]'" in result.stderr


def test_fit_ends_before_any_training_where_no_shape_can_meet_the_target(
    ad2kit: Any, tmp_path: Path
) -> None:
    quick = ("bench.seconds_per_cell=0.02", "export.variants=[fp32]")
    failed = ad2kit(
        "fit",
        "smoke",
        *quick,
        "--retain",
        "0.9",
        "--p99-ms",
        "0.000001",
        "--max-mb",
        "1000",
        "--layers",
        "1",
        "--feed-forward",
        "8",
        "--length",
        "16",
        "--runs-dir",
        tmp_path,
    )
    assert failed.code == 1
    assert (
        "no student meets the target (retain 90.00%, its interval above 80.00%; p99 at"
        in failed.err
    )
    assert "none of 2 shapes is cheap enough, so none was distilled" in failed.err
    assert "nearest: 1 layer, " in failed.err
    assert "ms above 1e-06 ms" in failed.err
    (folder,) = tmp_path.glob("fit-smoke-*")
    assert "too costly" in (folder / "fit.md").read_text()
    assert list(tmp_path.glob("smoke-*")) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--retain", "0.9"], "is met by the teacher itself"),
        (["--max-mb", "5"], "Missing option '--retain'"),
        (["--retain", "97", "--max-mb", "5"], "Invalid value for '--retain'"),
        (["--retain", "0.9", "--p99", "5"], "No such option"),
        (["--retain", "0.9", "--max-mb", "5", "--layers", "two"], "found 'two' in 'two'"),
        (
            ["--retain", "0.9", "--max-mb", "5", "--layers", "9"],
            "--layers: expected at most the teacher's 4, found 9",
        ),
        (["--retain", "0.9", "--max-mb", "5", "--device", "tpu"], "found 'tpu'"),
        (["--retain", "0.9", "--max-mb", "5", "--device", "cuda"], "provider 'cuda' was asked for"),
        (["--retain", "0.9", "--max-mb", "5", "--length", "999"], "--length is 999"),
    ],
)
def test_what_fit_cannot_take_is_refused(
    ad2kit: Any, tmp_path: Path, arguments: list[str], expected: str
) -> None:
    refused = ad2kit("fit", "smoke", *arguments, "--runs-dir", tmp_path)
    assert refused.code == 2
    assert expected in refused.err
    assert list(tmp_path.glob("smoke-*")) == []


def test_a_setting_where_a_run_is_expected(ad2kit: Any) -> None:
    for command in ("export", "bench", "report", "package"):
        refused = ad2kit(command, "export.search_seconds=20")
        assert refused.code == 2
        assert "ad2kit run RECIPE export.search_seconds=20" in refused.err


def test_the_next_step_asks_about_a_text_of_the_task(copied_run: RunDir) -> None:
    lines = copied_run.answers.read_text().split("\n")
    first = json.loads(lines[0])
    odd = first | {"texts": ["it's \u2028 'quoted'"]}
    copied_run.answers.write_text("\n".join([json.dumps(odd), *lines[1:]]))
    *_, curl = next_steps("demo:1", copied_run).split("\n")
    words = shlex.split(curl)
    assert json.loads(words[words.index("-d") + 1]) == {"texts": odd["texts"]}
    long = first | {"texts": ["x" * 81, "y" * 7]}
    copied_run.answers.write_text(json.dumps(long) + "\n")
    words = shlex.split(next_steps("demo:1", copied_run))
    assert json.loads(words[words.index("-d") + 1]) == {"texts": [long["texts"]]}
