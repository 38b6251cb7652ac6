"""Teachers that transformers 4 or 5 saved answer as they did, or are refused with the key named.

The folders and the logits in them are made by :mod:`tests.teachers`, with the version that saved
them and without ad2kit. They are read here with the version that is installed.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from ad2kit.data.demo_reviews import opinions
from ad2kit.data.splits import Split, encode
from ad2kit.exporting.tokenise import Tokenise, tokenisation, write_tokenizer
from ad2kit.models import text_model, translate
from ad2kit.models.text_model import load_model, predict_logits
from ad2kit.run.errors import ModelError
from ad2kit.run.sections import TextLength
from tests import teachers
from tests.models import LABELS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from ad2kit.models.text_model import TextModel
    from tests.conftest import Both

pytestmark = [
    pytest.mark.transformers5,
    # On import transformers compiles parts of DeBERTa and ModernBERT, in a way that torch gives up.
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
]

# For each version that runs: what it cannot express, and the key that the refusal names.
INEXPRESSIBLE = {
    4: {"modernbert-irregular": "layer_types", "modernbert-scaled": "rope_parameters"},
    5: {"bert-relative": "position_embedding_type"},
}[translate.RUNNING]
OTHER = {4: "5", 5: "4"}[translate.RUNNING]
# For each version that runs: what it reads of the other one, and reads wrongly.
MISREAD = {
    4: ("modernbert-thetas", "modernbert-layers", "albert"),
    5: ("albert", "bert-generic", "xlm-roberta", "deberta-v2"),
}[translate.RUNNING]
READINGS: dict[str, list[tuple[str, ...]]] = {
    "single": [(text,) for text in teachers.SINGLE],
    "pair": [*teachers.PAIR],
}
each_teacher = pytest.mark.parametrize("name", teachers.names())


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return teachers.unpack(tmp_path_factory.mktemp("teachers"))


def gaps(folder: Path, model: TextModel) -> dict[str, float]:
    """The largest distance of a model's logits from those that its folder says, by reading."""
    said = json.loads((folder / "answers.json").read_text())
    found = {}
    for reading, texts in READINGS.items():
        split = Split.of(tuple(texts), np.zeros(len(texts), np.int64))
        encoded = encode(split, model.tokenizer, TextLength(teachers.LENGTH))
        logits = predict_logits(model, encoded, torch.device("cpu"))
        found[reading] = (logits - torch.tensor(said[reading])).abs().max().item()
    return found


def key_of(name: str) -> str | None:
    return INEXPRESSIBLE.get(name.partition("/")[2])


@each_teacher
def test_a_teacher_of_any_version_answers_as_it_did(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    folder = folders[name]
    if (key := key_of(name)) is not None:
        with pytest.raises(ModelError, match=rf"config\.json: .*{key}") as refused:
            load_model(folder, LABELS)
        assert f"transformers {OTHER}" in refused.value.hint
        return
    said = json.loads((folder / "answers.json").read_text())
    assert all(torch.tensor(said[reading]).std(dim=0).min() > 0.1 for reading in READINGS)
    model = load_model(folder, LABELS)
    assert max(gaps(folder, model).values()) < 1e-5
    # So does what this version saves, and what a service reads.
    text_model.save(model, tmp_path / "saved", inputs="")
    assert max(gaps(folder, load_model(tmp_path / "saved", LABELS)).values()) < 1e-5
    write_tokenizer(model.tokenizer, tmp_path)
    for columns, texts in enumerate(READINGS.values(), start=1):
        backend = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        settings = tokenisation(model.tokenizer)
        tokens = Tokenise(backend, settings, TextLength(teachers.LENGTH), columns)(texts)
        split = Split.of(tuple(texts), np.zeros(len(texts), np.int64))
        encoded = encode(split, model.tokenizer, TextLength(teachers.LENGTH))
        assert [each.ids for each in tokens] == [list(ids) for ids in encoded.input_ids]


@pytest.mark.slow
@each_teacher
def test_check_agrees_with_distill(
    both: Callable[..., Both], name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    corpus = opinions(0, train_rows=80, validation_rows=20)
    source = tmp_path / "data"
    source.mkdir()
    for split in ("train", "validation"):
        rows = [f"{text}\tfine\t{LABELS[label]}" for text, label in getattr(corpus, split)]
        (source / f"{split}.tsv").write_text("\n".join(["a\tb\tlabel", *rows]) + "\n")
    said = both(
        "teacher.finetune=null",
        "teacher.accept=true",
        f"data.source={source}",
        "data.text_columns=[a,b]",
        f"data.labels=[{','.join(LABELS)}]",
        teacher=str(folders[name]),
    )
    key = key_of(name)
    assert said.code == (0 if key is None else 2), said.err
    assert key is None or key in said.err


def the_other_version_saved(*cases: str) -> list[str]:
    (version,) = (each for each in teachers.versions() if each.startswith(OTHER))
    return [f"{version}/{case}" for case in cases]


@pytest.mark.parametrize(
    "name",
    the_other_version_saved(*MISREAD),
)
def test_without_the_translation_they_do_not(
    name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: what the matrix would find if the door let folders through as they are."""
    monkeypatch.setattr(translate, "translated", lambda _path, config: config)
    monkeypatch.setattr(translate, "tokenizer_arguments", lambda *_: {})
    monkeypatch.setattr(translate, "as_in_4", lambda _folder, tokenizer: tokenizer)
    found = gaps(folders[name], load_model(folders[name], LABELS))
    assert max(found.values()) > 1e-2


def edited(folder: Path, name: str, **values: object) -> Path:
    """Change values of a JSON file of a folder; ... deletes a key."""
    found = json.loads((folder / name).read_text()) | values
    kept = {key: value for key, value in found.items() if value is not ...}
    (folder / name).write_text(json.dumps(kept))
    return folder


@pytest.fixture
def modernbert(tmp_path: Path) -> Path:
    """A ModernBERT that version 5 saved, to be changed."""
    (version,) = (each for each in teachers.versions() if each.startswith("5"))
    return teachers.unpack(tmp_path)[f"{version}/modernbert-layers"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"transformers_version": "6.1.0"}, "transformers_version is '6.1.0'"),
        ({"transformers_version": "latest"}, "transformers_version is 'latest'"),
    ],
)
def test_a_version_that_nobody_knows_is_refused(
    modernbert: Path, values: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ModelError, match=re.escape(expected)):
        load_model(edited(modernbert, "config.json", **values), LABELS)


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.skipif(translate.RUNNING != 4, reason="version 5 reads these itself")
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"layer_types": [FULL, SLIDING]}, "cannot express layer_types"),
        ({"layer_types": [FULL, "chunked", FULL, "chunked"]}, "cannot express layer_types"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters has 'rope_theta'"),
        (
            {"rope_parameters": {FULL: {"rope_theta": 5.0, "partial_rotary_factor": 0.5}}},
            "cannot express rope_parameters of full_attention",
        ),
    ],
)
def test_what_a_modernbert_of_version_4_does_not_have_is_refused(
    modernbert: Path, values: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ModelError, match=expected):
        load_model(edited(modernbert, "config.json", **values), LABELS)


def test_a_configuration_without_a_version_is_known_by_its_keys(modernbert: Path) -> None:
    edited(modernbert, "config.json", transformers_version=...)
    assert max(gaps(modernbert, load_model(modernbert, LABELS)).values()) < 1e-5


@pytest.mark.parametrize(
    ("pattern", "every"),
    [("F", 1), ("FF", 1), ("FsFs", 2), ("FssF", 3), ("Fss", 3), ("s", None), ("FsFF", None)],
)
def test_the_period_of_a_pattern(pattern: str, every: int | None) -> None:
    assert translate.period([letter == "F" for letter in pattern]) == every


def test_what_version_4_had_ignored_is_ignored(tmp_path: Path) -> None:
    """Version 4 reads a folder of version 5, ignores these keys, trains, and saves them again."""
    (version,) = (each for each in teachers.versions() if each.startswith("4"))
    folder = teachers.unpack(tmp_path)[f"{version}/modernbert-layers"]
    theta = {"rope_theta": 7.0, "rope_type": "default"}
    edited(
        folder,
        "config.json",
        layer_types=[SLIDING] * 4,
        rope_parameters={FULL: theta, SLIDING: theta},
    )
    assert max(gaps(folder, load_model(folder, LABELS)).values()) < 1e-5
