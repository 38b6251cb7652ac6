"""What must hold for every family of encoders: the whole chain, and the parts it is made of.

The models are real and tiny, with tokenizers of their own (see :mod:`tests.families`).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

import onnx
import pytest
import torch
import transformers
from onnxruntime import InferenceSession

from ad2kit.exporting import export as exporting
from ad2kit.exporting.classifier import MODEL_FILE, OnnxClassifier, read_artifact
from ad2kit.exporting.export import export, exporter
from ad2kit.exporting.fuse import read_first_token_only
from ad2kit.gate.parity import judge
from ad2kit.models import text_model
from ad2kit.models.layers import layer_stack
from ad2kit.run import recipe
from ad2kit.run.errors import ModelError
from ad2kit.run.folder import open_run
from ad2kit.run.sections import ComputeRecipe, IntermediateRecipe
from ad2kit.training import ad2
from ad2kit.training.ad2 import distillation
from ad2kit.training.distill import distill
from ad2kit.training.loop import prepare
from ad2kit.training.losses import Comparison, comparison
from ad2kit.training.students import build_student
from tests import families
from tests.models import LABELS, TEXTS, batch, cpu, gradients, settings

if TYPE_CHECKING:
    from pathlib import Path

    from ad2kit.models.text_model import TextModel

# On import transformers compiles parts of DeBERTa and ModernBERT, in a way that torch gives up.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")

each_family = pytest.mark.parametrize("family", list(families.FAMILIES))
DEPTH = families.DEPTH
EVERY_TERM = IntermediateRecipe(pkd=1.0, hidden_states=1.0, attentions=1.0, value_relations=1.0)
FIDELITY = {
    "logits not finite",
    "label flips",
    "logit gap, batches",
    "logit gap, one by one",
    "logit gap, padded",
    "logit gap, padded on the left",
    "logit gap, reversed order",
    "texts with other token ids",
}
CONVERSION = {
    "converted logits not finite",
    "label agreement with fp32",
    "label agreement with fp32, one by one",
}


# What fusing finds in students of two layers: Attention, EmbedLayerNormalization,
# SkipLayerNormalization, and Gelu in any form. It knows no attention with relative positions.
FUSED = {
    "bert": (2, 1, 4, 2),
    "roberta": (2, 0, 4, 2),
    "distilbert": (2, 1, 4, 2),
    "electra": (2, 1, 4, 3),
    "albert": (1, 0, 4, 2),
    "mpnet": (0, 0, 5, 2),
    "xlm-roberta": (2, 0, 4, 2),
    "camembert": (2, 0, 4, 2),
    "deberta-v2": (0, 0, 4, 3),
    "modernbert": (0, 0, 4, 3),
}

# How many nodes of the plain graph need the first token alone: the last layer from its queries on,
# in some families from its feed-forward block on.
FIRST_TOKEN = {
    "bert": 22,
    "roberta": 22,
    "distilbert": 22,
    "electra": 16,
    "albert": 25,
    "mpnet": 16,
    "xlm-roberta": 22,
    "camembert": 22,
    "deberta-v2": 16,
    "modernbert": 9,
}

# The graphs of torch.onnx shape the states of the heads with other nodes.
FIRST_TOKEN_BY_TORCH = {
    **dict.fromkeys(("bert", "roberta", "distilbert", "electra", "xlm-roberta", "camembert"), 26),
    "albert": 29,
}

SHORT = (
    "teacher.finetune.epochs=1",
    "distill.epochs=1",
    "data.max_train_rows=300",
    "data.max_length_tokens=40",
    "parity.bootstrap_samples=100",
)


def layers(model: TextModel) -> list[torch.nn.Module]:
    """The layers in the order of the forward pass."""
    depth = model.module.config.num_hidden_layers
    stack = layer_stack(model.module, depth)
    if stack is None:  # ALBERT has one, and goes through it again and again
        return [model.module.get_submodule("albert.encoder.albert_layer_groups.0")] * depth
    return list(model.module.get_submodule(stack.rstrip(".")).children())


def laid_out(model: TextModel, layout: str) -> dict[str, torch.Tensor]:
    """TEXTS with padding on the right, on the left, or on the right and with masked words."""
    inputs = batch(model).inputs
    mask = inputs["attention_mask"]
    padding = (mask == 0).sum(dim=1).tolist()
    assert any(padding)
    if layout == "left":
        return {
            name: torch.stack([row.roll(n) for row, n in zip(rows, padding, strict=True)])
            for name, rows in inputs.items()
        }
    if layout == "holes":
        mask[:, 2] = 0
        mask[::2, 1] = 0
    return inputs


@torch.no_grad()
def forward(model: TextModel, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits and last states without dropout."""
    output = model.module.eval()(**inputs, output_hidden_states=True)
    return output.logits, output.hidden_states[-1]


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=pytest.mark.transformers5 if name == "modernbert" else ())
        for name in families.FAMILIES
    ],
)
@pytest.mark.slow
def test_the_whole_chain_from_a_teacher_to_the_gate(family: str, tmp_path: Path) -> None:
    teacher = families.save(family, tmp_path / "teacher")
    variants = ["fp32", "fused", "fp16", "steady", "int8"]
    overrides = [
        f"teacher.model={teacher}",
        "student.layers=[0, 3]",
        *SHORT,
        f"export.variants=[{','.join(variants)}]",
    ]
    run = open_run(recipe.load_recipe("smoke", overrides), tmp_path / "runs")
    distilled = distill(run)
    assert distilled.steps == 8  # 240 rows in batches of 32
    assert (distilled.mean_adversarial_gain or 0.0) > 0
    student = text_model.load_model(run.student, distilled.labels)
    assert student.module.config.num_hidden_layers == 2
    # Layers that share their weights weigh the same however many there are.
    assert (distilled.student_parameters < (distilled.teacher_parameters or 0)) == (
        family != "albert"
    )

    export(run)
    # A gap of 1e-4 says something only where texts move the logits much further than that.
    assert OnnxClassifier(run.onnx("fp32"), threads=1).logits(TEXTS).std(axis=0).min() > 1e-2
    report = judge(run)
    assert [verdict.variant for verdict in report.variants] == variants
    for verdict in report.variants:
        passed = {check.name for check in verdict.checks if check.passed}
        exact = verdict.variant in ("fp32", "fused")
        assert passed >= (FIDELITY if exact else FIDELITY | CONVERSION)
    # In models as narrow as these, a rounding of floats that moves one integer can be seen.
    company = {verdict.variant: verdict.company for verdict in report.variants if verdict.company}
    assert company["steady"].flips == 0
    assert company["steady"].shift < 0.003
    assert (read_artifact(run.onnx("steady")).weights_in_8_bits or 0) > 0.8
    nodes = read_artifact(run.onnx("fused")).nodes
    kinds = ("Attention", "EmbedLayerNormalization", "SkipLayerNormalization")
    gelus = sum(count for name, count in nodes.items() if name.endswith("Gelu"))
    found = (*(nodes.get(kind, 0) for kind in kinds), gelus)
    by_optimum = exporter()[0] == "optimum"
    # Without optimum LayerNormalization and Gelu alone: the rest costs no more as it is.
    assert found == FUSED[family] if by_optimum else found[2:] == FUSED[family][2:]

    narrow = onnx.load(run.onnx("fp32") / MODEL_FILE)
    expected = FIRST_TOKEN if by_optimum else FIRST_TOKEN | FIRST_TOKEN_BY_TORCH
    assert read_first_token_only(narrow) == expected[family]
    onnx.save(narrow, tmp_path / "narrow.onnx")
    whole, first = (
        OnnxClassifier(run.onnx("fp32"), threads=1, graph=graph)
        for graph in (None, tmp_path / "narrow.onnx")
    )
    for left in (False, True):
        encodings = whole.encode(TEXTS)
        gap = abs(whole.run(encodings, left=left) - first.run(encodings, left=left))
        assert gap.max() < 1e-5


@each_family
@pytest.mark.slow
@pytest.mark.transformers5
def test_without_optimum_torch_exports_what_the_model_computes(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "main_export", None)
    model = families.tiny(family)
    text_model.save(model, tmp_path / "model", inputs="")
    exporting.export_fp32(tmp_path / "model", tmp_path / "onnx")
    session = InferenceSession(tmp_path / "onnx" / MODEL_FILE, providers=["CPUExecutionProvider"])
    model.module.set_attn_implementation("eager")
    for layout in ("right", "left", "holes"):
        inputs = laid_out(model, layout)
        (found,) = session.run(
            ["logits"], {each.name: inputs[each.name].numpy() for each in session.get_inputs()}
        )
        assert abs(found - forward(model, inputs)[0].numpy()).max() < 1e-5
    # A model without segments does not read those of its tokenizer.
    reread = text_model.load_saved(tmp_path / "model").tokenizer
    names = {each.name for each in session.get_inputs()}
    assert {"input_ids", "attention_mask"} <= names <= set(reread.model_input_names)


@each_family
@pytest.mark.parametrize("layout", ["right", "left", "holes"])
def test_the_hook_at_zero_reproduces_the_logits_exactly(family: str, layout: str) -> None:
    model = families.tiny(family)
    inputs = laid_out(model, layout)
    logits, _ = forward(model, inputs)
    zero = ad2.no_perturbation(inputs["attention_mask"], model.word_embeddings.embedding_dim)
    with ad2.perturbed(model.word_embeddings, zero):
        hooked, _ = forward(model, inputs)
    after, _ = forward(model, inputs)
    assert torch.equal(hooked, logits)
    assert torch.equal(after, logits)  # the hook is gone


@each_family
@pytest.mark.parametrize("layout", ["right", "left", "holes"])
def test_no_real_token_feels_a_perturbation_of_the_padding(family: str, layout: str) -> None:
    model = families.tiny(family)
    inputs = laid_out(model, layout)
    mask = inputs["attention_mask"]
    noise = torch.randn(
        *mask.shape, model.word_embeddings.embedding_dim, generator=torch.Generator().manual_seed(5)
    )
    logits, states = forward(model, inputs)
    with ad2.perturbed(model.word_embeddings, noise * (1 - mask).unsqueeze(-1)):
        unmoved_logits, unmoved = forward(model, inputs)
    with ad2.perturbed(model.word_embeddings, noise * mask.unsqueeze(-1)):
        _, moved = forward(model, inputs)
    assert torch.equal(unmoved[mask == 1], states[mask == 1])
    if layout != "left":  # there the heads of these families read the padding
        assert torch.equal(unmoved_logits, logits)
    assert ((moved - states)[mask == 1].abs().amax(dim=-1) > 1e-3).all()


@each_family
def test_a_text_alone_has_the_logits_that_it_has_in_a_padded_batch(family: str) -> None:
    teacher = families.tiny(family)
    for model in (teacher, build_student(teacher, [0, 3])):
        together, _ = forward(model, batch(model).inputs)
        alone = [forward(model, batch(model, slice(i, i + 1)).inputs)[0] for i in range(len(TEXTS))]
        torch.testing.assert_close(torch.cat(alone), together, rtol=0, atol=1e-5)
        assert together.std(dim=0).min() > 1e-2  # or nothing would have been compared


@each_family
def test_an_encoder_without_a_head_is_one_to_fine_tune(family: str, tmp_path: Path) -> None:
    model, folder = families.tiny(family), families.save(family, tmp_path / "model")
    encoder: Any = model.module.base_model
    encoder.save_pretrained(folder, safe_serialization=True)
    found = text_model.load_model(folder, LABELS, finished=False)
    inputs = batch(model).inputs
    assert torch.equal(forward(found, inputs)[1], forward(model, inputs)[1])
    assert not torch.equal(forward(found, inputs)[0], forward(model, inputs)[0])
    with pytest.raises(ModelError, match="does not hold a whole classifier"):
        text_model.load_model(folder, LABELS)


@each_family
def test_a_student_of_all_layers_is_its_teacher(family: str) -> None:
    teacher = families.tiny(family)
    student = build_student(teacher, range(DEPTH))
    inputs = batch(teacher).inputs
    assert torch.equal(forward(student, inputs)[0], forward(teacher, inputs)[0])


@each_family
def test_a_layer_computes_in_the_student_what_it_did_in_the_teacher(family: str) -> None:
    teacher, chosen = families.tiny(family), [0, 3]
    student = build_student(teacher, chosen)
    calls: list[tuple[Any, dict[str, Any], torch.Tensor]] = []
    for layer in dict.fromkeys(layers(teacher)):
        layer.register_forward_hook(
            lambda _module, args, kwargs, output: calls.append((args, kwargs, output[0])),
            with_kwargs=True,
        )
    forward(teacher, batch(teacher).inputs)
    for layer, place in zip(layers(student), chosen, strict=True):
        args, kwargs, output = calls[place]
        with torch.no_grad():
            assert torch.equal(layer.eval()(*args, **kwargs)[0], output)


def intermediate_terms(teacher: TextModel, student: TextModel) -> dict[str, torch.Tensor]:
    """Return the value of every intermediate term, with a graph to the student."""
    insides = cast("Comparison", comparison(teacher, student, EVERY_TERM))
    inputs = batch(teacher).inputs
    with torch.no_grad():
        _, theirs = insides.read(teacher, inputs)
    _, ours = insides.read(student, inputs)
    terms = insides.terms(ours, theirs, inputs["attention_mask"])
    return {name: value for name, (_, value) in terms.items()}


@each_family
def test_every_intermediate_term_is_zero_between_equals(family: str) -> None:
    teacher = families.tiny(family)
    student = build_student(teacher, range(DEPTH))
    student.module.eval()
    terms = intermediate_terms(teacher, student)
    assert set(terms) == set(IntermediateRecipe.model_fields)
    for name, value in terms.items():
        assert value.abs() < 1e-5, name


@each_family
def test_every_intermediate_term_teaches_another_student(family: str) -> None:
    teacher = families.tiny(family)
    student = build_student(families.tiny(family, seed=4), [0, 2, 3])
    student.module.eval()
    terms = intermediate_terms(teacher, student)
    for name, value in terms.items():
        assert value > 1e-4, name
        student.module.zero_grad()
        value.backward(retain_graph=True)
        found = gradients(student)
        assert torch.isfinite(found).all(), name
        assert found.abs().max() > 1e-4, name
    assert not gradients(teacher).any()


@each_family
def test_reading_the_attentions_says_nothing(family: str, caplog: pytest.LogCaptureFixture) -> None:
    transformers.utils.logging.warning_once.cache_clear()  # as in a process of its own
    teacher = families.tiny(family)
    intermediate_terms(teacher, build_student(teacher, [0, 3]))
    assert caplog.messages == []


@each_family
def test_gradient_checkpointing_keeps_the_gradients_or_is_refused(family: str) -> None:
    def update(*, checkpointing: bool) -> tuple[torch.Tensor, int]:
        """Return the gradients of an update, and how often a layer was entered for them."""
        model = families.tiny(family)
        prepare(model, ComputeRecipe(gradient_checkpointing=checkpointing))
        model.module.train()
        entered: list[None] = []
        for layer in dict.fromkeys(layers(model)):
            # Version 5 does not call the hooks of the layer itself again.
            linear = [each for each in layer.modules() if isinstance(each, torch.nn.Linear)]
            linear[-1].register_forward_pre_hook(lambda *_: entered.append(None))
        distillation(cpu(), settings(radius=0.1))(model, batch(model), 1.0)
        return gradients(model), len(entered)

    expected, once = update(checkpointing=False)
    if family in ("albert", "mpnet"):
        with pytest.raises(ModelError, match=r"compute\.gradient_checkpointing: '\w+' does not"):
            update(checkpointing=True)
        return
    found, twice = update(checkpointing=True)
    assert torch.equal(found, expected)
    assert expected.abs().max() > 1e-3
    assert (once, twice) == (2 * DEPTH, 4 * DEPTH)


@each_family
def test_the_longest_text_that_check_length_allows_fits(family: str) -> None:
    model = families.tiny(family)
    most = text_model.most_tokens(model)
    assert most == families.LONGEST

    def read(tokens: int) -> None:
        ids = torch.full((1, tokens), model.tokenizer.unk_token_id)
        forward(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    read(most)
    if family not in ("deberta-v2", "modernbert"):  # which see distances, at any length
        with pytest.raises((IndexError, RuntimeError)):
            read(most + 1)


def test_the_word_embeddings_of_modernbert_stay_outside_compiled_code(tmp_path: Path) -> None:
    """On a GPU transformers would compile them, and compiled code does not see a later hook."""
    teacher = text_model.load_model(families.save("modernbert", tmp_path / "model"), LABELS)
    for model in (teacher, build_student(teacher, [0, 3])):
        assert model.module.config.reference_compile is False


@pytest.mark.parametrize("family", ["distilbert", "mpnet"])
def test_a_tokenizer_with_segments_fits_a_family_without_them(family: str, tmp_path: Path) -> None:
    """Many checkpoints of DistilBERT name BERT's tokenizer as theirs."""
    folder = families.save(family, tmp_path / "model")
    settings_file = folder / "tokenizer_config.json"
    named = json.loads(settings_file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    settings_file.write_text(json.dumps(named))
    model = text_model.load_model(folder, LABELS)
    inputs = batch(model).inputs
    assert set(inputs) == {"input_ids", "attention_mask"}
    expected = families.tiny(family)
    assert torch.equal(forward(model, inputs)[0], forward(expected, batch(expected).inputs)[0])


@pytest.mark.slow
def test_a_student_of_another_family_width_and_tokenizer_learns_from_the_teacher(
    tmp_path: Path,
) -> None:
    """Token by token they have nothing in common; their answers they have."""
    folder = families.save("roberta", tmp_path / "student")
    overrides = [f"student.model={folder}", "student.layers=[0, 2]", *SHORT]
    run = open_run(recipe.load_recipe("smoke", overrides), tmp_path / "runs")
    report = distill(run)
    assert report.mean_clean_kl > 0
    student = text_model.load_model(run.student, report.labels)
    assert student.module.config.model_type == "roberta"
    assert student.module.config.num_hidden_layers == 2
    teacher = text_model.load_model(run.teacher, report.labels)
    assert student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab()
    export(run)
    failed = {
        check.name
        for verdict in judge(run).variants
        for check in verdict.checks
        if check.question == "export fidelity" and not check.passed
    }
    assert failed == set()
    more = recipe.load_recipe("smoke", [*overrides, "distill.intermediate.hidden_states=1"])
    other = open_run(more, tmp_path / "runs")
    with pytest.raises(ModelError, match="the student has a tokenizer of its own"):
        distill(other)
