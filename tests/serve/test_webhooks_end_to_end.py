"""Webhooks of real jobs to a real receiver: signed, retried, and never in anybody's way."""

import itertools
import json
import pathlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import standardwebhooks

from serve import webhooks
from tests.serve import processes
from tests.serve.processes import Inside, Message, Receiver, eventually

SECRET = webhooks.new_secret()
TURBO = {"model": "turbo", "prompt": "a red circle", "seed": 1}
LONG = {"model": "premium", "prompt": "a red circle", "num_inference_steps": 100, "n": 10}
TIMEOUT_S = 1.0


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(webhooks, "FIRST_BACKOFF_S", 0.2)
        folder = tmp_path_factory.mktemp("webhooks")
        settings: dict[str, Any] = {"webhook_secret": SECRET, "webhook_allow_private": True}
        with processes.inside(folder, **settings, webhook_timeout_s=TIMEOUT_S, lease_s=1.5) as inside:
            yield inside


def accept(service: Inside, url: str, **changes: Any) -> str:
    answer = httpx2.post(f"{service.url}/v1/jobs", json=TURBO | {"webhook_url": url} | changes, timeout=30)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["id"])


def job(service: Inside, job_id: str) -> dict[str, Any]:
    found: dict[str, Any] = httpx2.get(f"{service.url}/v1/jobs/{job_id}", timeout=30).json()
    return found


def wait_status(service: Inside, job_id: str, status: str, within_s: float = 20) -> dict[str, Any]:
    eventually(lambda: job(service, job_id)["status"] == status, within_s, f"{status} of {job_id}")
    return job(service, job_id)


def of(receiver: Receiver, job_id: str) -> list[Message]:
    return [message for message in receiver.messages if message.job_id == job_id]


# --- told -------------------------------------------------------------------------------------------


def test_the_end_of_a_job_is_told_once_and_signed(service: Inside) -> None:
    with Receiver() as receiver:
        told = accept(service, receiver.url)
        message = eventually(lambda: of(receiver, told))[0]
        assert wait_status(service, told, "succeeded")["result"]
    standardwebhooks.Webhook(SECRET).verify(message.body, message.headers)
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        standardwebhooks.Webhook(webhooks.new_secret()).verify(message.body, message.headers)
    assert "job.succeeded" in message.body.decode() and b"b64" not in message.body
    assert len(of(receiver, told)) == 1


@pytest.mark.parametrize("running", [True, False])
def test_a_cancelled_job_is_told_too(service: Inside, running: bool) -> None:
    with Receiver() as receiver:
        cancelled = accept(service, receiver.url, **LONG)
        if running:
            eventually(lambda: service.built.service.engine.active("premium"), what="the start")
        outcome = httpx2.post(f"{service.url}/v1/jobs/{cancelled}/cancel").json()["outcome"]
        assert outcome in (("cancellation_requested",) if running else ("cancelled", "cancellation_requested"))
        wait_status(service, cancelled, "cancelled", within_s=5)
        message = eventually(lambda: of(receiver, cancelled))[0]
    assert json.loads(message.body)["type"] == "job.cancelled"


# --- receivers that are bad -------------------------------------------------------------------------


def test_one_that_fails_is_asked_again_later_with_the_same_id(service: Inside) -> None:
    """More time passes before each attempt."""
    answers = iter([(500, None), (429, None), (200, None)])
    with Receiver(lambda _: next(answers)) as receiver:
        told = accept(service, receiver.url)
        eventually(lambda: len(of(receiver, told)) == 3, what="three attempts")
        messages = of(receiver, told)
    assert len({message.id for message in messages}) == len({message.body for message in messages}) == 1
    for message in messages:
        standardwebhooks.Webhook(SECRET).verify(message.body, message.headers)
    first_s, second_s = (later.at_s - earlier.at_s for earlier, later in itertools.pairwise(messages))
    assert first_s >= 0.2 * 0.8 and second_s >= 0.6 * 0.8


def test_one_that_is_down_delays_nobody_and_hears_of_it_when_it_is_up(service: Inside) -> None:
    with Receiver() as down:
        url = down.url
    told = accept(service, url)
    wait_status(service, told, "succeeded", within_s=10)
    with Receiver() as well:
        other = accept(service, well.url)
        eventually(lambda: of(well, other), within_s=10, what="the other webhook")
    with Receiver(port=int(url.split(":")[2].split("/")[0])) as up:
        eventually(lambda: of(up, told), what="the webhook, once it is up")


def test_slow_ones_delay_no_job_no_cancellation_and_no_other_webhook(service: Inside) -> None:
    """More webhooks hang than may be under way at once to one receiver."""
    let_go = threading.Event()

    def hang(_: Message) -> tuple[int, str | None]:
        let_go.wait(processes.PATIENCE_S)
        return 200, None

    with Receiver(hang) as slow, Receiver() as well:
        hanging = [accept(service, slow.url) for _ in range(6)]
        for one in hanging:
            wait_status(service, one, "succeeded", within_s=10)
        eventually(lambda: slow.messages, what="the first of them")
        began_s = time.monotonic()
        other = accept(service, well.url)
        eventually(lambda: of(well, other), within_s=10, what="the other webhook")
        assert time.monotonic() - began_s < TIMEOUT_S + 1
        cancelled = accept(service, slow.url, **LONG)
        httpx2.post(f"{service.url}/v1/jobs/{cancelled}/cancel")
        wait_status(service, cancelled, "cancelled", within_s=5)
        let_go.set()
        for one in (*hanging, cancelled):
            eventually(lambda one=one: of(slow, one), what="the webhook, once it answers")  # type: ignore[misc]


def test_a_redirect_is_not_followed(service: Inside) -> None:
    with Receiver() as inner:
        inner_url = inner.url
        with Receiver(lambda _: (302, inner_url)) as receiver:
            told = accept(service, receiver.url)
            eventually(lambda: len(of(receiver, told)) == 2, what="a second attempt")
            assert wait_status(service, told, "succeeded")
        assert inner.messages == []


# --- where none may go ------------------------------------------------------------------------------


@pytest.mark.parametrize("secret", [SECRET, None], ids=["a secret", "none"])
def test_by_default_no_private_address_and_nothing_without_a_secret(tmp_path: pathlib.Path, secret: str | None) -> None:
    urls = ["http://127.0.0.1:9/", "http://localhost/", "http://10.0.0.1/", "http://[::1]/", "http://169.254.169.254/"]
    urls += ["http://2130706433/", "http://0x7f.1/", "ftp://example.com/"] if secret else ["https://example.com/"]
    with processes.inside(tmp_path, webhook_secret=secret) as service:
        for url in urls:
            answer = httpx2.post(f"{service.url}/v1/jobs", json=TURBO | {"webhook_url": url})
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "webhook_url", url
            assert ("secret" in answer.json()["error"]["message"]) == (secret is None)
        assert httpx2.get(f"{service.url}/v1/jobs").json()["data"] == []
