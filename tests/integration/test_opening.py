"""What teachers and students may come in: `check` and `distill` agree, and each advice helps.

Every folder is a tiny real model, spoilt in the way that users spoil theirs.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from ad2kit.data.demo_reviews import opinions
from ad2kit.models import pretrained, text_model
from ad2kit.models.layers import LAYER_PARTS
from ad2kit.models.pretrained import RANDOM
from ad2kit.run.errors import ModelError
from tests import families
from tests.conftest import TINY_STEPS
from tests.models import LABELS, TEXTS, batch

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.conftest import Both, Outcome

# On import transformers compiles parts of DeBERTa and ModernBERT, in a way that torch gives up.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

CASES = Path(__file__).parents[3] / "shared" / "cases"
FINISHED, TRAINED = "teacher.finetune=null", "with the recipe's teacher.finetune"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)


def edit(file: Path, **values: object) -> None:
    """Change values of a JSON file; None is written as null, and ... deletes a key."""
    found = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))


def without_tokenizer(folder: Path) -> None:
    for name in TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)


def damaged_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def without_vocabulary(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.txt").unlink(missing_ok=True)  # version 5 does not write it


def slow_only(folder: Path) -> None:
    without_tokenizer(folder)
    (folder / "vocab.txt").write_text("never 2\ndull 1\n")
    (folder / "bpe.codes").write_text("n e 2\n")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertweetTokenizer"}')


def more_tokens(folder: Path) -> None:
    tokenizer = families.tiny("bert").tokenizer
    tokenizer.add_tokens(["[PRODUCT]"])
    tokenizer.save_pretrained(folder)


def no_padding(folder: Path) -> None:
    edit(
        folder / "tokenizer_config.json", pad_token=None, tokenizer_class="PreTrainedTokenizerFast"
    )
    if (folder / "special_tokens_map.json").is_file():  # of version 4
        edit(folder / "special_tokens_map.json", pad_token=...)


def not_a_number(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def adapter(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "adapter_model.safetensors")
    for name in ("model.safetensors", "config.json"):
        (folder / name).unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "task_type": "SEQ_CLS"}')


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def config(**values: object) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", **values)


def names(*labels: str) -> Callable[[Path], None]:
    return config(id2label=dict(enumerate(labels)), label2id=dict(zip(labels, (0, 1), strict=True)))


# What may be followed to the letter: given the folder and the hint, change the folder, and return
# the overrides to add.
Cure = "Callable[[Path, str], list[str]]"


def another_encoder(folder: Path, _hint: str) -> list[str]:
    """Give an encoder of a family with tokenizer.json, and train it: without FINISHED."""
    shutil.rmtree(folder)
    families.save("roberta", folder)
    return [TRAINED]


def save_the_tokenizer(folder: Path, hint: str) -> list[str]:
    assert f"tokenizer.save_pretrained('{folder}')" in hint
    families.tiny("bert").tokenizer.save_pretrained(folder)
    return []


def resize(folder: Path, hint: str) -> list[str]:
    (wanted,) = re.findall(r"model\.resize_token_embeddings\((\d+)\)", hint)
    module = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, trust_remote_code=False
    )
    module.resize_token_embeddings(int(wanted))
    module.save_pretrained(folder)
    return []


def write_the_number(folder: Path, hint: str) -> list[str]:
    (written,) = re.findall(r'"\w+": \S+', hint)
    edit(folder / "config.json", **json.loads(f"{{{written}}}"))
    return []


def use_the_file(folder: Path, hint: str) -> list[str]:
    assert f"set tokenizer_class to PreTrainedTokenizerFast in {folder}" in hint
    edit(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    return []


def set_the_padding(folder: Path, hint: str) -> list[str]:
    assert "set tokenizer.pad_token" in hint
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer.pad_token = "[PAD]"
    tokenizer.save_pretrained(folder)
    return []


def overrides_of(_folder: Path, hint: str) -> list[str]:
    """Type what the hint says."""
    return re.findall(r"'(data\.labels=.*)', or", hint)


def set_the_length(_folder: Path, hint: str) -> list[str]:
    (most,) = re.findall(r"set data\.max_length_tokens to (\d+)", hint)
    return [f"data.max_length_tokens={most}"]


def rename(folder: Path, hint: str) -> list[str]:
    assert f"in id2label of {folder / 'config.json'}" in hint
    names(*LABELS)(folder)
    return []


def config_of_the_weights(folder: Path, hint: str) -> list[str]:
    assert "give config.json and model.safetensors of the same model" in hint
    families.tiny("bert").module.config.save_pretrained(folder)
    return []


def train_a_head(_folder: Path, hint: str) -> list[str]:
    assert "teacher.finetune" in hint
    return [TRAINED]


def delete_the_kind(folder: Path, hint: str) -> list[str]:
    assert "delete problem_type" in hint
    edit(folder / "config.json", problem_type=...)
    return []


class Kind(NamedTuple):
    spoil: Callable[[Path], None]
    message: str
    cure: Callable[[Path, str], list[str]] | None
    family: str = "bert"
    overrides: tuple[str, ...] = ()


def dropout(value: object, words: str) -> Kind:
    return Kind(
        config(hidden_dropout_prob=value),
        f"config.json: hidden_dropout_prob is {words}, expected a number",
        write_the_number,
    )


def too_long(family: str, tokens: int, most: int, **values: object) -> Kind:
    return Kind(
        config(**values),
        f"data.max_length_tokens is {tokens}, but the model has positions for {most} tokens",
        set_the_length,
        family,
        (f"data.max_length_tokens={tokens}",),
    )


REFUSED = {
    "slow tokenizer": Kind(
        slow_only, "BertweetTokenizer, has no fast form", another_encoder, "roberta"
    ),
    "slow tokenizer beside tokenizer.json": Kind(
        lambda folder: edit(folder / "tokenizer_config.json", tokenizer_class="BertweetTokenizer"),
        "BertweetTokenizer, has no fast form",
        use_the_file,
    ),
    "no tokenizer": Kind(without_tokenizer, "holds no tokenizer", save_the_tokenizer),
    "no vocabulary": Kind(
        without_vocabulary,
        "holds no tokenizer: expected tokenizer.json, found config.json, model.safetensors",
        save_the_tokenizer,
    ),
    "damaged tokenizer": Kind(
        damaged_tokenizer,
        "holds no tokenizer that transformers can read",
        save_the_tokenizer,
    ),
    "no padding token": Kind(no_padding, "has no padding token", set_the_padding),
    "tokens without embeddings": Kind(more_tokens, "no embedding for '[PRODUCT]'", resize),
    **{
        family: Kind(
            config(model_type=family), f"model_type '{family}' is not supported", another_encoder
        )
        for family in ("xlnet", "gpt2", "bart", "longformer", "mobilebert", "big_bird", "deberta")
    },
    "no family": Kind(config(model_type=...), "it names no model_type", another_encoder),
    "adapter": Kind(adapter, "is a PEFT adapter", None),
    "pickled weights": Kind(pickled, "only pytorch_model.bin, which may run code", None),
    "null dropout": dropout(None, "null"),
    "dropout as text": dropout("0.1", '"0.1"'),
    "null heads": Kind(
        config(num_attention_heads=None), "config.json: num_attention_heads is null", None
    ),
    "null padding": Kind(
        config(pad_token_id=None), "config.json: pad_token_id is null", write_the_number
    ),
    "null epsilon of another family": Kind(
        config(layer_norm_eps=None),
        "config.json: layer_norm_eps is null",
        write_the_number,
        "deberta-v2",
    ),
    "a width that the heads do not divide": Kind(
        config(num_attention_heads=5), "is not a text classifier that transformers can load", None
    ),
    "an activation that nobody knows": Kind(
        config(hidden_act="nonsense"), "is not a text classifier that transformers can load", None
    ),
    "fewer layers than weights": Kind(
        config(num_hidden_layers=2),
        "tensors of layers that the 'bert' of its config.json does",
        config_of_the_weights,
    ),
    "another width": Kind(
        config(intermediate_size=32),
        "expected bert.encoder.layer.0.intermediate.dense.bias of shape [32], found another",
        config_of_the_weights,
    ),
    "a logit that is no number": Kind(
        not_a_number, "teacher.model: expected 2 finite logits for each text", None
    ),
    "labels in another order": Kind(
        names("POSITIVE", "negative"), "the teacher's labels differ from the data's", overrides_of
    ),
    "labels of other names": Kind(
        names("bad", "good"), "the teacher's labels differ from the data's", rename
    ),
    "labels of other names, head trained": Kind(
        names("bad", "good"), "the teacher's labels differ from the data's", train_a_head
    ),
    "another task": Kind(
        config(problem_type="multi_label_classification"),
        "says problem_type multi_label_classification, but data.task is single_label",
        delete_the_kind,
    ),
    "another task, head trained": Kind(
        config(problem_type="multi_label_classification"),
        "says problem_type multi_label_classification, but data.task is single_label",
        train_a_head,
    ),
    "a task that is written wrongly": Kind(
        config(problem_type="regression"), "says problem_type regression", delete_the_kind
    ),
    "too long for bert": too_long("bert", 49, 48),
    "too long for roberta": too_long("roberta", 49, 48),
    "too long for roberta with another padding": too_long("roberta", 50, 49, pad_token_id=0),
    "too long for camembert": too_long("camembert", 50, 48),
    "too long for mpnet": too_long("mpnet", 49, 48),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_distill_refuses_check_refuses_and_the_advice_helps(
    both: Callable[..., Both], ad2kit: Callable[..., Outcome], tmp_path: Path, kind: str
) -> None:
    spoil, message, cure, family, overrides = REFUSED[kind]
    folder = families.save(family, tmp_path / "teacher")
    spoil(folder)
    refused = both(FINISHED, *overrides)
    assert refused.code == 2
    assert message in refused.err
    if cure is None:
        assert refused.hint.strip()
        return
    more = [*overrides, *cure(folder, refused.hint)]
    if TRAINED in more:
        more.remove(TRAINED)
    else:
        more.append(FINISHED)
    helped = ad2kit("check", "smoke", *TINY_STEPS, f"teacher.model={folder}", *more)
    assert helped.code == 0, helped.err


@pytest.mark.parametrize("family", families.FAMILIES)
def test_each_family_is_let_in(both: Callable[..., Both], tmp_path: Path, family: str) -> None:
    families.save(family, tmp_path / "teacher")
    assert both(FINISHED).code == 0


def test_the_families_are_those_of_the_guide_and_of_the_tests() -> None:
    guide = (Path(__file__).parents[2] / "docs/guides/teacher.md").read_text()
    (listed,) = re.findall(r"one of these families: (BERT, RoBERTa, [^.]*?)\.", guide)
    said = re.split(r",\s+|\s+or\s+", listed)
    assert len(said) == len(pretrained.FAMILIES)
    assert set(pretrained.FAMILIES) == set(families.FAMILIES) == set(LAYER_PARTS)


def write_rows(folder: Path, classes: tuple[str, str]) -> list[str]:
    """Write rows with these names of the classes, and return the overrides that read them."""
    corpus, made = opinions(0, train_rows=80, validation_rows=20), folder / "data"
    made.mkdir()
    for name in ("train", "validation"):
        lines = [f"{text}\t{classes[label]}" for text, label in getattr(corpus, name)]
        (made / f"{name}.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n")
    return [FINISHED, f"data.source={made}"]


def test_the_task_that_a_teacher_was_trained_for_may_be_set(
    both: Callable[..., Both], tmp_path: Path
) -> None:
    rows = write_rows(tmp_path, LABELS)
    config(problem_type="multi_label_classification")(families.save("bert", tmp_path / "teacher"))
    refused = both(*rows)
    (task,) = re.findall(r"set (data\.task=\w+) if the rows are labelled so", refused.hint)
    assert both(*rows, task).code == 0


def test_ids_in_the_rows_get_the_names_of_the_teacher(
    both: Callable[..., Both], tmp_path: Path
) -> None:
    rows = write_rows(tmp_path, ("0", "1"))
    families.save("bert", tmp_path / "teacher")
    refused = both(*rows)
    assert "the teacher's labels differ from the data's" in refused.err
    assert both(*rows, *overrides_of(tmp_path, refused.hint)).code == 0


def test_names_are_compared_without_regard_to_case(
    both: Callable[..., Both], tmp_path: Path
) -> None:
    names("NEGATIVE", "Positive ")(families.save("bert", tmp_path / "teacher"))
    assert both(FINISHED).code == 0
    loaded = text_model.load_model(tmp_path / "teacher", LABELS)
    assert loaded.module.config.id2label == dict(enumerate(LABELS))
    with pytest.raises(ModelError, match="labels differ"):  # two differ in nothing else
        text_model.load_model(tmp_path / "teacher", ("negative", "NEGATIVE"))


def one_output(
    folder: Path, family: str, name: str, kind: str | None = None
) -> text_model.TextModel:
    """Keep the second output of a tiny classifier alone; return what it was."""
    model = families.tiny(family)
    head = next(
        part
        for part in model.module.modules()
        if isinstance(part, torch.nn.Linear) and part.out_features == 2
    )
    with torch.no_grad():
        for parameter in head.parameters():
            parameter[0] = 0
    model.module.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for key, value in weights.items():
        if re.search(r"(^|\.)(classifier|out_proj)\.\w+$", key) and len(value) == 2:
            weights[key] = value[1:].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder / "config.json", id2label={"0": name}, label2id={name: 0}, problem_type=kind or ...)
    return model


@pytest.mark.parametrize("family", families.FAMILIES)
def test_one_sigmoid_is_two_classes_exactly(family: str, tmp_path: Path) -> None:
    model = one_output(tmp_path / "model", family, "LABEL_0")
    inputs = batch(model).inputs
    loaded = text_model.load_model(tmp_path / "model", LABELS, order_given=True)
    with torch.no_grad():
        expected = model.module(**inputs).logits
        found = loaded.module.eval()(**inputs).logits
        assert torch.equal(found, expected)
        assert (expected[:, 0] == 0).all()
        torch.testing.assert_close(found.softmax(-1)[:, 1], expected[:, 1].sigmoid())
    assert loaded.module.config.id2label == dict(enumerate(LABELS))
    text_model.save(loaded, tmp_path / "again", inputs="")
    again = text_model.load_model(tmp_path / "again", LABELS, order_given=True)
    with torch.no_grad():
        assert torch.equal(again.module.eval()(**inputs).logits, expected)


@pytest.mark.parametrize(
    ("name", "kind", "first"),
    [
        ("LABEL_0", None, False),
        ("LABEL_0", "multi_label_classification", False),
        ("Positive", None, False),
        ("negative", None, True),  # the output is that of the first label
    ],
)
def test_a_teacher_of_one_sigmoid_is_distilled(
    both: Callable[..., Both], tmp_path: Path, name: str, kind: str | None, first: bool
) -> None:
    model = one_output(tmp_path / "teacher", "bert", name, kind)
    assert both(FINISHED, "data.labels=[negative,positive]").code == 0
    loaded = text_model.load_model(tmp_path / "teacher", LABELS, order_given=True)
    inputs = batch(model).inputs
    with torch.no_grad():
        expected = model.module(**inputs).logits
        found = loaded.module.eval()(**inputs).logits
    assert torch.equal(found, expected.flip(1) if first else expected)


def test_a_sigmoid_that_is_called_0_is_that_of_class_1(tmp_path: Path) -> None:
    for name in ("0", "LABEL_0"):
        model = one_output(tmp_path / name, "bert", name)
        inputs = batch(model).inputs
        with torch.no_grad():
            found = (
                text_model.load_model(tmp_path / name, ("0", "1")).module.eval()(**inputs).logits
            )
            assert torch.equal(found, model.module(**inputs).logits)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("LABEL_0", "regression", "says problem_type regression, but data.task is single_label"),
        ("score", None, "the teacher's labels differ from the data's"),
    ],
)
def test_one_output_that_is_no_sigmoid_of_a_label_is_refused(
    both: Callable[..., Both], tmp_path: Path, name: str, kind: str | None, message: str
) -> None:
    one_output(tmp_path / "teacher", "bert", name, kind)
    assert message in both(FINISHED).err


@pytest.mark.parametrize("place", ["config.json", "tokenizer_config.json"])
def test_the_code_of_a_folder_is_never_run(
    both: Callable[..., Both], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    folder = families.save("bert", tmp_path / "teacher")
    (folder / "my.py").write_text(
        "import transformers, pathlib\n"
        f"pathlib.Path({str(tmp_path / 'ran')!r}).write_text('')\n"
        "class MyConfig(transformers.BertConfig): model_type = 'mine'\n"
        "class MyModel(transformers.BertForSequenceClassification): config_class = MyConfig\n"
        "class MyTokenizer(transformers.BertTokenizerFast): pass\n"
    )
    if place == "config.json":
        auto: dict[str, object] = {
            "AutoConfig": "my.MyConfig",
            "AutoModelForSequenceClassification": "my.MyModel",
        }
        edit(folder / place, model_type="mine", auto_map=auto)
    else:
        auto = {"AutoTokenizer": [None, "my.MyTokenizer"]}
        edit(folder / place, auto_map=auto, tokenizer_class="MyTokenizer")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"y\n" * 9)))
    refused = both(FINISHED)
    assert refused.code == 2
    assert f"holds custom code (auto_map in {place}), which ad2kit does not run" in refused.err
    assert not (tmp_path / "ran").exists()
    if place == "config.json":  # its layers are those of a supported family: do as it says
        assert "delete auto_map" in refused.hint
        edit(folder / place, auto_map=..., model_type="bert")
    else:
        assert "delete auto_map" in refused.hint
        edit(folder / place, auto_map=..., tokenizer_class="PreTrainedTokenizerFast")
    assert both(FINISHED).code == 0
    assert not (tmp_path / "ran").exists()


def test_a_vocabulary_of_sentencepiece_needs_the_package(
    both: Callable[..., Both], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = families.save("deberta-v2", tmp_path / "teacher")
    without_tokenizer(folder)
    (folder / "spm.model").write_bytes(b"")
    with monkeypatch.context() as absent:
        absent.setattr(pretrained, "is_sentencepiece_available", lambda: False)
        refused = both(FINISHED)
    assert "has no tokenizer.json, and sentencepiece to make it from spm.model" in refused.err
    assert refused.hint.strip() == "pip install sentencepiece"
    sentencepiece = pytest.importorskip("sentencepiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(families.WORDS),
        model_prefix=str(folder / "spm"),
        vocab_size=100,
        pad_id=0,
        unk_id=3,
        bos_id=1,
        eos_id=2,
        pad_piece="[PAD]",
        bos_piece="[CLS]",
        eos_piece="[SEP]",
        unk_piece="[UNK]",
        minloglevel=2,
    )
    assert both(FINISHED).code == 0


@pytest.mark.parametrize("kind", ["gpt2", "no tokenizer", "null dropout", "adapter"])
def test_a_model_to_start_the_student_from_is_looked_at_before_the_teacher_learns(
    both: Callable[..., Both], tmp_path: Path, kind: str
) -> None:
    folder = families.save("bert", tmp_path / "student")
    REFUSED[kind].spoil(folder)
    refused = both(f"student.model={folder}", teacher=RANDOM)
    assert refused.code == 2
    assert REFUSED[kind].message in refused.err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["student.layers=[7]"], "of the 'bert' to copy from are 0 to 3"),
        (["student.feed_forward=999"], "student.feed_forward is 999"),
        (["data.max_length_tokens=129"], "has positions for 128 tokens"),
        (["student.model=STUDENT", "data.max_length_tokens=49"], "has positions for 48 tokens"),
        (
            ["student.model=STUDENT", "distill.intermediate.hidden_states=1"],
            "the student has a tokenizer of its own",
        ),
        (["distill.intermediate.pkd=1"], "the student has none"),
        (
            ["student.model=SHARED", "compute.gradient_checkpointing=true"],
            "compute.gradient_checkpointing: 'albert' does not support it",
        ),
        (["student.model=SHARED", "compute.compile=true"], "of a 'albert' share their weights"),
    ],
)
def test_what_teacher_and_student_cannot_do_is_said_before_the_teacher_learns(
    both: Callable[..., Both], tmp_path: Path, overrides: list[str], message: str
) -> None:
    places = {"STUDENT": "roberta", "SHARED": "albert"}
    for place, family in places.items():
        if any(place in override for override in overrides):
            families.save(family, tmp_path / family)
            overrides = [each.replace(place, str(tmp_path / family)) for each in overrides]
    refused = both(*overrides, teacher=RANDOM)
    assert refused.code == 2
    assert message in refused.err


def test_a_head_of_another_size_gives_way_to_one_that_is_trained(
    both: Callable[..., Both], tmp_path: Path
) -> None:
    folder = families.save("bert", tmp_path / "teacher")
    weights = load_file(folder / "model.safetensors")
    for key in ("classifier.weight", "classifier.bias"):
        weights[key] = torch.cat([weights[key], weights[key][:1]])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit(
        folder / "config.json", id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2}
    )
    assert both().code == 0
    one, two = (
        text_model.load_model(folder, LABELS, seed=5, finished=False).module for _ in range(2)
    )
    assert one.state_dict()["classifier.weight"].shape == (2, families.WIDTH)
    for key, value in one.state_dict().items():
        assert torch.equal(two.state_dict()[key], value)
        if not key.startswith("classifier"):
            assert torch.equal(weights[key], value)


def test_segments_that_the_model_does_not_have_are_named_before_training(tmp_path: Path) -> None:
    folder = families.save("bert", tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    key = "bert.embeddings.token_type_embeddings.weight"
    save_file(
        weights | {key: weights[key][:1].clone()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    edit(folder / "config.json", type_vocab_size=1)
    model = text_model.load_model(folder, LABELS)
    model.module.train()
    text_model.try_out(model, [(text,) for text in TEXTS[:2]], 48, key="teacher.model")
    assert model.module.training
    with pytest.raises(ModelError, match="cannot read the first training texts: IndexError"):
        text_model.try_out(model, [(text, text) for text in TEXTS[:2]], 48, key="teacher.model")


# The folder, its overrides, and the words that name the cause; None where it is let in.
FOLDERS = [
    ("07-slow-tokenizer-only", [], "has no fast form"),
    ("08-no-tokenizer-files", [], "tokenizer.save_pretrained('teacher')"),
    ("09-deberta-spm-only", [], "pip install sentencepiece"),
    ("10-tokens-without-embeddings", [], "resize_token_embeddings"),
    ("11-unsupported-families", ["teacher.model=xlnet"], "model_type 'xlnet' is not supported"),
    ("11-unsupported-families", ["teacher.model=gpt2"], "model_type 'gpt2' is not supported"),
    ("11-unsupported-families", ["teacher.model=bart"], "model_type 'bart' is not supported"),
    ("13-custom-code-prompt", [], "holds custom code"),
    ("20-one-sigmoid-output", [], None),
    ("21-adapter-folder", [], "merge_and_unload()"),
    ("23-label-case-dead-end", [], None),
    ("29-dropout-null", [], "teacher/config.json: hidden_dropout_prob is null"),
]


@pytest.mark.skipif(not CASES.is_dir(), reason="the folders of cases are not on this machine")
@pytest.mark.parametrize(("name", "overrides", "cause"), FOLDERS)
def test_the_folders_of_users(
    both: Callable[..., Both],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    overrides: list[str],
    cause: str | None,
) -> None:
    monkeypatch.chdir(CASES / name)
    monkeypatch.setattr(pretrained, "is_sentencepiece_available", lambda: False)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"y\n" * 9)))
    said = both(FINISHED, *overrides, teacher="teacher", recipe="../tiny.yaml")
    assert said.code == (0 if cause is None else 2)
    assert cause is None or cause in said.err
