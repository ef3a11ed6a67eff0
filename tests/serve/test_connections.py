"""Slow and large senders, over real sockets against a real uvicorn."""

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffusion_kd import errors
from serve import connections

HEADER_TIMEOUT_S, BODY_TIMEOUT_S, MOST_BYTES = 0.5, 0.6, 1000


class Echo:
    """Answers the size of the body; on /wait it answers only once the client has left."""

    def __init__(self) -> None:
        self.requests = 0
        self.left = threading.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.requests += 1
        message = await receive()
        assert message["type"] == "http.request" and not message["more_body"]
        if scope["path"] == "/wait":
            assert (await receive())["type"] == "http.disconnect"
            self.left.set()
        if scope["path"] == "/slow":
            await asyncio.sleep(2 * HEADER_TIMEOUT_S)
        body = b"%d" % len(message["body"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})


@contextlib.contextmanager
def serving(app: ASGIApp, **settings: Any) -> Iterator[int]:
    """A uvicorn in a thread; its port."""
    config = uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        lifespan="off",
        log_config=None,
        http=connections.protocol(HEADER_TIMEOUT_S),
        **settings,
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
def port(echo: Echo) -> Iterator[int]:
    with serving(connections.BodyLimit(echo, MOST_BYTES, BODY_TIMEOUT_S)) as port:
        yield port


def connected(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=5)


def until_closed(client: socket.socket) -> bytes:
    """All that comes until the server closes, cleanly or not."""
    got = b""
    with contextlib.suppress(ConnectionError):
        while chunk := client.recv(65536):
            got += chunk
    return got


def answer_of(client: socket.socket) -> tuple[int, bytes]:
    """One answer by its Content-Length, leaving the connection open."""
    answer = http.client.HTTPResponse(client)
    answer.begin()
    return answer.status, answer.read()


def refusal_in(raw: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = raw.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    return int(head.split()[1]), json.loads(body)["error"]


# --- bodies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, MOST_BYTES])
def test_a_body_within_the_limit_arrives_whole(size: int, port: int) -> None:
    with connected(port) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size)
        for half in (size // 2, size - size // 2):
            client.sendall(b"a" * half)
            time.sleep(0.05)
        assert answer_of(client) == (200, b"%d" % size)


def test_too_large_by_its_own_word_is_refused_before_it_is_sent(port: int, echo: Echo) -> None:
    with connected(port) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 1001\r\n\r\n")
        status, body = answer_of(client)
    error = json.loads(body)["error"]
    assert status == 413 and error["code"] == "request_too_large" and "1000 bytes" in error["message"]
    assert error["type"] == "invalid_request_error" and error["param"] is None
    assert echo.requests == 0


def test_too_large_in_chunks_is_refused_when_it_is(port: int, echo: Echo) -> None:
    with connected(port) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        client.sendall(b"3e8\r\n" + b"a" * 1000 + b"\r\n")
        time.sleep(0.1)
        client.sendall(b"1\r\na\r\n")
        status, error = refusal_in(until_closed(client))
    assert status == 413 and error["code"] == "request_too_large" and echo.requests == 0


def test_a_client_that_sends_on_still_gets_its_answer(port: int) -> None:
    """Closing on bytes that nobody read resets a connection, and an answer on its way is lost."""
    with connected(port) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4000000\r\n\r\n")
        client.sendall(b"a" * 4_000_000)
        status, error = refusal_in(until_closed(client))
    assert status == 413 and error["code"] == "request_too_large"


@pytest.mark.parametrize("trickle", [False, True])
def test_a_body_that_does_not_come_is_408(trickle: bool, port: int, echo: Echo) -> None:
    begun_s = time.perf_counter()
    with connected(port) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
        client.settimeout(0.05)
        got = b""
        while b"}}" not in got and time.perf_counter() - begun_s < 5:
            if trickle:
                client.sendall(b"a")
            with contextlib.suppress(TimeoutError):
                got += client.recv(65536)
        taken_s = time.perf_counter() - begun_s
    status, error = refusal_in(got)
    assert status == 408 and error["code"] == "request_timeout" and echo.requests == 0
    assert BODY_TIMEOUT_S * 0.9 < taken_s < BODY_TIMEOUT_S + 1


def test_a_client_that_leaves_amid_its_body_never_reaches_the_app(port: int, echo: Echo) -> None:
    with connected(port) as client:
        client.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc")
    time.sleep(0.2)
    assert echo.requests == 0


def test_the_app_hears_of_a_disconnection_after_the_body(port: int, echo: Echo) -> None:
    with connected(port) as client:
        client.sendall(b"POST /wait HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc")
        assert not echo.left.wait(BODY_TIMEOUT_S + 0.3)
    assert echo.left.wait(2)


def test_other_than_http_passes() -> None:
    seen = []

    async def inner(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append((scope["type"], await receive()))

    async def receive() -> Message:
        return {"type": "lifespan.startup"}

    async def send(_: Message) -> None:
        pass

    asyncio.run(connections.BodyLimit(inner, 0, 1)({"type": "lifespan"}, receive, send))
    assert seen == [("lifespan", {"type": "lifespan.startup"})]


# --- headers ----------------------------------------------------------------------------------------


def closed_after_s(client: socket.socket, piece: bytes = b"", every_s: float = 0.05) -> float:
    """Seconds until the server closes, while `piece` is sent again and again."""
    begun_s = time.perf_counter()
    client.settimeout(every_s)
    while time.perf_counter() - begun_s < 5:
        try:
            if piece:
                client.sendall(piece)
            if not client.recv(65536):
                break
        except TimeoutError:
            continue
        except ConnectionError:
            break
    return time.perf_counter() - begun_s


@pytest.mark.parametrize("piece", [b"", b"G"])
def test_a_connection_without_a_request_is_closed(piece: bytes, port: int) -> None:
    with connected(port) as client:
        assert HEADER_TIMEOUT_S * 0.8 < closed_after_s(client, piece) < HEADER_TIMEOUT_S + 1


@pytest.mark.parametrize("piece", [b"", b"X-A: b\r\n"])
def test_headers_that_do_not_end_close_the_connection(piece: bytes, port: int, echo: Echo) -> None:
    with connected(port) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
        assert HEADER_TIMEOUT_S * 0.8 < closed_after_s(client, piece) < HEADER_TIMEOUT_S + 1
    assert echo.requests == 0


def test_a_kept_connection_serves_on_and_rests_longer_than_headers_may(port: int) -> None:
    with connected(port) as client:
        for _ in range(3):
            client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert answer_of(client) == (200, b"0")
            time.sleep(1.5 * HEADER_TIMEOUT_S)
        # Headers in two pieces, in time.
        client.sendall(b"GET / HTTP/1.1\r\n")
        time.sleep(0.4 * HEADER_TIMEOUT_S)
        client.sendall(b"Host: x\r\n\r\n")
        assert answer_of(client) == (200, b"0")


def test_slow_headers_on_a_kept_connection_close_it(port: int) -> None:
    with connected(port) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer_of(client) == (200, b"0")
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
        assert HEADER_TIMEOUT_S * 0.8 < closed_after_s(client, b"X-A: b\r\n") < HEADER_TIMEOUT_S + 1


def test_an_answer_may_take_longer_than_headers_may(port: int) -> None:
    with connected(port) as client:
        client.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer_of(client) == (200, b"0")


def test_a_pipelined_request_is_served_after_a_slow_one(port: int) -> None:
    with connected(port) as client:
        client.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert until_closed(client).count(b"HTTP/1.1 200") == 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: connections.protocol(0),
        lambda: connections.BodyLimit(Echo(), -1, 1),
        lambda: connections.BodyLimit(Echo(), 1, 0),
    ],
)
def test_settings_out_of_range_are_refused(make: Any) -> None:
    with pytest.raises(errors.ConfigError, match="it must be"):
        make()
