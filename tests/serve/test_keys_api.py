"""Keys, scopes, rates, budgets and usage from outside; and a service without keys."""

import datetime
import decimal
import json
import time
from typing import Any

import httpx
import pytest

from diffusion_kd.errors import ConfigError
from serve import build
from serve.settings import Settings
from tests.serve.conftest import Start
from tests.serve.live import ADMIN, Live, refused
from tests.serve.test_api import GENERATIONS, body, events, made, premium

KEYS = "/v1/admin/keys"


# --- keys -------------------------------------------------------------------------------------------


def test_a_key_is_shown_once(live: Live) -> None:
    new = live.new_key(name="Ärger \N{SNOWMAN}", requests_per_minute=7, monthly_budget_usd=1.25)
    assert new["secret"].startswith("dkd_") and new["secret"].startswith(new["prefix"])
    assert (new["name"], new["scopes"]) == ("Ärger \N{SNOWMAN}", ["generate"])
    answer = live.client().get(KEYS)
    (listed,) = [key for key in answer.json()["data"] if key["id"] == new["id"]]
    assert listed == {name: value for name, value in new.items() if name != "secret"}
    assert new["secret"] not in answer.text and ADMIN not in answer.text


def test_a_revoked_key_is_refused_at_once(live: Live) -> None:
    new = live.new_key()
    user, admin = live.client(new["secret"]), live.client()
    assert user.get("/v1/models").status_code == 200
    assert admin.delete(f"{KEYS}/{new['id']}").json() == {"id": new["id"], "revoked": True}
    refused(user.get("/v1/models"), 401, code="invalid_api_key")
    refused(admin.delete(f"{KEYS}/{new['id']}"), 404)
    assert new["id"] not in admin.get(KEYS).text
    (kept,) = [
        key for key in admin.get(KEYS, params={"include_revoked": "true"}).json()["data"] if key["id"] == new["id"]
    ]
    assert abs(kept["revoked_at"] - time.time()) < 60


ROUTES = [
    ("POST", GENERATIONS, "generate"),
    ("GET", "/v1/models", "generate"),
    ("GET", "/v1/models/turbo", "generate"),
    ("POST", "/v1/jobs", "generate"),
    ("GET", "/v1/jobs", "generate"),
    ("GET", f"/v1/jobs/job_{'0' * 32}", "generate"),
    ("POST", f"/v1/jobs/job_{'0' * 32}/cancel", "generate"),
    ("GET", "/v1/usage", "generate"),
    ("POST", KEYS, "admin"),
    ("GET", KEYS, "admin"),
    ("DELETE", f"{KEYS}/key_x", "admin"),
]


@pytest.mark.parametrize(("method", "path", "scope"), ROUTES)
def test_each_route_asks_for_its_scope(method: str, path: str, scope: str, live: Live) -> None:
    given = {"json": {"name": "x"} if path == KEYS else body()} if method == "POST" and "cancel" not in path else {}
    other = live.user(scopes=["admin" if scope == "generate" else "generate"])
    assert scope in refused(other.request(method, path, **given), 403, code="missing_scope")
    stranger = live.client(None).request(method, path, **given)
    refused(stranger, 401, code="missing_api_key")
    assert stranger.headers["www-authenticate"] == "Bearer"
    refused(live.client("dkd_x").request(method, path, **given), 401, code="invalid_api_key")


@pytest.mark.parametrize("authorization", ["", "Bearer", "Basic eDp5", "bearer", "Token x", ADMIN])
def test_other_credentials_are_none(authorization: str, live: Live) -> None:
    refused(live.client(None).get("/v1/models", headers={"Authorization": authorization}), 401)


def test_health_needs_no_key(live: Live) -> None:
    for path in ("/healthz", "/readyz"):
        answer = live.client(None).get(path)
        assert answer.status_code == 200 and answer.json()["status"] == "ok"
        assert set(answer.json()["checks"].values()) == {"ok"}


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({}, "name"),
        ({"name": ""}, "name"),
        ({"name": "a" * 101}, "name"),
        ({"name": "a\0b"}, "name"),
        ({"name": None}, "name"),
        ({"name": "x", "scopes": []}, "scopes"),
        ({"name": "x", "scopes": ["root"]}, "scopes.0"),
        ({"name": "x", "scopes": "admin"}, "scopes"),
        ({"name": "x", "requests_per_minute": 0}, "requests_per_minute"),
        ({"name": "x", "requests_per_minute": 1.5}, "requests_per_minute"),
        ({"name": "x", "monthly_budget_usd": -1}, "monthly_budget_usd"),
        ({"name": "x", "monthly_budget_usd": 1e10}, "monthly_budget_usd"),
        ({"name": "x", "secret": "dkd_mine"}, "secret"),
    ],
)
def test_keys_that_cannot_be_are_refused(given: dict[str, Any], param: str, live: Live) -> None:
    refused(live.client().post(KEYS, json=given), 400, param)


@pytest.mark.parametrize("key_id", ["key_x", "..%2f..%2fx", "%00", "%ff", "a" * 3000, "\N{SNOWMAN}"])
def test_unknown_keys_cannot_be_revoked(key_id: str, live: Live) -> None:
    refused(live.client().delete(f"{KEYS}/{key_id}"), 404)


# --- rates and budgets ------------------------------------------------------------------------------


def test_a_rate_counts_requests_of_all_kinds(live: Live) -> None:
    user = live.user(requests_per_minute=3)
    made(user, body())
    events(user, body())
    assert user.post("/v1/jobs", json=body()).status_code == 202
    for answer in (
        user.post(GENERATIONS, json=body()),
        user.post(GENERATIONS, json=body(stream=True)),
        user.post(GENERATIONS, json=body(), headers={"Prefer": "respond-async"}),
        user.post("/v1/jobs", json=body()),
    ):
        assert "3 requests a minute" in refused(answer, 429, code="rate_limit_exceeded")
        assert 50 <= int(answer.headers["retry-after"]) <= 61
    made(live.user(), body())  # others are not held back
    assert user.get("/v1/usage").status_code == user.get("/v1/models").status_code == 200


def test_a_budget_stops_before_it_is_overspent(live: Live) -> None:
    probe = made(live.user(), premium(num_inference_steps=20))["usage"]["cost_usd"]
    budget = round(3.5 * probe, 9)
    user = live.user(monthly_budget_usd=budget)
    answers = [user.post(GENERATIONS, json=premium(num_inference_steps=20)) for _ in range(12)]
    served = [answer for answer in answers if answer.status_code == 200]
    assert 1 <= len(served) < 12
    message = refused(answers[-1], 429, code="insufficient_quota")
    assert "UTC" in message and f"${budget:g}" in message
    now = datetime.datetime.now(datetime.UTC)
    month_s = (
        (now.replace(day=1) + datetime.timedelta(days=32)).replace(day=1, hour=0, minute=0) - now
    ).total_seconds()
    assert abs(int(answers[-1].headers["retry-after"]) - month_s) < 120
    # What a request costs is known when it is made; the last one may err by a little.
    assert user.get("/v1/usage").json()["total"]["cost_usd"] < 1.5 * budget


def test_many_at_once_do_not_overspend(live: Live) -> None:
    probe = made(live.user(), premium(num_inference_steps=20))["usage"]["cost_usd"]
    user = live.user(monthly_budget_usd=round(3 * probe, 9))
    answer = user.post(GENERATIONS, json=premium(num_inference_steps=20, n=10))
    refused(answer, 429, code="insufficient_quota")
    assert user.get("/v1/usage").json()["total"]["images"] == 0


# --- usage ------------------------------------------------------------------------------------------


def test_the_costs_that_were_answered_add_up_to_the_last_digit(live: Live) -> None:
    user = live.user()
    answers = [
        user.post(GENERATIONS, json=given).text
        for given in (body(n=3), body(), premium(), premium(n=2), body(num_inference_steps=4), body(), body(n=7))
    ]
    answers.append(json.dumps(events(user, premium(n=2))[-1]))
    job = user.post("/v1/jobs", json=body(n=2)).json()["id"]
    live.until(lambda: user.get(f"/v1/jobs/{job}").json()["status"] == "succeeded")
    answers.append(json.dumps(user.get(f"/v1/jobs/{job}").json()["result"]))
    answered = [json.loads(answer, parse_float=decimal.Decimal) for answer in answers]
    usage = json.loads(user.get("/v1/usage").text, parse_float=decimal.Decimal)
    total = usage["total"]
    for field in ("cost_usd", "premium_cost_usd"):
        assert total[field] == sum(answer["usage"][field] for answer in answered)
        assert total[field] == sum(day[field] for day in usage["data"])
    assert total["requests"] == 9 and total["images"] == 3 + 1 + 1 + 2 + 1 + 1 + 7 + 2 + 2
    assert {day["tier"]: day["images"] for day in usage["data"]} == {"turbo": 15, "premium": 5}
    answered_ms = sum(float(answer["usage"]["compute_ms"][stage]) for answer in answered for stage in STAGES)
    assert float(total["compute_ms"]) == pytest.approx(answered_ms, abs=0.01 * len(answered))


STAGES = ("text", "denoise", "decode")


def test_cost_is_price_times_seconds_of_the_device(live: Live, user: httpx.Client) -> None:
    usage = made(user, premium())["usage"]
    device_s = sum(usage["compute_ms"][stage] for stage in STAGES) / 1000
    price = user.get("/v1/models/premium").json()["price_per_gpu_hour_usd"]
    assert usage["cost_usd"] == pytest.approx(device_s * price / 3600, abs=3e-9)


def test_usage_is_the_callers_own(live: Live) -> None:
    first, second = live.user(), live.user()
    made(first, body(n=2))
    assert first.get("/v1/usage").json()["total"]["images"] == 2
    empty = second.get("/v1/usage").json()
    assert empty["total"] == {"requests": 0, "images": 0, "compute_ms": 0, "cost_usd": 0, "premium_cost_usd": 0}
    assert empty["data"] == []


def test_usage_of_days(user: httpx.Client) -> None:
    made(user, body())
    today = datetime.datetime.now(datetime.UTC).date()
    yesterday = today - datetime.timedelta(days=1)
    (day,) = user.get("/v1/usage", params={"since": str(yesterday), "until": str(today)}).json()["data"]
    assert day["day"] == str(today) and day["tier"] == "turbo" and day["requests"] == 1
    assert user.get("/v1/usage", params={"since": str(yesterday), "until": str(yesterday)}).json()["data"] == []
    assert user.get("/v1/usage", params={"until": str(today)}).json()["since"] == str(today.replace(day=1))


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("since=yesterday", "since"),
        ("since=2026-02-30", "since"),
        ("since=2026-05-02&until=2026-05-01", "since"),
        ("since=2020-01-01&until=2026-01-01", "since"),
        ("since=Infinity", "since"),
        ("until=99999-01-01", "until"),
        ("from=2026-01-01", "from"),
    ],
)
def test_days_that_are_none_are_refused(query: str, param: str, user: httpx.Client) -> None:
    refused(user.get(f"/v1/usage?{query}"), 400, param)


@pytest.mark.parametrize("query", ["until=0001-01-01", "until=9999-12-31", "since=9999-12-31&until=9999-12-31"])
def test_the_ends_of_time_are_days_like_others(query: str, user: httpx.Client) -> None:
    assert user.get(f"/v1/usage?{query}").json()["data"] == []


# --- settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com"])
def test_without_keys_nobody_else_may_reach_the_service(host: str) -> None:
    with pytest.raises(ConfigError, match=r"auth is 'none'.*--auth keys.*keys create"):
        build.build(Settings(host=host, auth="none"))


def test_with_keys_there_must_be_one_of_an_admin(start: Start) -> None:
    with pytest.raises(ConfigError, match=r"no key of an admin.*keys create"):
        start(admin_key=None)


@pytest.fixture(scope="module")
def keyless(start: Start) -> Live:
    return start(auth="none", admin_key=None)


def test_alone_on_a_machine_no_key_is_needed(keyless: Live) -> None:
    anyone = keyless.client(None)
    answer = made(anyone, body())
    assert anyone.get("/v1/usage").json()["total"]["cost_usd"] == answer["usage"]["cost_usd"]
    assert anyone.get(KEYS).status_code == 200
    # A client that always sends a key is served as well.
    assert keyless.client("sk-anything").get("/v1/models").status_code == 200


@pytest.mark.parametrize("host", ["localhost", "LocalHost:8000", "127.0.0.1", "127.1.2.3:80", "[::1]", "[::1]:8000"])
def test_a_service_without_keys_answers_to_its_own_names(host: str, keyless: Live) -> None:
    assert keyless.client(None).get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "0.0.0.0", ""),
        *("192.168.0.1", "[::]", "localhost:80:80", "::1", "evil.example#localhost", "127.0.0.1@evil.example"),
    ],
)
def test_a_service_without_keys_answers_to_no_other(host: str, keyless: Live) -> None:
    for path in ("/v1/models", "/docs", "/healthz", "/metrics"):
        refused(keyless.client(None).get(path, headers={"Host": host}), 403, code="host_not_allowed")


@pytest.mark.parametrize("own", ["anonymous", "admin"])
def test_keys_of_the_settings_are_not_revoked(own: str, live: Live) -> None:
    refused(live.client().delete(f"/v1/admin/keys/{own}"), 400, "key_id")
    assert live.client().get("/v1/admin/keys").status_code == 200
