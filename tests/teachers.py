"""Teachers as users have them: tiny classifiers that a version of transformers saved.

    python -m tests.teachers

writes ``tests/fixtures/transformers-VERSION.tar.xz`` with the version that is installed: a folder
for each case, with the logits that this version itself gives (``answers.json``). Nothing of ad2kit
is used for them, so that they show what the teacher did. The tests read the folders of all versions
with the version that they run on.
"""

from __future__ import annotations

import json
import tarfile
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from packaging.version import Version

from tests import families
from tests.models import TEXTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

FIXTURES = Path(__file__).parent / "fixtures"
MAJOR = Version(transformers.__version__).major
EXTRA = ("<product>", "<url>")
# What normalisers, pre-tokenizers and special tokens differ in, and a text that has to be cut.
SINGLE = (
    *TEXTS,
    "A  Fine\tFilm, isn't it?",
    "``not bad at all'' \u2013 café \uff26\uff29\uff2e\uff25",
    "<product> is never dull <url>",
    "a slow start " * 20 + "but bad",
)
PAIR = tuple(zip(SINGLE, reversed(SINGLE), strict=True))
LENGTH = families.LONGEST


@dataclass(frozen=True)
class Case:
    """A teacher: its family, what differs from the smallest one, and the versions that can save it.

    ``generic`` takes the tokenizer class that adds nothing to tokenizer.json, and ``tokenizer``
    holds more of its settings.
    """

    family: str
    config: dict[str, Any] = field(default_factory=dict)
    extra: bool = False
    generic: bool = False
    tokenizer: dict[str, Any] = field(default_factory=dict)
    heads: dict[int, list[int]] = field(default_factory=dict)
    majors: tuple[int, ...] = (4, 5)


_THETAS = {"full_attention": 30.0, "sliding_attention": 5.0}


def _rope(**more: Any) -> dict[str, Any]:
    """Other rotary positions of a ModernBERT, in the words of the running version."""
    if MAJOR == 4:
        return {"global_rope_theta": 30.0, "local_rope_theta": 5.0}
    values = {"rope_type": "default", **more}
    return {
        "rope_parameters": {
            kind: {"rope_theta": theta, **values} for kind, theta in _THETAS.items()
        }
    }


def _layers(pattern: str) -> dict[str, Any]:
    """The layers of a ModernBERT: F sees the whole text, and s a window."""
    if MAJOR == 4:
        return {"num_hidden_layers": len(pattern), "global_attn_every_n_layers": 2}
    kinds = {"F": "full_attention", "s": "sliding_attention"}
    return {
        "num_hidden_layers": len(pattern),
        "layer_types": [kinds[letter] for letter in pattern],
    }


CASES = {
    **{family: Case(family) for family in families.FAMILIES},
    **{f"{family}-extra": Case(family, extra=True) for family in families.FAMILIES},
    "modernbert-thetas": Case("modernbert", config=_rope()),
    "modernbert-layers": Case("modernbert", config=_layers("FsFs")),
    # What version 4 cannot express.
    "modernbert-irregular": Case("modernbert", config=_layers("sFFs"), majors=(5,)),
    "modernbert-scaled": Case(
        "modernbert", config=_rope(rope_type="linear", factor=4.0), majors=(5,)
    ),
    "modernbert-scaling": Case(
        "modernbert", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, majors=(4,)
    ),
    # What version 5 cannot express.
    "bert-relative": Case("bert", {"position_embedding_type": "relative_key"}, majors=(4,)),
    "bert-heads": Case("bert", heads={0: [1], 1: [0, 3]}, majors=(4,)),
    # The generic class has segments in version 4 and none in version 5.
    "bert-generic": Case("bert", generic=True),
    "roberta-generic": Case("roberta", generic=True, tokenizer={"add_prefix_space": True}),
    "bert-no-segments": Case(
        "bert", tokenizer={"model_input_names": ["input_ids", "attention_mask"]}
    ),
    "bert-cased": Case("bert", tokenizer={"do_lower_case": False}),
    "bert-resized": Case("bert", {"vocab_size": 384}),
    "bert-left": Case("bert", tokenizer={"truncation_side": "left"}),
}
_SMALL = {
    "hidden_size": 16,
    "dim": 16,
    "embedding_size": 8,
    "intermediate_size": 32,
    "hidden_dim": 32,
    "num_hidden_layers": 2,
    "n_layers": 2,
}


def make(case: Case, folder: Path) -> None:
    """Save a teacher as its users would, with the logits that it gives."""
    own = families.FAMILIES[case.family].config
    small = {key: value for key, value in _SMALL.items() if key in own}
    words = _words(case, folder)
    model = families.tiny(
        case.family, words=words, **{"initializer_range": 0.4, **small, **case.config}
    )
    module: Any = model.module
    if case.heads:
        module.prune_heads(case.heads)
    module.half().save_pretrained(folder)
    words.save_pretrained(folder)
    again = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    again.save_pretrained(folder)  # version 5 changes parts of a tokenizer when it reads it
    answers = {name: logits.tolist() for name, logits in answer(folder).items()}
    (folder / "answers.json").write_text(json.dumps(answers))


def _words(case: Case, folder: Path) -> PreTrainedTokenizerFast:
    words = families.tokenizer(families.FAMILIES[case.family])
    if case.extra:
        key = "additional_special_tokens" if MAJOR == 4 else "extra_special_tokens"
        words.add_special_tokens({key: list(EXTRA)})
    if case.tokenizer or case.generic:
        words.save_pretrained(folder)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        if case.generic:
            generic = transformers.PreTrainedTokenizerFast.__name__
            settings = {key: settings[key] for key in settings if key.endswith("_token")}
            settings |= {"tokenizer_class": generic, "model_max_length": LENGTH}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | case.tokenizer))
        words = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return words


@torch.no_grad()
def answer(folder: Path) -> dict[str, torch.Tensor]:
    """Return the logits of a folder for SINGLE and PAIR, by transformers alone."""
    words = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    module: PreTrainedModel = transformers.AutoModelForSequenceClassification.from_pretrained(
        folder, trust_remote_code=False, dtype=torch.float32
    ).eval()
    readings = {"single": [SINGLE], "pair": list(zip(*PAIR, strict=True))}
    logits = {}
    for name, columns in readings.items():
        inputs = words(
            *map(list, columns),
            padding=True,
            truncation=True,
            max_length=LENGTH,
            return_tensors="pt",
        )
        logits[name] = module(**inputs).logits
    return logits


def versions() -> list[str]:
    """Return the versions of transformers that have saved teachers."""
    return [
        path.name.removeprefix("transformers-").removesuffix(".tar.xz")
        for path in sorted(FIXTURES.glob("transformers-*.tar.xz"))
    ]


def names() -> list[str]:
    """Return ``VERSION/CASE`` for all teachers."""
    return [
        f"{version}/{name}"
        for version in versions()
        for name, case in CASES.items()
        if Version(version).major in case.majors
    ]


def unpack(folder: Path) -> dict[str, Path]:
    """Unpack all teachers into a folder; return their folders by ``VERSION/CASE``."""
    found: dict[str, Path] = {}
    for version in versions():
        with tarfile.open(FIXTURES / f"transformers-{version}.tar.xz") as content:
            content.extractall(folder / version, filter="data")
        found |= {f"{version}/{path.name}": path for path in (folder / version).iterdir()}
    assert set(found) == set(names()), "type: python -m tests.teachers, with each version"
    return found


def main() -> None:
    """Write the fixtures of the installed version of transformers."""
    with tempfile.TemporaryDirectory() as temporary:
        for name, case in CASES.items():
            if MAJOR in case.majors:
                make(case, Path(temporary) / name)
        archive = FIXTURES / f"transformers-{transformers.__version__}.tar.xz"
        with tarfile.open(archive, "w:xz") as content:
            for path in sorted(Path(temporary).rglob("*")):
                if path.is_file():
                    entry = content.gettarinfo(path, str(path.relative_to(temporary)))
                    entry.uid = entry.gid = entry.mtime = 0
                    entry.uname = entry.gname = ""
                    content.addfile(entry, path.open("rb"))
        print(archive, archive.stat().st_size)


if __name__ == "__main__":
    main()
