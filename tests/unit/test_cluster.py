"""An address where no cluster is: found out in seconds, whatever else may listen there."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import pytest

from ad2kit.run import ray_cluster
from ad2kit.run.errors import UserError
from ad2kit.run.ray_cluster import check_answer

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def listener(answer: bytes | None) -> Iterator[str]:
    """Something that takes one connection and answers, or says nothing until the other leaves."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            # Who is refused leaves without reading to the end.
            with connection, suppress(ConnectionResetError):
                if answer:
                    connection.sendall(answer)
                while connection.recv(1024):
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(None, "timed out"), (b"HTTP/1.1 400 Bad Request\r\n\r\n", "it is no Ray head")],
)
def test_what_is_no_cluster_is_refused(
    monkeypatch: pytest.MonkeyPatch, answer: bytes | None, expected: str
) -> None:
    monkeypatch.setattr(ray_cluster, "_TIMEOUT_S", 0.2)
    with listener(answer) as address, pytest.raises(UserError, match=expected) as caught:
        check_answer(address)
    assert f"no Ray cluster answers at {address}" in caught.value.message
    assert "ray start --head" in caught.value.hint


def test_the_settings_of_an_http2_server_are_an_answer() -> None:
    with listener(bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))) as address:
        check_answer(address)


@pytest.mark.parametrize("address", ["localhost", "ray://localhost:10001", "localhost:head", ":1"])
def test_an_address_is_a_host_and_a_port(address: str) -> None:
    with pytest.raises(UserError, match=r"must look like HOST:PORT, found '") as caught:
        check_answer(address)
    assert "--address" in caught.value.hint
