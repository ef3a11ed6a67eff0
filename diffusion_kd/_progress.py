"""Silence for libraries that draw a progress bar for every file they touch."""

import contextlib
from collections.abc import Iterator

import transformers


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Within: transformers draws no bars. A small model loads in less time than its bar takes to read."""
    shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers.utils.logging.enable_progress_bar()
