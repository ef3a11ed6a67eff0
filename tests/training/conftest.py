"""Each test launches as a process would: no accelerate state left by another, one thread."""

from collections.abc import Iterator

import accelerate.state
import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_process() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(threads)
