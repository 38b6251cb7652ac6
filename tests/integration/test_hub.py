"""The hub as its users meet it: a GLUE recipe from it, a student to it, and all that goes wrong."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import datasets
import pytest
from huggingface_hub import ModelCard

from ad2kit.data.demo_reviews import opinions
from ad2kit.exporting.classifier import OnnxClassifier
from ad2kit.exporting.records import OnnxArtifact
from ad2kit.models.text_model import head_config, random_bert
from ad2kit.run.folder import RunDir
from ad2kit.training.records import DistillReport
from tests import hub as hubs
from tests.hub import MEMBER, STRANGER, ad2kit, environment
from tests.models import LABELS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from tests.hub import Hub

GLUE, BERT = "nyu-mll/glue", "google-bert/bert-base-uncased"
ROWS = {"train": 400, "validation": 120, "test": 20}
NOWHERE = "http://127.0.0.1:9"

# The recipe of SST-2 with what a tiny model on two slow cores needs.
TINY = (
    "data.max_length_tokens=64",
    "teacher.finetune.epochs=6",
    "teacher.finetune.lr=3e-3",
    "teacher.accept=true",
    "student.layers=[0,2]",
    "distill.epochs=6",
    "distill.lr=3e-3",
    "export.variants=[fp32]",
    "parity.min_retained=0.3",
    "parity.min_retained_lower=0.1",
    "compute.device=cpu",
    "compute.threads=1",
)


def glue(folder: Path, *, seed: int = 7, said: dict[str, int] = ROWS) -> dict[str, bytes]:
    """The files of a GLUE with two of its data sets: card with configs and sizes, Parquet files.

    ``said`` is what the card says of the number of rows.
    """
    features = datasets.Features(
        sentence=datasets.Value("string"),
        label=datasets.ClassLabel(names=["negative", "positive"]),
        idx=datasets.Value("int32"),
    )
    made = opinions(seed, train_rows=ROWS["train"], validation_rows=ROWS["validation"])
    splits = {
        "train": made.train,
        "validation": made.validation,
        "test": [(text, -1) for text, _ in made.validation[: ROWS["test"]]],
    }
    files = {".gitattributes": b"*.parquet filter=lfs diff=lfs merge=lfs -text\n"}
    for split, pairs in splits.items():
        table = {
            "sentence": [text for text, _ in pairs],
            "label": [label for _, label in pairs],
            "idx": list(range(len(pairs))),
        }
        path = folder / f"{split}.parquet"
        datasets.Dataset.from_dict(table, features).to_parquet(path)
        for config in ("cola", "sst2"):
            files[f"{config}/{split}-00000-of-00001.parquet"] = path.read_bytes()
    return files | {"README.md": card(said)}


def card(rows: dict[str, int]) -> bytes:
    """The README of GLUE, with the parts that programs read."""
    lines = ["---", "language:", "- en", "config_names:", "- cola", "- sst2", "dataset_info:"]
    for config in ("cola", "sst2"):
        lines += [f"- config_name: {config}", "  features:"]
        lines += ["  - name: sentence", "    dtype: string", "  - name: label", "    dtype:"]
        lines += ["      class_label:", "        names:"]
        lines += ["          '0': negative", "          '1': positive"]
        lines += ["  - name: idx", "    dtype: int32", "  splits:"]
        for split, number in rows.items():
            lines += [f"  - name: {split}", f"    num_bytes: {100 * number}"]
            lines += [f"    num_examples: {number}"]
        lines += ["  download_size: 10000", "  dataset_size: 20000"]
    lines += ["configs:"]
    for config in ("cola", "sst2"):
        lines += [f"- config_name: {config}", "  data_files:"]
        for split in rows:
            lines += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    return "\n".join([*lines, "---", "", "# GLUE", ""]).encode()


def bert(folder: Path, *, seed: int = 3) -> dict[str, bytes]:
    """The files of a tiny encoder as the repository of BERT has them: also those for others."""
    folder.mkdir()
    texts = tuple((text,) for text, _ in opinions(7, train_rows=400, validation_rows=2).train)
    model, tokenizer = random_bert(head_config(LABELS, "single_label"), seed, texts)
    model.bert.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files | {
        "README.md": b"---\nlicense: apache-2.0\n---\n# BERT\n",
        "pytorch_model.bin": b"the same weights, pickled",
        "onnx/model.onnx": b"the same weights as a graph",
    }


@dataclass
class Place:
    """A hub with GLUE and BERT, and a user of it with one run of each command."""

    hub: Hub
    folder: Path
    commits: dict[str, str]
    asked: list[str]

    @property
    def run(self) -> RunDir:
        (folder,) = self.folder.glob("runs/sst2-*")
        return RunDir(folder)

    def ad2kit(
        self, *arguments: str | Path, endpoint: str = "", **env: str
    ) -> subprocess.CompletedProcess[str]:
        variables = environment(endpoint or self.hub.address, self.folder / "home", **env)
        return ad2kit(*arguments, env=variables, cwd=self.folder)

    def copy(self, folder: Path) -> Place:
        """Return a copy of the user's folder, with its cache, that a test may change."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Place(self.hub, folder, self.commits, [])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """``distill`` of the recipe sst2 with an empty cache. Do not change it."""
    files, folder = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("user")
    with hubs.serving_hub() as hub:
        commits = {
            "data": hub.repository("datasets", GLUE).commit(glue(files)),
            "model": hub.repository("models", BERT).commit(bert(files / "bert")),
        }
        # A folder of this name is none of the hub's.
        decoy = folder / GLUE
        decoy.mkdir(parents=True)
        (decoy / "train.csv").write_text("sentence,label\na,0\nb,1\n")
        made = Place(hub, folder, commits, hub.requests)
        done = made.ad2kit("distill", "sst2", *TINY)
        assert done.returncode == 0, done.stderr
        made.asked = list(hub.requests)
        yield made


def test_a_glue_recipe_is_distilled_from_the_hub(place: Place) -> None:
    report = DistillReport.read(place.run.distill_report)
    assert report.labels == LABELS  # the names of the class column
    assert {name: facts.rows for name, facts in report.splits.items()} == {
        "train": 320,
        "select": 80,
        "validation": 120,
    }
    pinned = {
        "data.source": f"hub://{GLUE}/sst2@{place.commits['data']}",
        "teacher.model": f"hub://{BERT}@{place.commits['model']}",
    }
    assert report.hub == pinned
    assert place.run.recipe.teacher.model == pinned["teacher.model"]
    assert json.loads(place.run.hub_file.read_text()) == {
        f"hub://{GLUE}/sst2": place.commits["data"],
        f"hub://{BERT}": place.commits["model"],
    }
    # What is asked for is in the recipe, and what is not read is not downloaded.
    assert json.loads(place.run.recipe_file.read_text())["data"]["source"] == f"hub://{GLUE}/sst2"
    assert not [each for each in place.asked if "pytorch_model" in each or ".onnx" in each]
    assert not [each for each in place.asked if "cola/train" in each]


def test_the_student_goes_to_the_hub_and_comes_back(place: Place, tmp_path: Path) -> None:
    user = place.copy(tmp_path / "user")
    exported = user.ad2kit("export")
    assert exported.returncode == 0, exported.stderr
    pushed = user.ad2kit("push", "someone/sentiment", HF_TOKEN=MEMBER)
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.strip() == f"{place.hub.address}/someone/sentiment"
    assert "PUT /lfs" in place.hub.requests  # the weights

    # As the card says.
    code = "import ad2kit, huggingface_hub, json, sys\n"
    code += "folder = huggingface_hub.snapshot_download('someone/sentiment')\n"
    code += "answer = ad2kit.load(folder).predict(['never dull'])[0]\n"
    code += "print(json.dumps([answer.label, answer.score, folder]))"
    env = environment(place.hub.address, tmp_path / "other")
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    label, score, folder = json.loads(done.stdout)
    (ours,) = OnnxClassifier(user.run.onnx("fp32"), threads=1).predict(["never dull"])
    assert (label, score) == (ours.label, ours.score)
    lineage = OnnxArtifact.read(user.run.onnx("fp32") / OnnxArtifact.file_name).lineage
    assert lineage["teacher"] == f"hub://{BERT}@{place.commits['model']}"
    assert lineage["data.source"] == f"hub://{GLUE}/sst2@{place.commits['data']}"
    page = ModelCard.load(f"{folder}/README.md")
    assert page.data.base_model == BERT  # the hub links it
    assert place.commits["data"] in page.text


def test_a_second_run_reads_the_cache(place: Place, tmp_path: Path) -> None:
    user = place.copy(tmp_path / "user")
    first = user.run
    again = user.ad2kit("distill", "sst2", *TINY, "distill.seed=3", endpoint=NOWHERE)
    assert again.returncode == 0, again.stderr
    assert "the hub does not answer" in again.stderr
    assert "another run has made this teacher" in again.stderr  # of the same commits
    (second,) = (RunDir(each) for each in user.folder.glob("runs/sst2-*") if each != first.path)
    one, two = (DistillReport.read(run.distill_report) for run in (first, second))
    assert one.hub == two.hub
    assert one.splits == two.splits


@pytest.fixture
def moved(place: Place, tmp_path: Path) -> Iterator[Place]:
    """A copy of the user, whose data set and teacher have new commits since."""
    user = place.copy(tmp_path / "user")
    repositories = [place.hub.repository("datasets", GLUE), place.hub.repository("models", BERT)]
    repositories[0].commit(glue(tmp_path, seed=8))
    repositories[1].commit(bert(tmp_path / "bert", seed=4))
    yield user
    for repository, commit in zip(repositories, place.commits.values(), strict=True):
        repository.refs["main"] = commit


def test_a_run_goes_on_with_the_commits_it_began_with(moved: Place, place: Place) -> None:
    run = moved.run
    weights = (place.run.student / "model.safetensors").read_bytes()
    for path in (run.teacher, run.student, run.shared):
        shutil.rmtree(path)
    run.distill_report.unlink()
    done = moved.ad2kit("distill", "sst2", *TINY)
    assert done.returncode == 0, done.stderr
    assert (run.student / "model.safetensors").read_bytes() == weights

    # A run of an older version recorded no commits, and its data are others now.
    run.hub_file.unlink()
    refused = moved.ad2kit("distill", "sst2", *TINY)
    assert refused.returncode == 2
    assert "was made from other data than this run reads now" in refused.stderr


def test_a_pinned_revision_is_what_is_read_with_and_without_the_hub(
    moved: Place, place: Place
) -> None:
    place.hub.repository("datasets", GLUE).refs["v1"] = place.commits["data"]
    pinned_model = model(f"{BERT}@{place.commits['model']}")
    pinned = data(f"{GLUE}/sst2@{place.commits['data']}")
    new, old = examples(moved, [[], [data(f"{GLUE}/sst2@v1"), pinned_model]])
    assert old != new
    # Now the cache holds both commits. Of these, datasets takes the one that was written last.
    assert examples(moved, [[pinned], []], HF_ENDPOINT=NOWHERE) == [old, new]
    code = "import datasets\n"
    code += f"one = datasets.load_dataset('{GLUE}', 'sst2', revision='{place.commits['data']}')\n"
    code += "print(one['train'][0]['sentence'])"
    env = environment(NOWHERE, moved.folder / "home", HF_HUB_OFFLINE="1")
    other = moved.folder / "elsewhere"
    other.mkdir()
    taken = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=other, capture_output=True, text=True, check=True
    )
    texts = [opinions(seed, train_rows=400, validation_rows=120).train[0][0] for seed in (7, 8)]
    assert taken.stdout.strip() == texts[1]  # not of the commit that was asked for


def examples(user: Place, settings: list[list[str]], **env: str) -> list[str]:
    """Return the first training row that ``check`` shows, for each list of settings."""
    commands = [("", ["check", "sst2", *TINY, *each, "--json"]) for each in settings]
    answers = several(user, commands, **env)
    assert [each.code for each in answers] == [0] * len(answers), answers
    return [json.loads(each.out)["splits"]["train"]["example"] for each in answers]


class Answer(NamedTuple):
    """What a command left behind."""

    code: int
    err: str
    out: str


_SEVERAL = """
import contextlib, io, json, os, sys
from ad2kit.__main__ import main

for token, arguments in json.loads(sys.argv[1]):
    os.environ["HF_TOKEN"] = token
    sys.argv = ["ad2kit", *arguments]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([code, err.getvalue(), out.getvalue()]), flush=True)
"""


def several(user: Place, commands: Sequence[tuple[str, list[str]]], **env: str) -> list[Answer]:
    """Run several commands in one process, each with a token."""
    done = subprocess.run(
        [sys.executable, "-c", _SEVERAL, json.dumps(commands)],
        env=environment(user.hub.address, user.folder / "home", **env),
        cwd=user.folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    answers = [Answer(*json.loads(line)) for line in done.stdout.splitlines()]
    assert len(answers) == len(commands), done.stderr
    return answers


def data(name: str) -> str:
    return f"data.source=hub://{name}"


def model(name: str) -> str:
    return f"teacher.model=hub://{name}"


class Trouble(NamedTuple):
    """A setting and a user that the hub refuses, and the setting and user that the advice makes."""

    setting: str
    said: str
    advised: str
    token: str = ""
    cure: tuple[str, str] | None = None


LOG_IN = "`hf auth login`, or set HF_TOKEN"
SST2 = data(f"{GLUE}/sst2")
TROUBLES = {
    "no such data set": Trouble(data("a/none"), "has no such repository", "data.source"),
    "no such model": Trouble(model("a/none"), "has no such repository", "teacher.model", MEMBER),
    "a private data set": Trouble(
        data("me/private/sst2"), "or it is private", LOG_IN, cure=(data("me/private/sst2"), MEMBER)
    ),
    "a gated data set, not let in": Trouble(
        data("me/gated/sst2"), "it is gated", "datasets/me/gated", STRANGER
    ),
    "a gated data set": Trouble(
        data("me/gated/sst2"), "it is gated", LOG_IN, cure=(data("me/gated/sst2"), MEMBER)
    ),
    "a gated model, not let in": Trouble(
        model("me/gated"), "it is gated", "ask for access", STRANGER, (model("me/gated"), MEMBER)
    ),
    "a wrong token": Trouble(
        data("me/open/sst2"),
        "does not accept this token",
        LOG_IN,
        "hf_wrong",
        (data("me/open/sst2"), ""),
    ),
    "no such revision of the data": Trouble(
        f"{SST2}@v9", "no revision 'v9'", "commits/main", cure=(f"{SST2}@main", "")
    ),
    "a revision in the middle": Trouble(
        data(f"{GLUE}@main/sst2"), "no revision 'main/sst2'", "at the end of an address"
    ),
    "no such revision of the model": Trouble(
        model(f"{BERT}@v9"), "no revision 'v9'", "40 digits", cure=(model(f"{BERT}@main"), "")
    ),
    "no configuration": Trouble(
        data(GLUE), "['cola', 'sst2']", f"hub://{GLUE}/CONFIG", cure=(SST2, "")
    ),
    "no such configuration": Trouble(
        data(f"{GLUE}/sst3"), "'sst3' not found", f"hub://{GLUE}/CONFIG"
    ),
    "other sizes than the card says": Trouble(
        data("me/sizes/sst2"),
        "NonMatchingSplitsSizesError",
        "@REVISION",
        cure=(data("me/sizes/sst2@good"), ""),
    ),
    "no such split": Trouble(
        "data.validation=dev",
        "no split 'dev', only train, validation, test",
        "data.validation",
        cure=("data.validation=train", ""),
    ),
    "too many parts": Trouble(model("a/b/c"), "owner/name[@revision]", "teacher.model"),
    "an empty revision": Trouble(data("a/b@"), "owner/name[/config][@revision]", "data.source"),
}


@pytest.fixture(scope="module")
def troubled(
    place: Place, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Answer]:
    """Exit code and stderr of each trouble in ``check`` and ``distill``, and with its cure."""
    files = tmp_path_factory.mktemp("files")
    content = glue(files)
    hub = place.hub
    hub.repository("datasets", "me/private", private=True).commit(content)
    hub.repository("datasets", "me/gated", gated=True).commit(content)
    hub.repository("models", "me/gated", gated=True).commit(bert(files / "bert"))
    hub.repository("datasets", "me/open").commit(content)
    sizes = hub.repository("datasets", "me/sizes")
    sizes.refs["good"] = sizes.commit(content)
    sizes.commit({"README.md": card(ROWS | {"train": 500})})
    user = place.copy(tmp_path_factory.mktemp("troubled") / "user")
    asked: dict[tuple[str, str], tuple[str, list[str]]] = {}
    for name, trouble in TROUBLES.items():
        for command in ("check", "distill"):
            asked[name, command] = trouble.token, [command, "sst2", *TINY, trouble.setting]
        if trouble.cure is not None:
            setting, token = trouble.cure
            arguments = ["check", "sst2", *TINY, "data.max_leakage=1.0", setting]
            asked[name, "cure"] = token, arguments
    return dict(zip(asked, several(user, list(asked.values())), strict=True))


@pytest.mark.parametrize("trouble", TROUBLES)
def test_what_the_hub_refuses_is_the_users_to_mend(
    troubled: dict[tuple[str, str], Answer], trouble: str
) -> None:
    checked, distilled = (troubled[trouble, command] for command in ("check", "distill"))
    for code, words, _ in (checked, distilled):
        assert code == 2, words
        message, arrow, hint = words.rpartition("\n  -> ")
        assert arrow
        assert TROUBLES[trouble].said in message
        assert TROUBLES[trouble].advised in hint
        assert "Traceback" not in words
    # A run names the commit that it has found.
    plain = [re.sub("@[0-9a-f]{40}", "", each.err) for each in (checked, distilled)]
    assert plain[0].splitlines()[-2:] == plain[1].splitlines()[-2:]
    if TROUBLES[trouble].cure is not None:
        code, words, _ = troubled[trouble, "cure"]
        assert code == 0, words


def test_a_hub_that_is_away(place: Place, tmp_path: Path) -> None:
    """The advice is followed until nothing of the hub is needed."""
    for split, pairs in zip(("train", "validation"), opinions(7, 400, 120)[:2], strict=True):
        lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in pairs)]
        (tmp_path / f"{split}.tsv").write_text("\n".join(lines))
    for name, content in bert(tmp_path / "bert").items():
        (tmp_path / "bert" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bert" / name).write_bytes(content)
    user = Place(place.hub, tmp_path, place.commits, [])
    settings = [f"data.source={tmp_path}", f"teacher.model={tmp_path / 'bert'}"]
    commands = [("", ["check", "sst2", *TINY, *settings[:given]]) for given in range(3)]
    answers = several(user, commands, HF_ENDPOINT=NOWHERE)
    assert [each.code for each in answers] == [2, 2, 0], answers
    for answer, advice in zip(
        answers, ("data.source=FOLDER", "teacher.model=FOLDER"), strict=False
    ):
        assert f"{NOWHERE} does not answer" in answer.err
        assert advice in answer.err


def test_a_hub_that_is_down(place: Place, tmp_path: Path) -> None:
    user, empty = place.copy(tmp_path / "user"), Place(place.hub, tmp_path, place.commits, [])
    place.hub.down = True
    try:
        (refused,) = several(empty, [("", ["distill", "sst2", *TINY])])
        (cached,) = several(user, [("", ["check", "sst2", *TINY, "--json"])])
    finally:
        place.hub.down = False
    assert refused.code == 2, refused.err
    assert "(HTTP 503)" in refused.err
    assert f"{place.hub.address} does not answer" in refused.err
    assert cached.code == 0, cached.err
    assert json.loads(cached.out)["splits"]["validation"]["rows"] == ROWS["validation"]
