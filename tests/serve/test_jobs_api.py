"""`/v1/jobs` from outside."""

import base64
import datetime
import pathlib
import time
from typing import Any

import httpx
import pytest

from serve.store import Store, Usage
from tests.serve.conftest import Start
from tests.serve.live import ADMIN, Live, refused
from tests.serve.test_api import GENERATIONS, body, files, made, premium


def created(user: httpx.Client, given: dict[str, Any], **headers: str) -> dict[str, Any]:
    answer = user.post("/v1/jobs", json=given, headers=headers)
    assert answer.status_code == 202, answer.text
    job: dict[str, Any] = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}"
    return job


def shown(user: httpx.Client, job_id: str) -> dict[str, Any]:
    answer = user.get(f"/v1/jobs/{job_id}")
    assert answer.status_code == 200, answer.text
    job: dict[str, Any] = answer.json()
    return job


def ended(live: Live, user: httpx.Client, job_id: str) -> dict[str, Any]:
    live.until(lambda: shown(user, job_id)["status"] not in ("queued", "running"))
    return shown(user, job_id)


def cancelled(user: httpx.Client, job_id: str) -> str:
    answer = user.post(f"/v1/jobs/{job_id}/cancel")
    assert answer.status_code == 200 and answer.json()["id"] == job_id, answer.text
    return str(answer.json()["outcome"])


def test_a_job_is_accepted_carried_out_and_shown(live: Live, user: httpx.Client) -> None:
    new = created(user, body(n=2, seed=8, user="somebody"))
    assert new["status"] in ("queued", "running") and new["object"] == "job" and new["result"] is None
    job = ended(live, user, new["id"])
    assert job["status"] == "succeeded" and job["attempts"] == 1 and job["error"] is None
    assert job["created_at"] <= job["started_at"] <= job["finished_at"] <= time.time()
    assert job["request"]["user"] == "somebody" and job["request"]["n"] == 2
    assert files(job["result"]) == files(made(user, body(n=2, seed=8)))
    assert job["result"]["usage"]["cost_usd"] > 0


def test_a_drawn_seed_stands_in_the_job_from_the_first(live: Live, user: httpx.Client) -> None:
    new = created(user, body())
    assert ended(live, user, new["id"])["result"]["data"][0]["seed"] == new["request"]["seed"]


def test_a_job_by_url(live: Live, user: httpx.Client) -> None:
    job = ended(live, user, created(user, body(response_format="url", seed=3))["id"])
    (image,) = job["result"]["data"]
    assert image["b64_json"] is None
    assert httpx.get(image["url"], trust_env=False).content == files(made(user, body(seed=3)))[0]


@pytest.mark.parametrize("prefer", ["respond-async", "wait=10, respond-async", "Respond-Async"])
def test_prefer_makes_a_job_of_a_request(prefer: str, live: Live, user: httpx.Client) -> None:
    answer = user.post(GENERATIONS, json=body(), headers={"Prefer": prefer})
    assert answer.status_code == 202 and answer.headers["preference-applied"] == "respond-async"
    job_id = answer.headers["location"].removeprefix("/v1/jobs/")
    assert answer.json()["id"] == job_id and ended(live, user, job_id)["status"] == "succeeded"


def test_another_preference_changes_nothing(user: httpx.Client) -> None:
    assert user.post(GENERATIONS, json=body(), headers={"Prefer": "wait=10"}).status_code == 200


@pytest.mark.parametrize(
    ("given", "param"),
    [
        (body(stream=True), "stream"),
        (body(partial_images=1), "partial_images"),
        (body(n=11), "n"),
        (body(guidance_scale=3), "guidance_scale"),
        (body(webhook_url="https://example.com/hook"), "webhook_url"),  # no secret to sign with
        (body(webhook_url=""), "webhook_url"),
        (body(webhook="https://example.com/hook"), "webhook"),
        ({"model": "turbo"}, "prompt"),
    ],
)
def test_refusals(given: dict[str, Any], param: str, user: httpx.Client) -> None:
    refused(user.post("/v1/jobs", json=given), 400, param)
    assert user.get("/v1/jobs").json()["data"] == []


@pytest.fixture(scope="module")
def signing(start: Start) -> Live:
    return start(webhook_secret="whsec_" + base64.b64encode(b"s" * 32).decode())


@pytest.mark.parametrize(
    "url",
    [
        *(
            "http://127.0.0.1/",
            "http://localhost:8000/",
            "http://169.254.169.254/latest/meta-data/",
            "http://10.0.0.1/",
        ),
        *(
            "http://[::1]/",
            "http://2130706433/",
            "ftp://example.com/",
            "file:///etc/passwd",
            "https://u:p@example.com/",
        ),
        *("https://example.com/\0", "https://ex ample.com/", "javascript:alert(1)", "//example.com", "a" * 2001),
    ],
)
def test_a_webhook_to_a_private_place_is_refused(url: str, signing: Live) -> None:
    refused(signing.user().post("/v1/jobs", json=body(webhook_url=url)), 400, "webhook_url")


def test_pages_go_back_in_time(live: Live, user: httpx.Client) -> None:
    made_ids = [created(user, body())["id"] for _ in range(5)]
    seen: list[str] = []
    after: dict[str, str] = {}
    for _ in range(3):
        answer = user.get("/v1/jobs", params={"limit": "2", **after}).json()
        seen += [job["id"] for job in answer["data"]]
        after = {"after": answer["after"]}
    assert seen == made_ids[::-1] and not answer["has_more"] and answer["after"] is None
    for job_id in made_ids:
        ended(live, user, job_id)
    succeeded = user.get("/v1/jobs", params={"status": "succeeded"}).json()
    assert len(succeeded["data"]) == 5 and succeeded["data"][0]["result"]["data"][0]["b64_json"] is None
    assert httpx.get(succeeded["data"][0]["result"]["data"][0]["url"], trust_env=False).status_code == 200
    assert user.get("/v1/jobs", params={"status": "failed"}).json()["data"] == []


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=x", "limit"),
        ("status=done", "status"),
        ("after=job_1", "after"),
        ("after=%00", "after"),
        (f"after=job_{'0' * 32}", "after"),
        ("limits=5", "limits"),
    ],
)
def test_a_page_that_is_not_one_is_refused(query: str, param: str, user: httpx.Client) -> None:
    refused(user.get(f"/v1/jobs?{query}"), 400, param)


def test_jobs_of_others_are_unknown(live: Live, user: httpx.Client) -> None:
    job_id = created(user, body())["id"]
    other = live.user()
    refused(other.get(f"/v1/jobs/{job_id}"), 404)
    refused(other.post(f"/v1/jobs/{job_id}/cancel"), 404)
    refused(other.get("/v1/jobs", params={"after": job_id}), 400, "after")
    assert other.get("/v1/jobs").json()["data"] == []
    assert ended(live, user, job_id)["status"] == "succeeded"


@pytest.mark.parametrize("job_id", ["job_" + "0" * 32, "x", "job_" + "A" * 32, "..%2f..%2fx", "%00", "%ff", "a" * 3000])
def test_unknown_jobs(job_id: str, user: httpx.Client) -> None:
    refused(user.get(f"/v1/jobs/{job_id}"), 404)
    refused(user.post(f"/v1/jobs/{job_id}/cancel"), 404)


# --- taking back ------------------------------------------------------------------------------------


def test_a_running_job_leaves_the_device_within_a_step(narrow: Live) -> None:
    user = narrow.user()
    job_id = created(user, premium(num_inference_steps=100))["id"]
    narrow.until(lambda: narrow.built.service.engine.active("premium") == 1)
    assert cancelled(user, job_id) == "cancellation_requested"
    before = narrow.passes("premium")
    job = ended(narrow, user, job_id)
    assert job["status"] == "cancelled" and job["result"] is None and job["finished_at"]
    narrow.until_idle()
    assert narrow.passes("premium") - before <= 2  # the one under way, and one between the answer and the count
    assert cancelled(user, job_id) == "already_finished"
    assert user.get("/v1/usage").json()["total"]["images"] == 0


def test_a_queued_job_never_runs(narrow: Live) -> None:
    user = narrow.user()
    first, second = (created(user, premium(num_inference_steps=60))["id"] for _ in range(2))
    narrow.until(lambda: shown(user, first)["status"] == "running")
    assert shown(user, second)["status"] == "queued"
    assert cancelled(user, second) == "cancelled"
    job = shown(user, second)
    assert job["status"] == "cancelled" and job["started_at"] is None and job["attempts"] == 0
    assert cancelled(user, second) == "already_finished"
    cancelled(user, first)
    narrow.until_idle()


def test_a_finished_job_stays_as_it_is(live: Live, user: httpx.Client) -> None:
    job_id = created(user, body())["id"]
    ended(live, user, job_id)
    assert cancelled(user, job_id) == "already_finished"
    assert shown(user, job_id)["status"] == "succeeded"


def test_a_full_store_refuses_with_a_time_to_come_back(narrow: Live) -> None:
    user = narrow.user()
    ids = []
    try:
        for _ in range(5):
            answer = user.post("/v1/jobs", json=premium(num_inference_steps=100))
            if answer.status_code != 202:
                break
            ids.append(answer.json()["id"])
        refused(answer, 503, code="overloaded")
        assert int(answer.headers["retry-after"]) >= 1 and 2 <= len(ids) <= 3
    finally:
        for job_id in reversed(ids):
            cancelled(user, job_id)
        narrow.until_idle()


def test_a_job_that_is_cancelled_while_it_runs_is_charged_for_what_it_took(live: Live) -> None:
    user = live.user()
    before = live.passes("premium")
    job_id = created(user, premium(num_inference_steps=100, n=3))["id"]
    live.until(lambda: live.passes("premium") > before + 3)
    cancelled(user, job_id)
    assert ended(live, user, job_id)["status"] == "cancelled"
    total = user.get("/v1/usage").json()["total"]
    assert total["requests"] == 1 and total["images"] == 0 and total["cost_usd"] > 0


def test_a_job_that_ends_its_process_again_and_again_is_given_up(start: Start, tmp_path: pathlib.Path) -> None:
    database_url, job_id = f"sqlite:///{tmp_path}/service.db", f"job_{'0' * 32}"
    store = Store(database_url)
    store.ensure_key("admin", "admin", ["admin", "generate"], ADMIN)
    store.add_job(job_id, "admin", body(), None, most_queued=None)
    for _ in range(2):
        assert [job.id for job in store.claim_jobs("one that died", 1, lease_s=0)] == [job_id]
    store.close()
    live = start(database_url=database_url, job_attempts=2)
    job = ended(live, live.client(), job_id)
    assert job["status"] == "failed" and job["error"]["code"] == "too_many_attempts" and job["attempts"] == 3


def test_a_job_waits_for_a_busy_tier_instead_of_failing(narrow: Live) -> None:
    user = narrow.user()
    with narrow.occupied():
        job_id = created(user, premium())["id"]
        time.sleep(0.3)
        assert shown(user, job_id)["status"] in ("queued", "running")
    assert ended(narrow, user, job_id)["status"] == "succeeded"


def test_a_job_whose_budget_is_gone_by_then_fails_and_says_why(narrow: Live) -> None:
    key = narrow.new_key(monthly_budget_usd=1)
    user = narrow.client(key["secret"])
    # One job at a time: this one waits in the store.
    created(narrow.user(), premium(num_inference_steps=100, n=2))
    waiting = created(user, premium())["id"]
    now = datetime.datetime.now(datetime.UTC)
    narrow.built.service.store.record_usage(Usage(key["id"], "turbo", 1, 1.0, 10**9, 10**9, now))
    job = ended(narrow, user, waiting)
    assert job["status"] == "failed" and job["result"] is None
    assert job["error"]["code"] == "insufficient_quota" and "$1 are spent" in job["error"]["message"]
