"""Tiny real models of every family that ad2kit claims, with tokenizers made for a few words.

Random weights, four layers; what differs between the families is kept: the order of the special
tokens, the kind of subwords, where position ids come from, and the width of the word embeddings.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import transformers
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from ad2kit.data.demo_reviews import opinions
from ad2kit.models.text_model import TextModel, head_config
from ad2kit.run.machine import seeded
from tests.models import LABELS, TEXTS

if TYPE_CHECKING:
    from pathlib import Path

DEPTH, WIDTH, HEADS, LONGEST = 4, 32, 4, 48
NARROW = 16

# What the demo's texts are made of, so that they are not spelled letter by letter.
WORDS = (*TEXTS, *(text for text, _ in opinions(0, train_rows=60, validation_rows=2).train))

# In the order of their ids.
BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ROBERTA = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
MPNET = ("<s>", "<pad>", "</s>", "[UNK]", "<mask>")
ALBERT = ("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]")
DEBERTA = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]")
MODERNBERT = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")


@dataclass(frozen=True)
class Family:
    """The name of its classes, its tokens, and its configuration."""

    classes: str
    pieces: str
    special: tuple[str, ...]
    config: dict[str, Any] = field(default_factory=dict)


def _sizes(positions: int = LONGEST, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": HEADS,
        "intermediate_size": 64,
        "max_position_embeddings": positions,
        **more,
    }


FAMILIES = {
    "bert": Family("Bert", "wordpiece", BERT, config=_sizes()),
    # These count positions from the padding id on.
    "roberta": Family("Roberta", "bytes", ROBERTA, config=_sizes(LONGEST + 2, type_vocab_size=1)),
    "distilbert": Family(
        "DistilBert",
        "wordpiece",
        BERT,
        config={
            "dim": WIDTH,
            "n_layers": DEPTH,
            "n_heads": HEADS,
            "hidden_dim": 64,
            "max_position_embeddings": LONGEST,
        },
    ),
    "electra": Family("Electra", "wordpiece", BERT, config=_sizes(embedding_size=NARROW)),
    "albert": Family("Albert", "unigram", ALBERT, config=_sizes(embedding_size=NARROW)),
    "mpnet": Family("MPNet", "wordpiece", MPNET, config=_sizes(LONGEST + 2)),
    "xlm-roberta": Family(
        "XLMRoberta", "unigram", ROBERTA, config=_sizes(LONGEST + 2, type_vocab_size=1)
    ),
    "camembert": Family(
        "Camembert", "unigram", ROBERTA, config=_sizes(LONGEST + 2, type_vocab_size=1)
    ),
    # As the published v3: positions are relative alone, in buckets.
    "deberta-v2": Family(
        "DebertaV2",
        "unigram",
        DEBERTA,
        config=_sizes(
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=8,
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            position_biased_input=False,
            type_vocab_size=0,
        ),
    ),
    # A window that these texts are longer than.
    "modernbert": Family("ModernBert", "bytes", MODERNBERT, config=_sizes(local_attention=8)),
}


def tiny(
    name: str,
    *,
    seed: int = 3,
    words: transformers.PreTrainedTokenizerFast | None = None,
    **changes: Any,
) -> TextModel:
    """A random classifier of a family with its tokenizer, in evaluation mode, without dropout.

    ``words`` is another tokenizer, and ``changes`` are other values of the configuration.
    """
    family = FAMILIES[name]
    words = words or tokenizer(family)
    ids = {
        f"{key}_token_id": getattr(words, f"{key}_token_id")
        for key in ("pad", "bos", "eos", "cls", "sep")
    }
    config = getattr(transformers, f"{family.classes}Config")(
        # Weights large enough that layers and tokens tell in the logits.
        **{"vocab_size": len(words), "initializer_range": 0.2, **family.config, **changes},
        **ids,
        **head_config(LABELS, "single_label"),
    )
    for key in config.to_dict():
        if "drop" in key:
            setattr(config, key, 0.0)
    with seeded(seed):
        module = getattr(transformers, f"{family.classes}ForSequenceClassification")(config)
    return TextModel(module.eval(), words, LABELS)


def save(name: str, folder: Path, *, seed: int = 3) -> Path:
    """Write a tiny model and its tokenizer as anyone would, and return the folder."""
    model = tiny(name, seed=seed)
    model.module.save_pretrained(folder, safe_serialization=True)
    model.tokenizer.save_pretrained(folder)
    return folder


def tokenizer(family: Family) -> transformers.PreTrainedTokenizerFast:
    """Make the tokenizer of a family for WORDS."""
    backend = {"wordpiece": _wordpiece, "bytes": _bytes, "unigram": _unigram}[family.pieces](
        family.special
    )
    pad, unknown, first, last, mask = _roles(family.special)
    ids = [(token, backend.token_to_id(token)) for token in (first, last)]
    # RoBERTa and its like put two ends between the texts of a pair, and have no segments.
    pair = (
        f"{first} $A {last} {last} $B {last}"
        if first == "<s>"
        else f"{first} $A {last} $B:1 {last}:1"
    )
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", pair=pair, special_tokens=ids
    )
    # ModernBERT has no class of its own; its checkpoints say themselves what it reads.
    own = getattr(transformers, f"{family.classes}TokenizerFast", None)
    more = {} if own else {"model_input_names": ["input_ids", "attention_mask"]}
    made: transformers.PreTrainedTokenizerFast = (own or transformers.PreTrainedTokenizerFast)(
        tokenizer_object=backend,
        pad_token=pad,
        unk_token=unknown,
        cls_token=first,
        bos_token=first,
        sep_token=last,
        eos_token=last,
        mask_token=mask,
        model_max_length=LONGEST,
        **more,
    )
    return made


def _roles(special: tuple[str, ...]) -> tuple[str, ...]:
    """Return the tokens for padding, unknown words, the start, the end and the mask."""
    by_name = {token.strip("[]<>").lower(): token for token in special}
    start, end = ("s", "/s") if "<s>" in special else ("cls", "sep")
    return tuple(by_name[name] for name in ("pad", "unk", start, end, "mask"))


def _counts() -> Counter[str]:
    """Return how often each word and each character of a word occurs in WORDS, lower-cased.

    The vocabularies are made of these: two trainings of WordPiece or Unigram differ in theirs.
    """
    words = [word for text in WORDS for word in re.findall(r"\w+|[^\w\s]", text.lower())]
    return Counter([*words, *(letter for word in set(words) for letter in word)])


def _wordpiece(special: tuple[str, ...]) -> Tokenizer:
    counts = sorted(_counts())
    pieces = (*special, *counts, *(f"##{piece}" for piece in counts if len(piece) == 1))
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))  # noqa: S106
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return backend


def _bytes(special: tuple[str, ...]) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(special),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(WORDS, trainer)
    return backend


def _unigram(special: tuple[str, ...]) -> Tokenizer:
    counts = sorted(_counts().items())
    total = sum(count for _, count in counts)
    pieces = [(piece, 0.0) for piece in special]
    for start in ("▁", ""):
        pieces += [(start + piece, math.log(count / total)) for piece, count in counts]
    pieces.append(("▁", math.log(1 / total)))
    unknown = next(index for index, piece in enumerate(special) if "unk" in piece.lower())
    backend = Tokenizer(models.Unigram(pieces, unk_id=unknown))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend
