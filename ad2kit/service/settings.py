"""The operator's settings of the service, and the checks before a worker starts.

A setting ``name`` comes from the variable ``AD2KIT_NAME``, or in a checkout from ``bentoml serve
--arg name=value``. BentoML drops ``--arg`` when it serves a Bento: a server that was told to ask
for keys would be open. So arguments that BentoML has dropped are refused.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ad2kit.run.errors import UserError, nearest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from ad2kit.run.sections import TextLength

PREFIX = "AD2KIT_"
# The variable in which the parent process of a server hands its decisions to its workers
# (process.py).
SERVER = f"{PREFIX}SERVER"
# Other users of the machine can read a command line.
SECRETS = ("api_keys",)
PATHS = ("model", "runs_dir", "api_keys_file", "shadow")
# Paths of which several stand in one setting, with names.
NAMED_PATHS = ("models",)
# A Bento serves only the artefact that it was compared with before it was published.
OF_A_CHECKOUT = ("model", "runs_dir")
# Variables that are not settings: variables of the benchmarks and of the parent process, and the
# variables that Kubernetes sets in all pods beside a Service whose name begins with "ad2kit".
_NO_SETTING = re.compile(
    rf"{PREFIX}(BENCH_.*|SERVER|(.*_)?SERVICE_(HOST|PORT)(_.*)?|(.*_)?PORT_\d+_(TCP|UDP|SCTP)(_.*)?)"
)
# The bound of a part, the bound of the whole, and what the whole is.
_PARTS = (
    ("max_body_bytes", "max_held_bytes", "all bodies in a worker"),
    ("max_texts", "max_queue_texts", "the queue"),
    ("max_batch_tokens", "max_queue_tokens", "the queue"),
)
# An origin as browsers send it: scheme, host in small letters, and a port if it is not the usual.
_ORIGIN = r"https?://([a-z0-9._-]+|\[[0-9a-f:.]+\])(:[0-9]+)?"
# What the service and BentoML answer themselves; as a prefix of a proxy it would be taken off.
_OWN_PATHS = (
    "/classify",
    "/docs.json",
    "/healthz",
    "/info",
    "/livez",
    "/metrics",
    "/readyz",
    "/schema.json",
)
_NAMED = r"[A-Za-z0-9_-]+=[^,]+"
_KUBERNETES_PORT = re.compile(r"(tcp|udp|sctp)://")


class Settings(BaseModel):
    """The operator's settings; a new setting is one line here.

    ``model`` is a run or an exported variant; without it the service serves the most recent run in
    ``runs_dir`` that passed its gate. ``models`` are more runs or variants, NAME=FOLDER with commas
    between them, at the path ``/classify/NAME``. When a folder of ``model`` or ``models`` leads to
    another artefact, this one is served from then on. ``workers`` processes share the cores, and
    the engine of each has ``threads`` threads; if neither is set, each core has a worker with one
    thread. ``api_keys`` holds keys separated by commas, ``api_keys_file`` one key a line, and is
    read again when it changes; ``NAME: KEY``, with a blank after the colon, is a key with a name
    for the log and for the public metrics. ``shadow`` is a run or an artefact of the teacher, which
    scores ``shadow_share`` of the texts in the background. ``access_log`` writes a line for each
    request. ``root_path`` is the path below which a proxy offers the service, such as ``/ad2kit``,
    whether or not the proxy takes it off. Pages of ``cors_origins`` may ask the service from a
    browser: origins with commas between them, or ``*`` for all. ``metrics_port`` is a port of its
    own for ``/metrics``, which is then not on the port of the service.

    The other settings bound the resources of a worker that its clients can use: ``max_body_bytes``
    of one body; ``max_held_bytes`` of the bodies of all requests, without the first 4096 bytes of
    each; ``max_header_bytes`` of the headers of a request, with its address, chunk sizes and
    trailers; ``max_headers`` of a request; ``header_timeout_s`` until the headers have arrived,
    then ``body_timeout_s`` until the body has arrived; ``write_timeout_s`` until the client has
    read its answer; ``keep_alive_s`` between two requests of a connection; ``max_connections`` at a
    time; ``max_connection_requests`` of one connection, whose last answer says that it ends, so
    that clients come to a worker that was restarted; ``max_texts`` of one request;
    ``max_text_characters`` of one text or pair; ``max_key_requests_per_s`` of one key, in all
    workers together, and as many at once; ``max_queue_texts`` and ``max_queue_tokens`` that wait (a
    window of a long text counts as a text); ``max_batch_tokens``, with padding, that the engine
    computes at once; ``deadline_s`` until a request is answered or given up.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = Field(default=None, min_length=1)
    runs_dir: str | None = Field(default=None, min_length=1)
    models: str | None = Field(
        default=None,
        pattern=rf"^{_NAMED}(,{_NAMED})*$",
        description="NAME=FOLDER with commas between them and no spaces; a name has letters, "
        "digits, - and _, and stands there once",
    )
    workers: int | None = Field(default=None, ge=1, le=1024)
    threads: int | None = Field(default=None, ge=1, le=1024)
    api_keys: str | None = Field(default=None, repr=False)
    api_keys_file: str | None = Field(default=None, min_length=1)
    shadow: str | None = Field(default=None, min_length=1)
    shadow_share: float = Field(default=0.01, gt=0, le=1)
    access_log: bool = False
    root_path: str | None = Field(
        default=None,
        pattern=r"^(/[A-Za-z0-9._~-]+)+$",
        description="a path such as /ad2kit, without a slash at its end, no part is . or .., "
        f"and none of {', '.join(_OWN_PATHS)}",
    )
    cors_origins: str | None = Field(
        default=None,
        pattern=rf"^(\*|{_ORIGIN}( *, *{_ORIGIN})*)$",
        description="* or origins with commas between them, as browsers send them: such as "
        "https://app.example.com, without :443 after https or :80 after http",
    )
    metrics_port: int | None = Field(default=None, ge=1, le=2**16 - 1)
    max_body_bytes: int = Field(default=2**20, ge=2**10, le=2**26)
    max_held_bytes: int = Field(default=24 * 2**20, ge=2**10, le=2**32)
    max_header_bytes: int = Field(default=2**14, ge=2**10, le=2**20)
    max_headers: int = Field(default=100, ge=8, le=10_000)
    header_timeout_s: float = Field(default=10.0, ge=0.1, le=3600)
    body_timeout_s: float = Field(default=30.0, ge=0.1, le=3600)
    write_timeout_s: float = Field(default=30.0, ge=0.1, le=3600)
    keep_alive_s: float = Field(default=5.0, ge=0.1, le=3600)
    max_connections: int = Field(default=4096, ge=1, le=2**16)
    max_connection_requests: int = Field(default=1000, ge=1, le=2**31)
    max_texts: int = Field(default=128, ge=1, le=2**16)
    max_text_characters: int = Field(default=2**26, ge=1, le=2**26)
    max_key_requests_per_s: float | None = Field(default=None, gt=0, le=1e6)
    max_queue_texts: int = Field(default=1024, ge=1, le=2**20)
    max_queue_tokens: int = Field(default=2**17, ge=1, le=2**30)
    max_batch_tokens: int = Field(default=1024, ge=1, le=2**20)
    deadline_s: float = Field(default=10.0, ge=0.1, le=3600)

    @field_validator("models")
    @classmethod
    def _check_models(cls, models: str | None) -> str | None:
        """Refuse a name that stands there twice."""
        names = [name for name, _ in _named(models)]
        if len(set(names)) < len(names):
            raise ValueError(models)
        return models

    @field_validator("root_path")
    @classmethod
    def _check_root_path(cls, path: str | None) -> str | None:
        """Refuse a path that a browser would shorten, or that hides a path of the service."""
        parts = (path or "").split("/")
        if path in _OWN_PATHS or parts[1:2] == ["classify"] or {".", ".."} & set(parts):
            raise ValueError(path)
        return path

    @field_validator("cors_origins")
    @classmethod
    def _check_cors_origins(cls, origins: str | None) -> str | None:
        """Refuse an origin with a port that browsers leave out, so that it would never match."""
        for origin in (origins or "").split(","):
            scheme, _, port = re.sub(r"\[.*\]", "", origin.strip()).partition("://")
            port = port.partition(":")[2]
            usual = {"http": "80", "https": "443"}.get(scheme)
            if port and (port == usual or port != str(int(port)) or int(port) >= 2**16):
                raise ValueError(origin)
        return origins

    def check_they_fit(self) -> None:
        """Refuse settings that contradict each other.

        These are ``model`` with ``runs_dir``, ``shadow_share`` without ``shadow``, a rate for keys
        without keys, and a maximum of a part above the maximum of the whole.

        Raises:
            UserError: names the setting to leave out or to change.
        """
        if self.model is not None and self.runs_dir is not None:
            raise UserError(
                f"model names what is served, {self.model}, and runs_dir where to look for it, "
                f"{self.runs_dir}",
                hint=f"leave one of {_variable('model')} and {_variable('runs_dir')} out",
            )
        if self.shadow is None and "shadow_share" in self.model_fields_set:
            raise UserError(
                f"shadow_share={self.shadow_share:g} is the share of texts that a shadow scores, "
                "and there is no shadow",
                hint=f"add {_variable('shadow')}=FOLDER, or leave shadow_share out",
            )
        if self.max_key_requests_per_s is not None and not (self.api_keys or self.api_keys_file):
            raise UserError(
                f"max_key_requests_per_s={self.max_key_requests_per_s:g} bounds the requests of a "
                "key, and the service asks for no keys",
                hint=f"add {_variable('api_keys_file')}=FILE, or leave it out",
            )
        for part, whole, meaning in _PARTS:
            most_of_part, most_of_whole = getattr(self, part), getattr(self, whole)
            if most_of_part > most_of_whole:
                raise UserError(
                    f"{part}={most_of_part} is more than {whole}={most_of_whole}, the bound of "
                    f"{meaning}",
                    hint=f"raise {_variable(whole)}, or lower {_variable(part)}",
                )

    def check_model_fits(self, length: TextLength) -> None:
        """Refuse a queue that cannot hold one text, or one window of a text, of the model.

        Raises:
            UserError: names the setting and its least value.
        """
        least = length.max_length_tokens
        if self.max_queue_tokens < least:
            raise UserError(
                f"max_queue_tokens={self.max_queue_tokens}: expected at least {least}, because the "
                f"model reads texts of {least} tokens",
                hint=f"set {_variable('max_queue_tokens')}={least} or more",
            )

    def limits(self) -> dict[str, int | float | None]:
        """Return the bounds by name, without the ``max_`` in front."""
        return {
            name.removeprefix("max_"): getattr(self, name)
            for name in type(self).model_fields
            if name.startswith("max_") or name.endswith("_s")
        }

    @property
    def is_watched(self) -> bool:
        """Whether a file or folder of the settings may come to mean something else."""
        return bool(self.followed() or self.api_keys_file)

    def followed(self) -> dict[str, str]:
        """Return the folders that may lead to another artefact, by the name of the model.

        The service's own model has no name. It is not among them in a Bento, nor where it is the
        most recent run: a new run alone does not change what is served.
        """
        return ({"": self.model} if self.model else {}) | dict(_named(self.models))

    def origins(self) -> list[str]:
        """Return the origins whose pages may ask the service."""
        return [origin.strip() for origin in (self.cors_origins or "").split(",") if origin]

    def public(self) -> dict[str, Any]:
        """Return the settings that a client may see: neither keys nor folders of this machine."""
        return self.model_dump(exclude={*SECRETS, *PATHS, *NAMED_PATHS})

    def keys(self) -> dict[str, str]:
        """Return the names of the keys that clients may use; a name may be empty.

        Raises:
            UserError: the file cannot be read, a key is invalid or has two names, or keys were set
                but there is none.
        """
        named_keys = [
            _key(key, f"{_variable('api_keys')}, key {number}")
            for number, key in enumerate(map(_strip, (self.api_keys or "").split(",")), 1)
            if key
        ]
        if self.api_keys_file is not None:
            named_keys += keys_of(Path(self.api_keys_file))
        if not named_keys and (self.api_keys is not None or self.api_keys_file is not None):
            # A faulty secret must not open the service to everybody.
            raise UserError(
                "API keys were asked for and there is none",
                hint=f"write one key a line into the file that {_variable('api_keys_file')} names, "
                f"or several with commas into {_variable('api_keys')}; unset both to serve "
                "everybody",
            )
        keys = dict[str, str]()
        for name, key in named_keys:
            if keys.setdefault(key, name) != name:
                raise UserError(
                    f"one API key has two names, {keys[key]!r} and {name!r}",
                    hint="give each client a key of its own",
                )
        return keys


def read_settings(
    arguments: Mapping[str, Any],
    environment: Mapping[str, str],
    command: Sequence[str],
    *,
    packed: bool,
) -> Settings:
    """Return the settings of this process; paths are absolute.

    Args:
        arguments: the values of ``--arg`` and ``--arg-file`` that BentoML hands on.
        environment: the variables of this process.
        command: the command line of this process.
        packed: whether a Bento is served, which holds its model.

    Raises:
        UserError: a setting was dropped by BentoML, is unknown, has a wrong value, or was given
            twice.
    """
    arg_values = {name: str(value) for name, value in arguments.items()}
    _check_nothing_is_lost(arg_values, command, packed=packed)
    variables = _variables(environment)
    values = dict[str, Any]()
    for name in Settings.model_fields:
        if name in arg_values:
            values[name] = _value(name, arg_values[name], f"--arg {name}")
        if name in variables:
            value = _value(name, variables[name], _variable(name))
            if values.setdefault(name, value) != value:
                raise UserError(
                    f"{name} was given twice, as {arg_values[name]!r} by --arg and as "
                    f"{variables[name]!r} by {_variable(name)}",
                    hint=f"leave one of them out: `unset {_variable(name)}`, or no --arg {name}",
                )
        if packed and name in OF_A_CHECKOUT and name in values:
            raise UserError(
                f"{name} was given, and a Bento serves the model that it holds",
                hint=f"leave it out (`unset {_variable(name)}`), or make a Bento of another run "
                "with `ad2kit package`",
            )
        if name in PATHS and name in values:
            values[name] = str(_absolute(name, values[name], packed=packed))
        if name in NAMED_PATHS and name in values:
            values[name] = ",".join(
                f"{each}={_absolute(name, folder, packed=packed)}"
                for each, folder in _named(values[name])
            )
    return Settings(**values)


def client_key(file: Path | None, environment: Mapping[str, str]) -> str | None:
    """Return the key that a client sends: the first in ``file``, else in the environment, or None.

    Raises:
        UserError: the file, or the environment's setting, holds no key.
    """
    names = ("api_keys", "api_keys_file")
    if file:
        values = {"api_keys_file": str(file)}
    else:
        values = {
            name: environment[_variable(name)] for name in names if _variable(name) in environment
        }
    keys = Settings.model_validate(values).keys()
    return next(iter(keys), None)


def keys_of(path: Path) -> list[tuple[str, str]]:
    """Return names and keys in a file: one key a line, in UTF-8, a byte order mark or none.

    Empty lines and lines that begin with ``#`` are left out.

    Raises:
        UserError: the file cannot be read or is not text, or a line is not a valid key.
    """
    hint = "give a text file with one key a line"
    try:
        if not path.is_file():
            if path.is_dir():
                kind = "a folder"
            elif path.exists():
                kind = "no file"
            else:
                kind = "absent"
            raise UserError(f"expected API keys in {path}, and it is {kind}", hint=hint)
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the API keys in {path}: {error}", hint=hint) from error
    return [
        _key(line, f"{path}, line {number}")
        for number, line in enumerate(map(_strip, lines), 1)
        if line and not line.startswith("#")
    ]


def _named(text: str | None) -> list[tuple[str, str]]:
    """Return the names and folders of ``NAME=FOLDER,NAME=FOLDER``."""
    pairs = (pair.partition("=") for pair in (text or "").split(",") if pair)
    return [(name, folder) for name, _, folder in pairs]


def _strip(text: str) -> str:
    """Return a text without the spaces, tabs and line ends around it."""
    return text.strip(" \t\r\n")


def _key(line: str, where: str) -> tuple[str, str]:
    """Return name and key of a line, or raise an error that tells its place but does not show it.

    A key never holds a blank, so that a key with a colon in it is not taken for a name and a key.
    A name without a key is refused: the name would be a key that everybody can guess.
    """
    # The characters that RFC 6750 allows, and a few more.
    found = re.fullmatch(r"(?:([A-Za-z0-9._-]{1,64}):[ \t]+)?([!-~]+)", line)
    if not found or re.fullmatch("[A-Za-z0-9._-]{1,64}:", line):
        raise UserError(
            f"{where}: an API key consists of visible ASCII characters, without a blank; a name of "
            "at most 64 letters, digits, '.', '_' and '-', a colon and a blank may stand before "
            "it; this line has another form",
            hint="write one key a line, as KEY or as NAME: KEY, comments on lines of their own "
            f"that begin with #, or in {_variable('api_keys')} a comma between keys",
        )
    return found[1] or "", found[2]


def _variable(name: str) -> str:
    """Return the name of the environment variable of a setting."""
    return PREFIX + name.upper()


def _variables(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the texts of the settings in the environment, by the setting's name.

    Raises:
        UserError: a variable looks like a setting, and there is no such setting.
    """
    names = {_variable(name): name for name in Settings.model_fields}
    texts = dict[str, str]()
    for variable, text in environment.items():
        if variable in names:
            texts[names[variable]] = text
        elif not variable.upper().startswith(PREFIX) or _NO_SETTING.fullmatch(variable):
            continue
        elif not (variable.endswith("_PORT") and _KUBERNETES_PORT.match(text)):
            raise UserError(
                f"the environment has {variable}, and there is no such setting"
                f"{nearest(variable.upper(), names)}",
                hint=f"unset it; there are {', '.join(names)}",
            )
    return texts


def _value(name: str, text: str, source: str) -> Any:
    """Return the text of one setting, converted to the type of the setting.

    Raises:
        UserError: the text is not a valid value; the message names its ``source``.
    """
    try:
        return getattr(Settings.model_validate({name: text}), name)
    except ValidationError as error:
        raise UserError(
            f"{source}: expected {_expected(name)}, found {text!r}",
            hint=f"give such a value by {_variable(name)}, or leave it out",
        ) from error


def _expected(name: str) -> str:
    """Return in words which values a setting may have."""
    field = Settings.model_fields[name]
    if field.description:
        return field.description
    kinds = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text that is not empty",
    }
    types = get_args(field.annotation) or (field.annotation,)
    (kind_words,) = (words for kind, words in kinds.items() if kind in types)
    bounds = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    bounds_words = [
        f"{words} {getattr(limit, bound):.15g}"
        for limit in field.metadata
        for bound, words in bounds.items()
        if hasattr(limit, bound)
    ]
    return ", ".join([kind_words, *bounds_words])


def _absolute(name: str, path: str, *, packed: bool) -> Path:
    """Return a path as an absolute one, because workers have another working directory.

    Raises:
        UserError: a Bento is served, and the path is relative.
    """
    if packed and not Path(path).is_absolute():
        raise UserError(
            f"{name}: expected an absolute path, because a Bento is served in a folder of its own, "
            f"found {path!r}",
            hint=f'set {_variable(name)}="$PWD"/{shlex.quote(path)}',
        )
    return Path(path).absolute()


def _check_nothing_is_lost(
    arg_values: Mapping[str, str], command: Sequence[str], *, packed: bool
) -> None:
    """Refuse arguments that differ from the command line, are unknown, or are secret.

    Raises:
        UserError: the hint tells how to give the setting instead.
    """
    for option, name, value in _typed(command):
        if not name and packed:
            raise UserError(
                f"`{option} {value}` was given, and BentoML drops it when it serves a Bento",
                hint=f"set {PREFIX}NAME=VALUE in the environment for each of its lines",
            )
        if name and name in Settings.model_fields and arg_values.get(name) != value:
            result = "BentoML drops it"
            if name in arg_values:
                result = f"BentoML hands on {arg_values[name]!r}"
            reason = " when it serves a Bento" if packed else ": it was given twice"
            raise UserError(
                f"`{option} {name}=` was given, and {result}{reason}",
                hint=_way_to_set(name, value, packed=packed),
            )
    if _is_bentoml(command) and any(
        word.partition("=")[0] == "--timeout-keep-alive" for word in command
    ):
        raise UserError(
            "`--timeout-keep-alive` was given, and keep_alive_s is the setting for this time",
            hint=f"set {_variable('keep_alive_s')} in the environment instead",
        )
    typed_names = [name for _, name, _ in _typed(command) if name]
    for name in (*typed_names, *arg_values):
        if name not in Settings.model_fields:
            raise UserError(
                f"there is no argument {name!r}{nearest(name, Settings.model_fields)}",
                hint=f"there are {', '.join(Settings.model_fields)}",
            )
        if name in SECRETS:
            raise UserError(
                f"{name} was given by --arg, where other users of the machine can read it",
                hint=f"set {_variable(name)} in the environment, or give api_keys_file",
            )


def _way_to_set(name: str, value: str, *, packed: bool) -> str:
    """Return a hint: how to give a setting that BentoML has dropped."""
    if packed and name in OF_A_CHECKOUT:
        return (
            "a Bento serves the model that it holds: leave it out, or make a Bento of "
            "another run with `ad2kit package`"
        )
    shown = "…" if name in SECRETS else shlex.quote(value)
    if name in PATHS and not Path(value).is_absolute():
        shown = f'"$PWD"/{shown}'
    return f"set {_variable(name)}={shown} in the environment instead"


def _is_bentoml(command: Sequence[str]) -> bool:
    """Tell whether a command line is one of ``bentoml``, or of ``python -m bentoml``."""
    program = Path(command[0]) if command else Path()
    return program.stem == "bentoml" or program.parent.name == "bentoml"


def _typed(command: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Yield option, name and value of each typed argument of ``bentoml``.

    A file of arguments that cannot be read has an empty name, and its path is the value.
    """
    if not _is_bentoml(command):
        return
    words = iter(command[1:])
    for word in words:
        option, equals, value = word.partition("=")
        if option == "--":
            return
        if option in ("--arg", "--arg-file"):
            value = value if equals else next(words, "")
            pairs = [value.partition("=")[::2]] if option == "--arg" else _lines_of(value)
            for name, text in pairs:
                yield option, name, text


def _lines_of(file: str) -> Iterable[tuple[str, str]]:
    """Return the names and values in a YAML file of arguments."""
    try:
        arguments = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return [("", file)]  # BentoML has read it, from another working directory
    return [(str(name), str(value)) for name, value in (arguments or {}).items()]
