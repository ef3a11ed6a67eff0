"""Each test launches as a process would: no accelerate state left by another, one thread."""

import pathlib
from collections.abc import Iterator

import accelerate.state
import pytest
import torch

from tests import tiny


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with a tiny teacher and a tiny CLIP as its feature network."""
    folder = tmp_path_factory.mktemp("models")
    tiny.write_models(folder)
    return folder


@pytest.fixture
def pictures(tmp_path: pathlib.Path) -> pathlib.Path:
    tiny.write_pictures(tmp_path / "pictures")
    return tmp_path / "pictures"
