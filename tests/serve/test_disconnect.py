"""Clients that leave: the device is free within one step, and nothing of them is left.

The engine's thread is halted in a pass, by its observer, while a client leaves. So the tests know which step that was.
"""

import asyncio
import base64
import contextlib
import gc
import pathlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from serve import telemetry, watch
from serve.engine.requests import Ticket
from serve.store import idempotency
from tests.serve import processes
from tests.serve.processes import Inside, eventually

STEPS = 50
LONG = {"model": "premium", "prompt": "a red circle", "num_inference_steps": STEPS, "seed": 1}


class Halting(watch.EngineMetrics):
    """Halts the engine at the end of a chosen pass, before anybody can learn that it is over."""

    def __init__(self, metrics: telemetry.Metrics) -> None:
        super().__init__(metrics)
        self.passes = 0
        self.halt_after: int | None = None
        self.halted, self.go_on = threading.Event(), threading.Event()

    def passed(self, tier: str, rows: int, seconds: float) -> None:
        super().passed(tier, rows, seconds)
        self.passes += 1
        if self.passes == self.halt_after:
            self.halted.set()
            assert self.go_on.wait(processes.PATIENCE_S), "a test that lets the engine go on"

    def arm(self, passes: int) -> None:
        """Halt after that many more."""
        self.passes, self.halt_after = 0, passes
        self.halted.clear()
        self.go_on.clear()

    def wait_halted(self) -> None:
        assert self.halted.wait(processes.PATIENCE_S), "the engine has not come to that pass"


@pytest.fixture(scope="module")
def observers() -> list[Halting]:
    return []


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, observers: list[Halting]) -> Iterator[Inside]:
    """One image at a time on the premium tier, so that a second request waits."""

    def halting(metrics: telemetry.Metrics) -> Halting:
        observers.append(Halting(metrics))
        return observers[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "EngineMetrics", halting)
        folder = tmp_path_factory.mktemp("disconnect")
        with processes.inside(folder, premium_tier={"max_batch": 1}) as inside:
            yield inside


@pytest.fixture
def observer(service: Inside, observers: list[Halting]) -> Iterator[Halting]:
    yield observers[-1]
    observers[-1].halt_after = None
    observers[-1].go_on.set()
    eventually(lambda: idle(service), what="rest")


def idle(service: Inside) -> bool:
    engine = service.built.service.engine
    return not engine._open and not any(engine.active(tier) + engine.queued(tier) for tier in engine.models)


def open_requests(service: Inside) -> int:
    return len(service.built.service.engine._open)


# --- the device is free -----------------------------------------------------------------------------

STREAM = {"stream": True, "partial_images": 1}
KINDS = {
    "plain": (LONG, {}),
    "several images": (LONG | {"n": 3}, {}),
    "stream": (LONG | STREAM, {}),
    "idempotent": (LONG, {"Idempotency_Key": "left-plain"}),
    "idempotent stream": (LONG | STREAM, {"Idempotency_Key": "left-stream"}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_client_that_leaves_at_step_3_has_no_step_4(service: Inside, observer: Halting, kind: str) -> None:
    body, headers = KINDS[kind]
    observer.arm(3)
    client = processes.send(service.port, body, **headers)
    observer.wait_halted()
    client.close()
    eventually(lambda: open_requests(service) == 0, within_s=5, what="the end of the request")
    observer.go_on.set()
    eventually(lambda: idle(service), within_s=5, what="an idle engine")
    assert observer.passes == 3


def test_a_client_that_stays_gets_all_steps(service: Inside, observer: Halting) -> None:
    observer.arm(3)
    client = processes.send(service.port, LONG | {"num_inference_steps": 10})
    observer.wait_halted()
    observer.go_on.set()
    assert b"200 OK" in client.recv(4096)
    client.close()
    assert observer.passes == 10


def test_a_stream_that_is_cut_between_previews_ends_too(service: Inside, observer: Halting) -> None:
    """After its first preview, of two."""
    observer.arm(20)
    client = processes.send(service.port, LONG | {"stream": True, "partial_images": 2})
    observer.wait_halted()
    received = b""
    while b"image_generation.partial_image" not in received:
        received += client.recv(65536)
    client.close()
    eventually(lambda: open_requests(service) == 0, within_s=5, what="the end of the request")
    observer.go_on.set()
    eventually(lambda: idle(service), within_s=5, what="an idle engine")
    assert observer.passes == 20


def test_one_that_waits_leaves_the_queue_at_once_and_nobody_else_notices(service: Inside, observer: Halting) -> None:
    observer.arm(3)
    working = processes.send(service.port, LONG | {"num_inference_steps": 12})
    observer.wait_halted()
    waiting = [processes.send(service.port, body) for body in (LONG, LONG | STREAM, LONG | {"n": 2})]
    engine = service.built.service.engine
    eventually(lambda: engine.queued("premium") == 4, what="the queue")
    for client in waiting:
        client.close()
    eventually(lambda: engine.queued("premium") == 0, within_s=5, what="an empty queue")
    observer.go_on.set()
    assert b"200 OK" in working.recv(4096)
    working.close()
    eventually(lambda: idle(service), within_s=5, what="an idle engine")
    assert observer.passes == 12


# --- the same request again -------------------------------------------------------------------------


def test_the_idempotent_request_of_a_client_that_left_is_made_anew_once(service: Inside, observer: Halting) -> None:
    body, key = LONG | {"num_inference_steps": 10}, {"Idempotency-Key": "again"}
    observer.arm(3)
    client = processes.send(service.port, body, Idempotency_Key="again")
    observer.wait_halted()
    client.close()
    eventually(lambda: open_requests(service) == 0, within_s=5, what="the end of the request")
    observer.go_on.set()
    answers = [httpx2.post(f"{service.url}/v1/images/generations", json=body, headers=key, timeout=60) for _ in "12"]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert observer.passes == 3 + 10
    images = [base64.b64decode(answer.json()["data"][0]["b64_json"]) for answer in answers]
    assert images[0] == images[1]


def test_one_that_leaves_while_its_key_is_claimed_leaves_no_claim(
    service: Inside, observer: Halting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database answers slowly; the client is gone before it does."""
    begun, answer = threading.Event(), threading.Event()
    begin = idempotency.Idempotency.begin_idempotent

    def slowly(*given: Any) -> Any:
        begun.set()
        assert answer.wait(processes.PATIENCE_S)
        return begin(*given)

    monkeypatch.setattr(idempotency.Idempotency, "begin_idempotent", slowly)
    body = LONG | {"num_inference_steps": 2}
    client = processes.send(service.port, body, Idempotency_Key="claimed")
    assert begun.wait(processes.PATIENCE_S)
    gone = gone_requests(service)
    client.close()
    # Either the request ends now, or it waits for the database.
    time.sleep(0.2)
    answer.set()
    eventually(lambda: gone_requests(service) > gone, within_s=5, what="the end of the request")
    monkeypatch.undo()
    key = {"Idempotency-Key": "claimed"}
    again = httpx2.post(f"{service.url}/v1/images/generations", json=body, headers=key, timeout=10)
    assert again.status_code == 200


def gone_requests(service: Inside) -> float:
    route = "/v1/images/generations"
    return service.metric("request_seconds_count", route=route, method="POST", status=str(telemetry.CLIENT_GONE))


# --- nothing is left --------------------------------------------------------------------------------


def handles() -> list[str]:
    """What this process has open, but for the databases of its services: their pools fill in time, to a bound."""
    found = []
    for link in pathlib.Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # of this very listing
            found.append(str(link.readlink()))
    return [target for target in found if not target.removesuffix("-wal").removesuffix("-shm").endswith(".db")]


def footprint(service: Inside) -> dict[str, int]:
    """What a client may leave behind."""
    gc.collect()
    return {
        "tickets": sum(type(one) is Ticket for one in gc.get_objects()),
        "tasks": len(asyncio.all_tasks(service.built._tasks[0].get_loop())),
        "handles": len(handles()),
        "connections": len(service.server.server_state.connections),
        "open requests": open_requests(service),
    }


def leave_in_many_ways(service: Inside, go: Callable[[], None]) -> None:
    """Close on the server amid headers, body, waiting, work, stream; politely, and by a reset."""
    turbo = {"model": "turbo", "prompt": "a blue square"}
    for body in (LONG, LONG | STREAM, LONG | {"n": 4}, turbo, turbo | {"stream": True}, turbo | {"seed": -1}):
        for polite in (True, False):
            client = processes.send(service.port, body)
            if not polite:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            client.close()
    for part in (b"", b"POST /v1/ima", b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{"):
        client = socket.create_connection(("127.0.0.1", service.port))
        client.sendall(part)
        client.close()
    go()


ROUNDS = 12
"""What leaks grows by one a round at least, in any of the ways to leave; the other services of this process open and
close a file now and then, which does not grow."""


def test_those_who_leave_leave_nothing_behind(service: Inside, observer: Halting) -> None:
    def settled() -> None:
        eventually(lambda: idle(service) and not service.server.server_state.connections, what="rest")
        # The engine's threads may hold on to the last thing that they did: let it be the same each time.
        for tier in ({"model": "turbo"}, {"model": "premium", "num_inference_steps": 2}):
            answer = httpx2.post(f"{service.url}/v1/images/generations", json={"prompt": "a star", **tier}, timeout=20)
            assert answer.status_code == 200
        eventually(lambda: idle(service) and not service.server.server_state.connections, what="rest")

    leave_in_many_ways(service, settled)
    with contextlib.ExitStack() as held:  # a pool that fills only later would look like a leak
        engine = service.built.service.store._engine
        for _ in range(engine.pool.size()):
            held.enter_context(engine.connect())
    before = footprint(service)
    for _ in range(ROUNDS):
        leave_in_many_ways(service, settled)
    found = dict[str, int]()

    def no_more() -> bool:
        found.update(footprint(service))
        return all(found[name] < before[name] + ROUNDS // 3 for name in before)

    with contextlib.suppress(AssertionError):
        eventually(no_more, within_s=10)
    assert no_more(), f"{before} has become {found}"
