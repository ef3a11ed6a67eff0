"""What the engine says when it cannot.

EngineError
├── Busy            not admitted: the tier's queue is full or too slow; try again after `retry_after_s`
│   └── Draining    not admitted: the engine is closing
├── Cancelled       the caller took the request back
└── Failed          admitted and not made: ours to explain
    ├── OutOfMemory not even one image fits
    └── NotFinite   the network made NaN or infinite values
"""

from diffusion_kd import errors


class EngineError(errors.DiffusionKDError):
    """Root of what the engine raises."""


class Busy(EngineError):
    """Not admitted. retry_after_s: when the queue will have room again, as far as it can be told."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Draining(Busy):
    """Not admitted: the engine is closing."""


class Cancelled(EngineError):
    """The caller took the request back."""


class Failed(EngineError):
    """Admitted and not made."""


class OutOfMemory(Failed):
    """Not even one image of this size fits into memory."""


class NotFinite(Failed):
    """The network made NaN or infinite values."""
