"""What the text encoders made of recent prompts."""

import collections

from diffusion_kd.types import Conditioning

Key = tuple[int, bool, str, tuple[int, int]]
"""(id of the text encoder, whether the prompt is encoded by itself, prompt, width and height)."""


class EmbeddingCache:
    """The least recently used prompts are forgotten first. most_bytes: 0 keeps none. For one thread."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes, self._bytes = most_bytes, 0
        self._kept: collections.OrderedDict[Key, Conditioning] = collections.OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Key) -> Conditioning | None:
        if key in self._kept:
            self._kept.move_to_end(key)
        return self._kept.get(key)

    def put(self, key: Key, cond: Conditioning) -> None:
        if key in self._kept:
            return
        self._kept[key] = cond
        self._bytes += _size(cond)
        while self._bytes > self._most_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= _size(oldest)


def _size(cond: Conditioning) -> int:
    return sum(part.nbytes for part in (cond.prompt_embeds, cond.pooled, cond.time_ids))
