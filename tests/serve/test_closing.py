"""The end of a service while a thread is at work with the store, which no cancelling stops."""

import concurrent.futures
import functools
import pathlib
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI

from serve import api, build, webhooks
from serve.settings import Settings
from tests.serve.live import GRACE_S, serving
from tests.serve.test_api import GENERATIONS, body


@pytest.mark.parametrize(
    ("late", "waits"),
    [("sweep", "close"), ("claim_jobs", "release_jobs"), ("claim_deliveries", "release_deliveries")],
)
def test_what_is_under_way_in_the_store_is_over_first(late: str, waits: str, tmp_path: pathlib.Path) -> None:
    """`late` begins before the service is told to end and takes longer than all else; `waits` comes after it."""
    began, ending, order = threading.Event(), threading.Event(), list[str]()

    def create(settings: Settings, built: build.Built) -> FastAPI:
        store, engine = built.service.store, built.service.engine
        slow, follows, drain = getattr(store, late), getattr(store, waits), engine.drain

        def slowly(*given: Any, **named: Any) -> Any:
            began.set()
            assert ending.wait(20)
            time.sleep(0.5)
            done = slow(*given, **named)
            order.append(late)
            return done

        def following(*given: Any) -> Any:
            order.append(waits)
            return follows(*given)

        def draining(timeout_s: float) -> bool:
            ending.set()
            return drain(timeout_s)

        for owner, name, instead in ((store, late, slowly), (store, waits, following), (engine, "drain", draining)):
            setattr(owner, name, instead)
        return api.create_app(settings, built)

    with serving(tmp_path, create, webhook_secret=webhooks.new_secret()):
        assert began.wait(20)
    assert order[:2] == [late, waits]


def test_a_request_that_was_cut_off_is_recorded_to_the_end(tmp_path: pathlib.Path) -> None:
    """Its usage is being written when the server gives it up; its answer is kept for a repeat before the store ends."""
    began, order = threading.Event(), list[str]()
    seconds = {"record_usage": GRACE_S + 1, "complete_idempotent": 0.5, "close": 0}

    def create(settings: Settings, built: build.Built) -> FastAPI:
        def noted(name: str, work: Callable[..., Any], *given: Any) -> Any:
            if name == "record_usage":
                began.set()
            time.sleep(seconds[name])
            done = work(*given)
            order.append(name)
            return done

        store = built.service.store
        for name in seconds:
            setattr(store, name, functools.partial(noted, name, getattr(store, name)))
        return api.create_app(settings, built)

    with concurrent.futures.ThreadPoolExecutor(1) as clients, serving(tmp_path, create) as live:
        user = live.user()
        sent = clients.submit(user.post, GENERATIONS, json=body(), headers={"Idempotency-Key": "once"})
        assert began.wait(20)
    assert sent.exception() is not None or sent.result().status_code >= 500
    assert order == list(seconds)
