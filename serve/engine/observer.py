"""Who watches the engine."""

from typing import Protocol


class Observer(Protocol):
    """Called on the engine's threads, so it must be quick and must not raise. Times in seconds."""

    def waited(self, tier: str, seconds: float) -> None:
        """An image's first pass begins, that long after it was admitted."""

    def passed(self, tier: str, rows: int, seconds: float) -> None:
        """One pass of the network over `rows` rows."""

    def staged(self, tier: str, stage: str, seconds: float) -> None:
        """One batch went through a stage: text, decode, or encode (a single file)."""

    def looked_up(self, *, hit: bool) -> None:
        """A prompt was sought in the cache of embeddings."""

    def ran_out_of_memory(self, tier: str) -> None:
        """A batch did not fit and is split."""


class Unobserved:
    """Nobody watches."""

    def waited(self, tier: str, seconds: float) -> None: ...
    def passed(self, tier: str, rows: int, seconds: float) -> None: ...
    def staged(self, tier: str, stage: str, seconds: float) -> None: ...
    def looked_up(self, *, hit: bool) -> None: ...
    def ran_out_of_memory(self, tier: str) -> None: ...
