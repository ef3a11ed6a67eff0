"""The simulated worlds have the truth that they claim."""

import numpy as np
import pytest

from benchmarks import coverage
from eval.metrics import frechet


def test_a_world_s_distance_is_its_closed_form() -> None:
    world = coverage.World(20_000, 6)
    true, student = world.draw(np.random.default_rng(0), 0.3)
    assert world.truth(0.3) == pytest.approx(frechet.frechet_distance(student, true), rel=0.05)
    assert np.var(true, axis=0) == pytest.approx(world.variances, rel=0.05)


def test_pictures_of_a_prompt_have_their_share_in_common() -> None:
    (true,) = coverage.World(20_000, 1, common=0.3).draw(np.random.default_rng(0))
    first, second = true[::2, 0], true[1::2, 0]
    assert np.corrcoef(first, second)[0, 1] == pytest.approx(0.3, abs=0.03)


def test_lines_have_a_cell_for_every_heading(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [coverage.accuracy_line(16, 0.97, 0.85, 3, True), coverage.floor_line(coverage.World(40, 4), 0.2, 0.75, 2)]
    assert {len(line) for line in lines} == {9}
    assert len(coverage.frechet_line(coverage.World(40, 4), 0.1, 2)) == 10
