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
    page.get_by_role("button", name="Login").click()


def test_only_a_key_and_its_own_secret_let_in(visit: Any, locked: Live) -> None:
    page, key, other = visit(f"{locked.url}/playground/"), locked.new_key(), locked.new_key()
    expect(page.get_by_text("Log in with an API key")).to_be_visible()
    for secret in ("", "dkd_wrong", other["secret"]):
        log_in(page, key["id"], secret)
        expect(page.locator("#turbo")).to_have_count(0)
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


def test_nothing_of_the_page_is_served_to_strangers(locked: Live) -> None:
    client = locked.client(None)
    for path in ("/playground/gradio_api/info", "/playground/config", "/playground/gradio_api/queue/data"):
        assert client.get(path).status_code in (401, 404), path
    assert client.post("/playground/gradio_api/queue/join", json={"data": [], "fn_index": 0}).status_code == 401
