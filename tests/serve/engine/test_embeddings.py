"""The cache of prompts: what it keeps, and in how many bytes."""

import pytest
import torch

from diffusion_kd.types import Conditioning
from serve.engine.embeddings import EmbeddingCache, Key

ONE_BYTES = 4 * (3 * 4 + 2 + 6)


def cond() -> Conditioning:
    return Conditioning(torch.zeros(1, 3, 4), torch.zeros(1, 2), torch.zeros(1, 6))


def key(prompt: str) -> Key:
    return 1, False, prompt, (16, 16)


def test_what_was_asked_for_last_is_kept() -> None:
    cache = EmbeddingCache(2 * ONE_BYTES)
    a, b = cond(), cond()
    cache.put(key("a"), a)
    cache.put(key("b"), b)
    assert cache.get(key("a")) is a
    cache.put(key("c"), cond())
    assert cache.get(key("b")) is None
    assert cache.get(key("a")) is a and len(cache) == 2


@pytest.mark.parametrize(("most_bytes", "kept"), [(0, 0), (ONE_BYTES - 1, 0), (ONE_BYTES, 1), (3 * ONE_BYTES + 1, 3)])
def test_no_more_bytes_than_allowed(most_bytes: int, kept: int) -> None:
    cache = EmbeddingCache(most_bytes)
    for number in range(5):
        cache.put(key(str(number)), cond())
    assert len(cache) == kept


def test_a_prompt_that_comes_twice_is_kept_once() -> None:
    cache = EmbeddingCache(2 * ONE_BYTES)
    for prompt in ("a", "a", "a", "b"):
        cache.put(key(prompt), cond())
    assert len(cache) == 2


def test_encoder_size_and_company_tell_prompts_apart() -> None:
    cache = EmbeddingCache(100 * ONE_BYTES)
    cache.put((1, False, "a", (16, 16)), cond())
    for other in ((2, False, "a", (16, 16)), (1, True, "a", (16, 16)), (1, False, "a", (16, 32))):
        assert cache.get(other) is None
