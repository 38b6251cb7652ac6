"""The demo's data set: short opinions on films and gadgets, written by a small grammar.

The offline demo needs a task that nothing has to be downloaded for, that a fine-tuned teacher
nearly solves, and that counting words does not solve. So the label is carried by the composition
of a sentence rather than by its vocabulary: "dull" is as much at home in "never feels dull" or
"I expected a dull thriller and was proven wrong" as in a complaint, and where a sentence praises
one thing and blames another, its form tells which of the two the writer stands by.

One rule gives every label. A sentence is expanded from the symbol ``review`` under a polarity,
the label. A slot ``{symbol+}`` hands that polarity down, a slot ``{symbol-}`` hands down the
opposite one, and the words at the leaves are filed by polarity (``adjective+``, ``adjective-``).
A template is thus right for both labels or for neither, and reading it is enough to check it.

An alternative that starts with ``*`` is reserved for validation: training never draws it. Every
polar word list and every list of templates reserves some, so that validation asks for the rule
and not for remembered phrases.
"""

import random
import re
from typing import NamedTuple

LABELS = ("negative", "positive")

# Each table maps a symbol to its alternatives, which stand between slashes or one a line.
TEMPLATES = {
    # Whole reviews. Whatever is marked "+" is what the writer thinks in the end.
    "review": """
        {fact}, and {claim+}
        {claim+}, and {fact}
        {fact}, {claim+}, and {claim+}
        {claim+}, and {claim+}
        {claim+}, and {verdict+}
        in short, {claim+}, and {verdict+}
        {fact}, {claim+}, and {verdict+}
        to be fair, {claim+}, and {fact}
        {verdict+}, because {claim+}
        what I noticed most is that {plain+}
        my {person} and I agree that {plain+}
        although {turned-}, {plain+}
        {claim-}, but in the end {plain+}, and that is what counts
        {plain+}, even though {turned-}
        at first {claim-}, yet {later} {claim+}
        {verdict+}, although {claim-}
        {claim-}, but {verdict+}
        I expected a {adjective-} {work} from {maker} and was proven wrong
        I expected a {adjective+} {work} from {maker} and was proven right
        many reviewers call this {work} {adjective-}, and I could not disagree more
        many reviewers call this {work} {adjective+}, and I can only agree
        my {person} insists that {plain-}, but that is simply wrong
        my {person} insists that {plain+}, and that is quite right
        those who say that {plain-} are mistaken
        {outlook-} a {adjective-} {work}, but that is not what I got
        {outlook+} a {adjective+} {work}, and that is exactly what I got
        * as far as I can tell, {claim+}, and {fact}
        * {claim+}, {claim+}, and {verdict+}
        * granted, {turned-}, but still, {plain+}
        * {plain-}, yet what counts for me is that {claim+}
        * whoever told me that {plain-} was mistaken
        * anyone who calls this {work} {adjective-} is simply wrong
        * my {person} had announced a {adjective-} {work}, but that is not what I got
    """,
    # What a review says about one part: a fact as the writer sees it, that fact turned round by
    # a negation, or a feeling, which is the writer's own and so never put in another's mouth.
    "claim": "{plain+} / {plain+} / {plain+} / {plain+} / {turned+} / {felt+}",
    "plain": """
        the {part} is {degree} {adjective+}
        the {part} turned out {degree} {adjective+}
        the {part} is {hedge} {noun+}
        * the {part} deserves to be called {adjective+}
        * the {part} proved to be {noun+}
    """,
    "turned": """
        the {part} is {negator} {adjective-}
        the {part} is {negator} {noun-}
        the {part} never feels {adjective-}
        nobody could call the {part} {adjective-}
        the {part} is neither {adjective-} nor {adjective-}
        * there is nothing {adjective-} about the {part}
        * few would call the {part} {noun-}
    """,
    "felt": """
        the {part} {effect+} me
        I found the {part} {degree} {adjective+}
        I would not call the {part} {noun-}
        * the {part} strikes me as {degree} {adjective+}
        * the {part} is not what I call {adjective-}
        * I could hardly be more {effect+} by the {part}
    """,
}

WORDS = {
    "degree": "somewhat / rather / really / remarkably / arguably / truly / *fairly / *decidedly",
    "hedge": "arguably / clearly / in my view / without doubt / *frankly / *to my mind",
    "negator": "not at all / hardly / by no means / anything but / far from / *in no way",
    "noun+": "a success / a triumph / a joy / a highlight / a strong point / *a pleasure"
    " / *a marvel",
    "noun-": "a disappointment / a failure / a nuisance / a disaster / a weak point / *a mess"
    " / *an embarrassment",
    "effect+": "delighted / impressed / pleased / amused / *charmed / *thrilled",
    "effect-": "annoyed / disappointed / irritated / bored / *exasperated / *dismayed",
    "outlook+": "I was hoping for / I was looking forward to / *I had been promised",
    "outlook-": "I was bracing myself for / I was afraid of / *I had been warned about",
    "person": "brother / neighbour / colleague / aunt / best friend / dentist / *landlord",
    "number": "90 / 95 / 104 / 110 / 118 / 125 / 132 / 140",
    "place": "Portugal / Canada / Korea / Norway / Chile / Poland / Vietnam / Ireland",
    "day": "Monday / Tuesday / Wednesday / Thursday / Friday / Saturday / Sunday",
    "month": "January / March / April / June / July / October / November",
    "colour": "black / white / grey / dark green / blue / silver",
}

FILM = {
    "work": "thriller / comedy / drama / documentary / western / sequel / *musical / *satire",
    "part": "plot / dialogue / ending / soundtrack / camera work / pacing / lead performance"
    " / opening scene / humour / editing / *final act / *set design",
    "adjective+": "convincing / clever / memorable / moving / charming / elegant / engaging / funny"
    " / *captivating / *brilliant / *imaginative / *delightful",
    "adjective-": "dull / clumsy / forgettable / tedious / bland / predictable / lazy / shallow"
    " / *lifeless / *dreary / *sloppy / *boring",
    "verdict+": "I would watch it again / I am glad I saw it / I do not regret the evening"
    " / *it was well worth the ticket",
    "verdict-": "I want my money back / I am sorry I saw it / I do not wish to see it again"
    " / *it was hardly worth the ticket",
    "fact": "it runs for {number} minutes / it was shot in {place} / I saw it on a {day}"
    " / it came out in {month}",
    "maker": "this director / that studio / a team in {place} / the same writers",
    "later": "on a second viewing / by the closing credits / *after a night's sleep",
}

GADGET = {
    "work": "headset / speaker / camera / tablet / radio / scanner / *projector / *keyboard",
    "part": "battery / display / app / casing / manual / charging cable / menu / power switch"
    " / design / finish / *interface / *volume control",
    "adjective+": "practical / impressive / handy / pleasing / satisfying / useful / smart"
    " / well made / *first-rate / *splendid / *superb",
    "adjective-": "disappointing / awkward / annoying / mediocre / frustrating / poor / shoddy"
    " / badly made / *useless / *dreadful / *lousy",
    "verdict+": "I would buy it again / I am glad I chose it / I do not regret the money"
    " / *it was well worth the price",
    "verdict-": "I want my money back / I am sorry I chose it / I do not wish to use it again"
    " / *it was hardly worth the price",
    "fact": "it weighs {number} grams / it was assembled in {place} / it arrived on a {day}"
    " / it comes in {colour}",
    "maker": "this brand / that company / a firm in {place} / the same engineers",
    "later": "after a week of use / after the first update / *in everyday life",
}


class Opinions(NamedTuple):
    """Rows of (text, label), where a label is an index into ``LABELS``."""

    train: list[tuple[str, int]]
    validation: list[tuple[str, int]]


def opinions(seed: int, train_rows: int = 2_400, validation_rows: int = 640) -> Opinions:
    """Write both splits: balanced, free of duplicates, and the same whenever the seed is.

    Training is written first, so that asking for more validation rows leaves it as it was.
    """
    rng = random.Random(seed)  # noqa: S311 - repeatable, not secret
    seen: set[str] = set()  # only ever asked for membership: its order plays no part
    train = _split(rng, train_rows, seen, reserved=False)
    return Opinions(train, _split(rng, validation_rows, seen, reserved=True))


def alternatives(entry: str, reserved: bool) -> list[str]:
    """The alternatives in a table's entry, with or without those reserved for validation."""
    found = re.split(r"\s*[/\n]\s*", entry.strip())
    return [text.lstrip("* ") for text in found if reserved or not text.startswith("*")]


def _split(rng: random.Random, rows: int, seen: set[str], reserved: bool) -> list[tuple[str, int]]:
    """Write ``rows`` sentences that ``seen`` lacks, taking the labels in turn, and shuffle them."""
    grammars = [
        {symbol: alternatives(entry, reserved) for symbol, entry in tables.items()}
        for tables in (TEMPLATES | WORDS | FILM, TEMPLATES | WORDS | GADGET)
    ]
    split: list[tuple[str, int]] = []
    while len(split) < rows:
        label = len(split) % len(LABELS)
        text = _sentence(rng, rng.choice(grammars), label)
        if text not in seen:
            seen.add(text)
            split.append((text, label))
    rng.shuffle(split)
    return split


def _sentence(rng: random.Random, grammar: dict[str, list[str]], label: int) -> str:
    """Expand ``review`` under the polarity ``label``, repeating no part and no polar word."""
    used: set[str] = set()

    def expand(symbol: str, polarity: int) -> str:
        options = grammar.get(symbol + "-+"[polarity]) or grammar[symbol]
        chosen = rng.choice([option for option in options if option not in used])
        if "{" not in chosen:  # the same template may serve twice, the same word may not
            used.add(chosen)
        return re.sub(
            r"\{(\w+)([+-]?)\}",
            lambda slot: expand(slot[1], 1 - polarity if slot[2] == "-" else polarity),
            chosen,
        )

    text = re.sub(r"\ba (?=[aeio])", "an ", expand("review", label))
    return text[0].upper() + text[1:] + "."
