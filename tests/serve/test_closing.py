"""The end of a service while something is under way: in the store, in a thread that no cancelling stops, or unread."""

import asyncio
import concurrent.futures
import datetime
import pathlib
import socket
import threading
import time
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from fastapi import FastAPI

from serve import api, build, schemas, webhooks
from serve.settings import Settings
from serve.store import Usage
from tests.serve.live import Live, serving
from tests.serve.test_api import GENERATIONS, body


class Watched:
    """A service whose store notes in `order` what it has done.

    late: what begins before the service is told to end, and takes longer than what else ends it.
    """

    def __init__(self, late: str, *names: str) -> None:
        self.began, self._ending = threading.Event(), threading.Event()
        self.order: list[str] = []
        self._late, self._names = late, names

    def create(self, settings: Settings, built: build.Built) -> FastAPI:
        for name in (self._late, *self._names):
            setattr(built.service.store, name, self._noted(name, getattr(built.service.store, name)))
        drain = built.service.engine.drain

        def draining(timeout_s: float) -> bool:
            self._ending.set()
            return drain(timeout_s)

        setattr(built.service.engine, "drain", draining)  # noqa: B010 - a method
        return api.create_app(settings, built)

    def _noted(self, name: str, work: Any) -> Any:
        def noted(*given: Any, **named: Any) -> Any:
            if name == self._late:
                self.began.set()
                assert self._ending.wait(20)
            if name != self._names[-1]:
                time.sleep(0.5)
            done = work(*given, **named)
            self.order.append(name)
            return done

        return noted


@pytest.mark.parametrize(
    ("late", "last"),
    [("sweep", "close"), ("claim_jobs", "release_jobs"), ("claim_deliveries", "release_deliveries")],
)
def test_what_is_under_way_in_the_store_is_over_first(late: str, last: str, tmp_path: pathlib.Path) -> None:
    watched = Watched(late, last)
    with serving(tmp_path, watched.create, webhook_secret=webhooks.new_secret()):
        assert watched.began.wait(20)
    assert watched.order[:2] == [late, last]


def test_a_request_that_was_cut_off_is_recorded_to_the_end(tmp_path: pathlib.Path) -> None:
    """Its usage is being written when the server gives it up; its answer is kept for a repeat before the store ends."""
    watched = Watched("record_usage", "complete_idempotent", "close")
    with concurrent.futures.ThreadPoolExecutor(1) as clients, serving(tmp_path, watched.create) as live:
        sent = clients.submit(live.user().post, GENERATIONS, json=body(), headers={"Idempotency-Key": "once"})
        assert watched.began.wait(20)
    assert sent.exception() is not None or sent.result().status_code >= 500
    assert watched.order == ["record_usage", "complete_idempotent", "close"]


def test_a_stream_that_is_never_read_ends_before_the_store(tmp_path: pathlib.Path) -> None:
    silent, order = socket.socket(), list[str]()
    large = schemas.PartialImageEvent(
        b64_json="A" * 20_000_000,
        partial_image_index=0,
        image_index=0,
        created_at=0,
        size="64x64",
        output_format="png",
    )

    async def endless(*_: Any) -> AsyncGenerator[Any]:
        try:
            yield None
            while True:
                yield large
        finally:
            order.append("stream")

    def create(settings: Settings, built: build.Built) -> FastAPI:
        close = built.service.store.close

        def closing() -> None:
            order.append("close")
            silent.close()
            close()

        setattr(built.service, "stream", endless)  # noqa: B010 - a method
        setattr(built.service.store, "close", closing)  # noqa: B010
        return api.create_app(settings, built)

    with serving(tmp_path, create, auth="none") as live:
        _ask_for_a_stream(silent, live)
    assert order == ["stream", "close"]


def _ask_for_a_stream(client: socket.socket, live: Live) -> None:
    content = b'{"prompt": "a red circle", "model": "turbo", "stream": true}'
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", live.settings.port))
    head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    client.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    assert client.recv(12) == b"HTTP/1.1 200"


@pytest.mark.parametrize("made", [True, False])
def test_a_stream_that_is_not_read_on_is_paid_for(made: bool, tmp_path: pathlib.Path) -> None:
    """What was made is recorded as what was asked for; what was not, as compute without images."""
    settings = Settings(data_folder=tmp_path, playground="off")
    length = {"n": 1, "num_inference_steps": 10} if made else {"n": 10, "num_inference_steps": 100}
    asked = schemas.GenerationBody(prompt="a red circle", model="premium", stream=True, partial_images=3, **length)

    recording = threading.Event()

    async def use() -> None:
        built = build.build(settings)
        built.start()
        service, record = built.service, built.service.store.record_usage

        def slowly(*usages: Usage) -> None:
            recording.set()
            time.sleep(0.3)
            record(*usages)

        setattr(service.store, "record_usage", slowly)  # noqa: B010 - a method
        key = await service.authenticate(None)
        events = service.stream(key, asked)
        assert await anext(events) is None
        assert isinstance(await anext(events), schemas.PartialImageEvent)
        async with asyncio.timeout(20):
            while made and not recording.is_set():
                await asyncio.sleep(0.01)
        await events.aclose()
        (day,) = service.store.usage_days(key.id, datetime.date.min, datetime.date.max)
        assert day.images == int(made) and day.cost_nanousd > 0
        await built.close()

    asyncio.run(use())
