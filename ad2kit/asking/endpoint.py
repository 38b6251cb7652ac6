"""One endpoint of the OpenAI protocol: a request, its retries, and the limits of a minute.

The client's own retries are off, and it takes no proxy from the environment: every try is counted
here, and goes where the command says.
"""

from __future__ import annotations

import asyncio
import email.utils
import os
import random
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ad2kit.asking.prompts import REFUSED, parsed
from ad2kit.run.errors import MissingExtra, UserError

try:
    import httpx2
    import openai
except ModuleNotFoundError as error:
    raise MissingExtra(error.name or "openai", extra="ask") from error

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from ad2kit.asking.prompts import Reply

KEY_VARIABLE = "AD2KIT_ASK_KEY"
"""The environment variable with the key of the endpoint."""

# Variables by which the client would send headers that no command names.
_SILENT = ("OPENAI_CUSTOM_HEADERS",)
# A request is sent so many times; the waits between them add up to half a minute.
_TRIES = 6
_FIRST_WAIT_S = 1.0
_LONGEST_WAIT_S = 600.0


class Unanswered(Exception):
    """A request got no answer; ``final`` if it will never get one."""

    def __init__(self, reason: str, *, final: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.final = final


class Pace:
    """When the next request may start: by limits of a minute, and by what the server asked for.

    Args:
        requests_per_minute: a limit; None for none.
        tokens_per_minute: a limit on estimated tokens; None for none.
    """

    def __init__(self, requests_per_minute: float | None, tokens_per_minute: float | None) -> None:
        self._request_s = 60 / requests_per_minute if requests_per_minute else 0.0
        self._token_s = 60 / tokens_per_minute if tokens_per_minute else 0.0
        self._next_s = self.held_until_s = 0.0

    def start(self, now_s: float, tokens: float) -> float:
        """Return when a request of so many tokens may start that is ready now, and reserve that."""
        start_s = max(now_s, self._next_s)
        self._next_s = start_s + max(self._request_s, tokens * self._token_s)
        return start_s

    async def wait(self, tokens: float) -> None:
        """Wait until a request of so many tokens may start."""
        start_s = self.start(time.monotonic(), tokens)
        while (wait_s := max(start_s, self.held_until_s) - time.monotonic()) > 0:
            await asyncio.sleep(wait_s)

    def hold(self, seconds: float) -> None:
        """Start no request for so long, whoever sends it."""
        self.held_until_s = max(self.held_until_s, time.monotonic() + seconds)


class Endpoint:
    """A client of one model at one address.

    Args:
        base_url: the address, such as ``http://127.0.0.1:8000/v1``.
        model: the model to ask.
        concurrency: the most requests at once.
        pace: when a request may start.
        timeout_s: how long one request may take.
        proxy: the address of a proxy; None for none.

    Raises:
        UserError: the address is none, or the environment would change the requests.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        concurrency: int,
        pace: Pace,
        timeout_s: float,
        proxy: str | None = None,
    ) -> None:
        _check_address("--base-url", base_url)
        if proxy is not None:
            _check_address("--proxy", proxy)
        for name in _SILENT:
            if name in os.environ:
                raise UserError(
                    f"{name} is set, and would add headers to each request",
                    hint=f"unset {name}; fields of the body go into the recipe: ask.extra",
                )
        self.base_url = base_url
        self.model = model
        self._pace = pace
        key = os.environ.get(KEY_VARIABLE, "")
        self._left_out: dict[str, Any] = {
            name: openai.Omit() for name in ("OpenAI-Organization", "OpenAI-Project")
        }
        if not key:
            self._left_out["Authorization"] = openai.Omit()
        transport = httpx2.AsyncClient(
            trust_env=False,
            proxy=proxy,
            timeout=timeout_s,
            follow_redirects=False,
            limits=httpx2.Limits(max_connections=concurrency),
        )
        self._client = openai.AsyncOpenAI(
            base_url=base_url,
            api_key=key or "none",
            organization="",
            project="",
            max_retries=0,
            timeout=timeout_s,
            http_client=transport,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._client.close()

    async def reply(
        self,
        body: dict[str, Any],
        tokens: float,
        *,
        on_try: Callable[[], None],
        on_failure: Callable[[str], None],
        patient: bool,
    ) -> Reply:
        """Send a request until it is answered.

        Args:
            body: the request without the model.
            tokens: the estimated number of its tokens.
            on_try: called right before each try.
            on_failure: called with the reason after each try without an answer.
            patient: whether an endpoint that cannot be reached is tried again.

        Raises:
            Unanswered: the server refused the request, or every try failed.
            UserError: no request would be answered.
        """
        reason = ""
        for number in range(_TRIES):
            await self._pace.wait(tokens)
            on_try()
            try:
                reply = await self._once(body)
            except openai.APIError as error:
                end = self._end_of(error, patient=patient)
                if not (isinstance(end, Unanswered) and end.final):  # else this is the answer
                    on_failure(_name(error))
                if end is not None:
                    raise end from error
                reason, wait_s = _said(error), _retry_after(error)
            else:
                if reply is not None:
                    return reply
                on_failure("half a reply")
                reason, wait_s = "the reply is no completion of the protocol, or half of one", None
            if number + 1 < _TRIES:
                await self._wait(number, wait_s)
        raise Unanswered(f"no answer in {_TRIES} tries, at last: {reason}", final=False)

    async def _once(self, body: dict[str, Any]) -> Reply | None:
        """Send a request once; return None if the reply is no completion."""
        create = self._client.chat.completions.with_raw_response.create
        response = await create(
            model=self.model,
            messages=body["messages"],
            extra_body=body,
            extra_headers=self._left_out,
        )
        return parsed(response.http_response.content)

    async def _wait(self, number: int, asked_s: float | None) -> None:
        """Wait before the next try: as the server asks, else longer each time."""
        if asked_s is None:
            await asyncio.sleep(_FIRST_WAIT_S * 2**number * random.uniform(0.5, 1.0))  # noqa: S311
            return
        if asked_s > _LONGEST_WAIT_S:
            raise UserError(
                f"{self.base_url} asks to wait for {asked_s:,.0f} s",
                hint="run the same command again after that; what was answered is kept",
            )
        self._pace.hold(asked_s)

    def _end_of(self, error: openai.APIError, *, patient: bool) -> UserError | Unanswered | None:
        """Return what ends the job, or this request; None if it is worth another try."""
        if isinstance(error, openai.APIConnectionError):
            if patient or isinstance(error, openai.APITimeoutError):
                return None
            return UserError(
                f"cannot reach {self.base_url}: {error.__cause__ or error}",
                hint="start the server, correct --base-url, or give --proxy",
            )
        status = error.status_code if isinstance(error, openai.APIStatusError) else 0
        said = _said(error)
        if status in (401, 403):
            key = "was sent" if os.environ.get(KEY_VARIABLE) else "is not set"
            return UserError(
                f"{self.base_url} refuses the key: {said}",
                hint=f"the key is that of the environment variable {KEY_VARIABLE}, which {key}",
            )
        if status == 404 or 300 <= status < 400:
            return UserError(
                f"{self.base_url} does not know the path or the model '{self.model}': {said}",
                hint="correct --base-url (it often ends in /v1) or --model",
            )
        if error.code == "insufficient_quota":
            return UserError(
                f"{self.base_url}: the account is empty: {said}",
                hint="fill it, and run the same command again; what was answered is kept",
            )
        if 400 <= status < 500 and status not in (408, 409, 429):
            return Unanswered(f"{REFUSED}: {status}: {said}", final=True)
        return None


def _check_address(option: str, url: str) -> None:
    """Refuse what is no address, and one that holds a password: it would be written down."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    else:
        if good and option == "--base-url" and (parts.username or parts.password or parts.query):
            raise UserError(
                f"{option}: expected an address without a user, password or query, because it is "
                "written down",
                hint=f"give a key in the environment variable {KEY_VARIABLE}",
            )
    if not good:
        raise UserError(
            f"{option}: expected an address such as http://127.0.0.1:8000/v1, found "
            f"'{_without_user(url)}'",
            hint="correct it",
        )


def _without_user(url: str) -> str:
    """Return an address, also one that is none, without the user and password before its @."""
    before, at, host = url.rpartition("@")
    scheme, slashes, _ = before.rpartition("//")
    return f"{scheme}{slashes}[user]@{host}" if at else url


def _name(error: openai.APIError) -> str:
    """Return the kind of an error, to count it by."""
    if isinstance(error, openai.APIStatusError):
        return str(error.status_code)
    return "timeout" if isinstance(error, openai.APITimeoutError) else "connection"


def _said(error: openai.APIError) -> str:
    """Return what the server said, in one line; it never holds the key."""
    said = str(error.message)
    if key := os.environ.get(KEY_VARIABLE):
        said = said.replace(key, "[key]")
    return " ".join(said.split())[:300]


def _retry_after(error: openai.APIError) -> float | None:
    """Return the seconds that the server asks to wait; None if it does not say."""
    if not isinstance(error, openai.APIStatusError):
        return None
    headers = error.response.headers
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        if "retry-after" not in headers:
            return None
        said = headers["retry-after"]
        if said.strip().isdecimal():
            return float(said)
        return max(
            0.0, (email.utils.parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds()
        )
    except (ValueError, TypeError):
        return None
