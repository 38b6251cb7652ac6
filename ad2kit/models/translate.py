"""Model folders of another major version of transformers: what their files mean in this one.

transformers 4 and 5 write some facts in other words, and read the words of the other version
without an error and wrongly. The version that saved the weights is the reference, because they were
trained with its reading. What the running version cannot express is refused, with its key.

    config.json of a ModernBERT   4: global_rope_theta, local_rope_theta, global_attn_every_n_layers
                                  5: rope_parameters, layer_types
    tokenizer_config.json         4: PreTrainedTokenizerFast, additional_special_tokens
                                  5: TokenizersBackend, extra_special_tokens
    segment ids                   4: by default; 5: only of the classes that ask for them
    tokenizer.json                4: as it is; 5: some classes put their own normaliser in its place
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import transformers
from packaging.version import InvalidVersion, Version
from tokenizers import Tokenizer
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import ByteLevel

from ad2kit.run.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerFast

RUNNING = Version(transformers.__version__).major
_NEWEST = 5

CUTS_PRUNED_HEADS = RUNNING == 4
"""Version 4 cuts the heads in ``config.pruned_heads`` when it makes a model; version 5 does not."""


GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""The names of the tokenizer class that adds nothing to tokenizer.json, in version 4 and in 5."""

# The fast tokenizers that give segment ids in version 4 and none in 5, measured with 4.57.6 and
# 5.24.0. Others give them in both or in none.
_SEGMENTS_IN_4_ALONE = (
    "AlbertTokenizer",
    "BlenderbotSmallTokenizer",
    "CpmTokenizer",
    "FunnelTokenizer",
    "HerbertTokenizer",
    "RemBertTokenizer",
    "RoFormerTokenizer",
    "SplinterTokenizer",
    "XLNetTokenizer",
)
_INPUTS = ["input_ids", "attention_mask"]
_INPUTS_WITH_SEGMENTS = ["input_ids", "token_type_ids", "attention_mask"]

_FULL, _SLIDING = "full_attention", "sliding_attention"
# Version 4's name for the base of the rotary positions of each kind of layer.
_THETAS = {_FULL: "global_rope_theta", _SLIDING: "local_rope_theta"}
_EVERY = "global_attn_every_n_layers"
_HINT = "read the folder with transformers {}, in an environment of its own: pip install '{}'"


def recompute_activations(module: PreTrainedModel) -> None:
    """Let a model compute its activations once more in the backward pass, which saves memory."""
    # 5.24 has another name for it, and warns of the old one.
    enable: Any = getattr(module, "activation_checkpointing_enable", None)
    (enable or module.gradient_checkpointing_enable)({"use_reentrant": False})


def saved_by(path: Path, config: dict[str, Any]) -> int:
    """Return the major version of transformers that saved a model; ``config`` is its config.json.

    Raises:
        ModelError: the version is newer than those that ad2kit can translate, or is no version.
    """
    version = config.get("transformers_version")
    if version is None:  # written by hand, or before version 3
        return 5 if "layer_types" in config or "rope_parameters" in config else 4
    try:
        major = Version(str(version)).major
    except InvalidVersion as error:
        raise ModelError(
            f"{path}: transformers_version is {version!r}, expected a version such as "
            f'"{transformers.__version__}"',
            hint="write the version of transformers that saved the model",
        ) from error
    if major > _NEWEST:
        raise ModelError(
            f"{path}: transformers_version is {version!r}, and ad2kit can read what versions up to "
            f"{_NEWEST} save",
            hint=f"load the model and its tokenizer with transformers {_NEWEST}, compare its "
            "answers, and save both again with save_pretrained()",
        )
    return 5 if major == 5 else 4


def translated(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return config.json in the words of the running version.

    Raises:
        ModelError: the running version cannot express a value.
    """
    saved = saved_by(path, config)
    if saved == RUNNING:
        return config
    if config.get("model_type") == "modernbert":
        return (_modernbert_in_4 if RUNNING == 4 else _modernbert_in_5)(path, config)
    positions = config.get("position_embedding_type", "absolute")
    if RUNNING == 5 and positions != "absolute":
        raise ModelError(
            f"{path}: position_embedding_type is {positions!r}, which transformers 5 does not have",
            hint=_HINT.format(4, "ad2kit[cpu]"),
        )
    return config


def period(full: Sequence[bool]) -> int | None:
    """Return the n such that exactly every n-th layer, from the first one on, has full attention.

    None if there is no such n; version 4 can express no other pattern.
    """
    for n in range(1, len(full) + 1):
        if list(full) == [index % n == 0 for index in range(len(full))]:
            return n
    return None


def choose_layers(config: transformers.PretrainedConfig, layers: Sequence[int]) -> None:
    """Give a ModernBERT's configuration the attention of some layers of it, in their new order.

    A layer that was trained with global attention would compute something else with a window.

    Raises:
        ModelError: version 4 cannot express the pattern.
    """
    if RUNNING >= 5:
        config.layer_types = [config.layer_types[layer] for layer in layers]
        return
    every = getattr(config, _EVERY)
    new_every = period([layer % every == 0 for layer in layers])
    if new_every is None:
        raise ModelError(
            f"in a 'modernbert' every n-th layer from its first on sees the whole text, and layers "
            f"{list(layers)} would not see what they were trained on for any n",
            hint="choose them at equal distances from layer 0, such as [0, 2, 4] or [0, 3, 6]",
        )
    setattr(config, _EVERY, new_every)


def _modernbert_in_4(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of a ModernBERT of version 5 in the words of version 4."""
    config = dict(config)
    hint = _HINT.format(5, "ad2kit[cpu-transformers5]")
    layer_types = config.pop("layer_types", None)
    if layer_types is not None:
        every = period([kind == _FULL for kind in layer_types])
        unknown = set(layer_types) - {_FULL, _SLIDING}
        if every is None or unknown or len(layer_types) != config["num_hidden_layers"]:
            raise ModelError(
                f"{path}: transformers {transformers.__version__} cannot express layer_types: "
                f"expected {_FULL} in every n-th of {config['num_hidden_layers']} layers from the "
                f"first one on, and {_SLIDING} in the others, found {layer_types}",
                hint=hint,
            )
        config[_EVERY] = every
    rope = config.pop("rope_parameters", None) or {}
    if unknown := set(rope) - set(_THETAS):
        raise ModelError(
            f"{path}: rope_parameters has {min(unknown)!r}, expected {' and '.join(_THETAS)}",
            hint="write the base and the kind of the rotary positions of both kinds of layers",
        )
    for kind, theta in _THETAS.items():
        values = dict(rope.get(kind) or {})
        if "rope_theta" in values:
            config[theta] = values.pop("rope_theta")
        if values.pop("rope_type", "default") != "default" or values:
            raise ModelError(
                f"{path}: transformers {transformers.__version__} cannot express rope_parameters "
                f"of {kind}: expected rope_type 'default' and a rope_theta, found {rope[kind]}",
                hint=hint,
            )
    return config


def _modernbert_in_5(_path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of a ModernBERT of version 4 without what version 4 ignores.

    Version 5 understands the other keys. These are there if version 4 has read what version 5 had
    saved, and they had no effect on the training.
    """
    ignored = ("layer_types", "rope_parameters")
    return {key: value for key, value in config.items() if key not in ignored}


def tokenizer_arguments(
    settings: dict[str, Any], serialised: dict[str, Any], saved: int, family: str | None
) -> dict[str, Any]:
    """Return the arguments that make the running version read a tokenizer as its own did.

    Args:
        settings: the content of tokenizer_config.json.
        serialised: the content of tokenizer.json.
        saved: the major version that the model was trained with; see :func:`saved_by`.
        family: the ``model_type`` of the model, whose tokenizer class is the default.
    """
    arguments: dict[str, Any] = {}
    extra = settings.get("extra_special_tokens")
    if RUNNING == 4 and isinstance(extra, list):
        arguments["additional_special_tokens"] = extra
        arguments["extra_special_tokens"] = settings.get("model_specific_special_tokens", {})
    if saved == RUNNING:
        return arguments
    name = settings.get("tokenizer_class") or ("AlbertTokenizer" if family == "albert" else "")
    segments = name in GENERIC or name.removesuffix("Fast") in _SEGMENTS_IN_4_ALONE
    if segments and "model_input_names" not in settings:
        arguments["model_input_names"] = _INPUTS_WITH_SEGMENTS if saved == 4 else _INPUTS
    splitter = serialised.get("pre_tokenizer") or {}
    if RUNNING == 4 and name in GENERIC and "add_prefix_space" in splitter:
        # Version 4 writes the setting into tokenizer.json's part, and version 5 reads the part.
        arguments["add_prefix_space"] = splitter["add_prefix_space"]
    return arguments


def as_in_4(folder: Path, tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return a tokenizer of version 5 that reads the texts of a folder as version 4 does.

    The special tokens are those of ``tokenizer``, which version 5 has made from the folder.
    """
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    # Version 4 changes two things of the file: its tokenizer_config.json decides about them.
    loaded = tokenizer.backend_tokenizer
    if all(isinstance(each.normalizer, BertNormalizer) for each in (backend, loaded)):
        backend.normalizer = loaded.normalizer
    if isinstance(splitter := backend.pre_tokenizer, ByteLevel):
        splitter.add_prefix_space = tokenizer.add_prefix_space
        backend.pre_tokenizer = splitter
    special_tokens: dict[str, Any] = dict(tokenizer.special_tokens_map)
    made: PreTrainedTokenizerFast = transformers.PreTrainedTokenizerFast.from_pretrained(
        folder,
        local_files_only=True,
        tokenizer_object=backend,
        model_input_names=tokenizer.model_input_names,
        **special_tokens,
    )
    return made
