"""What the page stands on: the service, whose request it is, and where runs lie."""

import asyncio
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import gradio as gr

from diffusion_kd import errors as library_errors
from diffusion_kd.shapes import model as shapes
from serve import errors
from serve.service import Service
from serve.store import records

AT_ONCE: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
"""Of events that draw. The engine has queues of its own, which refuse what they cannot serve; Gradio's must not stand
before them. Cards show their own progress."""


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """find: gives the service; the page is made before it runs. runs: the folder with evaluations and trainings."""

    find: Callable[[], Service]
    runs: pathlib.Path

    @property
    def service(self) -> Service:
        return self.find()

    @property
    def on_shapes(self) -> bool:
        """Whether the pictures are of the size that the oracle of the embedded domain reads."""
        return self.service.catalogue.tiers["premium"].sizes[0] == (shapes.IMAGE_SIZE_PX, shapes.IMAGE_SIZE_PX)

    async def key(self, request: gr.Request) -> records.Key:
        """Whose account pays: that of the key that somebody logged in with, or everybody's where none are asked for.

        Raises Unauthorized for a key that was revoked since, Forbidden for one that may not make images.
        """
        service = self.service
        if service.settings.auth == "none":
            return await service.authenticate(None)
        key = await asyncio.to_thread(service.store.get_key, request.username or "")
        if key is None or key.revoked_at is not None:
            raise errors.Unauthorized("your API key was revoked; reload the page and log in with another")
        if "generate" not in key.scopes:
            raise errors.Forbidden("your API key lacks the scope 'generate', which drawing needs")
        return key

    async def may_enter(self, key_id: str, secret: str) -> bool:
        """Whether the secret is that of the key with this id."""
        key = await asyncio.to_thread(self.service.store.find_key, secret)
        return key is not None and key.id == key_id


def sentence(error: library_errors.DiffusionKDError) -> str:
    """Our messages begin as fragments do; on a page they are sentences."""
    text = str(error)
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith(('.', '!', '?')) else '.'}"
