"""One run: one recipe while a command works on it, and one verdict on what may be shipped."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from filelock import FileLock, Timeout

from ad2kit import load
from ad2kit.campaigns import run as chain
from ad2kit.campaigns.fit.looks import Looks
from ad2kit.data.splits import load_data
from ad2kit.gate.parity import judge
from ad2kit.gate.records import ParityReport
from ad2kit.gate.shipping import choose_variant, latest_passed_run, passed_variants
from ad2kit.run.errors import GateFailed, RunError
from ad2kit.run.files import sha256_of, write_record
from ad2kit.run.folder import RunDir, find_run, open_run
from ad2kit.run.records import CampaignRecord
from ad2kit.training.distill import distill
from tests.conftest import QUICK

if TYPE_CHECKING:
    from pathlib import Path

    from ad2kit.run.recipe import Recipe
    from tests.warm import Warm

LAX = "parity.min_retained=0.1"
FIT = CampaignRecord(command="ad2kit fit", rule="retain 97 %")


def opened_again(run: RunDir, recipe: Recipe, **options: Any) -> RunDir:
    return open_run(recipe, run.path.parent, **options)


# One recipe.


def test_a_refused_command_changes_nothing(copied_run: RunDir, warm: Warm) -> None:
    before = sha256_of(copied_run.recipe_file)
    with copied_run.locked() as held:
        refused = warm.run("run", "smoke", *QUICK, LAX, "--runs-dir", copied_run.path.parent)
        assert refused.returncode == 2
        assert f"run: {copied_run.path}" in refused.stderr
        assert "is being written by another ad2kit process" in refused.stderr
        assert sha256_of(copied_run.recipe_file) == before
        assert held.recipe.parity.min_retained == 0.5
    # The control: with the lock free the same command changes the gate.
    lax = warm.run("distill", "smoke", *QUICK, LAX, "--runs-dir", copied_run.path.parent)
    assert lax.returncode == 0, lax.stderr
    assert copied_run.recipe.parity.min_retained == 0.1


def test_a_command_at_work_keeps_the_recipe_that_it_began_with(
    tmp_path: Path, quick_recipe: Recipe, warm: Warm
) -> None:
    """Another process types the same recipe with a laxer gate while the student trains."""
    run = open_run(quick_recipe, tmp_path)
    codes = list[int]()

    def another(_record: object) -> None:
        if not codes:
            done = warm.run("distill", "smoke", *QUICK, LAX, "--runs-dir", tmp_path)
            codes.append(done.returncode)

    distill(run, on_step=another)
    assert codes == [2]
    assert RunDir(run.path).recipe == quick_recipe


def test_a_stage_judges_by_the_recipe_as_it_was_when_the_run_was_locked(
    copied_run: RunDir,
) -> None:
    recipe = copied_run.recipe
    other = recipe.parity.model_copy(update={"min_retained": 0.1, "bootstrap_samples": 100})
    with copied_run.locked() as held:
        write_record(copied_run.recipe_file, recipe.model_copy(update={"parity": other}))
        assert judge(held).thresholds == recipe.parity
    assert judge(copied_run).thresholds == other


class Stop(Exception):
    pass


def test_a_chain_holds_its_run_from_the_first_stage_to_the_last(
    copied_run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after each stage, which runs as it is, somebody else tries to take the lock."""
    free = list[str]()

    def watched(name: str) -> Any:
        stage = getattr(chain, name)

        def try_to_lock() -> None:
            with suppress(Timeout), FileLock(copied_run.path / ".lock", timeout=0):
                free.append(name)

        def call(*arguments: Any, **options: Any) -> Any:
            try_to_lock()
            if name == "package":
                raise Stop
            result = stage(*arguments, **options)
            try_to_lock()
            return result

        return call

    for name in ("distill", "export", "judge", "measure", "report", "package"):
        monkeypatch.setattr(chain, name, watched(name))
    with pytest.raises(Stop):
        chain.run_all(opened_again(copied_run, copied_run.recipe))
    assert free == []
    assert copied_run.report.is_file()


def test_a_kill_before_there_is_a_recipe_leaves_a_folder_that_can_be_opened(
    tmp_path: Path, quick_recipe: Recipe
) -> None:
    run = open_run(quick_recipe, tmp_path)
    for name in (".lock", ".tmp-new-1a2b-recipe.json", CampaignRecord.file_name):
        (run.path / name).write_text(FIT.model_dump_json())
    with open_run(quick_recipe, tmp_path).locked() as held:
        assert RunDir(held.path).recipe == quick_recipe
        assert sorted(p.name for p in run.path.iterdir()) == [
            ".lock",
            "campaign.json",
            "recipe.json",
        ]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    with pytest.raises(RunError, match="is not empty and is not a run folder"):
        open_run(quick_recipe, tmp_path, tmp_path / "full")


# One verdict.


def judged_at(run: RunDir, look: int, variant: str = "int8") -> CampaignRecord:
    """Write into a run what `fit` says of a variant at its n-th look at the validation rows."""
    report = ParityReport.read(run.parity_report)
    looks = Looks(0.5, load_data(run.recipe.data, run.recipe.seed).validation.labels, look - 1)
    verdict = looks.look(run, report, variant).record()
    record = FIT.model_copy(update={"verdicts": (verdict,)})
    write_record(run.campaign_record, record)
    return record


@pytest.fixture
def narrow(copied_run: RunDir) -> RunDir:
    """A run whose int8 just passes its gate, by the interval of a first look."""
    recipe, report = copied_run.recipe, ParityReport.read(copied_run.parity_report)
    (int8,) = (each for each in report.variants if each.variant == "int8")
    least = {"min_retained_lower": int8.retained_interval[0] - 1e-3}
    narrow = recipe.parity.model_copy(update=least)
    write_record(copied_run.recipe_file, recipe.model_copy(update={"parity": narrow}))
    assert judge(copied_run).variants[-1].passed
    return copied_run


def test_what_fit_refuses_is_not_shipped_though_the_gate_has_passed_it(narrow: RunDir) -> None:
    assert choose_variant(narrow, "int8") == (narrow.onnx("int8"), False)  # before there is a rule
    record = judged_at(narrow, 1)
    assert record.verdicts[0].passed
    assert passed_variants(narrow) == [narrow.onnx("int8")]  # and no variant that nobody judged

    refused = judged_at(narrow, 9).verdicts[0]
    assert refused.interval[0] < record.verdicts[0].interval[0]
    assert (refused.look, refused.error) == (9, 0.05 / 2**8)
    assert ParityReport.read(narrow.parity_report).variants[-1].passed
    assert passed_variants(narrow) == []
    words = r"int8, at look 9: accuracy retained is .*not shown: .* by the rule of `ad2kit fit`"
    with pytest.raises(GateFailed, match=words) as caught:
        choose_variant(narrow, "int8")
    assert f"ad2kit package {narrow.path} --variant int8 --allow-failed-parity" in caught.value.hint
    with pytest.raises(
        GateFailed, match=r"fp32: not passed by the rule .*: it was not judged as it lies"
    ):
        choose_variant(narrow, None)
    with pytest.raises(RunError, match=words):
        load(narrow.path)
    assert choose_variant(narrow, "int8", allow_failed_parity=True) == (narrow.onnx("int8"), True)
    assert load(narrow.onnx("int8")).predict(["fine"])


def test_the_command_line_tells_of_the_refusal(ad2kit: Any, narrow: RunDir) -> None:
    judged_at(narrow, 9)
    for command in (["parity"], ["package", "--variant", "int8"]):
        refused = ad2kit(command[0], narrow.path, *command[1:])
        assert refused.code == 1
        assert "by the rule of `ad2kit fit` (retain 97 %)" in refused.err
        assert "next:" not in refused.err
    table = ad2kit("report", narrow.path).out
    # The gate's thresholds lie just below int8; how the others stand to it, the CPU decides.
    (int8,) = (line for line in table.splitlines() if line.strip().startswith("int8 (ONNX)"))
    assert " refused" in int8
    assert " passed" not in table
    page = narrow.report.read_text()
    assert "<title>smoke: refused</title>" in page
    assert "at look 9" in page
    named = ad2kit("predict", "--run", narrow.path, "fine")
    assert (named.code, "at look 9" in named.err) == (2, True)
    judged_at(narrow, 1)
    passed = ad2kit("parity", narrow.path)
    assert (passed.code, f"next: ad2kit package {narrow.path}\n" in passed.err) == (0, True)


def test_a_verdict_of_a_campaign_is_of_one_artefact(narrow: RunDir) -> None:
    record = judged_at(narrow, 1)
    other = record.verdicts[0].model_copy(update={"manifest_sha256": "0" * 64})
    write_record(narrow.campaign_record, record.model_copy(update={"verdicts": (other,)}))
    assert passed_variants(narrow) == []


@pytest.mark.parametrize("campaign", [FIT, CampaignRecord(command="ad2kit sweep")])
def test_the_run_of_a_campaign_is_taken_only_when_it_is_named(
    copied_run: RunDir, campaign: CampaignRecord
) -> None:
    runs, older = copied_run.path.parent, RunDir(copied_run.path.parent / "older")
    shutil.copytree(copied_run.path, older.path)
    for file in (older.recipe_file, older.parity_report):
        os.utime(file, (1, 1))
    assert (find_run(runs), latest_passed_run(runs)) == (copied_run, copied_run)  # the control
    write_record(copied_run.campaign_record, campaign)
    if campaign.rule is not None:
        judged_at(copied_run, 1)
    assert (find_run(runs), latest_passed_run(runs)) == (older, older)
    assert find_run(runs, copied_run.path) == copied_run
    assert passed_variants(copied_run)
    shutil.rmtree(older.path)
    for search in (find_run, latest_passed_run):
        with pytest.raises(RunError, match=f"but those of campaigns, such as {copied_run.path}"):
            search(runs)


def test_who_asks_for_a_run_itself_makes_it_an_ordinary_one(copied_run: RunDir) -> None:
    recipe = copied_run.recipe
    write_record(copied_run.campaign_record, CampaignRecord(command="ad2kit sweep"))
    with RunDir(copied_run.path).locked():
        assert copied_run.campaign_record.is_file()  # a stage alone says nothing of the kind
    with opened_again(copied_run, recipe).locked():
        assert not copied_run.campaign_record.exists()
    # But no rule that has refused a variant is forgotten by that.
    write_record(copied_run.campaign_record, FIT)
    with opened_again(copied_run, recipe).locked():
        assert passed_variants(copied_run) == []


def test_a_campaign_leaves_the_gate_of_a_finished_run_alone(copied_run: RunDir) -> None:
    recipe = copied_run.recipe
    lax = recipe.parity.model_copy(update={"min_retained": 0.1})
    changed = recipe.model_copy(update={"parity": lax})
    campaign = CampaignRecord(command="ad2kit compare")
    os.utime(copied_run.recipe_file, (1, 1))
    with opened_again(copied_run, changed, campaign=campaign).locked() as held:
        assert held.recipe == recipe
    assert copied_run.recipe == recipe
    assert copied_run.recipe_file.stat().st_mtime == 1  # nor is it the most recent one by that
    assert not copied_run.campaign_record.exists()
    assert len(passed_variants(copied_run)) == 4
    with opened_again(copied_run, changed).locked() as held:
        assert held.recipe == RunDir(copied_run.path).recipe == changed
