"""Checks of a model folder before it is loaded, and the way from a name in a recipe to a folder.

Other people wrote the teacher, or the checkpoint that a student starts from. A model that ad2kit
cannot distil, export and serve is refused here; the error names the file and the remedy. No torch.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import transformers
from safetensors import safe_open
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name
from transformers.utils.import_utils import is_protobuf_available, is_sentencepiece_available

from ad2kit.models import translate
from ad2kit.run import hub
from ad2kit.run.errors import ModelError
from ad2kit.run.files import sha256_of_folder
from ad2kit.run.machine import quiet_transformers

# The values of `model_type` whose whole chain is tested (tests/families.py). Some other families
# load but are left out: MobileBERT reads the padding behind a text, and BigBird's attention depends
# on the longest text of a batch, so that answers depend on the other texts; the graph of the first
# DeBERTa cannot be fused.
FAMILIES = (
    "albert",
    "bert",
    "camembert",
    "deberta-v2",
    "distilbert",
    "electra",
    "modernbert",
    "mpnet",
    "roberta",
    "xlm-roberta",
)
_SUPPORTED = f"supported: {', '.join(FAMILIES)}"
_CONFIG = "config.json"
_TOKENIZER = "tokenizer.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
# The files that a tokenizer can be made from, in all families.
_VOCABULARIES = (_TOKENIZER, "vocab.*", "*.model", "bpe.codes")


RANDOM = "random://bert"
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model"]


def refuse_adapter(folder: Path, outputs: int) -> None:
    """Refuse a folder that peft's save_pretrained wrote; ``outputs`` is the number of outputs."""
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} is a PEFT adapter (it has an adapter_config.json), and no model by itself",
            hint="merge it into its base model, and give the merged folder: peft."
            f"AutoPeftModelForSequenceClassification.from_pretrained({str(folder)!r}, "
            f"num_labels={outputs}).merge_and_unload().save_pretrained('merged'); save its "
            "tokenizer there too",
        )


def check_weights(folder: Path) -> None:
    """Insist on whole safetensors weights.

    Raises:
        ModelError: it is not a model folder, or its weights are pickled, missing or damaged.
    """
    if not folder.is_dir() or not (folder / _CONFIG).is_file():
        raise ModelError(
            f"{folder} is not a model folder: it has no {_CONFIG}",
            hint="give a folder that save_pretrained() wrote",
        )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        patterns = ("*.bin", "*.pt", "*.pth")
        pickled = sorted(path.name for pattern in patterns for path in folder.glob(pattern))
        content = "no weights at all"
        if pickled:
            content = f"only {', '.join(pickled)}, which may run code"
        raise ModelError(
            f"{folder}: expected model.safetensors, found {content}",
            hint="load it once in a place you trust and call save_pretrained(folder, "
            "safe_serialization=True)",
        )
    for path in weights:
        try:
            with safe_open(path, framework="pt"):
                pass
        except Exception as error:
            # For a truncated or foreign file safetensors raises an error type of its own.
            raise ModelError(
                f"{path} is damaged: {error}", hint="copy the file again, or run its stage again"
            ) from error


def read_config(folder: Path) -> transformers.PretrainedConfig:
    """Read config.json.

    Raises:
        ModelError: it names custom code or an unsupported family, or has a wrong value.
    """
    raw_config = _read_json(folder / _CONFIG)
    _refuse_custom_code(folder, raw_config)
    family = raw_config.get("model_type")
    if family not in FAMILIES:
        reason = f"model_type '{family}' is not supported" if family else "it names no model_type"
        raise ModelError(
            f"{folder / _CONFIG}: {reason}; {_SUPPORTED}",
            hint="give a checkpoint of one of these families; with teacher.finetune an encoder "
            "learns your task",
        )
    raw_config = translate.translated(folder / _CONFIG, raw_config)
    _check_numbers(folder / _CONFIG, raw_config)
    try:
        config = transformers.CONFIG_MAPPING[family].from_dict(raw_config)
    except Exception as error:
        # Whatever transformers raises here, its cause is a value of this file.
        raise ModelError(
            f"{folder / _CONFIG}: {_words(error)}",
            hint="correct the value, or save the model again with save_pretrained()",
        ) from error
    return config


def saved_by(folder: Path) -> int:
    """Return the major version of transformers that saved a model folder."""
    return translate.saved_by(folder / _CONFIG, _read_json(folder / _CONFIG))


def read_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerFast:
    """Read the tokenizer, which has to be a fast one: a service reads only tokenizer.json.

    Raises:
        ModelError: there is no tokenizer, it has no fast form, a package to make the fast form is
            missing, it has no padding token, or its files are damaged.
    """
    _check_tokenizer_files(folder)
    try:
        tokenizer = load_tokenizer(folder)
    except Exception as error:
        # The tokenizers library raises a bare Exception for a file that it did not write.
        raise ModelError(
            f"{folder} holds no tokenizer that transformers can read: {_words(error)}",
            hint=f"load the tokenizer that the model was trained with, and call "
            f"tokenizer.save_pretrained({str(folder)!r})",
        ) from error
    if tokenizer.pad_token_id is None:
        raise ModelError(
            f"the tokenizer of {folder} has no padding token, and texts are read in batches",
            hint=f"set tokenizer.pad_token to the token that the model was trained with, and call "
            f"tokenizer.save_pretrained({str(folder)!r})",
        )
    return cast("transformers.PreTrainedTokenizerFast", tokenizer)


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a model folder as the version of transformers that saved the model.

    Raises:
        ModelError: the version is not known.
        Exception: of any type; see :func:`read_tokenizer` for the reasons.
    """
    config = _read_json(folder / _CONFIG)
    settings, serialised = (
        _read_json(folder / name) if (folder / name).is_file() else {}
        for name in (_TOKENIZER_CONFIG, _TOKENIZER)
    )
    saved = translate.saved_by(folder / _CONFIG, config)
    arguments = translate.tokenizer_arguments(settings, serialised, saved, config.get("model_type"))
    reader: Any = transformers.AutoTokenizer
    if settings.get("tokenizer_class") in translate.GENERIC:
        reader = transformers.PreTrainedTokenizerFast
    with quiet_transformers():  # each version warns about the other's name of the generic class
        tokenizer = reader.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **arguments
        )
        if saved < translate.RUNNING and serialised:
            tokenizer = translate.as_in_4(folder, tokenizer)
    return tokenizer


def _check_tokenizer_files(folder: Path) -> None:
    """Refuse files that cannot become a fast tokenizer; see :func:`read_tokenizer`."""
    if not any(path for pattern in _VOCABULARIES for path in folder.glob(pattern)):
        raise ModelError(
            f"{folder} holds no tokenizer: expected {_TOKENIZER}, found "
            f"{', '.join(sorted(path.name for path in folder.iterdir()))}",
            hint=f"load the tokenizer that the model was trained with, and call "
            f"tokenizer.save_pretrained({str(folder)!r})",
        )
    class_names = [
        _read_json(folder / name).get("tokenizer_class")
        for name in (_TOKENIZER_CONFIG, _CONFIG)
        if (folder / name).is_file()
    ]
    class_name = next(filter(None, class_names), None)
    serialised = (folder / _TOKENIZER).is_file()
    if class_name and not _has_fast_form(class_name):
        raise ModelError(
            f"the tokenizer of {folder}, {class_name}, has no fast form in transformers, and what "
            f"has no {_TOKENIZER} cannot be served",
            hint=f"set tokenizer_class to PreTrainedTokenizerFast in {folder / _TOKENIZER_CONFIG}, "
            f"so that {_TOKENIZER} is read"
            if serialised
            else f"give an encoder whose folder has a {_TOKENIZER}, and set teacher.finetune to "
            "train it on your rows",
        )
    available = {"sentencepiece": is_sentencepiece_available(), "protobuf": is_protobuf_available()}
    missing = [package for package, installed in available.items() if not installed]
    vocabulary = next(folder.glob("*.model"), None)
    if missing and vocabulary is not None and not serialised:
        raise ModelError(
            f"{folder} has no {_TOKENIZER}, and {' and '.join(missing)} to make it from "
            f"{vocabulary.name} is not installed",
            hint=f"pip install {' '.join(missing)}",
        )


def _has_fast_form(class_name: str) -> bool:
    """Tell whether transformers has a fast tokenizer of this name."""
    if class_name in translate.GENERIC:
        return True
    fast_class = tokenizer_class_from_name(f"{class_name.removesuffix('Fast')}Fast")
    # Version 5 returns a slow class where there is no fast one.
    return isinstance(fast_class, type) and issubclass(
        fast_class, transformers.PreTrainedTokenizerFast
    )


def _refuse_custom_code(folder: Path, config: dict[str, Any]) -> None:
    """Refuse a folder that names Python code to run, before transformers reads it."""
    tokenizer_config = folder / _TOKENIZER_CONFIG
    if "auto_map" in config:
        family = config.get("model_type")
        raise ModelError(
            f"{folder} holds custom code (auto_map in {_CONFIG}), which ad2kit does not run",
            hint=f"delete auto_map from {folder / _CONFIG}: a '{family}' needs no code of its own"
            if family in FAMILIES
            else f"if its layers and weights are those of a supported family, delete auto_map from "
            f"{folder / _CONFIG} and write this model_type there; {_SUPPORTED}",
        )
    if tokenizer_config.is_file() and "auto_map" in _read_json(tokenizer_config):
        file = folder / _TOKENIZER
        advice = ""
        if not file.is_file():
            advice = f"; write that first, with tokenizer.backend_tokenizer.save({str(file)!r})"
        raise ModelError(
            f"{folder} holds custom code (auto_map in {_TOKENIZER_CONFIG}), which ad2kit does not "
            "run",
            hint=f"delete auto_map from {tokenizer_config} and set its tokenizer_class to "
            f"PreTrainedTokenizerFast, so that {_TOKENIZER} is read{advice}",
        )


def _check_numbers(path: Path, config: dict[str, Any]) -> None:
    """Refuse null or a text where the default of the family is a number.

    Ids of tokens that no encoder reads may be null; the id of the padding token may not.
    """
    family_defaults = transformers.CONFIG_MAPPING[config["model_type"]]().to_dict()
    common_keys = transformers.PretrainedConfig().to_dict()
    for key, default in family_defaults.items():
        if key != "pad_token_id" and (key in common_keys or key.endswith("_token_id")):
            continue
        if key not in config or not _is_number(default) or _is_number(config[key]):
            continue
        example = 0.0 if "drop" in key else default
        raise ModelError(
            f"{path}: {key} is {json.dumps(config[key])}, expected a number",
            hint=f'write the number that the model was trained with, such as "{key}": {example}',
        )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}", hint="copy the file again") from error
    if not isinstance(content, dict):
        raise ModelError(
            f"{path}: expected an object, found {content!r:.80}",
            hint="write it with the model's save_pretrained()",
        )
    return content


def _words(error: Exception) -> str:
    """Return the type and the message of an error."""
    return f"{type(error).__name__}: {error}"


def find_model(reference: str, *, key: str = "teacher.model") -> Path:
    """Return the local folder of ``hub://…[@revision]``, ``package://module/folder`` or a path.

    ``key`` is the key of the recipe that holds ``reference``, for messages.

    Raises:
        ModelError: there is no such folder or repository, or the hub cannot be reached.
    """
    scheme, separator, address = reference.partition("://")
    if not separator:
        folder = Path(reference)
        if not folder.is_dir():
            raise ModelError(
                f"{key}: no folder '{reference}'",
                hint=f"for a model on the hub write hub://{reference}",
            )
        return folder
    if scheme == "package":
        module, _, subfolder = address.partition("/")
        spec = find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            raise ModelError(
                f"{key}: the Python package '{module}' is not installed",
                hint=f"pip install {module.replace('_', '-')}",
            )
        return Path(spec.submodule_search_locations[0]) / subfolder
    if scheme == "hub":
        return hub.snapshot(hub.parse(reference, "model", key), _HUB_FILES)
    raise ModelError(
        f"{key}: expected a folder, hub://, package:// or random://bert, found '{reference}'",
        hint=f"correct {key}",
    )


def reference_sha256(reference: str | None, *, key: str) -> dict[str, str] | None:
    """Return the sha256 of each file of a model; see :func:`find_model` for the arguments.

    None if there is no model, or of ``random://``, which has no files: seed and texts make it.
    """
    if reference is None or reference == RANDOM:
        return None
    return sha256_of_folder(find_model(reference, key=key))
