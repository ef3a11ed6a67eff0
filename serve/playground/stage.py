"""What the page stands on: the service, whose request it is, and where runs lie."""

import asyncio
import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import gradio as gr

from serve import errors
from serve.playground import words
from serve.service import Service
from serve.store import records

AT_ONCE: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden", "api_visibility": "private"}
"""Of events that draw. The engine has queues of its own, which refuse what they cannot serve; Gradio's must not stand
before them. Cards show their own progress."""


def queued(what: str, most: int) -> dict[str, Any]:
    """Of events that read or write: so many of a kind at a time, of all visitors together."""
    return AT_ONCE | {"concurrency_limit": most, "concurrency_id": what}


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
        """Whether the pictures are of the embedded domain, which the oracle reads."""
        return self.service.engine.models["premium"].source == "shapes-teacher"

    async def visitor(self, request: gr.Request) -> records.Key:
        """The key that somebody logged in with, or everybody's where none are asked for.

        Raises Unauthorized for one that was revoked since.
        """
        service = self.service
        if service.settings.auth == "none":
            return await service.authenticate(None)
        key = await asyncio.to_thread(service.store.get_key, request.username or "")
        if key is None or key.revoked_at is not None:
            raise errors.Unauthorized("your API key was revoked; reload the page and log in with another")
        return key

    async def payer(self, request: gr.Request) -> records.Key:
        """The visitor's key, for what costs. Raises as `visitor`, and Forbidden for a key that may not make images."""
        key = await self.visitor(request)
        if "generate" not in key.scopes:
            raise errors.Forbidden("your API key lacks the scope 'generate', which drawing needs")
        return key

    async def barred(self, request: gr.Request) -> str | None:
        """Why the visitor may look at nothing any more, in a sentence; None who may."""
        try:
            await self.visitor(request)
        except errors.ServiceError as error:
            return words.sentence(str(error))
        return None

    async def may_enter(self, key_id: str, secret: str) -> bool:
        """Whether the secret is that of the key with this id."""
        key = await asyncio.to_thread(self.service.store.find_key, secret)
        return key is not None and key.id == key_id
