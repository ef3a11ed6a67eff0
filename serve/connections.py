"""Clients that send too much or too slowly are turned away before they cost anything.

`BodyLimit` guards bodies, `protocol` the headers before them. Neither knows what the service does.
"""

import asyncio
import contextlib
import json
import logging

import h11
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http import h11_impl

from diffusion_kd import errors

logger = logging.getLogger(__name__)

_LINGER_S = 1.0
"""How long the rest of a body that is too large is read and dropped after the answer, so that the answer arrives."""


class BodyLimit:
    """ASGI middleware that takes a request's whole body in before the app sees the request.

    most_bytes: of a body; larger ones are answered 413, at once where Content-Length tells, else when they exceed it.
    timeout_s: for the whole of a body, however it trickles; then 408. Both close the connection.
    The app finds the body as one message and, after it, the disconnection when it comes. A client that leaves amid its
    body never reaches the app.
    """

    def __init__(self, app: ASGIApp, most_bytes: int, timeout_s: float) -> None:
        errors.require(most_bytes >= 0, "most_bytes", most_bytes, "0 or more")
        errors.require(timeout_s > 0, "timeout_s", timeout_s, "above 0")
        self._app, self._most_bytes, self._timeout_s = app, most_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if _announced_bytes(scope) > self._most_bytes:
            await self._refuse_size(receive, send)
            return
        try:
            async with asyncio.timeout(self._timeout_s):
                body = await self._read(receive)
        except TimeoutError:
            message = f"the request body did not arrive within {self._timeout_s:g} s; send it faster, or again"
            await _refuse(send, 408, message, "request_timeout")
        except _TooLarge:
            await self._refuse_size(receive, send)
        except _Left:
            return
        else:
            await self._app(scope, _Replay(body, receive), send)

    async def _read(self, receive: Receive) -> bytes:
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _Left
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._most_bytes:
                raise _TooLarge
            if not message.get("more_body", False):
                return b"".join(parts)

    async def _refuse_size(self, receive: Receive, send: Send) -> None:
        message = f"the request body is larger than {self._most_bytes} bytes; send a smaller one"
        await _refuse(send, 413, message, "request_too_large", receive)


class _TooLarge(Exception):
    """More has arrived than may."""


class _Left(Exception):
    """The client went away before its body was complete."""


class _Replay:
    """A `receive` that gives the body once, then what the server tells."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


def _announced_bytes(scope: Scope) -> int:
    """The largest Content-Length among a request's headers; 0 where there is none, or none that is a number."""
    values = [value for name, value in scope["headers"] if name.lower() == b"content-length"]
    return max((int(value) for value in values if value.isdigit()), default=0)


async def _refuse(send: Send, status: int, message: str, code: str, rest: Receive | None = None) -> None:
    """Answer an error in OpenAI's envelope and close the connection.

    rest: where more of the body may come from. It is read for a moment before the connection is closed, since closing
    on unread bytes resets it, and the client may then lose the answer.
    """
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    body = json.dumps({"error": error}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    if rest is not None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LINGER_S):
                while (await rest()).get("more_body", False):
                    pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})


# --- headers ----------------------------------------------------------------------------------------


def protocol(header_timeout_s: float) -> type[h11_impl.H11Protocol]:
    """A protocol for `uvicorn.Config(http=...)` that closes connections whose request headers do not arrive in time.

    header_timeout_s: from the connection, or on a kept one from the first byte of a further request, to the end of the
    headers. Between requests, uvicorn's own `timeout_keep_alive` counts.
    """
    errors.require(header_timeout_s > 0, "header_timeout_s", header_timeout_s, "above 0")
    return type("TimedProtocol", (_TimedProtocol,), {"header_timeout_s": header_timeout_s})


class _TimedProtocol(h11_impl.H11Protocol):
    header_timeout_s: float
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_headers()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._headers_came()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        # Also reached, without new data, when a pipelined request's turn has come.
        if self.conn.their_state is not h11.IDLE:
            self._headers_came()

    def _await_headers(self) -> None:
        """Start the clock, unless it runs: further bytes of the same headers buy no time."""
        if self._deadline is None:
            self._deadline = self.loop.call_later(self.header_timeout_s, self._give_up)

    def _headers_came(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            logger.info("a client's request headers did not arrive within %g s", self.header_timeout_s)
            self.transport.abort()
