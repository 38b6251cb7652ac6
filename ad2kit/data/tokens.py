"""From texts to token ids in batches: cut, in windows, or refused; and equal tokenizers."""

from __future__ import annotations

import json
from importlib import metadata
from typing import TYPE_CHECKING, Any

from ad2kit.data.mapped import token_batch, window_batch
from ad2kit.run.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import pyarrow as pa
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from ad2kit.data.mapped import TextRows
    from ad2kit.run.sections import TextLength

# Texts are tokenised in chunks of this size: until a call of the tokenizer ends, it keeps all
# pieces of every text that is longer than the model, which takes 300 times the bytes of the text.
_CHUNK_CHARACTERS = 2**18
# More tokens than any text has.
_NO_LIMIT = 2**20


def token_batches(
    texts: TextRows, tokenizer: PreTrainedTokenizerFast, max_length_tokens: int
) -> Iterator[pa.RecordBatch]:
    """Yield the tokens of the texts in batches, as ``tokenizer(..., truncation=True)`` makes them.

    The backend of the tokenizer is called, because transformers would turn each token into several
    Python objects. The backend uses all cores.
    """
    backend = _backend(tokenizer)
    backend.enable_truncation(max_length_tokens, direction=tokenizer.truncation_side)
    for chunk in _chunks(texts):
        yield token_batch(backend.encode_batch(_inputs(chunk)), max_length_tokens)


def window_batches(
    texts: TextRows,
    tokenizer: PreTrainedTokenizerFast,
    length: TextLength,
    name: str = "",
    *,
    windows: bool = True,
) -> Iterator[pa.RecordBatch]:
    """Yield the windows of the texts in batches, and refuse texts that are too long at the end.

    They are those of ``tokenizer(..., return_overflowing_tokens=True, stride=overlap)``, for pairs
    with ``truncation="only_second"``, and from the left to the right for any tokenizer. ``name``
    is that of the split, and ``windows`` as in :func:`ad2kit.data.splits.check_lengths`.
    """
    backend = _backend(tokenizer)
    limit = length.max_length_tokens
    overlap = length.window_overlap_tokens
    too_long: list[str] = []
    for chunk in _chunks(texts):
        rows, strategy = chunk, "longest_first"
        if len(chunk[0]) > 1:
            # The library stops at a pair whose first text leaves no room.
            whole = _whole_pairs(backend, chunk, length)
            too_long += [f"{row!r:.80}" for row, fits in whole if not fits]
            windows = windows and all(fits for _, fits in whole)
            rows = [row for row, fits in whole if fits]
            strategy = "only_second"
        backend.enable_truncation(limit, stride=overlap, strategy=strategy, direction="right")
        found = [[each, *each.overflowing] for each in backend.encode_batch(_inputs(rows))]
        too_long += [
            f"{row!r:.80}"
            for row, parts in zip(rows, found, strict=True)
            if len(parts) > length.max_windows
        ]
        if not too_long:
            yield window_batch(found)
    if too_long:
        of = f"{len(texts)}{name and ' '}{name}"
        raise _refusal(too_long, length, of, windows=windows)


def _whole_pairs(
    backend: Tokenizer, pairs: list[tuple[str, ...]], length: TextLength
) -> list[tuple[tuple[str, ...], bool]]:
    """Return pairs, and for each whether its first text leaves room for windows of its second."""
    backend.no_truncation()
    limit = length.max_length_tokens
    special = backend.num_special_tokens_to_add(is_pair=True)
    # Where long pairs are refused: would the windows of DataRecipe.length hold them?
    overlap = length.window_overlap_tokens if length.long_texts == "windows" else limit // 8
    room = limit - special - overlap
    return [
        (pair, len(each) <= limit or each.sequence_ids.count(0) < room)
        for pair, each in zip(pairs, backend.encode_batch(pairs), strict=True)
    ]


def equal_tokenizers(one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> bool:
    """Tell whether two tokenizers give the same token ids to every text."""
    return tokenizer_facts(one) == tokenizer_facts(other)


def same_tokens(
    texts: TextRows, one: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast
) -> bool:
    """Tell whether two tokenizers give each of the texts the same token ids, however long it is.

    Equal tokenizers need not read the texts. Others may differ in what no text shows, such as the
    entry of a token.
    """
    if equal_tokenizers(one, other):
        return True
    batches = (token_batches(texts, each, _NO_LIMIT) for each in (one, other))
    return all(
        mine["input_ids"].equals(theirs["input_ids"]) for mine, theirs in zip(*batches, strict=True)
    )


def _refusal(too_long: list[str], length: TextLength, of: str, *, windows: bool) -> DataError:
    """Return the error for texts that are too long; their beginnings are given.

    ``windows`` says whether windows, or more of them, would hold these texts.
    """
    most, advice = f"{length.max_length_tokens} tokens", ""
    if length.long_texts == "windows":
        most = f"{length.max_windows} windows of {most}"
        advice = "raise data.max_windows, "
        if not windows:
            most += ", and of a pair a first text that leaves room for the second"
    elif windows:
        advice = "set data.long_texts=windows, "
    return DataError(
        f"{len(too_long)} of {of} texts are too long: expected at most {most} "
        f"(data.long_texts: {length.long_texts}), the first is {too_long[0]}",
        hint=f"shorten or remove these rows, {advice if windows else ''}or set data.long_texts=cut",
    )


def _backend(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """Return the backend of a tokenizer with the settings that transformers gives it."""
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return backend


def _inputs(rows: list[tuple[str, ...]]) -> list[Any]:
    """Return rows as the backend of a tokenizer reads them: texts, or pairs."""
    return [text for (text,) in rows] if rows and len(rows[0]) == 1 else list(rows)


def tokenizer_facts(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return everything in a tokenizer that decides the token ids of a text, as plain data."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    return {
        **{key: value for key, value in backend.items() if key not in ("truncation", "padding")},
        "truncation_side": tokenizer.truncation_side,
        "split_special_tokens": tokenizer.split_special_tokens,
        "tokenizers": metadata.version("tokenizers"),
    }


def _chunks(texts: Iterable[tuple[str, ...]]) -> Iterator[list[tuple[str, ...]]]:
    """Yield the texts in chunks that end when they reach ``_CHUNK_CHARACTERS`` characters."""
    chunk: list[tuple[str, ...]] = []
    characters = 0
    for columns in texts:
        chunk.append(columns)
        characters += sum(map(len, columns))
        if characters >= _CHUNK_CHARACTERS:
            yield chunk
            chunk = []
            characters = 0
    if chunk:
        yield chunk
