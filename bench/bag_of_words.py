"""How far does counting words get on a recipe's data? The floor under the teacher's accuracy.

    python bench/bag_of_words.py demo
    python bench/bag_of_words.py sst2-minilm data.source=../shared/data/sst2

Logistic regression on unigram and on unigram and bigram counts (scikit-learn, its defaults but
for the number of iterations), trained on the recipe's train and select rows together, which is more
than the teacher trains on, and judged on its validation rows. Ends with a line of JSON.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline

from ad2kit.data import Split, load_data
from ad2kit.recipe import load

if TYPE_CHECKING:
    from ad2kit.data import Data


def texts(split: Split) -> list[str]:
    """Return the texts of a split, the two of a pair joined."""
    return [" ".join(columns) for columns in split.texts]


def answers(data: Data, longest: int) -> np.ndarray[Any, np.dtype[Any]]:
    """Return what counting n-grams of up to so many words answers to the validation rows.

    Ridge regression for a number; not for several labels.
    """
    regression = Ridge() if data.task == "regression" else LogisticRegression(max_iter=2_000)
    model = make_pipeline(CountVectorizer(ngram_range=(1, longest)), regression)
    labels = np.concatenate([data.train.labels, data.select.labels])
    model.fit(texts(data.train) + texts(data.select), labels)
    return np.asarray(model.predict(texts(data.validation)))


def main() -> None:
    """Print the accuracy of both baselines."""
    recipe = load(sys.argv[1] if len(sys.argv) > 1 else "demo", sys.argv[2:])
    data = load_data(recipe.data, recipe.seed)
    result: dict[str, float | str] = {"recipe": recipe.name}
    for name, longest in (("unigrams", 1), ("unigrams_and_bigrams", 2)):
        result[name] = float((answers(data, longest) == data.validation.labels).mean())
        print(f"{name:<22} accuracy {result[name]:.4f} on {len(data.validation)} texts")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
