"""What student and teacher must have in common before their insides can be compared."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers

from ad2kit.models.text_model import TextModel
from ad2kit.run.errors import ModelError
from ad2kit.run.sections import ComputeRecipe, IntermediateRecipe
from ad2kit.training.ad2 import distillation
from ad2kit.training.loop import prepare
from ad2kit.training.losses import comparison
from ad2kit.training.students import build_student
from tests.models import LABELS, batch, cpu, gradients, settings, tiny_bert


def bert(**changes: Any) -> TextModel:
    """A tiny BERT with the tokenizer of the others and a shape of its own."""
    teacher = tiny_bert()
    shape = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2} | changes
    config = transformers.BertConfig(
        vocab_size=len(teacher.tokenizer), intermediate_size=32, **shape
    )
    return TextModel(transformers.BertForSequenceClassification(config), teacher.tokenizer, LABELS)


@pytest.mark.parametrize(
    ("term", "student", "expected"),
    [
        ("pkd", {"hidden_size": 32}, "equal hidden_size: the teacher has 64, the student 32"),
        ("hidden_states", {"hidden_size": 32}, "equal hidden_size: the teacher has 64"),
        ("attentions", {"num_attention_heads": 2}, "equal num_attention_heads: the teacher has 4"),
        ("value_relations", {"hidden_size": 66, "num_attention_heads": 2}, "width is 66"),
        ("pkd", {"num_hidden_layers": 1}, "the student has none"),
    ],
)
def test_what_a_term_cannot_match_is_refused_by_name(
    term: str, student: dict[str, int], expected: str
) -> None:
    weights = IntermediateRecipe.model_validate({term: 1.0})
    with pytest.raises(ModelError, match=expected) as caught:
        comparison(tiny_bert(), bert(**student), weights)
    assert caught.value.hint


def test_value_relations_let_the_widths_differ() -> None:
    teacher, student = tiny_bert(), bert(hidden_size=32)
    weights = IntermediateRecipe(value_relations=1.0)
    objective = distillation(
        cpu(), settings(alpha=0.0, intermediate=weights), comparison(teacher, student, weights)
    )
    losses = objective(student, batch(student), 1.0)
    assert losses.terms["value_relations"] > 0
    assert gradients(student).norm() > 0


def test_another_vocabulary_is_refused() -> None:
    student = tiny_bert()
    student.tokenizer.add_tokens(["unheard"])
    with pytest.raises(ModelError, match="the student has a tokenizer of its own"):
        comparison(tiny_bert(), student, IntermediateRecipe(hidden_states=1.0))


def test_layers_imitate_evenly_spaced_ones_whichever_they_were_copied_from() -> None:
    teacher, weights = tiny_bert(), IntermediateRecipe(hidden_states=1.0)
    for layers, expected in (([0, 1], (1, 3)), ([3], (3,)), ([0, 1, 2], (0, 1, 3))):
        found = comparison(teacher, build_student(teacher, layers), weights)
        assert (found.layers if found else None) == expected


def test_without_a_weight_the_teacher_does_not_run() -> None:
    assert comparison(tiny_bert(), bert(hidden_size=32), IntermediateRecipe()) is None


def test_the_adversary_sees_the_clean_kl_alone_beside_other_terms() -> None:
    """The terms change the weights' gradient by what they add, and not the perturbation."""
    teacher, weights = tiny_bert(), IntermediateRecipe(hidden_states=0.5, pkd=2.0)

    def run(intermediate: IntermediateRecipe, alpha: float) -> tuple[torch.Tensor, Any]:
        student = build_student(teacher, [0, 1])
        student.module.eval()
        recipe = settings(alpha=alpha, radius=1e-2, intermediate=intermediate)
        insides = comparison(teacher, student, intermediate)
        losses = distillation(cpu(), recipe, insides)(student, batch(student), 1.0)
        return gradients(student), losses

    teacher.module.eval()
    both, found = run(weights, 1.0)
    attacked, plain = run(IntermediateRecipe(), 1.0)
    calm, _ = run(weights, 0.0)
    kd, _ = run(IntermediateRecipe(), 0.0)
    torch.testing.assert_close(both, attacked + calm - kd, rtol=1e-3, atol=1e-5)
    assert found.terms["adversarial"] == pytest.approx(plain.terms["adversarial"])


@pytest.mark.slow
# Dynamo looks at tensors in ways that torch itself warns of.
@pytest.mark.filterwarnings("ignore")
def test_compiled_layers_leave_the_perturbation_where_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Traced by dynamo but not translated to C++, which takes a compiler and a minute."""
    traced = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    expected_model, model = tiny_bert(), tiny_bert()
    recipe = settings(radius=1e-2, steps=2, step_size=7e-3)
    expected = distillation(cpu(), recipe)(expected_model, batch(expected_model), 1.0)
    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    prepare(model, ComputeRecipe(compile=True))
    model.module(**batch(model).inputs)  # once without a hook, as an evaluation would
    found = distillation(cpu(), recipe)(model, batch(model), 1.0)
    assert found.terms == pytest.approx(expected.terms, rel=1e-4)
    torch.testing.assert_close(gradients(model), gradients(expected_model), rtol=1e-3, atol=1e-6)
