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

from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from ad2kit.data import Split, load_data
from ad2kit.recipe import load


def texts(split: Split) -> list[str]:
    """Return the texts of a split, the two of a pair joined."""
    return [" ".join(columns) for columns in split.texts]


def main() -> None:
    """Print the accuracy of both baselines."""
    recipe = load(sys.argv[1] if len(sys.argv) > 1 else "demo", sys.argv[2:])
    data = load_data(recipe.data, recipe.seed)
    labels = [*data.train.labels, *data.select.labels]
    result: dict[str, float | str] = {"recipe": recipe.name}
    for name, longest in (("unigrams", 1), ("unigrams_and_bigrams", 2)):
        model = make_pipeline(
            CountVectorizer(ngram_range=(1, longest)), LogisticRegression(max_iter=2_000)
        )
        model.fit(texts(data.train) + texts(data.select), labels)
        result[name] = float(model.score(texts(data.validation), data.validation.labels))
        print(f"{name:<22} accuracy {result[name]:.4f} on {len(data.validation)} texts")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
