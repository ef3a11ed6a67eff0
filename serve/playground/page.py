"""The whole page, and where it is mounted."""

import asyncio
import urllib.parse
from collections.abc import Callable

import gradio as gr
from fastapi import FastAPI, Response
from fastapi.responses import PlainTextResponse
from starlette.datastructures import Headers
from starlette.routing import Mount
from starlette.types import ASGIApp, Receive, Scope, Send

import diffusion_kd
from serve.playground import compare, html, opinions, quality, runs, savings
from serve.playground.stage import Stage

_TITLE = "diffusion-kd playground"
_ICON = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">
<rect width="8" height="16" fill="#0d9488"/><rect x="8" width="8" height="16" fill="#6d5bd0"/></svg>"""
_LOGIN = "Log in with an API key: its id (key_…) as the user name, its secret (dkd_…) as the password."


def build(on: Stage, *, keys: bool) -> gr.Blocks:
    """All tabs. Nothing of it leaves this machine: no analytics, no fonts or scripts from elsewhere."""
    with gr.Blocks(title=_TITLE, analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.HTML(
            html.render("title", version=diffusion_kd.__version__, keys=keys),
            elem_classes="dkd-title",
        )
        with gr.Tabs():
            with gr.Tab("Compare", id="compare"):
                compare.Compare(on, page)
            with gr.Tab("Opinions", id="opinions"):
                opinions.Opinions(on, page)
            with gr.Tab("Quality", id="quality") as tab:
                quality.Quality(on, tab)
            with gr.Tab("Savings", id="savings"):
                savings.Savings(on)
            with gr.Tab("Runs", id="runs") as tab:
                runs.Runs(on, tab)
    return page  # type: ignore[no-any-return]


class Guard:
    """Refuses what pages of other sites ask of this one, as their visitor may be logged in here; and uploads, of all.

    Gradio itself lets every origin in, with cookies, unless it runs on localhost. public: URL of the service.
    """

    def __init__(self, app: ASGIApp, path: str, public: str) -> None:
        self._app, self._path, self._public = app, path, urllib.parse.urlsplit(public).netloc

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith(self._path):
            headers = Headers(scope=scope)
            ours = {self._public, headers.get("host"), headers.get("x-forwarded-host")}
            origin = headers.get("origin")
            if scope["path"].endswith("/upload"):
                await PlainTextResponse("Nothing is uploaded here.", 403)(scope, receive, send)
                return
            if origin is not None and urllib.parse.urlsplit(origin).netloc not in ours:
                await PlainTextResponse("This page answers to its own site alone.", 403)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def mount(app: FastAPI, on: Stage, path: str, *, keys: bool, public: str) -> Callable[[], None]:
    """Put the page into an app, whose lifespan then starts and ends it too.

    keys: ask for an API key first. public: URL under which clients reach the app. Returns what ends the connections of
    pages that are only open, for which a server would else wait before it ends.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:  # then Gradio makes loops of its own, and never closes them

        async def inside() -> Callable[[], None]:
            return _mount(app, on, path, keys, public)

        return asyncio.run(inside())
    return _mount(app, on, path, keys, public)


def _mount(app: FastAPI, on: Stage, path: str, keys: bool, public: str) -> Callable[[], None]:
    app.add_middleware(Guard, path=path, public=public)
    # Before the page, which has one of its own where it stands at the root.
    app.add_route("/favicon.ico", lambda _: Response(_ICON, media_type="image/svg+xml"), include_in_schema=False)
    gr.mount_gradio_app(
        app,
        build(on, keys=keys),
        path,
        app_kwargs={"openapi_url": None},
        footer_links=[],
        run_history=False,
        auth=on.may_enter if keys else None,
        auth_message=_LOGIN,
        show_error=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        theme=_theme(),
        css_paths=[html.STYLE],
    )
    page = next(route.app for route in app.routes if isinstance(route, Mount) and isinstance(route.app, gr.routes.App))
    return lambda: page.stop_event.set()


def _theme() -> gr.themes.Base:
    """Gradio's own, darker where its text would be hard to read on white."""
    theme = gr.themes.Default(primary_hue="teal", secondary_hue="indigo", neutral_hue="slate", radius_size="md")
    return theme.set(
        color_accent="*primary_700",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_400",
        block_label_text_color="*neutral_600",
        block_title_text_color="*neutral_600",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
    )
