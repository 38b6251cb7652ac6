"""What a model has made of each text before its last layer: the vectors that a probe reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ad2kit import data as datasets
from ad2kit.training import EVALUATION_BATCH, padded

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ad2kit.data import Encoded
    from ad2kit.models import TextModel

    Floats = NDArray[np.float64]


class Vectors(NamedTuple):
    """Two vectors of each text, float64.

    ``head_inputs`` [rows, width] is what the last linear layer of the classifier reads.
    ``token_means`` [rows, hidden size] is the mean of the encoder's last states over all tokens of
    the text, special ones included.
    """

    head_inputs: Floats
    token_means: Floats


def last_linear(module: torch.nn.Module) -> torch.nn.Linear:
    """Return the layer that computes the logits: the last linear one of a classifier."""
    return [part for part in module.modules() if isinstance(part, torch.nn.Linear)][-1]


@torch.inference_mode()
def read_vectors(
    model: TextModel, encoded: Encoded, device: torch.device,
    chosen: NDArray[np.int64] | None = None,
) -> Vectors:  # fmt: skip
    """Return the vectors of rows, without dropout.

    Args:
        model: lies on ``device``; it is in evaluation mode afterwards.
        encoded: texts, by the model's own tokenizer.
        device: where the model lies.
        chosen: the rows to read; all if None.
    """
    module = model.module.eval()
    heads: list[torch.Tensor] = []
    states: list[torch.Tensor] = []
    means: list[torch.Tensor] = []
    hooks = (
        last_linear(module).register_forward_pre_hook(lambda _, given: heads.append(given[0])),
        module.base_model.register_forward_hook(lambda _, __, found: states.append(found[0])),
    )
    every = np.arange(len(encoded)) if chosen is None else chosen
    lengths = [len(encoded.input_ids[row]) for row in every]
    batches = datasets.by_length(lengths, EVALUATION_BATCH)
    try:
        for rows in batches:
            inputs = padded(model, encoded, every[rows], device)
            module(**inputs)
            mask = inputs["attention_mask"].unsqueeze(-1).double()
            means.append((states.pop().double() * mask).sum(dim=1) / mask.sum(dim=1))
    finally:
        for hook in hooks:
            hook.remove()
    back = np.argsort(np.concatenate(batches))
    head_inputs, token_means = (
        torch.cat(found).double().cpu().numpy()[back] for found in (heads, means)
    )
    return Vectors(head_inputs, token_means)
