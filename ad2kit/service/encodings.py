"""Bodies that a client has compressed: gzip, and zstd where Python or a package can read it.

A kilobyte can unpack to a megabyte. So no more is unpacked than a body may have, and a caller waits
for the turn of the request before it unpacks much.
"""

from __future__ import annotations

import functools
import importlib
import zlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_WITH_GZIP_HEADER = 16 + zlib.MAX_WBITS
# A body may be several members or frames, one after the other. Thousands of empty ones would take
# seconds.
_MAX_MEMBERS = 16
# A frame of zstd may ask its reader for gigabytes; RFC 8878 recommends this bound.
_WINDOW_LOG = 23


class Damaged(Exception):
    """A body is not what its Content-Encoding says."""


class TooLarge(Exception):
    """A body unpacks to more than it may have."""


def encoding_of(headers: Mapping[bytes, bytes]) -> bytes:
    """Return the encoding of a body; it is empty for a plain body."""
    encoding = headers.get(b"content-encoding", b"").strip().lower()
    return b"" if encoding == b"identity" else encoding


def fault_of(encoding: bytes) -> str | None:
    """Return why an encoding is not read, or None if it is read."""
    if not encoding or encoding in _readers():
        return None
    if encoding == b"zstd":
        return "is not read: the service needs Python 3.14 or the package zstandard for it"
    return "is not read"


def unpack(body: bytes, encoding: bytes, max_bytes: int) -> bytes:
    """Return the content of a body in an encoding that :func:`fault_of` finds no fault with.

    Raises:
        Damaged: the body is not in this encoding, or it is not complete.
        TooLarge: the content has more than ``max_bytes``; hardly more than these were unpacked.
    """
    content = _readers()[encoding](body, max_bytes + 1)
    if len(content) > max_bytes:
        raise TooLarge(f"at most {max_bytes} bytes after it is unpacked")
    return content


@functools.cache
def _readers() -> dict[bytes, Callable[[bytes, int], bytes]]:
    """Return the functions that unpack at most so many bytes of a body, by encoding."""

    def gunzip(body: bytes, max_bytes: int) -> bytes:
        def member() -> Any:
            return zlib.decompressobj(_WITH_GZIP_HEADER)

        return _members(member, zlib.error, body, max_bytes)

    readers: dict[bytes, Callable[[bytes, int], bytes]] = {b"gzip": gunzip, b"x-gzip": gunzip}
    for name, reader in (("compression.zstd", _of_python), ("zstandard", _of_package)):
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        readers[b"zstd"] = reader(module)
        break
    return readers


def _of_python(zstd: Any) -> Callable[[bytes, int], bytes]:
    """Return the reader of zstd for the module of Python 3.14."""
    options = {zstd.DecompressionParameter.window_log_max: _WINDOW_LOG}

    def frame() -> Any:
        return zstd.ZstdDecompressor(options=options)

    return functools.partial(_members, frame, zstd.ZstdError)


def _of_package(zstandard: Any) -> Callable[[bytes, int], bytes]:
    """Return the reader of zstd for the package ``zstandard``."""

    def read(body: bytes, max_bytes: int) -> bytes:
        context = zstandard.ZstdDecompressor(max_window_size=2**_WINDOW_LOG)
        try:
            # It takes a frame that is cut for a whole one; then the JSON in it is not complete.
            return bytes(context.stream_reader(body, read_across_frames=True).read(max_bytes))
        except zstandard.ZstdError as error:
            raise Damaged(f"zstd: {error}") from error

    return read


def _members(
    member: Callable[[], Any], error: type[Exception], body: bytes, max_bytes: int
) -> bytes:
    """Return at most ``max_bytes`` of the content of the members of a body.

    Raises:
        Damaged: ``error`` was raised, or the body ends within a member, or has too many.
    """
    content: bytes = b""
    for _ in range(_MAX_MEMBERS):
        decompressor = member()
        try:
            content += decompressor.decompress(body, max_bytes - len(content))
        except error as fault:
            raise Damaged(str(fault)) from fault
        if len(content) >= max_bytes:
            return content
        if not decompressor.eof:
            raise Damaged("it ends too early")
        body = decompressor.unused_data
        if not body:
            return content
    raise Damaged(f"it has more than {_MAX_MEMBERS} parts")
