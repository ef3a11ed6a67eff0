"""The cost of measuring can be measured."""

import pathlib

import pytest

from benchmarks import metrics


def test_every_part_is_timed(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics.measure_once(40, tmp_path, crops=2, references=2)
    shown = capsys.readouterr().out
    for part in (
        "reference",
        "pictures: features",
        "fd",
        "kid",
        "cmmd",
        "mind",
        "all distances",
        "recall",
        "peak memory",
    ):
        assert part in shown
