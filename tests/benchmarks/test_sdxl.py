"""The benchmark of SDXL on a GPU, with a small network on whatever there is."""

import pytest
import torch

from benchmarks import sdxl
from diffusion_kd import errors


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
def test_a_toy_goes_through_all_of_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sdxl, "SWITCHES", (("attention=sdpa",), ("attention=xformers",)))
    monkeypatch.setattr(sdxl, "TEACHER_STEPS", 3)
    sdxl.main(["--toy", "--steps", "3", "--rounds", "1"])
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    told = {cells[0]: cells[1:] for cells in lines if cells}
    for name in ("sdxl_full", "sdxl_lora"):
        assert float(told[f"{name}, attention=sdpa"][0]) > 0
    if not torch.cuda.is_available():
        assert "xformers, which runs on CUDA only" in told["sdxl_full, attention=xformers"][0]
    for row in ("student, 1 steps", "student, 2 steps", "student, 4 steps", "teacher, 3 guided steps"):
        assert all(float(each) > 0 for each in told[row]) and len(told[row]) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_the_true_size_wants_a_gpu() -> None:
    with pytest.raises(errors.ConfigError, match="give --toy"):
        sdxl.main([])
