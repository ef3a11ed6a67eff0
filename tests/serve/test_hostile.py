"""What a hostile or broken client sends. Each is refused for its own fault, and the service goes on serving."""

import contextlib
import re
import socket
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.serve.conftest import Start
from tests.serve.live import ADMIN, Live, refused
from tests.serve.test_api import GENERATIONS, body, made, premium

JSON = {"Content-Type": "application/json"}


@pytest.fixture(autouse=True)
def serves_on(live: Live) -> Iterator[None]:
    """After each test: an ordinary request succeeds, within the time of one, and nothing was ours to answer for."""
    before = live.metric("request_seconds_count", status="500")
    yield
    began_s = time.monotonic()
    made(live.client(), body())
    assert time.monotonic() - began_s < 5
    assert live.metric("request_seconds_count", status="500") == before


# --- bodies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [GENERATIONS, "/v1/jobs", "/v1/admin/keys"])
def test_ten_megabytes_are_too_many(path: str, live: Live) -> None:
    answer = live.client().post(path, content=b'{"prompt": "' + b"a" * 10_000_000 + b'"}', headers=JSON)
    refused(answer, 413, code="request_too_large")


def test_ten_megabytes_in_chunks_are_too_many(live: Live) -> None:
    answer = live.client().post(GENERATIONS, content=iter([b"a" * 100_000] * 100), headers=JSON)
    refused(answer, 413, code="request_too_large")


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/xml",
        "a/b;;;=",
    ],
)
def test_what_is_not_sent_as_json_is_not_read_as_json(content_type: str, live: Live) -> None:
    """A web page may send such requests to another site without asking; it must ask before it sends JSON."""
    headers = {"Content-Type": content_type} if content_type else {}
    answer = live.client().post(GENERATIONS, content=b'{"prompt": "a"}', headers=headers)
    assert "Content-Type" in refused(answer, 400)


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 100_000 + b"]" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"prompt": "a", "seed": ' + b"9" * 100_000 + b"}",
        b'{"prompt": "\xff\xfe"}',
        b"\x00" * 1000,
        b"\x1f\x8b\x08\x00gzip",
    ],
)
def test_json_beyond_what_a_parser_takes(content: bytes, live: Live) -> None:
    refused(live.client().post(GENERATIONS, content=content, headers=JSON), 400)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", "[" * 900 + "]" * 900),
        ("seed", "9" * 4000),
        ("seed", "-" + "9" * 400),
        ("seed", "1e308"),
        ("seed", "NaN"),
        ("n", "Infinity"),
        ("guidance_scale", "NaN"),
        ("guidance_scale", "Infinity"),
        ("guidance_scale", "-Infinity"),
        ("guidance_scale", "1e999"),
        ("guidance_scale", "9" * 400),
        ("num_inference_steps", "1e3"),
        ("output_compression", "-0.0"),
    ],
)
def test_numbers_that_are_none(field: str, value: str, live: Live) -> None:
    rest = '"prompt": "a", ' if field != "prompt" else ""
    content = f'{{"model": "premium", {rest}"{field}": {value}}}'
    refused(live.client().post(GENERATIONS, content=content, headers=JSON), 400, field)


TEXTS = ("prompt", "model", "size", "user", "negative_prompt", "response_format", "webhook_url")


@pytest.mark.parametrize("field", TEXTS)
def test_half_a_character_is_no_text(field: str, live: Live) -> None:
    rest = '"prompt": "a", ' if field != "prompt" else ""
    content = f'{{"model": "premium", {rest}"{field}": "a\\ud800b"}}'
    if field == "model":
        content = content.replace('"model": "premium", ', "", 1)
    refused(live.client().post("/v1/jobs", content=content, headers=JSON), 400, field)


@pytest.mark.parametrize(
    "text", ["a\0b", "\0", "\x01\x1b[31m\x7f", "\u202e\u2066\ufeff", "\U0010ffff", "\r\nSet-Cookie: a"]
)
def test_any_other_text_is_carried_through(text: str, live: Live) -> None:
    """Also through the database, of which PostgreSQL knows no NUL."""
    user = live.user()
    given = premium(prompt=text, negative_prompt=text, user=text, seed=1)
    assert user.post(GENERATIONS, json=given).status_code == 200
    job = user.post("/v1/jobs", json=given)
    assert job.status_code == 202, job.text
    live.until(lambda: user.get(f"/v1/jobs/{job.json()['id']}").json()["status"] == "succeeded")
    request = user.get(f"/v1/jobs/{job.json()['id']}").json()["request"]
    assert (request["prompt"], request["negative_prompt"], request["user"]) == (text, text, text)
    headers = {"Idempotency-Key": f"text-{text.encode().hex()}"}
    assert made(user, given, **headers) == made(user, given, **headers)
    refused(user.post(GENERATIONS, json=premium(model=text)), 404, "model")
    refused(user.post(GENERATIONS, json=premium(size=text)), 400, "size")
    refused(user.post("/v1/jobs", json=body(webhook_url=text)), 400, "webhook_url")


@pytest.mark.parametrize("name", ["", "\0", "body", "path", "__class__", "a" * 10_000, "\N{SNOWMAN}", "model "])
def test_fields_of_any_name_are_refused(name: str, live: Live) -> None:
    answer = live.client().post(GENERATIONS, json={**body(), name: 1})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "unsupported_parameter"
    assert len(answer.content) < 1000


# --- raw bytes --------------------------------------------------------------------------------------


@contextlib.contextmanager
def connected(live: Live) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", live.settings.port), timeout=10) as client:
        yield client


def exchanged(live: Live, sent: bytes) -> bytes:
    """What comes back until the service closes the connection."""
    with connected(live) as client:
        got = b""
        with contextlib.suppress(ConnectionError):
            client.sendall(sent)
            while chunk := client.recv(65536):
                got += chunk
        return got


def request(path: str = "/v1/models", *headers: str, method: str = "GET", content: bytes = b"") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {ADMIN}", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(content)}", "Connection: close", "", ""]).encode() + content


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00" * 4096,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\xaa" * 200,  # TLS
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET /v1/models HTTP/1.1\r\n\r\n",
        b"\xff\xfe\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked, gzip\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX-A: a\x00b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 200_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
def test_garbage_is_answered_400_or_not_at_all(garbage: bytes, live: Live) -> None:
    began_s = time.monotonic()
    got = exchanged(live, garbage)
    assert got == b"" or got.startswith(b"HTTP/1.1 4"), got[:200]
    assert time.monotonic() - began_s < live.settings.header_timeout_s + 2


@pytest.mark.parametrize(
    "header",
    [
        "X-Request-ID: a\x01b",
        "X-Request-ID: \x7f\xe9",
        "X-Request-ID: " + "a" * 5000,
        "Prefer: \x80\xff",
        "Accept: \x0b",
        "Cookie: " + "a=b;" * 1000,
        "X-Forwarded-For: ' OR 1=1 --",
        "Idempotency-Key: \xff",
    ],
)
def test_odd_headers_break_nothing(header: str, live: Live) -> None:
    sent = request(GENERATIONS, "Content-Type: application/json", header, method="POST", content=b'{"prompt": "a"}')
    got = exchanged(live, sent.decode().encode("latin-1"))
    assert got[:12] in (b"HTTP/1.1 200", b"HTTP/1.1 400"), got[:200]
    assert b"\x01" not in got[:500] and b"x-request-id: aaaaaaaaaaaaaaaaaa" not in got


@pytest.mark.parametrize(
    "path",
    [
        *("/../../../../etc/passwd", "/v1/images/../../../etc/passwd", "/v1/images/..%2f..%2f..%2fetc%2fpasswd"),
        *(
            "/v1/images/%2e%2e/%2e%2e/service.db",
            "/v1/models/..%5c..%5cx",
            "//evil.example/%2f..",
            "/v1/jobs/%00/cancel",
        ),
        *("/v1/images/img_" + "a" * 60_000, "/v1/models/%F0%28%8C%28", "/v1/jobs/%00/cancel", "/docs/../openapi.json"),
    ],
)
def test_paths_lead_nowhere(path: str, live: Live) -> None:
    got = exchanged(live, request(path))
    assert got[:12] in (b"HTTP/1.1 404", b"HTTP/1.1 405", b"HTTP/1.1 400"), got[:200]
    assert b"root:" not in got and b"location:" not in got.lower()


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "TRACE", "PUT", "PATCH", "CONNECT", "FOO"])
@pytest.mark.parametrize("path", [GENERATIONS, "/v1/models", "/v1/jobs", "/v1/admin/keys", "/healthz"])
def test_other_methods_are_refused_with_those_that_work(method: str, path: str, live: Live) -> None:
    got = exchanged(live, request(path, method=method))
    head, _, content = got.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 405"), head
    (allowed,) = [line.split(b": ")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"allow:")]
    assert set(allowed.split(b", ")) <= {b"GET", b"POST", b"HEAD"} and (method == "HEAD") == (content == b"")
    assert path not in ("/v1/jobs", "/v1/admin/keys") or set(allowed.split(b", ")) == {b"GET", b"POST"}
    assert ADMIN.encode() not in got


def test_pipelined_requests_are_answered_in_order(live: Live) -> None:
    first = request("/v1/models/turbo").replace(b"Connection: close\r\n", b"")
    got = exchanged(live, first + first.replace(b"turbo", b"nosuchmodel") + request("/v1/models/premium"))
    assert re.findall(rb"HTTP/1.1 ([0-9]+)", got) == [b"200", b"404", b"200"]
    assert got.index(b'"id":"turbo"') < got.index(b"model_not_found") < got.index(b'"id":"premium"')


# --- slow clients -----------------------------------------------------------------------------------


def test_slow_headers_and_bodies_are_cut_off(live: Live) -> None:
    begun = [
        (b"GET /v1/models HT", b"T", b""),
        (b"GET /v1/models HTTP/1.1\r\nHost: x\r\n", b"X-A: b\r\n", b""),
        (request(GENERATIONS, method="POST", content=b"a" * 1000)[:-1000], b"a", b"HTTP/1.1 408"),
    ]
    for start, piece, answered in begun:
        began_s, got = time.monotonic(), b""
        with connected(live) as client, contextlib.suppress(ConnectionError):
            client.sendall(start)
            client.settimeout(0.1)
            while time.monotonic() - began_s < 6:
                client.sendall(piece)
                try:
                    if not (chunk := client.recv(65536)):
                        break
                    got += chunk
                except TimeoutError:
                    continue
        assert got.startswith(answered)
        assert live.settings.header_timeout_s * 0.8 < time.monotonic() - began_s < 4


def test_two_hundred_idle_connections_hold_nobody_up(live: Live) -> None:
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(connected(live)) for _ in range(200)]
        for client in idle[:100]:
            client.sendall(b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        began_s = time.monotonic()
        made(live.client(), body())
        assert time.monotonic() - began_s < 3


def test_whoever_never_reads_holds_nobody_up(live: Live) -> None:
    """Some clients ask for much and do not read their answers."""
    content = b'{"prompt": "a", "n": 10}'
    sent = request(GENERATIONS, "Content-Type: application/json", method="POST", content=content)
    with contextlib.ExitStack() as stack:
        for _ in range(6):
            client = stack.enter_context(connected(live))
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            client.sendall(sent)
        made(live.client(), body())
    live.until_idle()


def test_more_connections_than_there_may_be_are_refused_and_the_others_served(start: Start) -> None:
    live = start(max_connections=20, header_timeout_s=5)
    user = live.client()
    assert user.get("/v1/models").status_code == 200
    with contextlib.ExitStack() as stack:
        for _ in range(30):
            stack.enter_context(connected(live))
        time.sleep(0.2)
        with httpx.Client(trust_env=False) as late:
            assert late.get(f"{live.url}/v1/models").status_code == 503
    live.until(lambda: user.get("/v1/models").status_code == 200)
