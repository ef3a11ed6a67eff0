"""The Savings tab in a real browser: the worked cases, as typed and as chosen."""

import re
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.serve.live import Live
from tests.serve.playground.conftest import PHONE


def fill(page: Page, **given: str) -> None:
    labels = {
        "images": "Images a month",
        "premium": "A premium image, $",
        "turbo": "A turbo image, $",
        "project": "The project, $",
        "upkeep": "Upkeep a month, $",
    }
    for name, value in given.items():
        page.get_by_label(labels[name], exact=True).fill(value)


@pytest.mark.parametrize(
    ("given", "verdict", "numbers"),
    [
        (
            {"images": "200000", "premium": "0.0105", "turbo": "0.0005", "project": "300000", "upkeep": "0"},
            "Do not",
            ["$2,000", "12.5 years"],
        ),
        (
            {"images": "50000000", "premium": "0.011", "turbo": "0.0009", "project": "600000", "upkeep": "13000"},
            "Distil",
            ["$492,000", "in 1.2 months"],
        ),
        (
            {"images": "8000000", "premium": "0.012", "turbo": "0.0008", "project": "600000", "upkeep": "20000"},
            "Pilot first",
            ["$69,600", "in 8.6 months"],
        ),
    ],
)
def test_the_worked_cases_as_typed(visit: Any, given: dict[str, str], verdict: str, numbers: list[str]) -> None:
    page = visit(tab="Savings")
    fill(page, **given)
    expect(page.locator("#savings-verdict .dkd-outcome")).to_have_text(verdict)
    for number in numbers:
        expect(page.locator("#savings-numbers")).to_contain_text(number)
    expect(page.locator("#savings-curve canvas, #savings-curve svg").first).to_be_visible()


def test_a_worked_case_is_a_click_away(visit: Any, picture: Any) -> None:
    page = visit(tab="Savings")
    page.get_by_role("button", name="200,000 a month").click()
    expect(page.locator("#savings-verdict .dkd-outcome")).to_have_text("Do not")
    expect(page.get_by_label("The project, $", exact=True)).to_have_value("300000")
    page.get_by_role("button", name="50 million a month").click()
    expect(page.locator("#savings-verdict .dkd-outcome")).to_have_text("Distil")
    expect(page.locator("#savings-tables tr.dkd-own")).to_have_count(2)
    expect(page.locator("#savings-tables")).to_contain_text(re.compile(r"5 %-\$363,000neverdo not"))
    page.wait_for_timeout(300)  # the curve's animation
    picture(page, "savings")


def test_prices_are_those_measured_here(visit: Any, site: Live) -> None:
    page = visit()
    expect(page.locator("#turbo [data-state=done]")).to_be_visible()
    site.until_idle()  # what is drawn changes what is measured
    page.get_by_role("tab", name="Savings").click()
    page.get_by_role("button", name="Use the prices measured here").click()
    expect(page.get_by_label("A premium image, $", exact=True)).not_to_have_value("0.011")
    models = site.client(None).get("/v1/models").json()["data"]
    measured = {model["id"]: model["image_cost_usd"] for model in models}
    for tier, label in (("turbo", "A turbo image, $"), ("premium", "A premium image, $")):
        shown = float(page.get_by_label(label, exact=True).input_value())
        assert shown == pytest.approx(measured[tier], rel=1e-6)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"images": "-5"}, "“Images a month” is -5"),
        ({"project": ""}, "“The project, $” is empty; give a number."),
        ({"turbo": "1e300"}, "“A turbo image, $” is 1e+300"),
    ],
)
def test_what_makes_no_sense_is_told_in_a_sentence(visit: Any, given: dict[str, str], told: str) -> None:
    page = visit(tab="Savings")
    fill(page, **given)
    expect(page.locator("#savings-verdict [role=alert]")).to_contain_text(told)
    fill(page, **dict.fromkeys(given, "1000"))
    expect(page.locator("#savings-verdict .dkd-outcome")).to_be_visible()


def test_a_share_that_falls_back_changes_the_sum(visit: Any) -> None:
    page = visit(tab="Savings")
    page.get_by_text("What may go wrong").click()
    page.get_by_role("spinbutton", name=re.compile("Made again by premium")).fill("50")
    expect(page.locator("#savings-numbers")).to_contain_text("$217,000")


def test_on_a_phone_nothing_sticks_out(visit: Any, picture: Any) -> None:
    page = visit(size=PHONE)
    page.get_by_role("button", name="More tabs").click()
    page.get_by_role("button", name="Savings").last.click()
    expect(page.locator("#savings-tables table").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    picture(page, "savings-phone")
