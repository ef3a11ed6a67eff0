"""The Quality tab in a real browser, on the report that is shipped with the student."""

import json
import pathlib
import re
import shutil
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from diffusion_kd import artifact
from eval import cases
from serve.playground import quality, reports
from tests.serve.live import Live
from tests.serve.playground.conftest import PHONE
from tests.serve.playground.test_opinions import show, vote

SHIPPED = artifact.SHIPPED["shapes-student"].parent


@pytest.fixture(scope="module", autouse=True)
def evaluations(site: Live) -> None:
    """Another evaluation beside the shipped one, and one that is damaged in the middle."""
    for name in ("mine", "damaged"):
        folder = site.settings.runs_folder / name
        folder.mkdir()
        shutil.copy(SHIPPED / cases.FILE_NAME, folder)
        report = json.loads((SHIPPED / "report.json").read_text())
        report["models"]["student"]["source"] = f"runs/{name}/student"
        if name == "mine":
            report["rows"][1]["values"]["prompt_accuracy"]["value"] = 0.25
        else:
            del report["rows"][1]["slices"]
        (folder / "report.json").write_text(json.dumps(report))


def choose(page: Page, menu: str, name: str) -> None:
    page.get_by_label(menu, exact=True).click()
    page.get_by_role("option", name=re.compile(name)).click()
    expect(page.get_by_role("option")).to_have_count(0)


def test_the_latest_report_is_there_in_words_bars_and_pictures(visit: Any, picture: Any) -> None:
    page = visit(tab="Quality")
    choose(page, "Evaluation", "shipped")
    report = page.locator("#evaluation")
    verdict = json.loads((SHIPPED / "report.json").read_text())["verdict"]
    expect(report).to_contain_text(f"{verdict}: the student meets the quality floor")
    expect(report.locator(".dkd-panel[data-steps]")).to_have_count(3)
    expect(report.locator(".bar").first).to_contain_text(
        re.compile(r"all prompts 512.*1 step.*[\d.]+ \[[\d.]+, [\d.]+\]", re.DOTALL)
    )
    for title in ("Edge cases, apart", "Worst cases", "Worst edge cases", "Best cases"):
        expect(report.get_by_role("heading", name=title, exact=True)).to_be_visible()
    expect(report.locator(".dkd-case img")).to_have_count(36)  # six of each kind, by teacher and student
    picture(page, "quality")


def test_two_artifacts_beside_each_other(visit: Any) -> None:
    page = visit(tab="Quality")
    choose(page, "Evaluation", "shipped")
    choose(page, "Compare with", "mine")
    row = page.locator("#comparison tr", has_text="prompt accuracy").nth(1)
    expect(row).to_contain_text(re.compile(r"student1.*0\.2.*-0\.\d"))
    choose(page, "Compare with", "no other")
    expect(page.locator("#comparison table")).to_have_count(0)


def test_a_damaged_report_is_told_in_a_sentence(visit: Any) -> None:
    page = visit(tab="Quality")
    choose(page, "Evaluation", "damaged")
    expect(page.locator("#evaluation [role=alert]")).to_contain_text(
        "This report is damaged: something that this page needs is missing"
    )


@pytest.mark.parametrize("broken", ["edge_cases", "complete", "verdict", "latency_s", "rows"])
def test_whatever_is_damaged_is_a_sentence(broken: str, tmp_path: pathlib.Path) -> None:
    report = json.loads((SHIPPED / "report.json").read_text())
    if broken == "edge_cases":
        del report["protocol"]["edge_cases"]
    elif broken == "latency_s":
        report["rows"][1]["speed"]["latency_s"] = 0
    elif broken == "verdict":
        report["verdict"] = "MAYBE"
    else:
        report.update({"rows": []} if broken == "rows" else {"complete": None})
        report.pop("complete" if broken == "complete" else "", None)
    (tmp_path / "report.json").write_text(json.dumps(report))
    shown = quality._readable(quality._evaluation, ["it"], {"it": tmp_path / "report.json"})
    assert "This report is damaged: " in shown and 'role="alert"' in shown


def test_cases_of_another_evaluation_are_not_shown(visit: Any) -> None:
    page = visit(tab="Quality")
    choose(page, "Evaluation", "mine")
    expect(page.locator("#evaluation")).to_contain_text("The cases beside this report are of another evaluation")
    expect(page.locator("#evaluation .dkd-case")).to_have_count(0)


def test_votes_are_counted_here(visit: Any) -> None:
    page = visit(tab="Opinions")
    show(page)
    vote(page, "No difference")
    page.get_by_role("tab", name="Quality").click()
    expect(page.locator("#people")).to_contain_text(re.compile(r"Turbo was preferred in .* \(95 %: "))


def test_on_a_phone_nothing_sticks_out(visit: Any, picture: Any) -> None:
    page = visit(size=PHONE)
    page.get_by_role("button", name="More tabs").click()
    page.get_by_role("button", name="Quality").last.click()
    choose(page, "Evaluation", "shipped")
    choose(page, "Compare with", "mine")
    expect(page.locator("#comparison table")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    picture(page, "quality-phone")


def test_reports_are_named_by_where_they_lie(site: Live) -> None:
    found = reports.find(site.settings.runs_folder, "shapes-student")
    assert set(found) == {
        "mine: student on shapes, PASS",
        "damaged: student on shapes, PASS",
        "shipped: shapes-student on shapes, PASS",
    }
