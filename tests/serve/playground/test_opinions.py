"""Blind votes in a real browser."""

import base64
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.serve.live import Live
from tests.serve.playground.conftest import PHONE


def show(page: Page, prompt: str = "") -> None:
    page.get_by_label("A prompt of your own").fill(prompt)
    page.get_by_role("button", name="Show").click()
    expect(page.locator("#vote-pair [data-state=shown]")).to_be_visible()


def vote(page: Page, name: str) -> None:
    page.get_by_role("button", name=name).click()
    expect(page.locator("#vote-pair [data-state=voted]")).to_be_visible()


def counted(site: Live) -> dict[str, int]:
    """Votes by who won them."""
    service = site.built.service
    turbo, premium = (service.catalogue.tiers[tier].model.version for tier in ("turbo", "premium"))
    tallies = service.store.tallies(turbo, premium)
    return {name: sum(getattr(tally, name) for tally in tallies) for name in ("turbo", "premium", "neither")}


def test_a_vote_is_kept_for_the_tier_that_was_chosen(visit: Any, site: Live, picture: Any) -> None:
    page = visit(tab="Opinions")
    before = counted(site)
    show(page, "a red circle left of a blue star")
    vote(page, "A is better")
    first = page.locator("#vote-pair figure").first
    expect(first).to_contain_text("your choice")
    letter = first.locator("figcaption strong")
    assert letter.evaluate(
        "it => { const {x, y, width, height} = it.getBoundingClientRect();"
        " return document.elementFromPoint(x + width / 2, y + height / 2) === it; }"
    ), "nothing covers what is said of a picture"
    winner = "turbo" if "turbo" in first.inner_text() else "premium"
    after = counted(site)
    assert after == before | {winner: before[winner] + 1}
    picture(page, "opinions")


def test_nothing_tells_which_is_which_before_the_vote(visit: Any) -> None:
    page = visit(tab="Opinions")
    show(page)
    pair = page.locator("#vote-pair")
    shown = pair.inner_html().lower()
    assert "turbo" not in shown and "premium" not in shown and "step" not in shown
    for image in pair.locator("img").all():
        file = base64.b64decode(str(image.get_attribute("src")).partition(",")[2])
        assert b"turbo" not in file and b"premium" not in file and b"shapes-" not in file


def test_the_sides_change(visit: Any) -> None:
    page, sides = visit(tab="Opinions"), set()
    for _ in range(16):  # the same side each time: once in 32,768 runs
        show(page)
        vote(page, "No difference")
        sides.add("turbo" in page.locator("#vote-pair figure").first.inner_text())
        if len(sides) == 2:
            return
    pytest.fail("turbo was always on the same side")


def test_one_pair_is_one_vote(visit: Any, site: Live) -> None:
    page = visit(tab="Opinions")
    show(page)
    before = counted(site)
    # All three at once, before the first answer can come.
    page.evaluate("document.querySelectorAll('#vote-buttons button').forEach(button => button.click())")
    expect(page.locator("#vote-pair [data-state=voted]")).to_be_visible()
    expect(page.get_by_role("button", name="B is better")).to_be_disabled()
    page.wait_for_timeout(500)
    after = counted(site)
    (kept,) = [winner for winner in after if after[winner] != before[winner]]
    assert after[kept] == before[kept] + 1
    shown = [figure.inner_text() for figure in page.locator("#vote-pair figure").all()]
    chosen = [text for text in shown if "your choice" in text]
    assert chosen == [text for text in shown if kept in text], "the page says what was kept"


def test_there_is_nothing_to_vote_on_at_first(visit: Any) -> None:
    page = visit(tab="Opinions")
    for name in ("A is better", "No difference", "B is better"):
        expect(page.get_by_role("button", name=name)).to_be_disabled()


def test_it_works_with_the_keyboard_alone_on_a_phone(visit: Any, picture: Any) -> None:
    page = visit(tab="Opinions", size=PHONE)
    page.get_by_label("A prompt of your own").press("Enter")
    expect(page.locator("#vote-pair [data-state=shown]")).to_be_visible()
    page.get_by_role("button", name="A is better").press("Enter")
    expect(page.locator("#vote-pair [data-state=voted]")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    picture(page, "opinions-phone")
