"""`Idempotency-Key` from outside: however often a request is sent, its images are made once."""

import concurrent.futures
import time
import uuid
from typing import Any

import httpx
import pytest

from tests.serve.live import Live, refused
from tests.serve.test_api import GENERATIONS, body, events, made, premium


def once() -> dict[str, str]:
    return {"Idempotency-Key": uuid.uuid4().hex}


def test_a_repeat_gets_the_first_answer_and_generates_nothing(live: Live, user: httpx.Client) -> None:
    headers = once()
    first = user.post(GENERATIONS, json=body(n=2), headers=headers)
    passes, cost = live.passes("turbo"), user.get("/v1/usage").json()["total"]
    second = user.post(GENERATIONS, json=body(n=2), headers=headers)
    assert first.status_code == 200 and second.content == first.content
    assert live.passes("turbo") == passes and user.get("/v1/usage").json()["total"] == cost
    assert made(user, body(n=2), **once())["data"] != first.json()["data"]


def test_fields_in_another_order_and_defaults_written_out_are_the_same_request(user: httpx.Client) -> None:
    headers = once()
    first = made(user, {"prompt": "a", "model": "turbo"}, **headers)
    assert made(user, {"model": "turbo", "n": 1, "seed": None, "prompt": "a", "size": None}, **headers) == first


def test_links_are_repeated_too(user: httpx.Client) -> None:
    headers = once()
    first, second = (made(user, body(response_format="url"), **headers) for _ in range(2))
    assert first["data"][0]["seed"] == second["data"][0]["seed"]
    pictures = [httpx.get(answer["data"][0]["url"], trust_env=False) for answer in (first, second)]
    assert pictures[0].status_code == 200 and pictures[0].content == pictures[1].content


def test_concurrent_repeats_generate_once(live: Live) -> None:
    key, headers = live.new_key(), once()
    given = premium(num_inference_steps=20)

    def send(_: int) -> bytes:
        with httpx.Client(trust_env=False, timeout=30) as client:
            answer = client.post(
                live.url + GENERATIONS, json=given, headers=headers | {"Authorization": f"Bearer {key['secret']}"}
            )
        assert answer.status_code == 200
        return answer.content

    before = live.passes("premium")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = set(pool.map(send, range(8)))
    assert len(answers) == 1
    # Twenty passes of the one image, or a little more where the teacher's table of steps is longer than asked.
    assert 20 <= live.passes("premium") - before <= 22
    assert live.client(key["secret"]).get("/v1/usage").json()["total"]["images"] == 1


@pytest.mark.parametrize(
    "other", [{"prompt": "another"}, {"n": 2}, {"seed": 1}, {"stream": True}, {"response_format": "url"}, {"user": "b"}]
)
def test_another_body_is_a_conflict(other: dict[str, Any], user: httpx.Client) -> None:
    headers = once()
    made(user, body(), **headers)
    refused(user.post(GENERATIONS, json=body(**other), headers=headers), 409, code="idempotency_key_reused")


def test_images_and_jobs_are_different_requests(user: httpx.Client) -> None:
    headers = once()
    made(user, body(), **headers)
    refused(user.post("/v1/jobs", json=body(), headers=headers), 409)
    refused(user.post(GENERATIONS, json=body(), headers=headers | {"Prefer": "respond-async"}), 409)


def test_the_same_key_of_another_caller_is_another(live: Live) -> None:
    headers = once()
    first, second = (made(live.user(), body(), **headers) for _ in range(2))
    assert first["data"][0]["seed"] != second["data"][0]["seed"]


def test_a_failed_request_can_be_sent_again(narrow: Live) -> None:
    user, headers = narrow.user(), once()
    with narrow.occupied(by=user):
        refused(user.post(GENERATIONS, json=premium(), headers=headers), 503)
        refused(user.post(GENERATIONS, json=premium(), headers=headers), 503)
    first = made(user, premium(), **headers)
    assert made(user, premium(), **headers) == first


def test_a_refused_field_does_not_take_the_key(user: httpx.Client) -> None:
    headers = once()
    refused(user.post(GENERATIONS, json=body(n=11), headers=headers), 400, "n")
    made(user, body(n=1), **headers)


def test_whoever_leaves_and_comes_back_is_served(live: Live) -> None:
    """At whatever moment it leaves, also while the key is being claimed."""
    user = live.user()
    given = premium(num_inference_steps=100)
    for leaves_after_s in (0.001, 0.004, 0.01, 0.1):
        headers = once()
        with pytest.raises(httpx.ReadTimeout):
            user.post(GENERATIONS, json=given, headers=headers, timeout=httpx.Timeout(30, read=leaves_after_s))
        began_s = time.monotonic()
        made(user, given, **headers)
        assert time.monotonic() - began_s < 10
    live.until_idle()


def test_a_stream_is_repeated_without_generating(live: Live, user: httpx.Client) -> None:
    headers = once()
    given = premium(num_inference_steps=6, partial_images=2, n=2)
    first = events(user, given, **headers)
    passes = live.passes("premium")
    second = events(user, given, **headers)
    assert second == [event for event in first if event["type"] == "image_generation.completed"] and len(second) == 2
    assert live.passes("premium") == passes


def test_a_repeated_job_is_the_same_job(live: Live, user: httpx.Client) -> None:
    headers = once()
    first, second = (user.post("/v1/jobs", json=body(), headers=headers) for _ in range(2))
    assert first.status_code == second.status_code == 202 and first.json()["id"] == second.json()["id"]
    assert first.headers["location"] == second.headers["location"]
    live.until(lambda: user.get(f"/v1/jobs/{first.json()['id']}").json()["status"] == "succeeded")
    assert user.post("/v1/jobs", json=body(), headers=headers).json()["id"] == first.json()["id"]
    assert user.get("/v1/usage").json()["total"]["images"] == 1 and len(user.get("/v1/jobs").json()["data"]) == 1
    refused(user.post("/v1/jobs", json=body(n=2), headers=headers), 409)


@pytest.mark.parametrize("key", [b"", b"a b", b"\xc3\xa9", b"a" * 256, b"a\tb"])
def test_a_malformed_key_is_refused(key: bytes, user: httpx.Client) -> None:
    answer = user.post(GENERATIONS, json=body(), headers=[(b"Idempotency-Key", key)])
    refused(answer, 400, "Idempotency-Key")
