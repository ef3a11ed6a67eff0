"""The page of a service that asks for keys: who may enter, and who pays."""

import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.serve.live import Live, serving


@pytest.fixture(scope="module")
def locked(no_network: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder: pathlib.Path = tmp_path_factory.mktemp("locked")
    with serving(folder, playground="on", runs_folder=folder / "runs") as locked:
        yield locked


def log_in(page: Page, key_id: str, secret: str) -> None:
    page.get_by_label("username").fill(key_id)
    page.get_by_label("password").fill(secret)
    with page.expect_response("**/login*"):
        page.get_by_role("button", name="Login").click()


def test_only_a_key_and_its_own_secret_let_in(visit: Any, locked: Live) -> None:
    page, key, other = visit(f"{locked.url}/playground/"), locked.new_key(), locked.new_key()
    expect(page.get_by_text("Log in with an API key")).to_be_visible()
    for secret in ("dkd_wrong", other["secret"]):
        log_in(page, key["id"], secret)
        expect(page.get_by_text("Incorrect Credentials")).to_be_visible()
        expect(page.get_by_label("username")).to_have_value("")
    log_in(page, key["id"], key["secret"])
    expect(page.locator("#turbo [data-state=done]")).to_be_visible()


def test_the_key_pays(visit: Any, locked: Live) -> None:
    page, key = visit(f"{locked.url}/playground/"), locked.new_key()
    log_in(page, key["id"], key["secret"])
    expect(page.locator("#turbo [data-state=done]")).to_be_visible()
    usage = locked.client(key["secret"]).get("/v1/usage").json()
    assert [(day["tier"], day["images"]) for day in usage["data"]] == [("turbo", 1)]


def test_a_limit_of_the_key_is_told_in_a_sentence(visit: Any, locked: Live) -> None:
    page, key = visit(f"{locked.url}/playground/"), locked.new_key(requests_per_minute=2)
    log_in(page, key["id"], key["secret"])
    expect(page.locator("#turbo [data-state=done]")).to_be_visible()
    page.get_by_role("button", name="Compare", exact=True).click()
    told = page.locator("#pair [data-state=failed] [role=alert]")
    expect(told).to_contain_text("The key may send 2 requests a minute; try again in")


def test_a_revoked_key_is_out(visit: Any, locked: Live) -> None:
    page, key = visit(f"{locked.url}/playground/"), locked.new_key()
    log_in(page, key["id"], key["secret"])
    expect(page.locator("#turbo [data-state=done]")).to_be_visible()
    locked.client().delete(f"/v1/admin/keys/{key['id']}")
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.locator("#premium [role=alert]")).to_contain_text("Your API key was revoked")
    for tab, place in (("Quality", "#evaluation"), ("Runs", "#run-health")):
        page.get_by_role("tab", name=tab).click()
        expect(page.locator(place)).to_contain_text("Your API key was revoked")


@pytest.mark.parametrize(
    "path", ["config", "gradio_api/info", "gradio_api/queue/data?session_hash=x", "gradio_api/file=/etc/passwd"]
)
def test_nothing_of_the_page_is_served_to_strangers(locked: Live, path: str) -> None:
    assert locked.client(None).get(f"/playground/{path}").status_code == 401


def test_nothing_is_taken_from_strangers(locked: Live) -> None:
    client, body = locked.client(None), {"data": [], "fn_index": 0, "session_hash": "x"}
    assert client.post("/playground/gradio_api/queue/join", json=body).status_code == 401
    assert client.post("/playground/gradio_api/upload", files={"files": b"x"}).status_code == 403


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1"])
def test_other_sites_cannot_use_a_login(locked: Live, origin: str) -> None:
    key, client = locked.new_key(), locked.client(None)
    client.post("/playground/login", data={"username": key["id"], "password": key["secret"]})
    assert client.get("/playground/config").status_code == 200
    headers = {"Host": "service.example", "Origin": origin}
    answer = client.get("/playground/config", headers=headers)
    assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    body = {"data": [], "fn_index": 0, "session_hash": "x"}
    assert client.post("/playground/gradio_api/queue/join", json=body, headers=headers).status_code == 403
    own = {"Host": "service.example", "Origin": "https://service.example"}
    assert client.get("/playground/config", headers=own).status_code == 200
