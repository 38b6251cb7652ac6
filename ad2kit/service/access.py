"""Who may ask: API keys, and pages of other origins."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING

from ad2kit.service.connections import REQUEST
from ad2kit.service.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

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


class ApiKeys:
    """ASGI middleware: requests without a valid key get an answer from the public paths only.

    Args:
        app: the application to guard.
        keys: the valid keys.
        public: paths that need no key.
        count: called with the name of the key of each request, if the key has a name.
    """

    def __init__(
        self,
        app: App,
        *,
        keys: Keys,
        public: Collection[str],
        count: Callable[[str], None] = lambda _name: None,
    ) -> None:
        self.app = app
        self.public = frozenset(public)
        self.count = count
        self.keys = keys

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass one request on if it has a valid key or needs none.

        Raises:
            Problem: with status 401, if it has no valid key and needs one.
        """
        pairs = self.keys.pairs
        if pairs and scope["type"] == "http" and scope["path"] not in self.public:
            authorization = dict(scope["headers"]).get(b"authorization", b"")
            scheme, _, key = authorization.partition(b" ")
            # The key is compared with all valid keys, each time in constant time, so that the
            # time of an answer reveals nothing about a valid key.
            key = key.strip()
            names = [name for valid, name in pairs if hmac.compare_digest(key, valid)]
            if scheme.lower() != b"bearer" or not names:
                raise Problem(401)
            if names[0]:
                REQUEST.get({})["key_name"] = names[0]
                self.count(names[0])
        await self.app(scope, receive, send)
