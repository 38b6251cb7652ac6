"""The folder of a teacher that is given by its answers: their logits, in place of a model.

``answers.safetensors`` holds the logits on train and unlabelled (``distillation``), on ``select``
and on validation, float32 [rows, outputs]. ``sha256.json`` is the manifest, as of a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ad2kit.models.records import ANSWERS, ModelManifest
from ad2kit.models.text_model import MANIFEST
from ad2kit.run.errors import RunError
from ad2kit.run.files import sha256_of_folder, whole_folder, write_record

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray


def save(logits: Mapping[str, NDArray[np.float32]], folder: Path, *, inputs: str) -> None:
    """Write the logits of each of :data:`ad2kit.data.answers.SPLITS`, with a sha256 manifest."""
    with whole_folder(folder) as new:
        tensors = {name: torch.from_numpy(array.copy()) for name, array in logits.items()}
        save_file(tensors, new / ANSWERS)
        write_record(new / MANIFEST, ModelManifest(inputs=inputs, files=sha256_of_folder(new)))


def logits(folder: Path, split: str) -> torch.Tensor:
    """Return the logits on a split, float32 [rows, outputs]; the file is mapped into memory.

    Raises:
        RunError: the file is damaged.
    """
    hint = f"delete {folder} and run `ad2kit distill` again"
    return stored_tensor(folder / ANSWERS, split, hint=hint)


def stored_tensor(path: Path, name: str, *, hint: str) -> torch.Tensor:
    """Return a tensor of a safetensors file, which is mapped into memory.

    Raises:
        RunError: the file is damaged, or does not hold it.
    """
    try:
        with safe_open(path, "pt") as tensors:
            tensor: torch.Tensor = tensors.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} is damaged: {error}", hint=hint) from error
    return tensor
