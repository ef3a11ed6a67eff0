"""Where the page is, and where it is not."""

import importlib.util
import pathlib
import re
from typing import Any

import pytest
from playwright.sync_api import expect

from diffusion_kd import errors
from serve import api
from serve.settings import Settings
from tests.serve.live import Live, serving


def test_the_page_alone_has_no_api(visit: Any, no_network: list[str], tmp_path: pathlib.Path) -> None:
    with serving(tmp_path, api.create_playground, auth="none", admin_key=None, runs_folder=tmp_path) as alone:
        page = visit(f"{alone.url}/")
        expect(page.locator("#turbo [data-state=done]")).to_be_visible()
        client = alone.client(None)
        assert client.get("/v1/models").status_code == 404 and client.get("/openapi.json").status_code == 404
        assert client.get("/readyz").status_code == 200


def test_without_the_last_slash_it_is_found_too(site: Live) -> None:
    assert site.client(None).get("/playground", follow_redirects=True).status_code == 200


def test_off_is_off(tmp_path: pathlib.Path) -> None:
    with serving(tmp_path, playground="off") as bare:
        assert bare.client().get("/playground").status_code == 404


def test_a_page_that_cannot_be_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gradio" else found(name))
    settings = Settings(data_folder=tmp_path, playground="on")
    for create in (api.create_app, api.create_playground):
        with pytest.raises(errors.ConfigError, match="gradio is not installed"):
            create(settings)
    api.create_app(Settings(data_folder=tmp_path))  # it is not asked for, and not needed


def test_the_tabs_are_reached_with_the_keyboard(visit: Any) -> None:
    page = visit()
    expect(page.locator("#turbo [data-state=done]")).to_be_visible()
    page.get_by_role("tab", name="Compare").focus()
    for name in ("Opinions", "Quality", "Savings", "Runs"):
        page.keyboard.press("Tab")
        expect(page.get_by_role("tab", name=name)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#run-health")).to_be_visible()


def test_an_empty_house_says_what_to_do(visit: Any, no_network: list[str], tmp_path: pathlib.Path) -> None:
    with serving(tmp_path, auth="none", admin_key=None, playground="on", runs_folder=tmp_path / "none") as empty:
        page = visit(f"{empty.url}/playground/", tab="Runs")
        expect(page.locator("#run-health")).to_contain_text(re.compile("There is no training yet. Start one with"))
