"""Several models in one service, and new versions of them while it answers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from typing import TYPE_CHECKING, Any

import bentoml
import pytest

from ad2kit.exporting.classifier import MODEL_FILE, OnnxClassifier
from ad2kit.exporting.golden import GOLDEN_FILE, add_golden_answers
from ad2kit.exporting.records import OnnxArtifact
from ad2kit.packaging.bento import served
from ad2kit.run.errors import ModelError, UserError
from ad2kit.run.files import sha256_of, write_record
from ad2kit.service.models import Version
from ad2kit.service.process import Server, Watch, this_server
from tests.http_client import (
    CHECKOUT,
    JSON,
    SERVICE,
    Reply,
    call,
    check_error,
    command_of,
    log_of,
    metrics_of,
    server_at,
    wait_for,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import psutil

    from ad2kit.gate.records import BentoRecord
    from ad2kit.run.folder import RunDir

pytestmark = pytest.mark.slow

TEXTS = ["never dull", "not at all convincing", "a delight", "dull, long and clumsy"]
BODY = json.dumps({"texts": TEXTS, "scores": True}).encode()


def renamed(source: Path, target: Path, *labels: str) -> Path:
    """A copy of an artefact that calls its labels by other names, in their order."""
    shutil.copytree(source, target)
    (target / GOLDEN_FILE).unlink()
    artifact = OnnxArtifact.read(target / OnnxArtifact.file_name)
    files = {name: sha256 for name, sha256 in artifact.files.items() if name != GOLDEN_FILE}
    changed = artifact.model_copy(update={"labels": labels, "files": files})
    write_record(target / OnnxArtifact.file_name, changed)
    add_golden_answers(target)
    return target


def lead(link: Path, folder: Path) -> None:
    """Let a link lead to a folder, at once."""
    new = link.with_name("new-link")
    new.symlink_to(folder)
    new.replace(link)


@pytest.fixture(scope="module")
def versions(
    packaged: tuple[RunDir, BentoRecord], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Artefacts that answer with other words each."""
    folder, source = tmp_path_factory.mktemp("versions"), packaged[0].onnx("fp32")
    found = {
        words: renamed(source, folder / words, *words.split("-"))
        for words in ("no-yes", "bad-good", "down-up")
    }
    shutil.copytree(found["down-up"], folder / "broken")
    graph = folder / "broken" / MODEL_FILE
    graph.write_bytes(graph.read_bytes()[:-100])
    return {**found, "broken": folder / "broken"}


def answers(folder: Path) -> list[dict[str, Any]]:
    """The answers of an artefact to the texts."""
    found = OnnxClassifier(folder, threads=1).predict(TEXTS)
    return [{"label": each.label, "scores": pytest.approx(each.scores, abs=1e-5)} for each in found]


def said(reply: Reply) -> list[dict[str, Any]]:
    return [{name: each[name] for name in ("label", "scores")} for each in reply.predictions]


@pytest.fixture(scope="module", params=["Bento", "checkout"])
def several(
    request: pytest.FixtureRequest,
    packaged: tuple[RunDir, BentoRecord],
    versions: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """A service with its own model and two others."""
    models = f"one={versions['no-yes']},two={versions['bad-good']}"
    environment = {**os.environ, "AD2KIT_MODELS": models, "AD2KIT_WORKERS": "1"}
    target, arguments = bentoml.bentos.get(packaged[1].tag).path, tuple[str, ...]()
    if request.param == "checkout":
        environment["AD2KIT_MODEL"] = str(packaged[0].onnx(packaged[1].variant))
        target, arguments = SERVICE, ("--working-dir", str(CHECKOUT))
    folder = tmp_path_factory.mktemp("several")
    with served(target, folder, *arguments, environment=environment) as address:
        yield address


def test_each_model_answers_at_its_own_path(
    several: str, packaged: tuple[RunDir, BentoRecord], versions: dict[str, Path]
) -> None:
    folders = {
        "/classify": packaged[0].onnx(packaged[1].variant),
        "/classify/one": versions["no-yes"],
        "/classify/two/": versions["bad-good"],
    }
    expected = {path: answers(folder) for path, folder in folders.items()}
    found = dict[str, Any]()

    def ask(path: str) -> None:
        found[path] = [said(call(several, "POST", path, BODY, JSON)) for _ in range(30)]

    threads = [threading.Thread(target=ask, args=(path,)) for path in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {path: [answer] * 30 for path, answer in expected.items()}
    error = check_error(call(several, "POST", "/classify/three", BODY, JSON), 404, "not_found")
    assert error["hint"] == "POST to /classify or /classify/one or /classify/two"
    check_error(call(several, "GET", "/classify/three"), 404, "not_found")
    error = check_error(call(several, "GET", "/classify/one"), 405, "method_not_allowed")
    assert error["hint"] == "use POST /classify/one"
    counted = metrics_of(several)
    for path, label in (("/classify/one", "yes"), ("/classify/two/", "good")):
        name = f'ad2kit_predictions_total{{label="{label}",model="{path[10:13]}"}}'
        assert counted[name] == 30 * sum(each["label"] == label for each in expected[path])


def test_info_and_openapi_tell_of_each_model(several: str, versions: dict[str, Path]) -> None:
    info = call(several, "GET", "/info").json
    assert {name: model["labels"] for name, model in info["models"].items()} == {
        "one": ["no", "yes"],
        "two": ["bad", "good"],
    }
    assert info["labels"] == ["negative", "positive"]
    assert info["refused"] == []
    assert str(versions["no-yes"]) not in json.dumps(info)
    paths = call(several, "GET", "/docs.json").json["paths"]
    assert {"/classify", "/classify/one", "/classify/two"} < set(paths)


def test_a_new_version_is_exchanged_without_a_lost_request(
    packaged: tuple[RunDir, BentoRecord], versions: dict[str, Path], tmp_path: Path
) -> None:
    link = tmp_path / "current"
    lead(link, versions["no-yes"])
    environment = {**os.environ, "AD2KIT_MODELS": f"words={link}", "AD2KIT_WORKERS": "2"}
    bento = bentoml.bentos.get(packaged[1].tag).path
    old, new = answers(versions["no-yes"]), answers(versions["bad-good"])
    replies = list[Reply]()
    stop = threading.Event()
    with served(bento, tmp_path, environment=environment) as address:

        def ask() -> Reply:
            return call(address, "POST", "/classify/words", BODY, JSON)

        def keep_asking() -> None:
            while not stop.is_set():
                replies.append(ask())

        def all_say(expected: list[dict[str, Any]]) -> bool:
            return all(said(ask()) == expected for _ in range(20))

        def loaded(name: str) -> int:
            """The number of workers that have said that they changed to this version."""
            told = [each for each in log_of(tmp_path) if each["message"].endswith("is served")]
            return [each["model"] for each in told].count(str(versions[name]))

        def refused() -> float:
            """The number of workers whose new version is refused."""
            return metrics_of(address)["ad2kit_refused_versions"]

        def reasons() -> str:
            return " ".join(each["reason"] for each in log_of(tmp_path) if "reason" in each)

        assert all_say(old)
        clients = [threading.Thread(target=keep_asking) for _ in range(4)]
        for client in clients:
            client.start()
        lead(link, versions["bad-good"])
        wait_for(lambda: loaded("bad-good") == 2)
        assert all_say(new)
        stop.set()
        for client in clients:
            client.join()
        assert {reply.status for reply in replies} == {200}
        ours = [said(reply) for reply in replies]
        assert all(answer in (old, new) for answer in ours)
        assert old in ours
        assert new in ours
        assert refused() == 0

        (worker, *_) = workers(address)
        worker.send_signal(signal.SIGKILL)
        worker.wait(20)
        wait_for(lambda: len(workers(address)) == 2)
        assert all_say(new)

        lead(link, versions["broken"])
        wait_for(lambda: refused() == 2)
        assert call(address, "GET", "/info").json["refused"] == ["words"]
        assert "model.onnx" in reasons()
        assert all_say(new)
        link.unlink()
        wait_for(lambda: "neither a run folder nor an exported variant" in reasons())
        assert all_say(new)
        lead(link, versions["down-up"])
        wait_for(lambda: loaded("down-up") == 2)
        assert all_say(answers(versions["down-up"]))
        assert refused() == 0
    assert {each["level"] for each in log_of(tmp_path) if "reason" in each} == {"ERROR"}


# The service as it is; it writes down how many classifiers are alive after each exchange.
COUNTED = """
import weakref
from pathlib import Path

from ad2kit.exporting.classifier import OnnxClassifier
from serving import service

alive = weakref.WeakSet()
honest_init, honest_take = OnnxClassifier.__init__, service.Ad2kitClassifier.inner.take


def init(self, *arguments, **options):
    honest_init(self, *arguments, **options)
    alive.add(self)


def take(self, decided):
    honest_take(self, decided)
    with Path("alive").open("a") as file:
        file.write(f"{len(alive)}\\n")


OnnxClassifier.__init__ = init
service.Ad2kitClassifier.inner.take = take
Ad2kitClassifier = service.Ad2kitClassifier
"""


def test_an_old_version_leaves_the_memory(versions: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "counted.py").write_text(COUNTED)
    for name in ("own", "words"):
        lead(tmp_path / name, versions["no-yes"])
    environment = {
        **os.environ,
        "PYTHONPATH": str(CHECKOUT),
        "AD2KIT_WORKERS": "1",
        "AD2KIT_MODEL": str(tmp_path / "own"),
        "AD2KIT_MODELS": f"words={tmp_path / 'words'}",
    }
    arguments = ("--working-dir", str(tmp_path))
    counts = tmp_path / "alive"
    with served(
        "counted:Ad2kitClassifier", tmp_path, *arguments, environment=environment
    ) as address:
        for name, path in (("own", "/classify"), ("words", "/classify/words")):
            for words in ("bad-good", "down-up"):
                assert call(address, "POST", path, BODY, JSON).status == 200
                lead(tmp_path / name, versions[words])
                expected = answers(versions[words])
                wait_for(lambda: said(call(address, "POST", path, BODY, JSON)) == expected)  # noqa: B023
        wait_for(lambda: len(counts.read_text().splitlines()) == 4)
    assert counts.read_text().splitlines() == ["2"] * 4  # one of each model


def workers(address: str) -> list[psutil.Process]:
    """The workers of a server of this process."""
    children = server_at(address).children()
    return [each for each in children if "_bentoml_impl" in " ".join(command_of(each))]


@pytest.fixture
def place(packaged: tuple[RunDir, BentoRecord], tmp_path: Path) -> Path:
    """The folder of a Bento's service."""
    shutil.copytree(packaged[0].onnx("steady"), tmp_path / "artifact")
    return tmp_path


@pytest.fixture
def watched(
    place: Path, versions: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Watch:
    """What the parent process of a Bento's server knows of a model behind a link."""
    lead(tmp_path / "current", versions["no-yes"])
    monkeypatch.setenv("AD2KIT_MODELS", f"words={tmp_path}/current")
    return Watch(this_server(place, {}, worker=False), tmp_path / "server.json")


def test_what_is_decided_is_read_again(
    watched: Watch, versions: dict[str, Path], tmp_path: Path
) -> None:
    watched.look()
    assert not watched.file.exists()  # nothing is new
    lead(tmp_path / "current", versions["bad-good"])
    watched.look()
    decided = Server.model_validate_json(watched.file.read_bytes())
    assert decided == watched.server
    assert decided.models["words"].folder == versions["bad-good"]
    assert decided.models[""].folder == tmp_path / "artifact"


def test_a_new_measurement_of_a_run_chooses_no_other_variant(finished_run: RunDir) -> None:
    chosen = Version.of(finished_run.path)
    assert chosen.folder == finished_run.onnx("steady").resolve()
    before = chosen.model_copy(update={"folder": finished_run.onnx("int8").resolve()})
    assert Version.of(finished_run.path, before).folder == before.folder
    other = before.model_copy(update={"given": finished_run.path.parent})
    assert Version.of(finished_run.path, other) == chosen


def test_a_version_that_failed_is_tried_again_after_a_while(
    watched: Watch, versions: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(versions["broken"], copy)
    lead(tmp_path / "current", copy)
    watched.look()
    reason = watched.server.refused["words"]
    assert "model.onnx" in reason
    shutil.copy(versions["down-up"] / MODEL_FILE, copy)  # the copy is complete now
    watched.look()
    assert watched.server.refused["words"] == reason
    monkeypatch.setattr("ad2kit.service.process.RETRY_S", 0.0)
    watched.look()
    assert watched.server.refused == {}
    assert watched.server.models["words"].folder == copy


def test_an_exit_code_that_another_has_collected_is_not_taken_for_a_success(
    watched: Watch, versions: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Circus collects every child of the parent process; Python then takes the code for 0."""

    def collected(*_: object) -> tuple[int, int]:
        raise ChildProcessError

    with monkeypatch.context() as patch:
        patch.setattr(os, "waitpid", collected)
        patch.setattr(Server, "check", lambda *_, **__: None)  # the trial alone finds the fault
        lead(tmp_path / "current", versions["broken"])
        watched.look()
        assert "model.onnx" in watched.server.refused["words"]
        lead(tmp_path / "current", versions["bad-good"])
        watched.look()
    assert watched.server.refused == {}
    assert watched.server.models["words"].folder == versions["bad-good"]


def test_what_a_new_version_must_keep(
    watched: Watch, versions: dict[str, Path], tmp_path: Path
) -> None:
    """The queue must hold a text of it, and its golden answers must come."""
    wrong = tmp_path / "wrong"
    shutil.copytree(versions["down-up"], wrong)
    golden = json.loads((wrong / GOLDEN_FILE).read_text())
    golden[0]["answer"]["scores"] = dict.fromkeys(golden[0]["answer"]["scores"], 0.5)
    (wrong / GOLDEN_FILE).write_text(json.dumps(golden))
    artifact = OnnxArtifact.read(wrong / OnnxArtifact.file_name)
    files = artifact.files | {GOLDEN_FILE: sha256_of(wrong / GOLDEN_FILE)}
    write_record(wrong / OnnxArtifact.file_name, artifact.model_copy(update={"files": files}))
    lead(tmp_path / "current", wrong)
    watched.look()
    assert "the golden text" in watched.server.refused["words"]
    small = watched.server.settings.model_copy(update={"max_queue_tokens": 8})
    watched.server = watched.server.model_copy(update={"settings": small})
    lead(tmp_path / "current", versions["down-up"])
    watched.look()
    assert "max_queue_tokens=8: expected at least" in watched.server.refused["words"]
    assert watched.server.models["words"].folder == versions["no-yes"]


@pytest.mark.parametrize(
    ("models", "found"),
    [
        ("words", "expected NAME=FOLDER with commas between them"),
        ("a=/x,a=/y", "stands there once"),
        ("a b=/x", "a name has letters"),
        ("a=relative", "expected an absolute path"),
    ],
)
def test_a_wrong_list_of_models_is_refused(
    models: str, found: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AD2KIT_MODELS", models)
    with pytest.raises(UserError, match=found):
        this_server(place, {}, worker=False)


def test_a_model_that_is_not_there_is_refused_at_start(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AD2KIT_MODELS", f"a={place}/nowhere")
    with pytest.raises(ModelError, match="neither a run folder nor an exported variant"):
        this_server(place, {}, worker=False)
