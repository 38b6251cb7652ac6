"""A tiny BERT with random weights, for runs that take seconds."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import transformers
from tokenizers.implementations import BertWordPieceTokenizer

from ad2kit.runtime import seeded

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def random_bert(
    head: Mapping[str, Any], seed: int, texts: Sequence[tuple[str, ...]]
) -> tuple[transformers.BertForSequenceClassification, transformers.BertTokenizerFast]:
    """Return a four-layer classifier and a tokenizer whose vocabulary is the words of ``texts``.

    ``head`` is what its configuration says of the outputs.
    """
    words = sorted(
        {
            word
            for columns in texts
            for text in columns
            for word in re.findall(r"\w+|[^\w\s]", text.lower())
        }
    )
    letters = sorted({letter for word in words for letter in word})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = [*special, *words, *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    backend = BertWordPieceTokenizer(vocabulary, lowercase=True)
    tokenizer = transformers.BertTokenizerFast(tokenizer_object=backend._tokenizer)  # noqa: SLF001
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=128,
        **head,
    )
    with seeded(seed):
        return transformers.BertForSequenceClassification(config), tokenizer
