"""The Runs tab in a real browser."""

import pathlib
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import expect
from torch.utils import tensorboard

from tests.serve.live import Live
from tests.serve.playground.conftest import PHONE

POINTS = 40


def train(folder: pathlib.Path, *, diverge: bool) -> None:
    """What a training leaves, in brief: its settings, its curves, its samples."""
    folder.mkdir()
    (folder / "config.yaml").write_text("training:\n  batch_size: 16\n")
    (folder / "origin.json").write_text("{}")
    with tensorboard.SummaryWriter(str(folder / "training")) as writer:
        for index in range(1, POINTS + 1):
            value = 0.02 * 1.2**index if diverge else 0.02 / index
            writer.add_scalar("distillation", value, 800 * index)
            writer.add_scalar("student_gradient", 0.2, 800 * index)
            writer.add_scalar("student_skipped", 0.0, 800 * index)
            writer.add_scalar("samples/2_steps/clip_score[eyes]", 0.9, 800 * index)
            if index % 10 == 0:
                grid = np.random.default_rng(index).random((3, 128, 512))
                writer.add_image("samples", grid, 800 * index)


@pytest.fixture(scope="module", autouse=True)
def trainings(site: Live) -> None:
    train(site.settings.runs_folder / "steady", diverge=False)
    train(site.settings.runs_folder / "runaway", diverge=True)


def choose(page: Any, name: str) -> None:
    page.get_by_label("Run", exact=True).click()
    page.get_by_role("option", name=name).click()


def test_curves_samples_and_a_verdict_in_words(visit: Any, picture: Any) -> None:
    page = visit(tab="Runs")
    choose(page, "steady")
    expect(page.locator("#run-health")).to_contain_text("Nothing points to trouble. 32,000 images seen")
    expect(page.locator("#run-curves canvas, #run-curves svg.marks")).to_have_count(3)  # nothing was skipped
    expect(page.locator("#run-curves")).to_contain_text("clip_score[eyes], 2 steps")
    expect(page.locator("#run-grids img")).to_have_count(4)
    expect(page.locator("#run-grids figcaption").first).to_have_text("32,000 images")
    page.get_by_text("The run's settings").click()
    expect(page.locator("#run-config")).to_contain_text("batch_size: 16")
    picture(page, "runs")


def test_trouble_is_said_in_words_with_what_to_do(visit: Any) -> None:
    page = visit(tab="Runs")
    choose(page, "runaway")
    health = page.locator("#run-health")
    expect(health).to_contain_text("In trouble")
    expect(health.locator("li").first).to_contain_text("distillation")
    expect(health.locator("li").first.locator(".dkd-soft")).not_to_be_empty()


def test_a_run_that_goes_on_is_followed(visit: Any, site: Live) -> None:
    page = visit(tab="Runs")
    choose(page, "steady")
    expect(page.locator("#run-health")).to_contain_text("32,000 images seen")
    with tensorboard.SummaryWriter(str(site.settings.runs_folder / "steady" / "training")) as writer:
        writer.add_scalar("distillation", 0.001, 800 * (POINTS + 1))
    expect(page.locator("#run-health")).to_contain_text("32,800 images seen", timeout=15_000)


def test_on_a_phone_nothing_sticks_out(visit: Any, picture: Any) -> None:
    page = visit(size=PHONE)
    page.get_by_role("button", name="More tabs").click()
    page.get_by_role("button", name="Runs").last.click()
    expect(page.locator("#run-grids img").first).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    picture(page, "runs-phone")
