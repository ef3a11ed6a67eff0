"""The demo says what it cannot do before it trains."""

import pathlib

import pytest

from diffusion_kd import errors
from training import demo


@pytest.mark.parametrize(("option", "value"), [("--prompts", "7"), ("--minutes", "0")])
def test_what_cannot_be_judged_is_refused_before_training(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, option: str, value: str
) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("nothing may be trained")

    monkeypatch.setattr(demo.distill, "Distillation", refuse)
    with pytest.raises(errors.ConfigError, match=option):
        demo.main(["--out", str(tmp_path / "run"), option, value])
    assert not (tmp_path / "run").exists()
