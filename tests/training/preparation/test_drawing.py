"""Prompts become pictures, by the teacher's networks or by a service that gives pictures alone."""

import base64
import contextlib
import http.server
import io
import json
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import PIL.Image
import pytest
import torch

from diffusion_kd import errors, pipeline
from tests import toys
from training.preparation import drawing, filters, pictures


def test_prompts_are_read_from_lines_and_tables(tmp_path: pathlib.Path) -> None:
    (tmp_path / "p.txt").write_text("\ufeffa cat\n\n  a dog \n", encoding="utf-8")
    (tmp_path / "p.jsonl").write_text('{"text": "a cat"}\n{"text": "a dog", "id": 3}\n')
    (tmp_path / "p.csv").write_text('id,text\n1,a cat\n2,"a dog"\n')
    for name in ("p.txt", "p.jsonl", "p.csv"):
        assert drawing.read_prompts(tmp_path / name) == ["a cat", "a dog"]
    (tmp_path / "q.jsonl").write_text('{"prompt": "a cat"}\n')
    with pytest.raises(errors.DataError, match=r"q\.jsonl, line 1: not of the form"):
        drawing.read_prompts(tmp_path / "q.jsonl")
    (tmp_path / "q.csv").write_text("prompt\na cat\n")
    with pytest.raises(errors.DataError, match="no column text; it has prompt"):
        drawing.read_prompts(tmp_path / "q.csv")


def test_names_say_what_decides_a_picture() -> None:
    first = drawing.wanted(["a", "b", "a"], "key", 2)
    assert [one.prompt for one in first] == ["a", "a", "b", "b", "a", "a"]
    assert len({one.name for one in first}) == 6
    assert drawing.wanted(["b", "a"], "key", 2)[0] == first[2]
    assert not {one.name for one in first} & {one.name for one in drawing.wanted(["a", "b"], "other", 2)}


def texts(prompts: list[str]) -> dict[drawing.Wanted, str]:
    return {one: one.prompt for one in drawing.wanted(prompts, "toy")}


def test_drawn_again_a_batch_is_the_same_and_what_is_there_stays(tmp_path: pathlib.Path) -> None:
    sampler, wanted = pipeline.TeacherPipeline(toys.tiny_parts()), texts(["a red circle", "a blue star", "a ring"])
    drawing.draw(sampler, wanted, tmp_path, steps=2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    first, second, third = (drawing.picture_path(tmp_path, one.name) for one in wanted)
    second.unlink()
    first.write_bytes(b"kept")
    seen: list[int] = []
    drawing.draw(sampler, wanted, tmp_path, steps=2, seen=seen.append)
    assert second.read_bytes() == before[second.name] != before[third.name]
    assert first.read_bytes() == b"kept" and seen == [3]
    assert len(before) == 3


def test_processes_share_the_batches(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "BATCH", 2)
    sampler, wanted = pipeline.TeacherPipeline(toys.tiny_parts()), texts([f"number {n}" for n in range(5)])
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        drawing.draw(sampler, wanted, tmp_path / str(rank), steps=1, share=(rank, 2))
    names = [one.name for one in wanted]
    assert {path.stem for path in (tmp_path / "0").iterdir()} == {names[0], names[1], names[4]}
    assert {path.stem for path in (tmp_path / "1").iterdir()} == {names[2], names[3]}


def test_what_is_not_finite_is_refused(tmp_path: pathlib.Path) -> None:
    def sampler(prompts: list[str], seeds: list[int], **settings: Any) -> torch.Tensor:
        images = torch.zeros(len(prompts), 3, 8, 8)
        images[0, 0, 0, 0] = torch.nan
        return images

    wanted = texts(["a", "b"])
    drawing.draw(sampler, wanted, tmp_path)  # type: ignore[arg-type]
    items = drawing.Drawn(tmp_path, list(wanted), source="toy", licence="MIT").items(0, 2)
    assert items[0].problem is not None and items[0].problem.reason == filters.NOT_FINITE
    assert items[1].problem is None and items[1].caption == "b" and items[1].licence == "MIT"
    assert pictures.open_rgb(items[1].image, "b").size == (8, 8)


Answer = Callable[[dict[str, Any], int], tuple[int, Any, dict[str, str]]]


@contextlib.contextmanager
def service(answer: Answer) -> Iterator[tuple[str, list[tuple[dict[str, Any], dict[str, str]]]]]:
    """An images API on a free port. answer: (body, how many came before) -> status, JSON, headers."""
    asked: list[tuple[dict[str, Any], dict[str, str]]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((body, dict(self.headers)))
            status, content, headers = answer(body, len(asked) - 1)
            written = json.dumps(content).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(written))}.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(BrokenPipeError):  # a client that waited no longer
                self.wfile.write(written)

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def picture() -> str:
    written = io.BytesIO()
    PIL.Image.linear_gradient("L").save(written, "PNG")
    return base64.b64encode(written.getvalue()).decode()


def asking(url: str, **changes: Any) -> drawing.ImageService:
    return drawing.ImageService(**{"url": url, "model": "premium", "size": "64x64", "wait_s": 0.001, **changes})


def test_a_service_draws_what_is_missing(tmp_path: pathlib.Path) -> None:
    def answer(body: dict[str, Any], count: int) -> tuple[int, Any, dict[str, str]]:
        if body["prompt"] == "rude":
            return 400, {"error": {"message": "not that", "code": "content"}}, {}
        if count == 0:
            return 429, {"error": {"message": "full"}}, {"Retry-After": "0"}
        return 200, {"data": [{"b64_json": picture()}]}, {}

    wanted = texts(["a cat", "rude", "a dog"])
    with service(answer) as (url, asked):
        teacher = asking(url, key="secret", seeded=True)
        drawing.fetch(teacher, wanted, tmp_path, workers=1)
        assert len(asked) == 4, "the first came twice"
        drawing.fetch(teacher, wanted, tmp_path)
        assert len(asked) == 4, "what is there, or refused, is not asked for again"
    one = next(iter(wanted))
    body, headers = asked[0]
    expected = {"model": "premium", "prompt": "a cat", "n": 1, "size": "64x64", "seed": one.seed % 2**32}
    assert body == expected and asked[1][0] == expected
    assert headers["Authorization"] == "Bearer secret" and headers["Idempotency-Key"] == one.name
    items = drawing.Drawn(tmp_path, list(wanted), source="premium").items(0, 3)
    assert [item.problem is None for item in items] == [True, False, True]
    assert items[1].problem is not None and "400 not that" in items[1].problem.detail
    assert pictures.open_rgb(items[2].image, "dog").size == (256, 256)


@pytest.mark.parametrize(
    ("status", "content", "kind", "message"),
    [
        (
            401,
            {"error": {"message": "who?"}},
            errors.ConfigError,
            "answers 401 who.; check --images-from and --api-key",
        ),
        (404, {}, errors.ConfigError, "answers 404"),
        (503, {"error": {"message": "full"}}, errors.DataError, "no picture in 3 attempts, the last: 503 full"),
        (200, {"data": []}, errors.DataError, "answered 200 without a picture"),
        (200, {"data": [{"b64_json": "!"}]}, errors.DataError, "without a picture"),
        (200, [], errors.DataError, "without a picture"),
    ],
)
def test_a_service_of_no_use_is_an_error(
    tmp_path: pathlib.Path, status: int, content: Any, kind: type[Exception], message: str
) -> None:
    with service(lambda *_: (status, content, {})) as (url, asked), pytest.raises(kind, match=message):
        drawing.fetch(asking(url, attempts=3), texts(["a cat"]), tmp_path)
    assert len(asked) == (3 if status == 503 else 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "kind", "message"),
    [
        ("http://127.0.0.1:1", errors.DataError, "no picture in 2 attempts, the last: ConnectError"),
        ("ftp://host", errors.ConfigError, "--images-from 'ftp://host'"),
        ("host", errors.ConfigError, "--images-from 'host'"),
    ],
)
def test_an_address_of_no_use_is_an_error(
    tmp_path: pathlib.Path, url: str, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        drawing.fetch(asking(url, attempts=2), texts(["a cat"]), tmp_path)


def test_a_silent_service_times_out(tmp_path: pathlib.Path) -> None:
    pause = threading.Event()

    def answer(body: dict[str, Any], count: int) -> tuple[int, Any, dict[str, str]]:
        pause.wait(5)
        return 200, {}, {}

    with service(answer) as (url, _):
        with pytest.raises(errors.DataError, match="ReadTimeout"):
            drawing.fetch(asking(url, attempts=1, timeout_s=0.05), texts(["a cat"]), tmp_path)
        pause.set()


@pytest.mark.parametrize("url", ["https://h", "https://h/v1/", "https://h/v1/images/generations"])
def test_addresses_may_be_short(url: str) -> None:
    assert asking(url).endpoint == "https://h/v1/images/generations"


def test_a_picture_given_as_a_link_is_fetched_without_the_key() -> None:
    def handle(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            assert "Authorization" not in request.headers
            return httpx.Response(200, content=b"picture")
        return httpx.Response(200, json={"data": [{"url": "https://elsewhere/x.png"}]})

    one = drawing.wanted(["a"], "k")[0]
    with httpx.Client(transport=httpx.MockTransport(handle)) as client:
        assert asking("https://h", key="secret").fetch(client, one, "a") == b"picture"
