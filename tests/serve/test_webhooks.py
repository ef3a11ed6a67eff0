"""Webhooks: signatures checked by the standard's own library, receivers good and bad."""

import asyncio
import base64
import contextlib
import dataclasses
import datetime
import http.server
import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import httpcore
import pytest
import standardwebhooks

from diffusion_kd import errors
from serve import receivers, webhooks

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
MESSAGE = {"type": "job.succeeded", "data": {"id": "job_1", "prompt": "Größe"}}

# --- signatures -------------------------------------------------------------------------------------


def test_a_signature_verifies_with_the_standards_library() -> None:
    body = '{"data":"Größe"}'.encode()
    headers = webhooks.sign(SECRET, "msg_1", int(time.time()), body)
    assert standardwebhooks.Webhook(SECRET).verify(body, headers) == {"data": "Größe"}
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        standardwebhooks.Webhook(SECRET).verify(body + b" ", headers)
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        standardwebhooks.Webhook(SECRET).verify(body, headers | {"webhook-id": "msg_2"})


def test_a_known_signature() -> None:
    """The example that the reference libraries test with."""
    headers = webhooks.sign(
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}'
    )
    assert headers == {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }


def test_a_new_secret_signs() -> None:
    one, other = webhooks.new_secret(), webhooks.new_secret()
    assert one != other and webhooks.sign(one, "m", 0, b"") != webhooks.sign(other, "m", 0, b"")


@pytest.mark.parametrize(
    "secret",
    ["", "plain", "whsec_", "whsec_?", "whsec_" + base64.b64encode(b"short").decode(), SECRET.removeprefix("whsec_")],
)
def test_other_secrets_are_refused_and_not_repeated(secret: str) -> None:
    with pytest.raises(errors.ConfigError, match="whsec_ and the base64") as caught:
        webhooks.Deliverer(FakeOutbox(), secret=secret)
    assert not secret.removeprefix("whsec_") or secret not in str(caught.value)


# --- when to try again ------------------------------------------------------------------------------


def test_backoff_triples_up_to_six_hours_with_some_jitter() -> None:
    assert [webhooks.backoff_s(attempts, 0) for attempts in range(1, 5)] == [5, 15, 45, 135]
    assert webhooks.backoff_s(9, 0) == webhooks.backoff_s(10_000, 0) == 6 * 3600
    assert webhooks.backoff_s(2, 1) == pytest.approx(12)


# --- receivers and an outbox ------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Delivery:
    id: str
    url: str
    attempts: int = 1
    job_id: str = "job_1"
    event: str = "job.succeeded"
    payload: dict[str, Any] = dataclasses.field(default_factory=lambda: dict(MESSAGE))
    next_at: datetime.datetime = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)


class FakeOutbox:
    """Holds deliveries in lists. Retries are due at once where `soon`, else never."""

    def __init__(self, *due: Delivery, soon: bool = False) -> None:
        self.due, self.soon = list(due), soon
        self.leased: dict[str, Delivery] = {}
        self.done: list[str] = []
        self.retried: list[tuple[str, datetime.datetime, str]] = []
        self.failed: list[tuple[str, str]] = []
        self.threads: set[str] = set()

    def claim_deliveries(self, owner: str, limit: int, lease_s: float) -> Sequence[Delivery]:
        self.threads.add(threading.current_thread().name)
        claimed, self.due = self.due[:limit], self.due[limit:]
        self.leased |= {delivery.id: delivery for delivery in claimed}
        return claimed

    def delivery_done(self, delivery_id: str) -> None:
        self.done.append(delivery_id)

    def retry_delivery(self, delivery_id: str, next_at: datetime.datetime, error: str) -> None:
        self.retried.append((delivery_id, next_at, error))
        if self.soon:
            delivery = self.leased[delivery_id]
            self.due.append(dataclasses.replace(delivery, attempts=delivery.attempts + 1))

    def fail_delivery(self, delivery_id: str, error: str) -> None:
        self.failed.append((delivery_id, error))

    @property
    def settled(self) -> int:
        return len(self.done) + len(self.retried) + len(self.failed)


class Receiver:
    """A real HTTP server that answers as told, one handler a request, the last for all further ones."""

    def __init__(
        self, *answers: Callable[[http.server.BaseHTTPRequestHandler], None], tls: ssl.SSLContext | None = None
    ):
        self.got: list[tuple[str, dict[str, str], bytes]] = []
        self.at_once = self.most_at_once = 0
        self.over = threading.Event()
        lock = threading.Lock()
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                with lock:
                    receiver.got.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                    receiver.at_once += 1
                    receiver.most_at_once = max(receiver.most_at_once, receiver.at_once)
                    number = len(receiver.got) - 1
                with contextlib.suppress(OSError):
                    answers[min(number, len(answers) - 1)](self)
                with lock:
                    receiver.at_once -= 1

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]
        if tls is not None:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/hook?token=t"

    def __enter__(self) -> "Receiver":
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


Handler = http.server.BaseHTTPRequestHandler


def answering(status: int, **headers: str) -> Callable[[Handler], None]:
    def answer(handler: Handler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("content-length", "2")
        handler.end_headers()
        handler.wfile.write(b"ok")

    return answer


def wedged(handler: Handler) -> None:
    time.sleep(3)


def trickling(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
    for _ in range(60):
        handler.wfile.write(b"a")
        time.sleep(0.05)


def endless(handler: Handler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        handler.wfile.write(b"a" * 65536)


def run(outbox: FakeOutbox, until: Callable[[], bool] | None = None, **settings: Any) -> webhooks.Deliverer:
    """Deliver until all is settled, or for at most 10 s."""
    settings = {"secret": SECRET, "allow_private": True, "timeout_s": 0.5, "poll_s": 0.02} | settings
    expected = len(outbox.due)
    done = until or (lambda: outbox.settled >= expected)

    async def deliver() -> webhooks.Deliverer:
        deliverer = webhooks.Deliverer(outbox, **settings)
        running = asyncio.create_task(deliverer.run())
        begun_s = time.perf_counter()
        while not done() and not running.done():
            assert time.perf_counter() - begun_s < 10, "not settled within 10 s"
            await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        return deliverer

    return asyncio.run(deliver())


# --- delivery ---------------------------------------------------------------------------------------


def test_what_is_received_is_what_was_signed() -> None:
    with Receiver(answering(200)) as receiver:
        outbox, counted = FakeOutbox(Delivery("d1", receiver.url)), list[str]()
        run(outbox, count=counted.append)
    ((path, headers, body),) = receiver.got
    assert outbox.done == ["d1"] and outbox.settled == 1 and counted == ["delivered"]
    assert path == "/hook?token=t" and headers["content-type"] == "application/json"
    assert headers["host"] == f"127.0.0.1:{receiver.port}" and headers["webhook-id"] == "d1"
    message = standardwebhooks.Webhook(SECRET).verify(body, headers)
    assert message == MESSAGE == json.loads(body)
    assert not any(name == "MainThread" for name in outbox.threads)


def test_a_500_is_tried_again_with_the_same_id_and_body() -> None:
    with Receiver(answering(500), answering(503), answering(204)) as receiver:
        outbox, counted = FakeOutbox(Delivery("d1", receiver.url), soon=True), list[str]()
        run(outbox, until=lambda: bool(outbox.done), count=counted.append)
    assert [error for *_, error in outbox.retried] == [f"127.0.0.1:{receiver.port} answered {s}" for s in (500, 503)]
    assert len({(headers["webhook-id"], body) for _, headers, body in receiver.got}) == 1
    assert counted == ["retried", "retried", "delivered"]


def test_retries_are_put_off_by_the_backoff() -> None:
    with Receiver(answering(500)) as receiver:
        outbox = FakeOutbox(Delivery("d1", receiver.url), Delivery("d2", receiver.url, attempts=4))
        before = datetime.datetime.now(datetime.UTC)
        run(outbox)
    waits = {name: (next_at - before).total_seconds() for name, next_at, _ in outbox.retried}
    assert 4 <= waits["d1"] <= 7 and 108 <= waits["d2"] <= 137


def test_it_is_given_up_after_the_last_attempt(caplog: pytest.LogCaptureFixture) -> None:
    with Receiver(answering(500)) as receiver, caplog.at_level(logging.WARNING, logger="serve.webhooks"):
        outbox, counted = FakeOutbox(Delivery("d1", receiver.url), soon=True), list[str]()
        run(outbox, until=lambda: bool(outbox.failed), most_attempts=3, count=counted.append)
    assert len(receiver.got) == 3 and counted == ["retried", "retried", "failed"]
    assert "d1 of job job_1 is given up after attempt 3" in caplog.text and "token" not in caplog.text


def test_410_gives_up_at_once() -> None:
    with Receiver(answering(410)) as receiver:
        outbox = FakeOutbox(Delivery("d1", receiver.url))
        run(outbox)
    assert [name for name, _ in outbox.failed] == ["d1"]


def test_a_receiver_that_is_down_is_tried_again() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        outbox = FakeOutbox(Delivery("d1", f"http://127.0.0.1:{taken.getsockname()[1]}/"))
        run(outbox)
    assert "gave no answer" in outbox.retried[0][2]


@pytest.mark.parametrize("slow", [wedged, trickling])
def test_a_slow_receiver_is_left_after_the_timeout(slow: Callable[[Handler], None]) -> None:
    with Receiver(slow) as receiver:
        outbox = FakeOutbox(Delivery("d1", receiver.url))
        begun_s = time.perf_counter()
        run(outbox)
        assert 0.4 < time.perf_counter() - begun_s < 2
    assert outbox.retried[0][2] == f"127.0.0.1:{receiver.port} did not answer within 0.5 s"


def test_of_an_endless_answer_a_little_is_read() -> None:
    with Receiver(endless) as receiver:
        outbox = FakeOutbox(Delivery("d1", receiver.url))
        run(outbox, timeout_s=2)
    assert outbox.done == ["d1"]


def test_redirects_are_not_followed() -> None:
    with Receiver(answering(200)) as inner, Receiver(answering(307, location=inner.url)) as receiver:
        outbox = FakeOutbox(Delivery("d1", receiver.url))
        run(outbox)
    assert len(receiver.got) == 1 and inner.got == []
    assert "answered 307; redirects are not followed" in outbox.retried[0][2]


def test_a_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with Receiver(answering(200)) as proxy, Receiver(answering(200)) as receiver:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{proxy.port}")
        run(FakeOutbox(Delivery("d1", receiver.url)))
    assert len(receiver.got) == 1 and proxy.got == []


def test_an_unusable_url_in_the_outbox_fails_at_once() -> None:
    outbox = FakeOutbox(Delivery("d1", "http://127.0.0.1:1/"), Delivery("d2", "ftp://example.com"))
    run(outbox, allow_private=False)
    assert sorted(name for name, _ in outbox.failed) == ["d1", "d2"]


# --- names ------------------------------------------------------------------------------------------


def resolving(*addresses: str) -> tuple[receivers.Resolve, list[tuple[str, int]]]:
    """A resolver that gives these to everybody, and what it was asked."""
    asked: list[tuple[str, int]] = []

    async def resolve(host: str, port: int) -> Sequence[str]:
        asked.append((host, port))
        return addresses

    return resolve, asked


@pytest.mark.parametrize(
    "addresses", [("127.0.0.1",), ("8.8.8.8", "127.0.0.1"), ("::1",), ("::ffff:127.0.0.1",), ("fe80::1%eth0",)]
)
def test_a_name_with_an_address_that_is_not_public_is_refused(
    addresses: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def connect(*_: object, **__: object) -> None:
        pytest.fail("connected")

    monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", connect)
    with Receiver(answering(200)) as receiver:
        resolve, _ = resolving(*addresses)
        outbox = FakeOutbox(Delivery("d1", f"http://hooks.example:{receiver.port}/"))
        run(outbox, allow_private=False, resolve=resolve)
    assert "hooks.example has the address" in outbox.failed[0][1] and receiver.got == []


def test_the_systems_resolver_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name of this machine, whatever it is called, is refused at delivery."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(socket.AF_INET, 1, 6, "", ("127.0.0.1", 80))])
    outbox = FakeOutbox(Delivery("d1", "http://hooks.example/"))
    run(outbox, allow_private=False)
    assert "127.0.0.1, which is not public" in outbox.failed[0][1]


def test_the_connection_goes_to_the_address_that_was_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that answers otherwise the second time is asked once."""
    with Receiver(answering(200)) as receiver:
        resolve, asked = resolving("8.8.8.8")
        connected: list[str] = []
        connect = httpcore.AnyIOBackend.connect_tcp

        async def watched(self: Any, host: str, port: int, *others: Any) -> Any:
            connected.append(host)
            return await connect(self, "127.0.0.1", port, *others)

        monkeypatch.setattr(httpcore.AnyIOBackend, "connect_tcp", watched)
        outbox = FakeOutbox(Delivery("d1", f"http://Hooks.example.:{receiver.port}/"))
        run(outbox, allow_private=False, resolve=resolve)
    assert outbox.done == ["d1"]
    assert asked == [("hooks.example", receiver.port)] and connected == ["8.8.8.8"]
    assert receiver.got[0][1]["host"] == f"hooks.example:{receiver.port}"


@pytest.mark.parametrize("addresses", [("::1", "127.0.0.1"), ("127.0.0.1", "::1")])
def test_any_address_that_answers_will_do(addresses: tuple[str, str]) -> None:
    with Receiver(answering(200)) as receiver:
        resolve, _ = resolving(*addresses)
        outbox = FakeOutbox(Delivery("d1", f"http://hooks.example:{receiver.port}/"))
        run(outbox, resolve=resolve)
    assert outbox.done == ["d1"]


def test_a_name_that_cannot_be_resolved_is_tried_again() -> None:
    async def resolve(host: str, port: int) -> Sequence[str]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    outbox = FakeOutbox(Delivery("d1", "http://hooks.example/"))
    run(outbox, resolve=resolve)
    assert outbox.retried[0][2].startswith("hooks.example gave no answer: its name cannot be resolved")


def certificate(folder: Any, name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """What a server of that name shows, and what trusts it."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = folder / "both.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    pem.write_bytes(made.public_bytes(serialization.Encoding.PEM) + private)
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.create_default_context(cafile=pem)
    server.load_cert_chain(pem)
    return server, client


@pytest.mark.parametrize(("name", "arrives"), [("hooks.example", True), ("other.example", False)])
def test_tls_asks_for_the_name_and_checks_it(name: str, arrives: bool, tmp_path: Any) -> None:
    server, client = certificate(tmp_path, "hooks.example")
    asked: list[str | None] = []
    server.sni_callback = lambda _, name, __: asked.append(name)
    with Receiver(answering(200), tls=server) as receiver:
        resolve, _ = resolving("127.0.0.1")
        outbox = FakeOutbox(Delivery("d1", f"https://{name}:{receiver.port}/"))
        run(outbox, resolve=resolve, ssl_context=client, timeout_s=3)
    assert asked == [name]
    assert bool(outbox.done) == arrives == bool(receiver.got)
    assert arrives or "CERTIFICATE_VERIFY_FAILED" in outbox.retried[0][2]


# --- one does not hold up another -------------------------------------------------------------------


def test_a_wedged_receiver_does_not_delay_another() -> None:
    with Receiver(wedged) as bad, Receiver(answering(200)) as good:
        blocked = [Delivery(f"bad{number}", bad.url) for number in range(40)]
        outbox = FakeOutbox(*blocked, *(Delivery(f"good{number}", good.url) for number in range(20)))
        begun_s = time.perf_counter()
        run(outbox, until=lambda: len(outbox.done) == 20, timeout_s=5, concurrency=4)
        assert time.perf_counter() - begun_s < 2
    assert bad.most_at_once == webhooks.PER_RECEIVER and good.most_at_once <= webhooks.PER_RECEIVER


def test_what_waits_for_a_silent_receiver_is_put_off_with_it() -> None:
    with Receiver(wedged) as bad:
        outbox = FakeOutbox(*(Delivery(f"d{number}", bad.url) for number in range(40)))
        begun_s = time.perf_counter()
        run(outbox)
        assert time.perf_counter() - begun_s < 2
    assert len(outbox.retried) == 40 and len(bad.got) == webhooks.PER_RECEIVER


def test_concurrency_is_bounded_over_all_receivers() -> None:
    def slow(handler: Handler) -> None:
        time.sleep(0.1)
        answering(200)(handler)

    with contextlib.ExitStack() as stack:
        receivers = [stack.enter_context(Receiver(slow)) for _ in range(4)]
        outbox = FakeOutbox(*(Delivery(f"d{n}", receivers[n % 4].url) for n in range(8)))
        begun_s = time.perf_counter()
        run(outbox, concurrency=2, timeout_s=5)
        assert time.perf_counter() - begun_s > 0.35
    assert len(outbox.done) == 8


def test_more_than_one_claims_worth_is_delivered() -> None:
    with Receiver(answering(200)) as receiver:
        outbox = FakeOutbox(*(Delivery(f"d{number}", receiver.url) for number in range(250)))
        run(outbox, poll_s=30, timeout_s=5)
    assert len(set(outbox.done)) == 250


# --- the loop ---------------------------------------------------------------------------------------


def awake(
    use: Callable[[webhooks.Deliverer, asyncio.Task[None]], Awaitable[None]], outbox: FakeOutbox, **more: Any
) -> None:
    """Run `use` beside a deliverer that does not look by itself."""

    async def both() -> None:
        deliverer = webhooks.Deliverer(outbox, secret=SECRET, allow_private=True, poll_s=60, **more)
        running = asyncio.create_task(deliverer.run())
        await asyncio.sleep(0.1)
        await use(deliverer, running)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    asyncio.run(both())


def test_it_looks_at_once_when_woken() -> None:
    with Receiver(answering(200)) as receiver:
        outbox = FakeOutbox()

        async def use(deliverer: webhooks.Deliverer, _: asyncio.Task[None]) -> None:
            outbox.due.append(Delivery("d1", receiver.url))
            await asyncio.sleep(0.2)
            assert not outbox.done
            deliverer.wake()
            await asyncio.sleep(0.5)

        awake(use, outbox)
    assert outbox.done == ["d1"]


def test_cancelling_ends_attempts_under_way_and_writes_nothing() -> None:
    with Receiver(wedged) as receiver:
        outbox = FakeOutbox(Delivery("d1", receiver.url))

        async def use(_: webhooks.Deliverer, running: asyncio.Task[None]) -> None:
            await asyncio.sleep(0.2)
            begun_s = time.perf_counter()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            assert time.perf_counter() - begun_s < 1

        awake(use, outbox)
    assert len(receiver.got) == 1 and outbox.settled == 0


@pytest.mark.parametrize("method", ["claim_deliveries", "delivery_done", "retry_delivery"])
def test_an_outbox_that_fails_once_does_not_end_delivery(
    method: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Receiver(answering(500), answering(200)) as receiver:
        outbox = FakeOutbox(Delivery("d1", receiver.url), soon=True)
        whole, broken = getattr(outbox, method), [True]

        def once(*arguments: Any) -> Any:
            if broken.pop() if broken else False:
                if method != "claim_deliveries":
                    # Its lease lapses.
                    outbox.due.append(outbox.leased[arguments[0]])
                raise RuntimeError("the database is locked")
            return whole(*arguments)

        monkeypatch.setattr(outbox, method, once)
        run(outbox, until=lambda: bool(outbox.done))
    assert outbox.done == ["d1"] and "the database is locked" in caplog.text


def test_one_whose_lease_is_nearly_over_is_left_to_its_next_owner() -> None:
    with Receiver(answering(200)) as receiver:
        outbox = FakeOutbox()

        async def use(deliverer: webhooks.Deliverer, _: asyncio.Task[None]) -> None:
            now_s = asyncio.get_running_loop().time()
            await deliverer._settle(Delivery("late", receiver.url), now_s + 1)
            await deliverer._settle(Delivery("in time", receiver.url), now_s + 20)

        awake(use, outbox, timeout_s=5)
    assert outbox.done == ["in time"] and len(receiver.got) == 1


def test_one_that_is_claimed_again_while_under_way_is_sent_once() -> None:
    def slow(handler: Handler) -> None:
        time.sleep(0.3)
        answering(200)(handler)

    with Receiver(slow) as receiver:
        outbox = FakeOutbox(Delivery("d1", receiver.url))

        async def use(deliverer: webhooks.Deliverer, _: asyncio.Task[None]) -> None:
            outbox.due.append(Delivery("d1", receiver.url))
            deliverer.wake()
            await asyncio.sleep(0.8)

        awake(use, outbox)
    assert outbox.done == ["d1"] and len(receiver.got) == 1
