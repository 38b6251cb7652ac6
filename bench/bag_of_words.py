"""How far does counting words get on a recipe's data? The floor under the teacher's score.

    python bench/bag_of_words.py demo
    python bench/bag_of_words.py sst2-minilm data.source=../shared/data/sst2

The bag of words that every teacher is compared with (see `ad2kit/models/baselines.py`), here
trained on all of the recipe's train and select rows together, which is more than the teacher trains
on, and judged on its validation rows. Ends with a line of JSON.
"""

from __future__ import annotations

import json
import sys

import numpy as np

from ad2kit.data.splits import Split, load_data
from ad2kit.models.baselines import bag_of_words
from ad2kit.models.records import BAG_OF_WORDS
from ad2kit.run.recipe import load_recipe
from ad2kit.statistics import metrics


def main() -> None:
    """Print what a bag of words scores."""
    recipe = load_recipe(sys.argv[1] if len(sys.argv) > 1 else "demo", sys.argv[2:])
    data = load_data(recipe.data, recipe.seed)
    rows = Split(
        data.train.texts + data.select.texts,
        np.concatenate([data.train.labels, data.select.labels]),
    )
    found = bag_of_words(data.task, rows)(data.validation)
    score = metrics.mean_metric(recipe.data.judged_by, found, data.validation.labels)
    what = " and ".join(recipe.data.judged_by)
    print(f"{BAG_OF_WORDS}: {what} {score:.4f} on {len(data.validation)} texts")
    print(json.dumps({"recipe": recipe.name, BAG_OF_WORDS: score}))


if __name__ == "__main__":
    main()
