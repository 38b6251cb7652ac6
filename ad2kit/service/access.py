"""Who may ask, and how often: API keys, and pages of other origins."""

from __future__ import annotations

import fcntl
import hmac
import math
import mmap
import struct
import time
from typing import TYPE_CHECKING

from ad2kit.service.connections import REQUEST
from ad2kit.service.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping
    from pathlib import Path

    from ad2kit.service.errors import App, Message, Receive, Send


class Preflight:
    """ASGI middleware: tells a browser beforehand what a page of another origin may send.

    Whether the page may send anything, a header of every answer says (``connections.py``). A
    browser asks without a key.

    Args:
        app: the application for everything else.
    """

    _HEADERS = (
        (b"access-control-allow-methods", b"GET, POST"),
        (
            b"access-control-allow-headers",
            b"Authorization, Content-Type, Content-Encoding, X-Request-ID, X-Server-Timing",
        ),
        (b"access-control-max-age", b"600"),
    )

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answer a preflight request, or pass a request on."""
        is_asked = scope["type"] == "http" and scope["method"] == "OPTIONS"
        if not (is_asked and b"access-control-request-method" in dict(scope["headers"])):
            await self.app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 204, "headers": [*self._HEADERS]})
        await send({"type": "http.response.body"})


class Keys:
    """The keys that are valid now.

    Args:
        keys: the names of the valid keys, by key; a name may be empty. There are several keys
            during a change of keys. Without keys all paths are open.
    """

    def __init__(self, keys: Mapping[str, str]) -> None:
        self.change(keys)

    def change(self, keys: Mapping[str, str]) -> None:
        """Take other keys; safe in any thread."""
        self.pairs = [(key.encode(), name) for key, name in keys.items()]


class Rate:
    """A bound on the requests of each key, in all workers of a server together.

    By the generic cell rate algorithm (ITU-T I.371): for each key a file holds the time when its
    next request is due if it asks evenly. A request may come up to a second before.

    Args:
        file: the file that the workers share.
        per_s: requests of a key per second.
    """

    _KEYS = 2**16

    def __init__(self, file: Path, per_s: float) -> None:
        self.per_s = per_s
        self._file = file.open("a+b")
        self._file.truncate(8 * self._KEYS)  # a sparse file of zeros
        self._due = mmap.mmap(self._file.fileno(), 8 * self._KEYS)

    def close(self) -> None:
        """Leave the file."""
        self._due.close()
        self._file.close()

    def check(self, key: int) -> None:
        """Count a request of a key, given by its place in the list.

        Raises:
            Problem: with status 429, if the key has asked too often.
        """
        start = 8 * (key % self._KEYS)
        fcntl.lockf(self._file, fcntl.LOCK_EX, 8, start)
        try:
            now = time.monotonic()  # the same clock in all processes
            due = max(now, struct.unpack_from("d", self._due, start)[0])
            early_s = due - now - 1.0
            if early_s <= 0:
                struct.pack_into("d", self._due, start, due + 1.0 / self.per_s)
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 8, start)
        if early_s > 0:
            raise Problem(
                429,
                f"this key may send {self.per_s:g} requests per second",
                retry_after_s=max(1, math.ceil(early_s)),
            )


class ApiKeys:
    """ASGI middleware: requests without a valid key get an answer from the public paths only.

    Args:
        app: the application to guard.
        keys: the valid keys.
        public: paths that need no key.
        count: called with the name of the key of each request, if the key has a name.
        rate: returns the bound on the requests of a key, or None. It is called at each request,
            because the service is created after its middleware.
    """

    def __init__(
        self,
        app: App,
        *,
        keys: Keys,
        public: Collection[str],
        count: Callable[[str], None] = lambda _name: None,
        rate: Callable[[], Rate | None] = lambda: None,
    ) -> None:
        self.app = app
        self.public = frozenset(public)
        self.count = count
        self.rate = rate
        self.keys = keys

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass one request on if it has a valid key or needs none.

        Raises:
            Problem: with status 401, if it has no valid key and needs one; with status 429, if the
                key has asked too often.
        """
        pairs = self.keys.pairs
        if pairs and scope["type"] == "http" and scope["path"] not in self.public:
            authorization = dict(scope["headers"]).get(b"authorization", b"")
            scheme, _, key = authorization.partition(b" ")
            # The key is compared with all valid keys, each time in constant time, so that the
            # time of an answer reveals nothing about a valid key.
            key = key.strip()
            found = [
                (place, name)
                for place, (valid, name) in enumerate(pairs)
                if hmac.compare_digest(key, valid)
            ]
            if scheme.lower() != b"bearer" or not found:
                raise Problem(401)
            place, name = found[0]
            if name:
                REQUEST.get({})["key_name"] = name
                self.count(name)
            if (rate := self.rate()) is not None:
                rate.check(place)
        await self.app(scope, receive, send)
