"""Narrower layers: what is ranked, what is cut, and that nothing else changes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import pytest
import torch

from ad2kit.data.labels import no_labels
from ad2kit.exporting.export import export_fp32, exporter
from ad2kit.exporting.fuse import fuse, node_counts
from ad2kit.exporting.int8 import Way, quantize
from ad2kit.models import text_model
from ad2kit.models.layers import LAYER_PARTS, layers_of
from ad2kit.run.errors import ModelError, RecipeError
from ad2kit.run.machine import cpu_flags, dot_products
from ad2kit.run.recipe import load_recipe
from ad2kit.run.sections import StudentRecipe
from ad2kit.statistics.logits import answers
from ad2kit.training import students
from ad2kit.training.losses import supervised
from ad2kit.training.students import build_student
from tests import families
from tests.models import LABELS, TEXTS, batch, cpu, encoded, split, tiny_bert

if TYPE_CHECKING:
    from pathlib import Path

    from ad2kit.models.text_model import TextModel
    from ad2kit.run.sections import Task

# On import transformers compiles parts of DeBERTa and ModernBERT, in a way that torch gives up.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

each_family = pytest.mark.parametrize("family", list(families.FAMILIES))
HEADLESS = ("mpnet", "deberta-v2", "modernbert")
NEURONS = 64


@torch.no_grad()
def forward(model: TextModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    logits: torch.Tensor = model.module.eval()(**inputs).logits
    return logits


def silenced(model: TextModel, name: str, kept: list[list[int]], units: int) -> TextModel:
    """The model with zeros in place of what the other units compute: a mask, and no cut."""
    for layer, stay in zip(layers_of(model.module), kept, strict=True):
        mask = torch.zeros(len(TEXTS), units)
        mask[:, stay] = 1.0
        layer.get_submodule(name).register_forward_pre_hook(students._multiply(mask))
    return model


def ranked(teacher: TextModel, kind: str, count: int, layers: int) -> list[list[int]]:
    """The units of the first so many layers that matter most."""
    scores = getattr(students.importance(teacher, encoded(teacher), cpu()), kind)
    return students.most_important(scores[:layers], count)


def cut(family: str, kind: str) -> tuple[TextModel, TextModel]:
    """A student of two layers without half of its heads or neurons, and one that has them mute."""
    teacher = families.tiny(family)
    student, whole = build_student(teacher, [0, 1]), build_student(teacher, [0, 1])
    names, layers = LAYER_PARTS[family], len(layers_of(student.module))
    keep, out, units = {
        "heads": (students.keep_heads, names.heads_out, families.HEADS),
        "neurons": (students.keep_neurons, names.down, NEURONS),
    }[kind]
    kept = ranked(teacher, kind, units // 2, layers)
    keep(student, kept)
    return student, silenced(whole, str(out), kept, units)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *((family, "neurons") for family in families.FAMILIES),
        *((family, "heads") for family in families.FAMILIES if family not in HEADLESS),
    ],
)
def test_what_is_cut_computes_what_it_would_with_zeros_in_its_place(family: str, kind: str) -> None:
    student, mute = cut(family, kind)
    inputs = batch(student).inputs
    assert (forward(student, inputs) - forward(mute, inputs)).abs().max() < 2e-6
    full = build_student(families.tiny(family), [0, 1])
    # Or the cut would have cost nothing to be equal to.
    assert (forward(student, inputs) - forward(full, inputs)).abs().max() > 1e-3
    layers = len(layers_of(student.module))
    units, width = (2, families.WIDTH // families.HEADS) if kind == "heads" else (32, 1)
    # Of queries, keys and values the weights and biases, of the projection back the weights.
    each = (3 * (families.WIDTH + 1) + families.WIDTH) * width
    if kind == "neurons":
        each = families.WIDTH + 1 + families.WIDTH
        if family == "modernbert":  # without biases, and with a gate
            each = 3 * families.WIDTH
    assert full.parameters() - student.parameters() == layers * units * each


@pytest.mark.slow
@pytest.mark.transformers5
@each_family
def test_a_narrow_student_is_saved_loaded_exported_fused_and_quantised(
    family: str, tmp_path: Path
) -> None:
    teacher = families.tiny(family)
    heads = None if family in HEADLESS else 3
    settings = StudentRecipe(layers=(0, 3), attention_heads=heads, feed_forward=20)
    student = build_student(teacher, [0, 3])
    students.narrow(student, teacher, settings, lambda: encoded(teacher), cpu())
    text_model.save(student, tmp_path / "student", inputs="")
    again = text_model.load_model(tmp_path / "student", LABELS)
    assert students.widths(again)[1] == 20
    assert again.parameters() == student.parameters()
    inputs = batch(student).inputs
    expected = forward(student, inputs)
    assert torch.equal(forward(again, inputs), expected)

    export_fp32(tmp_path / "student", tmp_path / "onnx")
    fp32, fused, int8 = (tmp_path / "onnx" / f"{name}.onnx" for name in ("model", "fused", "int8"))
    fuse(fp32, fused)
    quantize(fused, int8, Way(fused=True))
    # No worse than whole heads, which ONNX Runtime fuses into one node a layer.
    attentions = {"albert": 1}.get(family, 0 if family in HEADLESS else 2)
    if exporter()[0] != "optimum":  # whose attention is fused; that of torch.onnx is not
        attentions = 0
    assert node_counts(fused).get("Attention", 0) == attentions
    # Without dot products of 8 bits the sums of two products are cut to 16 bits.
    rough = 0.3 if dot_products(cpu_flags()) else 1.0
    for graph, gap in ((fp32, 1e-5), (fused, 1e-5), (int8, rough)):
        session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
        feed = {item.name: inputs[item.name].numpy() for item in session.get_inputs()}
        (logits,) = session.run(["logits"], feed)
        assert abs(logits - expected.numpy()).max() < gap
    assert int8.stat().st_size < fused.stat().st_size


def test_fusing_a_narrow_student_says_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student, _ = cut("bert", "heads")
    text_model.save(student, tmp_path / "student", inputs="")
    export_fp32(tmp_path / "student", tmp_path / "onnx")
    caplog.clear()
    fuse(tmp_path / "onnx" / "model.onnx", tmp_path / "fused.onnx")
    assert caplog.messages == []


def test_the_layers_of_the_teacher_keep_their_own_ranks() -> None:
    teacher = tiny_bert()
    found = students.importance(teacher, encoded(teacher), cpu())
    settings = StudentRecipe(layers=(3, 1), feed_forward=5)
    student = build_student(teacher, settings.layers or ())
    students.narrow(student, teacher, settings, lambda: encoded(teacher), cpu())
    for layer, place in zip(layers_of(student.module), (3, 1), strict=True):
        stay = sorted(found.neurons[place].argsort(descending=True)[:5].tolist())
        theirs: Any = layers_of(teacher.module)[place].get_submodule("intermediate.dense")
        ours: Any = layer.get_submodule("intermediate.dense")
        assert torch.equal(ours.weight, theirs.weight[stay])
    assert student.module.config.intermediate_size == 5
    assert teacher.module.config.intermediate_size > 5  # a copy is cut, and not the teacher


def test_a_unit_that_nothing_reads_ranks_last_and_one_that_is_read_loudly_first() -> None:
    teacher = tiny_bert()
    heads, neurons = students.widths(teacher)
    size = teacher.module.config.hidden_size // heads
    with torch.no_grad():
        for layer in layers_of(teacher.module):
            down: Any = layer.get_submodule("output.dense")
            down.weight[:, 7] = 0.0
            down.weight[:, 11] *= 300.0
            out: Any = layer.get_submodule("attention.output.dense")
            out.weight[:, :size] = 0.0
            out.weight[:, size : 2 * size] *= 30.0
    found = students.importance(teacher, encoded(teacher), cpu())
    of_heads, depth = torch.as_tensor(found.heads), len(layers_of(teacher.module))
    assert found.neurons.shape == (depth, neurons)
    assert of_heads.shape == (depth, heads)
    assert found.neurons[:, 7].tolist() == [0.0] * depth
    assert of_heads[:, 0].tolist() == [0.0] * depth
    # Of the last layer: what an earlier one does to the loss goes through those above it.
    assert found.neurons[-1].argmax() == 11
    assert of_heads[-1].argmax() == 1
    assert all(0 not in kept for kept in students.most_important(of_heads, heads - 1))
    assert 11 in students.most_important(found.neurons, 1)[-1]


def test_importance_is_the_mean_over_texts_of_the_slope_of_their_losses() -> None:
    """By finite differences, text by text."""
    teacher = tiny_bert()
    texts, heads = encoded(teacher), students.widths(teacher)[0]
    found = students.importance(teacher, texts, cpu())
    labels = torch.from_numpy(split().labels)
    place, unit, step = 2, 1, 1e-2
    module = layers_of(teacher.module)[place].get_submodule("attention.output.dense")

    def losses(value: float) -> np.ndarray:
        mask = torch.ones(1, heads)
        mask[:, unit] = value
        handle = module.register_forward_pre_hook(students._multiply(mask))
        rows = []
        for row in range(len(texts)):
            logits = forward(teacher, batch(teacher, slice(row, row + 1)).inputs)
            rows.append(supervised("single_label", logits.double(), labels[row : row + 1]).item())
        handle.remove()
        return np.array(rows)

    slopes = (losses(1 + step) - losses(1 - step)) / (2 * step)
    assert abs(slopes).mean() > 1e-4
    assert torch.as_tensor(found.heads)[place, unit].item() == pytest.approx(
        abs(slopes).mean(), rel=0.02
    )


@pytest.mark.parametrize("task", ["single_label", "multi_label", "regression"])
def test_importance_without_labels_is_of_the_teachers_answers(task: Task) -> None:
    teacher = tiny_bert(task=task)
    texts = encoded(teacher)
    nothing = no_labels(task, len(texts), len(teacher.labels))
    found = students.importance(teacher, replace(texts, labels=nothing), cpu())
    logits = forward(teacher, batch(teacher).inputs)
    # A number's loss has no slope at the answer: the answer itself is measured.
    said = answers(task, logits.numpy() - (0.5 if task == "regression" else 0.0))
    as_labels = replace(texts, labels=said.astype(texts.labels.dtype))
    expected = students.importance(teacher, as_labels, cpu())
    assert (found.neurons.max(dim=1).values > 0).all()
    torch.testing.assert_close(found.neurons, expected.neurons)
    torch.testing.assert_close(found.heads, expected.heads)
    # Of rows with labels it is that of their labels alone.
    some = texts.labels.copy()
    some[4:] = nothing[4:]
    half = students.importance(teacher, replace(texts, labels=some), cpu())
    assert not torch.equal(half.neurons, found.neurons)


def test_measuring_importance_leaves_nothing_behind_and_repeats_itself() -> None:
    teacher = tiny_bert(dropout=True)
    inputs = batch(teacher).inputs
    before = forward(teacher, inputs)
    one = students.importance(teacher, encoded(teacher), cpu())
    teacher.module.train()
    two = students.importance(teacher, encoded(teacher), cpu())
    assert torch.equal(torch.as_tensor(one.heads), torch.as_tensor(two.heads))
    assert torch.equal(one.neurons, two.neurons)
    assert torch.equal(forward(teacher, inputs), before)
    assert all(parameter.grad is None for parameter in teacher.module.parameters())


def test_of_equals_the_first_stay() -> None:
    scores = torch.tensor([[1.0, 3.0, 1.0, 3.0, 0.0], [0.0, 0.0, 0.0, 0.0, 1.0]])
    assert students.most_important(scores, 3) == [[0, 1, 3], [0, 1, 4]]


@pytest.mark.parametrize(
    ("family", "heads", "neurons", "expected", "hint"),
    [
        ("bert", 5, None, r"attention_heads is 5, but the layers of the 'bert' .* have 4", "4 or"),
        ("bert", 2, 65, r"student\.feed_forward is 65, but .* have 64", "64 or less"),
        (
            "mpnet",
            2,
            None,
            r"attention_heads: cannot be cut in a 'mpnet', only in bert, roberta",
            "feed_forward can be cut",
        ),
        ("modernbert", 2, 32, r"cannot be cut in a 'modernbert', only in .*albert$", "leave"),
    ],
)
def test_widths_that_cannot_be_are_refused(
    family: str, heads: int | None, neurons: int | None, expected: str, hint: str
) -> None:
    settings = StudentRecipe(layers=(0,), attention_heads=heads, feed_forward=neurons)
    with pytest.raises(ModelError, match=expected) as caught:
        students.check_widths(families.tiny(family), settings)
    assert hint in caught.value.hint
    assert caught.value.exit_code == 2


def test_a_student_of_a_teacher_that_lacks_heads_lacks_them_where_it_copies(tmp_path: Path) -> None:
    teacher = tiny_bert()
    students.keep_heads(teacher, [[0, 1], [1, 2], [2, 3], [0, 3]])
    text_model.save(teacher, tmp_path / "teacher", inputs="")
    teacher = text_model.load_model(tmp_path / "teacher", LABELS)
    same, student = build_student(teacher, range(4)), build_student(teacher, [1, 3])
    inputs = batch(teacher).inputs
    assert torch.equal(forward(same, inputs), forward(teacher, inputs))
    assert student.module.config.pruned_heads == {0: [0, 3], 1: [1, 2]}
    with pytest.raises(ModelError, match="has had heads cut out of layers 0, 1, 2, 3 already"):
        students.check_widths(teacher, StudentRecipe(layers=(0,), attention_heads=1))
    students.check_widths(teacher, StudentRecipe(layers=(0,), feed_forward=8))


def test_a_family_that_nobody_has_tried_is_refused() -> None:
    model = families.tiny("bert")
    model.module.config.model_type = "unheard-of"
    with pytest.raises(ModelError, match="cannot be cut in a 'unheard-of', only in bert"):
        students.check_widths(model, StudentRecipe(layers=(0,), feed_forward=8))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["student.model=somewhere", "student.feed_forward=8"], "leave 'model' out"),
        (["student.attention_heads=0"], "student.attention_heads: .*, found 0"),
        (["student.feed_foward=8"], r"unknown key 'student.feed_foward' \(did you mean 'feed_f"),
        (
            ["student.attention_heads=1", "distill.intermediate.attentions=1"],
            "compare head by head",
        ),
    ],
)
def test_recipes_that_contradict_themselves_are_refused(
    overrides: list[str], expected: str
) -> None:
    with pytest.raises(RecipeError, match=expected):
        load_recipe("smoke", overrides)
