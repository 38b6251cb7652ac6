"""Teachers and students: what is loaded, derived and refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from ad2kit.models import pretrained, text_model
from ad2kit.run.errors import ModelError
from ad2kit.training.students import build_student
from tests.models import LABELS, batch, split, tiny_bert

if TYPE_CHECKING:
    from pathlib import Path


def test_the_student_is_the_chosen_layers_of_the_teacher() -> None:
    teacher = tiny_bert()
    student = build_student(teacher, [3, 1])
    theirs, ours = teacher.module.state_dict(), student.module.state_dict()
    for new, old in enumerate((3, 1)):
        for key in (k for k in ours if f"layer.{new}." in k):
            assert torch.equal(ours[key], theirs[key.replace(f"layer.{new}.", f"layer.{old}.")])
    for key in ("bert.embeddings.word_embeddings.weight", "classifier.weight"):
        assert torch.equal(ours[key], theirs[key])
    assert student.module.config.num_hidden_layers == 2
    assert teacher.module.config.num_hidden_layers == 4
    # A copy: training the student must not move the teacher.
    assert ours["classifier.weight"].data_ptr() != theirs["classifier.weight"].data_ptr()


def test_all_layers_make_the_teacher_again() -> None:
    teacher = tiny_bert()
    student = build_student(teacher, [0, 1, 2, 3])
    inputs = batch(teacher).inputs
    teacher.module.eval()
    student.module.eval()
    with torch.no_grad():
        assert torch.equal(student.module(**inputs).logits, teacher.module(**inputs).logits)


def test_a_layer_that_the_teacher_lacks_is_refused() -> None:
    with pytest.raises(ModelError, match=r"layer 4, but the layers of the 'bert' .* are 0 to 3"):
        build_student(tiny_bert(), [1, 4])


def albert(groups: int) -> text_model.TextModel:
    config = transformers.AlbertConfig(
        vocab_size=40,
        embedding_size=8,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        num_hidden_groups=groups,
    )
    module: Any = transformers.AlbertForSequenceClassification(config)
    return text_model.TextModel(module, tiny_bert().tokenizer, LABELS)


def test_a_student_of_shared_layers_keeps_them_and_uses_them_less() -> None:
    teacher = albert(groups=1)
    student = build_student(teacher, [0, 1])
    assert student.parameters() == teacher.parameters()
    assert student.module.config.num_hidden_layers == 2
    inputs = {"input_ids": torch.arange(8)[None]}
    teacher.module.eval()
    student.module.eval()
    with torch.no_grad():
        states = teacher.module(**inputs, output_hidden_states=True).hidden_states
        found = student.module(**inputs, output_hidden_states=True).hidden_states
    assert torch.equal(found[2], states[2])


def test_layers_that_share_weights_in_groups_are_refused_by_name() -> None:
    with pytest.raises(ModelError, match="the layers of a 'albert' cannot be told apart"):
        build_student(albert(groups=2), [0])


def test_save_and_load_is_exact(tmp_path: Path) -> None:
    model = tiny_bert()
    text_model.save(model, tmp_path / "model", inputs="abc")
    again = text_model.load_model(tmp_path / "model", LABELS)
    assert text_model.saved_inputs(tmp_path / "model") == "abc"
    for key, value in model.module.state_dict().items():
        assert torch.equal(again.module.state_dict()[key], value)
    assert again.tokenizer("never dull").input_ids == model.tokenizer("never dull").input_ids


def saved(path: Path) -> Path:
    text_model.save(tiny_bert(), path / "model", inputs="x")
    return path / "model"


def test_a_tampered_model_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match="is not the file that was written: sha256 expected"):
        text_model.load_model(folder, LABELS)


def test_a_truncated_model_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ModelError, match="is damaged"):
        text_model.load_model(folder, LABELS)


def test_pickled_weights_are_refused_and_said_to_be(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no weights at all"):
        text_model.load_model(folder, LABELS)
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"only pytorch_model\.bin, which may run code") as caught:
        text_model.load_model(folder, LABELS)
    assert "safe_serialization=True" in caught.value.hint


def test_a_finished_teacher_needs_its_head_and_the_same_labels(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / text_model.MANIFEST).unlink()
    with pytest.raises(ModelError, match="labels differ from the data's") as caught:
        text_model.load_model(folder, ("positive", "negative"))
    assert "{0: 'negative', 1: 'positive'}" in caught.value.message
    assert "{0: 'positive', 1: 'negative'}" in caught.value.message
    # The encoder alone: fit to fine-tune, not to distil from.
    tiny_bert().module.bert.save_pretrained(folder)  # type: ignore[operator, union-attr]
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = dict(enumerate(LABELS))
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="does not hold a whole classifier"):
        text_model.load_model(folder, LABELS)
    assert text_model.load_model(folder, LABELS, finished=False).labels == LABELS


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / text_model.MANIFEST).unlink()
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 6
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="does not hold a whole encoder: 32 tensors are missing"):
        text_model.load_model(folder, LABELS, finished=False)


def test_a_maximum_length_beyond_the_positions_is_refused() -> None:
    with pytest.raises(ModelError, match="has positions for 128 tokens"):
        text_model.check_length(tiny_bert(), 129, key="data.max_length_tokens")
    text_model.check_length(tiny_bert(), 128, key="data.max_length_tokens")


@pytest.mark.parametrize(
    ("reference", "expected", "hint"),
    [
        ("nowhere", "no folder 'nowhere'", "hub://nowhere"),
        ("package://not_there/model", "'not_there' is not installed", "pip install not-there"),
        ("s3://x", "expected a folder, hub://", "teacher.model"),
        ("hub://google-bert/bert-base-uncased", "cannot load the model", "package://"),
    ],
)
def test_a_teacher_that_is_not_there(reference: str, expected: str, hint: str) -> None:
    with pytest.raises(ModelError, match=expected) as caught:
        pretrained.find_model(reference)
    assert hint in caught.value.hint


def test_the_head_depends_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = tiny_bert(seed=5)
    torch.manual_seed(2)
    two, other = tiny_bert(seed=5), tiny_bert(seed=6)
    key = "classifier.weight"
    assert torch.equal(one.module.state_dict()[key], two.module.state_dict()[key])
    assert not torch.equal(one.module.state_dict()[key], other.module.state_dict()[key])
    assert len(split()) == len(split().labels)
