"""The Compare tab in a real browser."""

import re
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.serve.live import Live
from tests.serve.playground.conftest import PHONE

PROMPT = "a red circle left of a blue star"


def done(page: Page, tier: str, **having: str) -> Any:
    """The finished card of a tier; having: its prompt or seed."""
    wanted = "".join(f'[data-{name}="{value}"]' for name, value in having.items())
    return page.locator(f"#{tier} .dkd-card[data-state=done]{wanted}")


def ask(page: Page, prompt: str) -> None:
    page.get_by_label("Prompt").first.fill(prompt)


def source(page: Page, tier: str) -> str:
    return str(page.locator(f"#{tier} img").get_attribute("src"))


def test_turbo_is_there_before_anything_is_asked(visit: Any) -> None:
    page = visit()
    expect(done(page, "turbo")).to_be_visible()
    expect(page.locator("#premium .dkd-card")).to_have_attribute("data-state", "empty")


def test_turbo_follows_the_typing(visit: Any, site: Live) -> None:
    page = visit()
    expect(done(page, "turbo")).to_be_visible()
    before = site.passes("turbo")
    field = page.get_by_label("Prompt").first
    field.fill("")
    field.press_sequentially("a green square")
    expect(done(page, "turbo", prompt="a green square")).to_be_visible()
    field.press("Backspace")
    expect(done(page, "turbo", prompt="a green squar")).to_be_visible()
    assert site.passes("turbo") - before <= 3, "keystrokes in a burst are drawn once"


def test_nothing_is_drawn_twice(visit: Any, site: Live) -> None:
    page = visit()
    expect(done(page, "turbo")).to_be_visible()
    page.wait_for_timeout(500)
    before = site.passes("turbo")
    page.get_by_role("button", name="place").click()
    expect(done(page, "turbo", prompt="a small green square at the top")).to_be_visible()
    page.get_by_label("Prompt").first.press("Enter")
    expect(done(page, "premium")).to_be_visible()
    page.wait_for_timeout(500)
    expect(done(page, "premium")).to_be_visible()
    assert site.passes("turbo") - before == 2


def test_both_tiers_beside_each_other(visit: Any, picture: Any) -> None:
    page = visit()
    expect(done(page, "turbo")).to_be_visible()
    page.get_by_role("button", name="Compare", exact=True).click()
    for tier, steps in (("turbo", "1 step"), ("premium", "50 steps")):
        card = done(page, tier, prompt=PROMPT, seed="7")
        expect(card).to_be_visible()
        expect(card).to_contain_text(steps)
        expect(card).to_contain_text(re.compile(r"\d ms|\d s"))
        expect(card).to_contain_text(re.compile(r"\$[\d.]+ per 1,000"))
        expect(card).to_contain_text("asked red circle left of blue star")
        expect(card).to_contain_text("seen")
    expect(page.locator("#wipe")).to_contain_text(re.compile(r"[\d.]+ times as fast"))
    assert source(page, "turbo") != source(page, "premium")
    picture(page, "compare")


def test_the_wipe_moves_with_the_keyboard(visit: Any) -> None:
    page = visit()
    expect(done(page, "turbo")).to_be_visible()
    page.get_by_label("Prompt").first.press("Enter")
    wiper = page.get_by_role("slider", name="How much of turbo shows")
    wiper.focus()
    page.keyboard.press("Home")
    clip = "getComputedStyle(document.querySelector('#wipe .dkd-upper')).clipPath"
    assert page.evaluate(clip) == "inset(0px 0px 0px 0%)"
    for _ in range(3):
        page.keyboard.press("ArrowRight")
    assert page.evaluate(clip) == "inset(0px 0px 0px 3%)"


def test_a_locked_seed_stays_and_gives_the_same_picture(visit: Any) -> None:
    page = visit()
    expect(done(page, "turbo", seed="7")).to_be_visible()
    first = source(page, "turbo")
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(done(page, "premium", seed="7")).to_be_visible()
    assert page.get_by_label("Seed", exact=True).input_value() == "7" and _pixels(page) == _pixels_of(page, first)


def test_without_the_lock_each_compare_has_a_new_seed(visit: Any) -> None:
    page = visit()
    expect(done(page, "turbo", seed="7")).to_be_visible()
    page.get_by_label("Keep the seed").uncheck()
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(done(page, "premium")).to_be_visible()
    seed = page.get_by_label("Seed", exact=True).input_value()
    assert seed != "7"
    expect(done(page, "turbo", seed=seed)).to_be_visible()
    expect(done(page, "premium", seed=seed)).to_be_visible()


def test_several_seeds_show_how_diverse_a_tier_is(visit: Any) -> None:
    page = visit()
    expect(done(page, "turbo")).to_be_visible()
    page.get_by_role("button", name="How diverse?").click()
    for tier in ("turbo", "premium"):
        strip = page.locator(f"#strips .dkd-{tier}[data-state=done]")
        expect(strip.locator("img")).to_have_count(6)
        sources = {image.get_attribute("src") for image in strip.locator("img").all()}
        assert len(sources) == 6


def test_an_example_is_drawn_at_once(visit: Any) -> None:
    page = visit()
    expect(done(page, "turbo")).to_be_visible()
    page.get_by_role("button", name="misspelt").click()
    expect(done(page, "turbo", prompt="a yelow triangel below a gren circel")).to_be_visible()
    expect(page.locator("#turbo")).not_to_contain_text("asked")  # nobody knows what those words ask for


def test_premium_shows_previews_on_the_way_and_stop_frees_the_device(visit: Any, site: Live) -> None:
    page = visit()
    expect(done(page, "turbo")).to_be_visible()
    page.get_by_role("spinbutton", name="Premium steps").fill("100")
    with site.occupied(images=6, by=site.client(None)):
        page.get_by_role("button", name="Compare", exact=True).click()
        expect(page.locator("#premium [data-state=drawing] img")).to_be_visible()
        page.get_by_role("button", name="Stop").click()
    site.until_idle()
    expect(page.locator("#premium .dkd-card")).to_contain_text("Stopped")
    expect(done(page, "turbo")).to_be_visible()


def test_closing_the_page_frees_the_device(visit: Any, site: Live) -> None:
    page, engine = visit(), site.built.service.engine
    expect(done(page, "turbo")).to_be_visible()
    page.get_by_role("spinbutton", name="Premium steps").fill("100")
    with site.occupied(images=6, by=site.client(None)):
        site.until(lambda: engine.active("premium") == 6)
        page.get_by_role("button", name="Compare", exact=True).click()
        site.until(lambda: engine.active("premium") == 7)
        page.context.close()
        site.until(lambda: engine.active("premium") < 7)
        assert engine.active("premium") == 6, "those of the other visitor go on"


def test_what_is_typed_stands_over_an_example_that_is_being_drawn(visit: Any) -> None:
    page = visit()
    expect(done(page, "turbo")).to_be_visible()
    page.get_by_role("button", name="place").click()
    expect(page.get_by_label("Prompt").first).to_have_value("a small green square at the top")
    ask(page, "a yellow ring")
    expect(done(page, "turbo", prompt="a yellow ring")).to_be_visible()
    page.wait_for_timeout(500)
    expect(page.get_by_label("Prompt").first).to_have_value("a yellow ring")
    expect(done(page, "turbo", prompt="a yellow ring")).to_be_visible()


def test_two_people_at_once_see_their_own(visit: Any) -> None:
    pages = {prompt: visit() for prompt in ("a green square", "a yellow ring at the top")}
    for prompt, page in pages.items():
        expect(done(page, "turbo")).to_be_visible()
        ask(page, prompt)
    for page in pages.values():
        page.get_by_role("button", name="Compare", exact=True).click()
    for prompt, page in pages.items():
        expect(done(page, "premium", prompt=prompt)).to_be_visible()
        expect(done(page, "turbo", prompt=prompt)).to_be_visible()


def test_no_prompt_is_told_in_a_sentence(visit: Any) -> None:
    page = visit()
    expect(done(page, "turbo")).to_be_visible()
    ask(page, "  ")
    expect(page.locator("#turbo")).to_contain_text("Type what you would like to see.")
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.locator("#premium [role=alert]")).to_contain_text("Type a prompt first")


def test_a_seed_that_is_none_is_told_in_a_sentence(visit: Any) -> None:
    page = visit()
    expect(done(page, "turbo")).to_be_visible()
    page.get_by_label("Seed", exact=True).fill("5000000000")
    told = page.locator("#turbo [data-state=failed] [role=alert]")
    expect(told).to_have_text("The seed is 5000000000; it must be from 0 to 4294967295.")


@pytest.mark.parametrize(("seed", "prompt"), [("1e20", "a red circle"), ("7", "a \ud800 red circle")])
def test_what_cannot_be_sent_back_does_no_harm(visit: Any, seed: str, prompt: str) -> None:
    page = visit()
    expect(done(page, "turbo")).to_be_visible()
    page.get_by_label("Seed", exact=True).fill(seed)
    page.get_by_label("Prompt").first.evaluate(
        "(field, text) => { field.value = text; field.dispatchEvent(new Event('input', {bubbles: true})); }", prompt
    )
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.locator("#premium [role=alert]")).to_be_visible()
    page.get_by_label("Seed", exact=True).fill("8")
    ask(page, "a red circle")
    expect(done(page, "turbo", seed="8", prompt="a red circle")).to_be_visible()


def test_another_prompt_ends_the_strips(visit: Any, site: Live) -> None:
    page = visit()
    expect(done(page, "turbo")).to_be_visible()
    page.get_by_role("spinbutton", name="Premium steps").fill("100")
    page.get_by_role("button", name="How diverse?").click()
    site.until(lambda: site.built.service.engine.active("premium") == 6)
    ask(page, "a yellow ring")
    site.until(lambda: site.built.service.engine.active("premium") == 0, timeout_s=1.5)
    expect(page.locator("#strips .dkd-strip")).to_have_count(0)


def test_it_is_usable_on_a_phone(visit: Any, picture: Any) -> None:
    page = visit(size=PHONE)
    expect(done(page, "turbo")).to_be_visible()
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(done(page, "premium")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], "nothing sticks out"
    picture(page, "compare-phone")


def test_dark_is_dark(visit: Any, picture: Any) -> None:
    page = visit(color_scheme="dark")
    expect(done(page, "turbo")).to_be_visible()
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", background)[:3])) < 60
    picture(page, "compare-dark")


def _pixels(page: Page) -> list[int]:
    return _pixels_of(page, source(page, "turbo"))


def _pixels_of(page: Page, uri: str) -> list[int]:
    """What a browser shows of a picture; files differ by what they say of their making."""
    found: list[int] = page.evaluate(
        """async uri => { const image = new Image(); image.src = uri; await image.decode();
        const canvas = Object.assign(document.createElement('canvas'), {width: image.width, height: image.height});
        const context = canvas.getContext('2d'); context.drawImage(image, 0, 0);
        return [...context.getImageData(0, 0, image.width, image.height).data]; }""",
        uri,
    )
    return found
