"""How a text becomes token ids: the one place that says it, for the gate and for serving.

``tokenizer.json`` does not say it alone. transformers keeps beside it on which side a text is cut,
and whether the model is fed segment ids: :func:`tokenisation` reads that from the tokenizer that
training used, the artefact carries it, and :class:`Tokenise` obeys it.

A long text is not tokenised as a whole. The tokenizers library would keep a piece for every
``max_length_tokens`` of it: 300 MB for a text of 1 MB. No fixed number of characters is right
either, because a normaliser may drop any number of them. So a prefix is tokenised, and then one
that is twice as dear, until it gives more tokens than the model reads. Its last words are not
counted, because what follows may change them. Where the tokenizer cuts on the left it is a suffix,
and its first words.
"""

from __future__ import annotations

import json
import unicodedata
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ad2kit.exporting.records import Tokenisation
from ad2kit.run.errors import MissingExtra, ModelError

try:
    from tokenizers import Encoding, Tokenizer
except ModuleNotFoundError as error:
    raise MissingExtra(error.name or "tokenizers", extra="cpu") from error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

CHUNK_CHARACTERS = 65_536
"""Short texts are tokenised together up to this many characters, on all cores."""

# A word of English has some five characters a token; who has more is read in two steps.
_CHARACTERS_A_TOKEN = 8
# To tokenise a character that may be a word of its own takes some 430 bytes, and a letter or space
# less than an eighth. So a piece may grow by many spaces, and not by as many marks behind them.
_CHEAP = np.array([code < 33 or code == 127 or chr(code).isalnum() for code in range(128)])
_DEAR = 8
# Words of so many tokens are of no use in pieces: they are longer than any that WordPiece cuts.
_GIANT_TOKENS = 256
# So many words at the end of a prefix are left out of the count, and besides as many as the longest
# added token (or what a normaliser replaces) has characters: what follows may complete it. A letter
# that is composed with its accents, or one grapheme of SentencePiece's normaliser (below 6 bytes),
# is far shorter.
_OPEN_WORDS = 16
# What a prefix says of the words before its end: these look no further than to the end of a run of
# spaces, of marks or of characters of one kind. A text behind anything else is read whole.
_NORMALIZERS = frozenset(
    {
        "BertNormalizer",
        "Lowercase",
        "NFC",
        "NFD",
        "NFKC",
        "NFKD",
        "Nmt",
        "Precompiled",
        "Prepend",
        "Strip",
        "StripAccents",
    }
)
_PRE_TOKENIZERS = frozenset(
    {
        "BertPreTokenizer",
        "ByteLevel",
        "CharDelimiterSplit",
        "Digits",
        "Metaspace",
        "Punctuation",
        "Whitespace",
        "WhitespaceSplit",
    }
)
# The only pattern in the normalisers of SentencePiece models that transformers has converted.
_SPACES = " {2,}"
_PROBE = "a 1 . 一"


class Tokens(NamedTuple):
    """One tokenised text or pair: what the model is fed, and whether it was cut to its length."""

    ids: list[int]
    type_ids: list[int]
    truncated: bool


def tokenisation(tokenizer: PreTrainedTokenizerFast) -> Tokenisation:
    """Return what transformers applies when it calls a tokenizer, beside its ``tokenizer.json``."""
    side = tokenizer.truncation_side.lower()
    return Tokenisation(
        truncation_side="left" if side == "left" else "right",
        segment_ids="token_type_ids" in tokenizer.model_input_names,
        split_special_tokens=tokenizer.split_special_tokens,
        pad_token_id=tokenizer.pad_token_id or 0,
        pad_type_id=tokenizer.pad_token_type_id,
    )


def write_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write ``tokenizer.json`` as a model was trained with it; it cuts and pads nothing by itself.

    transformers applies some settings of its other files (``do_lower_case``, ``add_prefix_space``,
    added tokens) only when it loads a tokenizer.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.save(str(folder / "tokenizer.json"))


class Tokenise:
    """Turns texts into what a model is fed. Safe to call from several threads.

    The ids, the segment ids and whether a text was cut are those that transformers gives with
    ``truncation=True``, of texts of any length.

    Args:
        tokenizer: of ``tokenizer.json``; it is taken over, and cuts and pads nothing any more.
        settings: what transformers keeps beside it.
        max_length_tokens: of one example, with its special tokens.
        columns: how many texts an example has, 1 or 2.

    Raises:
        ModelError: a post-processor that does more than to put special tokens around texts, or
            leaves no room for them.
    """

    def __init__(
        self, tokenizer: Tokenizer, settings: Tokenisation, max_length_tokens: int, columns: int
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = settings.split_special_tokens
        self.tokenizer, self.settings = tokenizer, settings
        self._left = settings.truncation_side == "left"
        self._columns, self._max_length_tokens = columns, max_length_tokens
        self._frame = _Frame.of(tokenizer, columns)
        # Behind BERT's own post-processor this faster method gives both texts the same segment.
        fast = tokenizer.encode_batch_fast([(_PROBE, _PROBE) if columns > 1 else _PROBE])[0]
        self._knows_segments = fast.type_ids == self._frame.probe.type_ids
        self._room = max_length_tokens - self._frame.special
        if self._room < 1:
            raise ModelError(
                f"a length of {max_length_tokens} tokens leaves no room for a text beside "
                f"{self._frame.special} special tokens",
                hint="set data.max_length_tokens to more",
            )
        self._local, self._open_words = _locality(tokenizer, left=self._left)
        self.short_characters = _CHARACTERS_A_TOKEN * (max_length_tokens + self._open_words)

    def __call__(self, examples: Sequence[tuple[str, ...]]) -> list[Tokens]:
        """Tokenise texts (one column each) or pairs (two)."""
        found, short, characters = list[Tokens](), list[tuple[str, ...]](), 0
        for example in examples:
            size = sum(map(len, example))
            long = size > self.short_characters
            if short and (long or characters + size > CHUNK_CHARACTERS):
                found += self._read_short(short)
                short, characters = [], 0
            if long:  # one by one: its memory is gone before the next is looked at
                found.append(self._fit(self._read_enough(example)))
            else:
                short.append(example)
                characters += size
        return found + self._read_short(short) if short else found

    def bytes_at_once(self, examples: Sequence[tuple[str, ...]]) -> int:
        """Return how many bytes of UTF-8 are tokenised at a time at most, before it is done.

        Long texts may have to be read whole, but come one at a time; short ones come in chunks.
        """
        short, long = 0, [0]
        for example in examples:
            # A caller may ask before it knows that these are texts at all.
            size = sum(len(text.encode(errors="replace")) for text in example)
            if sum(map(len, example)) > self.short_characters:
                long.append(size)
            else:
                short += size
        return max(min(short, 4 * CHUNK_CHARACTERS), *long)

    def _read_short(self, examples: list[tuple[str, ...]]) -> list[Tokens]:
        """Tokenise texts as a whole, on all cores."""
        # The same ids as encode_batch, without the places of the tokens in the text.
        encodings = self.tokenizer.encode_batch_fast(
            examples if self._columns > 1 else [text for (text,) in examples]
        )
        most, segments = self._max_length_tokens, self.settings.segment_ids
        found = []
        for encoding in encodings:
            ids = encoding.ids
            if len(ids) <= most and (self._knows_segments or not segments):
                types = encoding.type_ids if segments else [0] * len(ids)
                found.append(Tokens(ids, types, truncated=False))
            else:
                columns = encoding.sequence_ids
                found.append(
                    self._fit(
                        [
                            self._column(
                                [i for i, c in zip(ids, columns, strict=True) if c == column],
                                whole=True,
                            )
                            for column in range(self._columns)
                        ]
                    )
                )
        return found

    def _read_enough(self, example: tuple[str, ...]) -> list[_Column]:
        """Tokenise so much of each text as decides what is kept of all of them."""
        sizes = [self.short_characters] * len(example)
        columns = [self._read(text, size) for text, size in zip(example, sizes, strict=True)]
        while not _is_settled(columns, self._room):
            part = min(
                (place for place, column in enumerate(columns) if not column.whole),
                key=lambda place: columns[place].count,
            )
            text = example[part]
            giant = columns[part].open_tokens > _GIANT_TOKENS * self._open_words
            sizes[part] = len(text) if giant else _twice(text, sizes[part], left=self._left)
            columns[part] = self._read(text, sizes[part])
        return columns

    def _read(self, text: str, characters: int) -> _Column:
        """Tokenise the part of a text that is kept for certain, of about so many characters."""
        if len(text) <= characters or not self._local:
            (encoding,) = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)
            return self._column(encoding.ids, whole=True)
        piece = text[-characters:] if self._left else text[:characters]
        encoding = self.tokenizer.encode(piece, add_special_tokens=False)
        spans = encoding.offsets
        first, last = _closed(
            [-1 if word is None else word for word in encoding.word_ids],
            lambda place: _is_blank(piece[slice(*spans[place])]),
            self._open_words,
            left=self._left,
        )
        ids = encoding.ids[first:last]
        return self._column(ids, whole=False, open_tokens=len(encoding.ids) - len(ids))

    def _column(self, ids: list[int], *, whole: bool, open_tokens: int = 0) -> _Column:
        return _Column(self._cut(ids, self._room), len(ids), whole, open_tokens)

    def _cut(self, ids: list[int], most: int) -> list[int]:
        """Return the tokens of a text that are kept if it may have so many."""
        if len(ids) <= most:
            return ids
        return ids[len(ids) - most :] if self._left else ids[:most]

    def _fit(self, columns: list[_Column]) -> Tokens:
        """Cut texts to the length of the model, and put the special tokens around them."""
        counts = [column.count for column in columns]
        contents, truncated = [column.ids for column in columns], sum(counts) > self._room
        if truncated and len(columns) > 1:
            kept = _longest_first(counts, self._room)
            contents = [self._cut(ids, most) for ids, most in zip(contents, kept, strict=True)]
        ids, types = self._frame.around(contents)
        return Tokens(ids, types if self.settings.segment_ids else [0] * len(ids), truncated)


@dataclass(frozen=True, slots=True)
class _Column:
    """The tokens of one text: the ids that may be kept, and how many tokens it has.

    Unless it is ``whole`` it has at least ``count`` of them, and ``open_tokens`` were read besides
    that may turn out otherwise.
    """

    ids: list[int]
    count: int
    whole: bool
    open_tokens: int


@dataclass(frozen=True, slots=True)
class _Frame:
    """What the post-processor puts around texts: ids with types, and None where a text goes."""

    parts: tuple[tuple[list[int] | None, int], ...]
    special: int
    probe: Encoding

    @classmethod
    def of(cls, tokenizer: Tokenizer, columns: int) -> _Frame:
        """Learn it from what the tokenizer makes of a text of some tokens."""
        probe = tokenizer.encode(_PROBE, add_special_tokens=False).ids
        encoding = tokenizer.encode(*[_PROBE] * columns)
        parts = list[tuple[list[int] | None, int]]()
        contents, before = list[list[int]](), None
        for token, kind, sequence in zip(
            encoding.ids, encoding.type_ids, encoding.sequence_ids, strict=True
        ):
            if sequence is None:
                parts.append(([token], kind))
            elif sequence != before:
                parts.append((None, kind))
                contents.append([token])
            else:
                contents[-1].append(token)
            before = sequence
        if not probe or contents != [probe] * columns:
            raise ModelError(
                f"tokenizer.json: expected a post-processor that puts special tokens around "
                f"{columns} text(s), found {contents} where the texts should be {probe}",
                hint="use a tokenizer with one of BERT's or RoBERTa's templates",
            )
        return cls(tuple(parts), sum(ids is not None for ids, _ in parts), encoding)

    def around(self, contents: Sequence[list[int]]) -> tuple[list[int], list[int]]:
        """Return the ids and the segment ids of texts with their special tokens."""
        ids, types, texts = list[int](), list[int](), iter(contents)
        for special, kind in self.parts:
            part = next(texts) if special is None else special
            ids += part
            types += [kind] * len(part)
        return ids, types


def _longest_first(counts: Sequence[int], room: int) -> list[int]:
    """Return how many tokens of two texts are kept, as ``longest_first`` of tokenizers says it."""
    short, long = sorted(counts)
    # Of two that are longer than the room the library looks at the shorter one alone.
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short, long = room // 2, room - room // 2
    return [long, short] if counts[0] > counts[1] else [short, long]


def _is_settled(columns: Sequence[_Column], room: int) -> bool:
    """Tell whether the rest of texts that are not read whole changes nothing."""
    parts = [column.count for column in columns if not column.whole]
    if any(count <= room for count in parts):
        return False
    if not parts or len(columns) == 1 or room % 2 == 0:
        return True
    # Two long texts share the room, and the longer one has the odd token: which is it?
    whole = [column.count for column in columns if column.whole]
    return bool(whole) and parts[0] > whole[0]


def _twice(text: str, characters: int, *, left: bool) -> int:
    """Return how long a piece of a text is that takes about twice the memory of a shorter one."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")[:: -1 if left else 1]
    cheap = (codes < len(_CHEAP)) & _CHEAP[codes % len(_CHEAP)]
    costs = np.cumsum(np.where(cheap, 1, _DEAR))
    return int(np.searchsorted(costs, 2 * costs[characters - 1])) + 1


def _closed(
    words: list[int], is_blank: Callable[[int], bool], open_words: int, *, left: bool
) -> tuple[int, int]:
    """Return the range of the tokens of a piece of text that no text beside it can change.

    The words nearest to the cut are open, then the blank ones next to them (an added token may take
    the spaces before or behind it along), and one more that may begin or end with a space.

    Args:
        words: the word of each token, ascending.
        is_blank: whether there is nothing to see of the token at a place.
        open_words: how many words at least are open.
        left: the text goes on before the piece, and not behind it.
    """
    count = len(words)
    if left:
        mirrored = [-word for word in reversed(words)]
        _, last = _closed(
            mirrored, lambda place: is_blank(count - 1 - place), open_words, left=False
        )
        return count - last, count
    order = list(dict.fromkeys(words))
    if len(order) <= open_words:
        return 0, 0
    last = bisect_left(words, order[-open_words])
    while last and is_blank(last - 1):
        last -= 1
    return 0, bisect_left(words, words[last - 1]) if last else 0


def _is_blank(text: str) -> bool:
    """Tell whether a text is nothing but spaces, control characters and accents."""
    return all(unicodedata.category(character)[0] in "CMZ" for character in text)


def _components(component: Any, key: str) -> list[dict[str, Any]]:
    """Return the parts that a normaliser or pre-tokenizer consists of; ``key`` of a sequence."""
    if component is None:
        return []
    waiting, found = [json.loads(component.__getstate__())], list[dict[str, Any]]()
    while waiting:
        part = waiting.pop()
        if part["type"] == "Sequence":
            waiting += part[key]
        else:
            found.append(part)
    return found


def _added(tokenizer: Tokenizer) -> set[str]:
    """Return the added tokens, as they are written and as the normaliser makes them."""
    contents = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    if tokenizer.normalizer is not None:
        contents |= {tokenizer.normalizer.normalize_str(content) for content in contents}
    return contents


def _locality(tokenizer: Tokenizer, *, left: bool) -> tuple[bool, int]:
    """Tell whether the tokens of a piece of text are those of the text, but for its open words.

    And return how many words are open.
    """
    contents, local = _added(tokenizer), True
    for part in _components(tokenizer.normalizer, "normalizers"):
        if part["type"] == "Replace":
            pattern = part["pattern"]
            contents |= {pattern["String"]} if "String" in pattern else set()
            local &= pattern.get("Regex", _SPACES) == _SPACES
        else:
            local &= part["type"] in _NORMALIZERS
    cuts = _components(tokenizer.pre_tokenizer, "pretokenizers")
    local &= bool(cuts) and all(part["type"] in _PRE_TOKENIZERS for part in cuts)
    # What is searched from left to right, and may overlap with itself, is found at other places by
    # who begins later: `aa` in a row of an odd number of them.
    local &= not (left and _overlap(contents))
    return local, _OPEN_WORDS + max(map(len, contents), default=0)


def _overlap(contents: set[str]) -> bool:
    """Tell whether one of these may begin inside of another; rows of spaces alone do no harm."""
    seen = {content for content in contents if content.strip()}

    def starts(of: set[str]) -> set[str]:
        return {content[:end] for content in of for end in range(1, len(content))}

    def ends(of: set[str]) -> set[str]:
        return {content[start:] for content in of for start in range(1, len(content))}

    return bool(starts(seen) & ends(contents) or ends(seen) & starts(contents))
