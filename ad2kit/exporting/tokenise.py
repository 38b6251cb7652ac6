"""Tokenisation of texts, for the gate and for serving.

``tokenizer.json`` does not hold all settings. transformers stores elsewhere on which side a text is
cut, and whether the model gets segment ids. :func:`tokenisation` reads these settings from the
tokenizer of the training, the artefact stores them, and :class:`Tokenise` applies them.

A long text is not tokenised as a whole, because the tokenizers library would keep a piece for every
``max_length_tokens`` of it: 300 MB for a text of 1 MB. A fixed number of characters is not enough,
because a normaliser may drop any number of them. So a prefix is tokenised, and then one that needs
twice the memory, until it has more tokens than the model reads. The last words of a prefix are not
counted, because the following text may change them. If the tokenizer cuts on the left, a suffix is
tokenised, and its first words are not counted.

A long text that is read in windows becomes several :class:`Tokens`, one after the other in the flat
list of all texts. Only as many tokens of it are read as show that it has too many windows.
"""

from __future__ import annotations

import json
import unicodedata
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from ad2kit.data import windows
from ad2kit.exporting.records import Tokenisation
from ad2kit.run.errors import MissingExtra, ModelError, TextTooLong

try:
    from tokenizers import Encoding, Tokenizer
except ModuleNotFoundError as error:
    raise MissingExtra(error.name or "tokenizers", extra="cpu") from error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from transformers import PreTrainedTokenizerFast

    from ad2kit.run.sections import TextLength

    Refuse = Callable[[int, str], None]

CHUNK_CHARACTERS = 65_536
"""Short texts are tokenised together up to this many characters, on all cores."""

# English has about five characters per token. A text with more than eight needs a second step.
_CHARACTERS_A_TOKEN = 8
# A character that may be a word of its own (dear) takes about 430 bytes to tokenise; a letter, a
# digit or a space (cheap) takes less than an eighth. So a piece may grow by many cheap characters,
# but only by an eighth as many dear ones.
_CHEAP = np.array([code < 33 or code == 127 or chr(code).isalnum() for code in range(128)])
_DEAR = 8
# If the uncounted words have more tokens than this on average, the text is read whole. WordPiece
# cuts no word into so many tokens.
_GIANT_TOKENS = 256
# This many words at the end of a prefix are not counted. As many words more are not counted as the
# longest added token (or pattern of a normaliser) has characters, because the following text may
# complete it. A letter with its accents, or a grapheme of SentencePiece's normaliser (below 6
# bytes), is far shorter.
_OPEN_WORDS = 16
# These normalisers and pre-tokenizers look no further than to the end of a run of spaces, of marks
# or of characters of one kind. So a prefix is enough for the words before its end. A text is read
# whole if the tokenizer has any other component.
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
    """The inputs of the model for one text, one pair, or one window of a long text.

    ``truncated`` tells whether the text was cut, and ``continues`` whether this window goes on with
    the text of the :class:`Tokens` before it.
    """

    ids: list[int]
    type_ids: list[int]
    truncated: bool
    continues: bool = False


def stop_at_long_text(position: int, reason: str) -> NoReturn:
    """Refuse a text that is too long, and with it all texts.

    Raises:
        TextTooLong: always.
    """
    raise TextTooLong(
        f"text {position}: {reason}",
        hint="shorten the text, or send its parts as texts of their own",
    )


def tokenisation(tokenizer: PreTrainedTokenizerFast) -> Tokenisation:
    """Return the settings that transformers applies to a tokenizer beside ``tokenizer.json``."""
    side = tokenizer.truncation_side.lower()
    return Tokenisation(
        truncation_side="left" if side == "left" else "right",
        segment_ids="token_type_ids" in tokenizer.model_input_names,
        split_special_tokens=tokenizer.split_special_tokens,
        pad_token_id=tokenizer.pad_token_id or 0,
        pad_type_id=tokenizer.pad_token_type_id,
    )


def write_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the tokenizer of the training as ``tokenizer.json``, without truncation and padding.

    transformers applies some settings of its other files (``do_lower_case``, ``add_prefix_space``,
    added tokens) only when it loads a tokenizer.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.save(str(folder / "tokenizer.json"))


class Tokenise:
    """Turns texts into the inputs of a model. Safe to call from several threads.

    For texts of any length, the ids, the segment ids and the flag of a cut text equal those of
    transformers with ``truncation=True``. Windows equal those of transformers with
    ``return_overflowing_tokens=True``, ``truncation_side="right"`` and, for pairs,
    ``truncation="only_second"``.

    Args:
        tokenizer: the tokenizer of ``tokenizer.json``. This object changes it: its truncation and
            its padding are switched off.
        settings: the settings that ``tokenizer.json`` does not hold.
        length: the maximum length of one example, and what happens to a longer one.
        columns: the number of texts of an example, 1 or 2.

    Raises:
        ModelError: the post-processor does more than put special tokens around texts, or its tokens
            leave no room for a text, or for more of it than a window shares with the one before.
    """

    def __init__(
        self, tokenizer: Tokenizer, settings: Tokenisation, length: TextLength, columns: int
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = settings.split_special_tokens
        self.tokenizer = tokenizer
        self.settings = settings
        self._left = settings.truncation_side == "left" and length.long_texts == "cut"
        self._columns = columns
        self._length = length
        self._max_length_tokens = length.max_length_tokens
        self._frame = _Frame.of(tokenizer, columns)
        # With BERT's own post-processor encode_batch_fast gives both texts the same segment.
        fast_probe = tokenizer.encode_batch_fast([(_PROBE, _PROBE) if columns > 1 else _PROBE])[0]
        self._knows_segments = fast_probe.type_ids == self._frame.probe.type_ids
        self._room = length.max_length_tokens - self._frame.special
        step = self._room - length.window_overlap_tokens
        if step < 1:
            overlap = f" and {length.window_overlap_tokens} of the window before"
            raise ModelError(
                f"a length of {length.max_length_tokens} tokens leaves no room for a text beside "
                f"{self._frame.special} special tokens"
                f"{overlap if length.window_overlap_tokens else ''}",
                hint="set data.max_length_tokens to more",
            )
        # More tokens are never read of a text. For a pair in windows this is an upper bound.
        self._most = self._room + (length.max_windows - 1) * step
        self._local, self._open_words = _locality(tokenizer, left=self._left)
        most_tokens = length.max_length_tokens + self._most - self._room
        self.short_characters = _CHARACTERS_A_TOKEN * (most_tokens + self._open_words)
        if length.max_windows > 1:  # most texts are shorter than the longest that is allowed
            self.short_characters = min(self.short_characters, CHUNK_CHARACTERS)

    def __call__(
        self, examples: Sequence[tuple[str, ...]], refuse: Refuse = stop_at_long_text
    ) -> list[Tokens]:
        """Tokenise texts (one column each) or pairs (two columns), and fit them to the length.

        Args:
            examples: the texts or pairs.
            refuse: called with the position of each text that is too long, and the reason. If it
                returns, the text has no tokens in the result.
        """
        tokens: list[Tokens] = []
        chunk: list[tuple[str, ...]] = []
        chunk_size = 0
        for position, example in enumerate(examples):
            size = sum(map(len, example))
            is_long = size > self.short_characters
            if chunk and (is_long or chunk_size + size > CHUNK_CHARACTERS):
                tokens += self._read_short(chunk, position - len(chunk), refuse)
                chunk = []
                chunk_size = 0
            if is_long:  # alone, so that its memory is free before the next one is read
                tokens += self._fit(self._read_enough(example), position, refuse)
            else:
                chunk.append(example)
                chunk_size += size
        if chunk:
            tokens += self._read_short(chunk, len(examples) - len(chunk), refuse)
        return tokens

    def bytes_at_once(self, examples: Sequence[tuple[str, ...]]) -> int:
        """Return an upper bound of the bytes of UTF-8 that are tokenised at the same time.

        A long text may have to be read whole, but long texts are read one by one. Short texts are
        read in chunks.
        """
        short_bytes = 0
        long_bytes = [0]
        for example in examples:
            # The texts may be unchecked yet, and hold lone surrogates.
            size = sum(len(text.encode(errors="replace")) for text in example)
            if sum(map(len, example)) > self.short_characters:
                long_bytes.append(size)
            else:
                short_bytes += size
        return max(min(short_bytes, 4 * CHUNK_CHARACTERS), *long_bytes)

    def _read_short(
        self, examples: list[tuple[str, ...]], first: int, refuse: Refuse
    ) -> list[Tokens]:
        """Tokenise whole texts, on all cores; ``first`` is the position of the first one."""
        # encode_batch_fast gives the same ids as encode_batch, without the offsets of the tokens.
        encodings = self.tokenizer.encode_batch_fast(
            examples if self._columns > 1 else [text for (text,) in examples]
        )
        has_segments = self.settings.segment_ids
        tokens = []
        for position, encoding in enumerate(encodings, first):
            ids = encoding.ids
            fits = len(ids) <= self._max_length_tokens
            if fits and (self._knows_segments or not has_segments):
                type_ids = encoding.type_ids if has_segments else [0] * len(ids)
                tokens.append(Tokens(ids, type_ids, truncated=False))
            else:
                tokens += self._fit(self._columns_of(encoding), position, refuse)
        return tokens

    def _columns_of(self, encoding: Encoding) -> list[_Column]:
        """Return the columns of an encoded example, without their special tokens."""
        pairs = list(zip(encoding.ids, encoding.sequence_ids, strict=True))
        return [
            self._column([token for token, sequence in pairs if sequence == column], whole=True)
            for column in range(self._columns)
        ]

    def _read_enough(self, example: tuple[str, ...]) -> list[_Column]:
        """Tokenise as much of each text as decides which tokens of all texts are kept."""
        sizes = [self.short_characters] * len(example)
        columns = [self._read(text, size) for text, size in zip(example, sizes, strict=True)]
        while not self._is_settled(columns):
            shortest = min(
                (index for index, column in enumerate(columns) if not column.whole),
                key=lambda index: columns[index].count,
            )
            text = example[shortest]
            if columns[shortest].open_tokens > _GIANT_TOKENS * self._open_words:
                sizes[shortest] = len(text)
            else:
                sizes[shortest] = _twice(text, sizes[shortest], left=self._left)
            columns[shortest] = self._read(text, sizes[shortest])
        return columns

    def _read(self, text: str, characters: int) -> _Column:
        """Tokenise a piece of a text of ``characters``, and keep the tokens that are certain."""
        if len(text) <= characters or not self._local:
            (encoding,) = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)
            return self._column(encoding.ids, whole=True)
        piece = text[-characters:] if self._left else text[:characters]
        encoding = self.tokenizer.encode(piece, add_special_tokens=False)
        spans = encoding.offsets
        first, last = _closed(
            [-1 if word is None else word for word in encoding.word_ids],
            lambda index: _is_blank(piece[slice(*spans[index])]),
            self._open_words,
            left=self._left,
        )
        ids = encoding.ids[first:last]
        return self._column(ids, whole=False, open_tokens=len(encoding.ids) - len(ids))

    def _is_settled(self, columns: Sequence[_Column]) -> bool:
        """Tell whether the unread rest of the texts can change nothing."""
        if self._length.long_texts == "cut":
            return _is_settled(columns, self._room)
        partial = [column for column in columns if not column.whole]
        return not partial or any(column.count > self._most for column in partial)

    def _column(self, ids: list[int], *, whole: bool, open_tokens: int = 0) -> _Column:
        return _Column(self._cut(ids, self._most), len(ids), whole, open_tokens)

    def _cut(self, ids: list[int], most: int) -> list[int]:
        """Return at most ``most`` tokens of a text; the truncation side says which are cut off."""
        if len(ids) <= most:
            return ids
        return ids[len(ids) - most :] if self._left else ids[:most]

    def _fit(self, columns: list[_Column], position: int, refuse: Refuse) -> list[Tokens]:
        """Fit a text or a pair to the length of the model, and put the special tokens around it."""
        counts = [column.count for column in columns]
        contents = [column.ids for column in columns]
        is_long = sum(counts) > self._room
        if is_long and self._length.long_texts != "cut":
            return self._windows(columns, position, refuse)
        if is_long and len(columns) > 1:
            kept_counts = _longest_first(counts, self._room)
            contents = [
                self._cut(ids, count) for ids, count in zip(contents, kept_counts, strict=True)
            ]
        return [self._framed(contents, truncated=is_long)]

    def _windows(self, columns: list[_Column], position: int, refuse: Refuse) -> list[Tokens]:
        """Return the windows of a long text, or of the second text of a pair; or refuse it."""
        *earlier, last = columns
        room = self._room - sum(column.count for column in earlier)
        reason = self._too_long(columns, room)
        if reason:
            refuse(position, reason)
            return []
        before = [column.ids for column in earlier]
        parts = windows.cut(last.ids, room, self._length.window_overlap_tokens)
        return [
            self._framed([*before, part], truncated=False, continues=index > 0)
            for index, part in enumerate(parts)
        ]

    def _too_long(self, columns: list[_Column], room: int) -> str:
        """Return the reason to refuse a long text whose windows have so much room; "" if none."""
        length = self._length
        overlap = length.window_overlap_tokens
        at_least = "" if all(column.whole for column in columns) else "at least "
        if length.max_windows == 1:
            tokens = sum(column.count for column in columns) + self._frame.special
            return f"expected at most {length.max_length_tokens} tokens, found {at_least}{tokens}"
        if room <= overlap:
            return (
                "expected a first text that leaves room for the second in "
                f"{length.max_length_tokens} tokens, found {at_least}{columns[0].count} tokens"
            )
        count = windows.window_count(columns[-1].count, room, overlap)
        if count <= length.max_windows:
            return ""
        return (
            f"expected at most {length.max_windows} windows of {length.max_length_tokens} tokens, "
            f"found {at_least}{count}"
        )

    def _framed(
        self, contents: Sequence[list[int]], *, truncated: bool, continues: bool = False
    ) -> Tokens:
        """Put the special tokens around texts."""
        ids, type_ids = self._frame.around(contents)
        if not self.settings.segment_ids:
            type_ids = [0] * len(ids)
        return Tokens(ids, type_ids, truncated, continues)


@dataclass(frozen=True, slots=True)
class _Column:
    """The tokens of one text: the ids that may be kept, and the number of its tokens.

    If the text was read ``whole``, ``count`` is the number of its tokens. Otherwise it has at least
    ``count`` tokens, and ``open_tokens`` more were read that the rest of the text may change.
    """

    ids: list[int]
    count: int
    whole: bool
    open_tokens: int


@dataclass(frozen=True, slots=True)
class _Frame:
    """The special tokens that the post-processor puts around texts.

    Each part has ids, or None in the place of a text, and the segment id of the part. ``special``
    is the number of special tokens, and ``probe`` the encoded probe with them.
    """

    parts: tuple[tuple[list[int] | None, int], ...]
    special: int
    probe: Encoding

    @classmethod
    def of(cls, tokenizer: Tokenizer, columns: int) -> _Frame:
        """Derive the frame from the encoding of a probe.

        Raises:
            ModelError: the post-processor changes the tokens of the texts.
        """
        probe = tokenizer.encode(_PROBE, add_special_tokens=False).ids
        encoding = tokenizer.encode(*[_PROBE] * columns)
        parts: list[tuple[list[int] | None, int]] = []
        contents: list[list[int]] = []
        previous_sequence = None
        for token, type_id, sequence in zip(
            encoding.ids, encoding.type_ids, encoding.sequence_ids, strict=True
        ):
            if sequence is None:
                parts.append(([token], type_id))
            elif sequence != previous_sequence:
                parts.append((None, type_id))
                contents.append([token])
            else:
                contents[-1].append(token)
            previous_sequence = sequence
        if not probe or contents != [probe] * columns:
            raise ModelError(
                f"tokenizer.json: expected a post-processor that puts special tokens around "
                f"{columns} text(s), found {contents} where the texts should be {probe}",
                hint="use a tokenizer with one of BERT's or RoBERTa's templates",
            )
        return cls(tuple(parts), sum(ids is not None for ids, _ in parts), encoding)

    def around(self, contents: Sequence[list[int]]) -> tuple[list[int], list[int]]:
        """Return the ids and the segment ids of texts with their special tokens."""
        ids: list[int] = []
        type_ids: list[int] = []
        remaining = iter(contents)
        for special, type_id in self.parts:
            part = next(remaining) if special is None else special
            ids += part
            type_ids += [type_id] * len(part)
        return ids, type_ids


def _longest_first(counts: Sequence[int], room: int) -> list[int]:
    """Return the number of kept tokens of two texts, by the strategy ``longest_first``.

    The rule is that of the tokenizers library.
    """
    short, long = sorted(counts)
    # If both are longer than the room, the library considers the shorter one alone.
    long = short if short > room else max(short, room - short)
    if short + long > room:
        short, long = room // 2, room - room // 2
    return [long, short] if counts[0] > counts[1] else [short, long]


def _is_settled(columns: Sequence[_Column], room: int) -> bool:
    """Tell whether the unread rest of the texts cannot change which tokens are kept."""
    partial_counts = [column.count for column in columns if not column.whole]
    if any(count <= room for count in partial_counts):
        return False
    if not partial_counts or len(columns) == 1 or room % 2 == 0:
        return True
    # Two long texts share the room, and the longer one gets the odd token. So the longer text has
    # to be known.
    whole_counts = [column.count for column in columns if column.whole]
    return bool(whole_counts) and partial_counts[0] > whole_counts[0]


def _twice(text: str, characters: int, *, left: bool) -> int:
    """Return the length of a piece that takes about twice the memory of one of ``characters``."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")[:: -1 if left else 1]
    is_cheap = (codes < len(_CHEAP)) & _CHEAP[codes % len(_CHEAP)]
    costs = np.cumsum(np.where(is_cheap, 1, _DEAR))
    return int(np.searchsorted(costs, 2 * costs[characters - 1])) + 1


def _closed(
    words: list[int], is_blank: Callable[[int], bool], open_words: int, *, left: bool
) -> tuple[int, int]:
    """Return the range of the closed tokens of a piece: the rest of the text cannot change them.

    The words nearest to the cut are open. So are the blank words next to them, because an added
    token may take the spaces around it, and one word more, which may begin or end with a space.

    Args:
        words: the number of the word of each token, in ascending order.
        is_blank: tells whether the token at an index has no visible character.
        open_words: the least number of open words.
        left: whether the rest of the text is before the piece, and not after it.
    """
    count = len(words)
    if left:
        mirrored = [-word for word in reversed(words)]
        _, last = _closed(
            mirrored, lambda index: is_blank(count - 1 - index), open_words, left=False
        )
        return count - last, count
    distinct_words = list(dict.fromkeys(words))
    if len(distinct_words) <= open_words:
        return 0, 0
    last = bisect_left(words, distinct_words[-open_words])
    while last and is_blank(last - 1):
        last -= 1
    return 0, bisect_left(words, words[last - 1]) if last else 0


def _is_blank(text: str) -> bool:
    """Tell whether a text has only spaces, control characters and accents."""
    return all(unicodedata.category(character)[0] in "CMZ" for character in text)


def _components(component: Any, key: str) -> list[dict[str, Any]]:
    """Return the parts of a normaliser or pre-tokenizer; a sequence holds its parts at ``key``."""
    if component is None:
        return []
    stack = [json.loads(component.__getstate__())]
    parts: list[dict[str, Any]] = []
    while stack:
        part = stack.pop()
        if part["type"] == "Sequence":
            stack += part[key]
        else:
            parts.append(part)
    return parts


def _added_tokens(tokenizer: Tokenizer) -> set[str]:
    """Return the added tokens, as they are written and in their normalised form."""
    contents = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    if tokenizer.normalizer is not None:
        contents |= {tokenizer.normalizer.normalize_str(content) for content in contents}
    return contents


def _locality(tokenizer: Tokenizer, *, left: bool) -> tuple[bool, int]:
    """Return whether pieces of a text have the tokens of the text, and the number of open words.

    The open words of a piece are excepted.
    """
    patterns = _added_tokens(tokenizer)
    is_local = True
    for part in _components(tokenizer.normalizer, "normalizers"):
        if part["type"] == "Replace":
            pattern = part["pattern"]
            if "String" in pattern:
                patterns.add(pattern["String"])
            is_local &= pattern.get("Regex", _SPACES) == _SPACES
        else:
            is_local &= part["type"] in _NORMALIZERS
    pre_tokenizers = _components(tokenizer.pre_tokenizer, "pretokenizers")
    is_local &= bool(pre_tokenizers)
    is_local &= all(part["type"] in _PRE_TOKENIZERS for part in pre_tokenizers)
    # Patterns are searched from left to right. If a pattern may overlap with itself, a search that
    # begins later finds other matches, such as `aa` in an odd number of `a`.
    is_local &= not (left and _overlap(patterns))
    return is_local, _OPEN_WORDS + max(map(len, patterns), default=0)


def _overlap(patterns: set[str]) -> bool:
    """Tell whether a pattern may begin inside another; patterns of spaces alone do no harm."""
    visible_patterns = {pattern for pattern in patterns if pattern.strip()}

    def starts(texts: set[str]) -> set[str]:
        return {text[:end] for text in texts for end in range(1, len(text))}

    def ends(texts: set[str]) -> set[str]:
        return {text[start:] for text in texts for start in range(1, len(text))}

    return bool(
        starts(visible_patterns) & ends(patterns) or ends(visible_patterns) & starts(patterns)
    )
