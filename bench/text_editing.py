"""What does AD2 cost beside editing texts, the other way to give a student more to imitate?

    python bench/text_editing.py sst2-minilm data.source=../shared/data/sst2 [--threads 2]

AD2's authors call it up to 28 times faster than augmentation by text editing. That makes N copies
of each sentence (20 in TinyBERT: Jiao et al., Findings of EMNLP 2020), lets the teacher read them,
and trains the student by plain distillation on N + 1 times the rows. Three ways to edit:

- `deletion` and `swap` of random words, two of the operations of EDA (Wei and Zou, EMNLP 2019);
- `masked_lm`, TinyBERT's algorithm without its GloVe half: a language model proposes 15 words for
  each place, and in each copy a place takes one of them with probability 0.4.

This measures cost and not quality. all-MiniLM-L6-v2 has no head for masked words, so the teacher's
encoder proposes with its word embeddings as the decoder: the work of a real one, but for a dense
layer, and proposals that no one should train on. A language model larger than the teacher, which
is usual, would cost more.

The systems take turns, round by round, on the same rows; each figure is the median of the rounds.
Making the texts and the teacher's reading are paid once, the training in each epoch: `over ad2`
spreads the former over the recipe's epochs, `one epoch` charges them to one. Two things favour the
edited texts: tokenising is left out, and 21 times the rows fall into batches of more equal length
(on SST-2 they pad less by 5 % with 512 rows, by 17 % with 256, by half with 64). Ends with a line
of JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from ad2kit.data.mapped import TextRows
from ad2kit.data.splits import Split, by_length, encode
from ad2kit.models.text_model import EVALUATION_BATCH, padded
from ad2kit.run.machine import environment
from ad2kit.training.ad2 import distillation
from bench.train import Workbench, plain_ad2, run, set_up

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Edit = Callable[[str, Sequence[int]], str]
    Proposals = dict[str, list[list[str]]]

CANDIDATES, REPLACED = 15, 0.4
# Of the systems without copies, whose one epoch is too short to time.
EPOCHS = 5


def delete_words(text: str, seed: Sequence[int], share: float = 0.1) -> str:
    """Return the text without some of its words; one always stays."""
    words, generator = text.split(), np.random.default_rng(seed)
    keeps = generator.random(len(words)) >= share
    keeps[generator.integers(len(words))] |= not keeps.any()
    return " ".join(word for word, keep in zip(words, keeps, strict=True) if keep)


def swap_words(text: str, seed: Sequence[int], share: float = 0.1) -> str:
    """Return the text after some exchanges of two of its words."""
    words, generator = text.split(), np.random.default_rng(seed)
    for _ in range(max(1, round(share * len(words)))):
        one, other = generator.integers(len(words), size=2)
        words[one], words[other] = words[other], words[one]
    return " ".join(words)


def replace_words(proposals: Proposals, text: str, seed: Sequence[int]) -> str:
    """Return the text with some of its words replaced by what is proposed for their places."""
    words, generator = text.split(), np.random.default_rng(seed)
    for place in np.flatnonzero(generator.random(len(words)) < REPLACED):
        choice = proposals[text][place]
        words[place] = choice[generator.integers(len(choice))]
    return " ".join(words)


@torch.inference_mode()
def propose(bench: Workbench, split: Split) -> Proposals:
    """Return candidates for each word of each text, from one pass with that word masked."""
    teacher, tokenizer = bench.teacher, bench.teacher.tokenizer
    texts = list(dict.fromkeys(text for columns in split.texts for text in columns))
    # A place that truncation cuts off keeps its word.
    found = {text: [[word] for word in text.split()] for text in texts}
    places = [(text, place) for text in texts for place in range(len(found[text]))]
    masked = []
    for text, place in places:
        words = text.split()
        words[place] = str(tokenizer.mask_token)
        masked.append((" ".join(words),))
    length = bench.recipe.data.length
    encoded = encode(Split.of(masked, np.zeros(len(masked))), tokenizer, length)
    teacher.module.eval()
    for rows in by_length(encoded.lengths, EVALUATION_BATCH):
        inputs = padded(teacher, encoded, rows, bench.accelerator.device)
        at_mask = inputs["input_ids"] == tokenizer.mask_token_id
        states = teacher.module.base_model(**inputs).last_hidden_state
        first = states[torch.arange(len(rows)), at_mask.int().argmax(dim=1)]
        scores = first @ teacher.word_embeddings.weight.T
        scores[:, tokenizer.all_special_ids] = -torch.inf
        best = scores.topk(CANDIDATES).indices.tolist()
        for row, ids, seen in zip(rows, best, at_mask.any(dim=1).tolist(), strict=True):
            if seen:
                text, place = places[row]
                tokens = tokenizer.convert_ids_to_tokens(ids)
                found[text][place] = [token.removeprefix("##") for token in tokens]
    return found


def with_copies(split: Split, copies: int, seed: int, edit: Edit) -> Split:
    """Return the rows, then their edited copies."""
    edited = [
        tuple(edit(text, (seed, copy, row, column)) for column, text in enumerate(columns))
        for copy in range(copies)
        for row, columns in enumerate(split.texts)
    ]
    return Split(split.texts + TextRows.of(edited), np.concatenate([split.labels] * (copies + 1)))


def one_round(bench: Workbench, split: Split, copies: int) -> dict[str, tuple[float, float, float]]:
    """Return, for each system, the seconds of making texts, of reading them, and of an epoch."""
    augmented = partial(with_copies, split, copies, bench.recipe.seed)
    make: dict[str, Callable[[], Split]] = {
        "ad2": lambda: split,
        "kd": lambda: split,
        "deletion": lambda: augmented(delete_words),
        "swap": lambda: augmented(swap_words),
        "masked_lm": lambda: augmented(partial(replace_words, propose(bench, split))),
    }
    seconds = {}
    for name, making in make.items():
        start = time.perf_counter()
        rows = making()
        made_s = time.perf_counter() - start
        logits, read_s = bench.logits(bench.teacher, rows)
        epochs = EPOCHS if len(rows) == len(split) else 1
        changes = {"epochs": epochs} if name == "ad2" else {"epochs": epochs, "alpha": 0.0}
        settings = plain_ad2(bench.recipe, **changes)
        objective = distillation(bench.accelerator, settings)
        trained_s = run(bench.updates(bench.student(), rows, logits, objective, settings)) / epochs
        seconds[name] = (made_s, read_s, trained_s)
    return seconds


def main() -> None:
    """Print the costs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=512, help="training sentences")
    parser.add_argument("--copies", type=int, default=20, help="of each sentence")
    parser.add_argument("--rounds", type=int, default=2)
    options, bench = set_up(parser)
    teacher, hidden = bench.teacher, bench.teacher.module.config.hidden_size
    if not teacher.tokenizer.mask_token or teacher.word_embeddings.embedding_dim != hidden:
        parser.error("needs a teacher with a mask token, and word embeddings as wide as its layers")
    split, epochs = bench.rows(options.rows), bench.recipe.distill.epochs
    rounds = [one_round(bench, split, options.copies) for _ in range(options.rounds)]
    print(
        f"\n{len(split)} sentences, {options.copies} copies of each; seconds\n"
        f"{'system':<11}{'make':>8}{'teacher':>9}{'epoch':>9}{'ms a sentence':>15}"
        f"{f'over ad2, {epochs} epochs':>20}{'one epoch':>11}"
    )
    found: dict[str, dict[str, float]] = {}
    for name in rounds[0]:
        made_s, read_s, trained_s = np.median([each[name] for each in rounds], axis=0).tolist()
        once, spread = made_s + read_s + trained_s, (made_s + read_s) / epochs + trained_s
        found[name] = one = {
            "make_s": made_s,
            "teacher_s": read_s,
            "train_epoch_s": trained_s,
            "epoch_s": spread,
            "first_epoch_s": once,
            "sentence_s": spread / len(split),
        }
        one["over_ad2"] = spread / found["ad2"]["epoch_s"]
        one["first_epoch_over_ad2"] = once / found["ad2"]["first_epoch_s"]
        print(
            f"{name:<11}{made_s:>8.2f}{read_s:>9.2f}{trained_s:>9.2f}"
            f"{1e3 * one['sentence_s']:>15.2f}{one['over_ad2']:>20.2f}"
            f"{one['first_epoch_over_ad2']:>11.2f}",
            flush=True,
        )
    print(
        json.dumps(
            {
                **vars(options),
                "rows": len(split),
                "epochs": epochs,
                "systems": found,
                "environment": environment(torch.get_num_threads()),
            }
        )
    )


if __name__ == "__main__":
    main()
