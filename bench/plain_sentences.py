"""Does the demo's student answer what a visitor types? Plain sentences of many domains.

    python bench/plain_sentences.py [RUN]

The sentences were written before the embedded grammar (`ad2kit/data/demo_reviews.py`) got the
templates that it has now, and none of them is one of its texts: they ask what carries over from the
grammar to English. Mistakes of two teachers here said which kinds of sentences the grammar
lacked (plural subjects, plain verbs that are negated, warnings, disappointed hopes); it got them in
other words. Each was labelled by hand; 30 are negative, 30 positive. RUN is a run on the embedded
opinions, by default that of `make demo`; the variant that it ships answers. Prints what was
answered wrong, and how many are right. Exit code 1 if these are fewer than 52.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import ad2kit
from ad2kit.run.folder import run_folder
from ad2kit.run.recipe import load_recipe

NEGATIVE = (
    "bad",
    "The film was not good",
    "Don't waste your time",
    "Terrible.",
    "I hated it.",
    "The soup was cold and the waiter ignored us.",
    "We will never come back.",
    "It broke after two days.",
    "My parcel arrived three weeks late and the box was crushed.",
    "Not worth the money.",
    "The room smelled of smoke and the bed was uncomfortable.",
    "I wouldn't recommend this dentist to anyone.",
    "The app crashes every time I open it.",
    "Nice colours, but the shirt fell apart in the wash.",
    "The teacher was rude and didn't answer a single question.",
    "A waste of paper.",
    "The concert was boring.",
    "This bank doesn't care about its customers.",
    "The battery doesn't last.",
    "I couldn't finish the book.",
    "Worst holiday ever.",
    "The beach was lovely, but the hotel was awful.",
    "I expected more.",
    "The plumber never showed up and nobody picked up the phone.",
    "It isn't funny.",
    "The chips were soggy, the fish was dry and the bill was a joke.",
    "Save your money.",
    "My daughter cried because the doll's arm came off on her birthday.",
    "The instructions make no sense.",
    (
        "We waited for two hours, the doctor was in a hurry, and in the end nobody could tell us "
        "what was wrong. I am looking for another clinic."
    ),
)

POSITIVE = (
    "good",
    "Great!",
    "I loved every minute of it.",
    "The film was not bad at all.",
    "Best pizza in town.",
    "The staff were friendly and the room was spotless.",
    "You won't regret it.",
    "It does exactly what it should.",
    "My order came a day early and was well packed.",
    "Worth every penny.",
    "I can't stop listening to this album.",
    "The mechanic was honest and fixed my car in an hour.",
    "Small screen, but a wonderful phone.",
    "The book made me cry, and I have already bought the next one.",
    "Highly recommended.",
    "There is nothing to complain about.",
    "I have never had a better haircut.",
    "The course was hard, but I learned so much.",
    "Thank you for a perfect evening!",
    "The kids didn't want to leave.",
    "Easy to install and very quiet.",
    "I was worried about the size, but the shoes fit perfectly.",
    "Beautiful.",
    "The lawyer explained everything patiently.",
    "We'll be back next summer.",
    "It isn't cheap, but it is worth it.",
    "The cake was delicious.",
    "This vacuum cleaner has made my life so much easier.",
    "My son passed his exam thanks to this tutor.",
    (
        "The train was on time, the seats were comfortable, and a kind conductor helped us with "
        "our luggage. What a pleasant trip."
    ),
)

LEAST_RIGHT = 52


def main() -> None:
    """Ask the shipped student, and print its mistakes and how many are right."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="?", help="default: that of `make demo`")
    run = parser.parse_args().run or run_folder(load_recipe("demo"), Path("runs"))
    sentences = (*NEGATIVE, *POSITIVE)
    truth = ["negative"] * len(NEGATIVE) + ["positive"] * len(POSITIVE)
    predictions = ad2kit.load(run).predict(list(sentences))
    right = 0
    for text, label, said in zip(sentences, truth, predictions, strict=True):
        right += said.label == label
        if said.label != label:
            print(f"  {said.label} at {said.score:.2f}, expected {label}: {text}")
    print(f"plain sentences: {right} of {len(sentences)} right (expected at least {LEAST_RIGHT})")
    sys.exit(right < LEAST_RIGHT)


if __name__ == "__main__":
    main()
