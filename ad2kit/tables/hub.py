"""Data sets of the hub, read at one commit, from the hub or from its cache.

``datasets`` has the files of a commit prepared as Arrow files in its own cache. Whatever goes wrong
on the way to the hub, it takes the newest of these, of any commit; so the commit is checked here.
"""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ad2kit.run import hub
from ad2kit.run.errors import MissingExtra, UserError, no_room_left
from ad2kit.tables.rows import check_columns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from ad2kit.run.hub import Address

    Rows = tuple[str, Callable[[], Iterator[Any]], Callable[[], Any]]


def load(reference: str, *, key: str) -> Any:
    """Load a data set ``hub://owner/name[/config][@revision]``: a mapping of its splits.

    Args:
        reference: the address; a ``#split`` at its end is left out.
        key: the key of the recipe that holds it, for messages.

    Raises:
        DataError: the hub cannot be reached or refuses, there is no such data set, configuration or
            revision, or its files cannot be read or are not what its card says.
        MissingExtra: datasets is not installed.
    """
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise MissingExtra("datasets", extra="cpu") from error

    address = hub.parse(reference, "dataset", key)
    commit = hub.commit_of(address)
    prepared = _prepared(address, commit)
    config = address.config
    if config not in prepared and hub.is_offline():
        config = config or _default_config(address, commit)
        if config not in prepared:
            raise _not_prepared(address, config, commit, prepared)
    if config in prepared:
        return _open_prepared(address, prepared[config])
    try:
        # "hf://": without it, a folder of this name beside the user is read in place of the hub.
        loaded = datasets.load_dataset(
            f"hf://datasets/{address.name}", address.config, revision=commit
        )
    except Exception as error:
        # Whatever datasets raises here, its cause is the content of the repository or the hub.
        if no_room_left(error):
            raise
        raise _explained(error, address) from error
    for split in loaded.values():
        found = [Path(file["filename"]).parts for file in split.cache_files]
        # The folder of a part of its files, or of other arguments, has a longer name.
        wanted = {commit, config or split.info.config_name or commit}
        if any(not wanted <= set(parts) for parts in found):
            raise address.error(
                f"the hub stopped answering, and the cache holds no commit {commit} of it",
                "run the same command again when the hub answers",
            )
    return loaded


def stream(reference: str, split: str, columns: Sequence[str], most: int, *, key: str) -> Rows:
    """Return the rows of one split of a data set, which is read as a stream from the hub.

    Args:
        reference: the address; see :func:`load`.
        split: the name of the split.
        columns: the columns to read.
        most: no more than so many rows are of use.
        key: the key of the recipe that holds it, for messages.

    Returns:
        The address with its commit, a function that starts to read, and one that returns the
        schema, or None if it is known only while rows are read. The first yields batches of Arrow;
        the errors of both are those of :func:`load`.

    Raises:
        DataError, MissingExtra: see :func:`load`.
    """
    address = hub.parse(reference, "dataset", key)
    commit = hub.commit_of(address)

    @contextmanager
    def opened() -> Iterator[Any]:
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise MissingExtra("datasets", extra="cpu") from error

        try:
            loaded = datasets.load_dataset(
                f"hf://datasets/{address.name}", address.config, revision=commit, streaming=True
            )
            if split not in loaded:
                raise address.error(
                    f"it has no split '{split}', only {', '.join(loaded)}",
                    f"write the split at the end of {key}: #{next(iter(loaded))}",
                )
            yield loaded[split]
        except UserError:
            raise
        except Exception as error:
            if no_room_left(error):
                raise
            raise _explained(error, address) from error

    def batches() -> Iterator[Any]:
        from ad2kit.tables import arrow_files

        with opened() as rows:
            # The columns of some formats are known only when the first rows are there.
            parts = rows.with_format("arrow").iter(min(arrow_files.BATCH_ROWS, most))
            for number, batch in enumerate(parts):
                if number == 0:
                    check_columns(f"{address} {split}", columns, batch.column_names)
                yield batch.select(list(dict.fromkeys(columns)))

    def schema() -> Any:
        with opened() as rows:
            return None if rows.features is None else rows.features.arrow_schema

    return f"{address.name}/{address.config or ''}@{commit}#{split}", batches, schema


def _prepared(address: Address, commit: str) -> dict[str | None, Path]:
    """Return the folders of prepared Arrow files of a commit in the cache, by configuration."""
    from datasets import config
    from datasets.naming import camelcase_to_snakecase

    owner, slash, name = address.name.rpartition("/")
    folder = f"{owner}{'___' if slash else ''}{camelcase_to_snakecase(name)}"
    folders = Path(config.HF_DATASETS_CACHE, folder).glob(f"*/*/{commit}")
    return {path.parts[-3]: path for path in folders if path.is_dir()}


def _default_config(address: Address, commit: str) -> str | None:
    """Return the configuration that an address without one means, by the card in the cache.

    None if the card names several configurations, and none of them as the default.
    """
    from datasets.info import DatasetInfosDict
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard, constants, try_to_load_from_cache

    card = try_to_load_from_cache(
        address.name,
        "README.md",
        cache_dir=constants.HF_HUB_CACHE,
        revision=commit,
        repo_type=address.kind,
    )
    if not isinstance(card, str):
        return "default"
    try:
        facts = DatasetCard.load(card, ignore_metadata_errors=True).data
        configs = MetadataConfigs.from_dataset_card_data(facts)
        infos = DatasetInfosDict.from_dataset_card_data(facts)
        default: str | None = configs.get_default_config_name()
    except (ValueError, TypeError, LookupError) as error:
        raise _explained(error, address) from error
    if configs:
        return default
    return next(iter(infos)) if len(infos) == 1 else "default"


def _not_prepared(
    address: Address, config: str | None, commit: str, prepared: dict[str | None, Path]
) -> Exception:
    """Return the error for a configuration that the cache does not hold, without the hub.

    A folder such as ``default-1a2b`` holds a part of the files, or other columns.
    """
    from datasets import config as settings
    from huggingface_hub import constants

    whole = [each for each in prepared if each == _configuration_in(prepared[each])]
    held = ", ".join(sorted(map(repr, whole))) or "none"
    parts = ", ".join(sorted(repr(each) for each in prepared if each not in whole))
    asked = f"its configuration '{config}'" if config else "a default configuration"
    choice = f"write {hub.HUB}{address.name}/CONFIG with one of these; or " if whole else ""
    return address.error(
        f"{constants.ENDPOINT} does not answer (or HF_HUB_OFFLINE is set), and the cache "
        f"{settings.HF_DATASETS_CACHE} does not hold {asked} at commit {commit}; configurations "
        f"in it: {held}" + (f"; parts of some, which are not read: {parts}" if parts else ""),
        f"{choice}run the same command again when the hub answers; without a network, "
        f"{hub.elsewhere(address)}",
    )


def _configuration_in(folder: Path) -> str | None:
    """Return the configuration whose rows a prepared folder holds, whole or in part."""
    try:
        content = json.loads((folder / "dataset_info.json").read_text(encoding="utf-8"))
        name: str | None = content.get("config_name")
    except (OSError, ValueError, AttributeError):
        return None
    return name


def _open_prepared(address: Address, folder: Path) -> Any:
    """Open the prepared Arrow files of a commit."""
    from datasets.packaged_modules.cache.cache import Cache

    config, version, commit = folder.parts[-3:]
    return Cache(
        dataset_name=address.name.rpartition("/")[2],
        config_name=config,
        version=version,
        hash=commit,
        repo_id=address.name,
    ).as_dataset()


def _explained(error: Exception, address: Address) -> Exception:
    """Return an error of datasets as one of the user's."""
    from datasets import exceptions

    words = f"{type(error).__name__}: {error}"
    if isinstance(error, exceptions.SplitsVerificationError):
        # Its splits have other names or sizes than its card says.
        return address.error(
            words,
            f"its files and its own card differ: take another revision, @REVISION at the end of "
            f"{address.key}; or {hub.elsewhere(address)}",
        )
    if isinstance(error, exceptions.DatasetsError) and not isinstance(error, OSError):
        return address.error(
            words,
            f"its files are not what datasets reads: see {address.page}; or "
            f"{hub.elsewhere(address)}",
        )
    if isinstance(error, ValueError) and "config" in str(error).lower():
        return address.error(words, f"write {hub.HUB}{address.name}/CONFIG, with one of these")
    return hub.explained(error, address)
