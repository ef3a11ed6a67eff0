"""A real service with its page, a real Chromium, and the network cut off: what leaves this machine fails the test.

DIFFUSION_KD_TEST_BROWSER: path of a Chromium; else Playwright's own, else one on the PATH. Where there is none the
tests skip, and fail if DIFFUSION_KD_TEST_NO_SKIPS is set, as in CI.
DIFFUSION_KD_TEST_SCREENSHOTS: where pictures of the page go; docs/images/playground for the documentation's.
"""

import contextlib
import os
import pathlib
import shutil
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright import sync_api

from tests.serve.live import Live, serving

DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
_LOCAL = ("127.0.0.1", "localhost", "::1")


def _chromium(of_playwright: str) -> str | None:
    """The path of a Chromium that can be started."""
    named = os.environ.get("DIFFUSION_KD_TEST_BROWSER")
    if named or pathlib.Path(of_playwright).is_file():
        return named or of_playwright
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")  # while it runs, its event loop is this thread's, and other tests need their own
def chromium() -> Iterator[Any]:
    with sync_api.sync_playwright() as started:
        path = _chromium(started.chromium.executable_path)
        if path is None:
            said = "there is no Chromium: playwright install chromium, or set DIFFUSION_KD_TEST_BROWSER"
            if os.environ.get("DIFFUSION_KD_TEST_NO_SKIPS"):
                pytest.fail(said)
            pytest.skip(said)
        cut_off = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox", cut_off])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def no_network() -> Iterator[list[str]]:
    """Refuses this process every connection to other machines, and tells which were tried."""
    tried: list[str] = []
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in _LOCAL:
            tried.append(str(address))
            raise OSError("the network is cut off")
        connect(self, address)

    def guarded_look_up(host: Any, *given: Any, **named: Any) -> Any:
        if host is not None and host not in _LOCAL:
            tried.append(str(host))
            raise socket.gaierror("the network is cut off")
        return look_up(host, *given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded)
        patch.setattr(socket, "getaddrinfo", guarded_look_up)
        yield tried


@pytest.fixture(scope="module")
def site(no_network: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """The service with its page, without keys."""
    with serving(
        tmp_path_factory.mktemp("playground"),
        auth="none",
        admin_key=None,
        playground="on",
        runs_folder=tmp_path_factory.mktemp("runs"),
    ) as site:
        yield site
    assert no_network == [], "the service tried to reach other machines"


Open = Callable[..., Any]


@pytest.fixture
def visit(chromium: Any, site: Live) -> Iterator[Open]:
    """Opens the page as somebody new. Nothing may leave the machine, and nothing may fail in the browser."""
    amiss: list[str] = []
    with contextlib.ExitStack() as stack:

        def visit(
            url: str | None = None, *, tab: str | None = None, size: dict[str, int] = DESKTOP, **given: Any
        ) -> Any:
            context = stack.enter_context(chromium.new_context(viewport=size, reduced_motion="reduce", **given))
            page = context.new_page()
            page.set_default_timeout(20_000)
            page.on("request", lambda request: _note_foreign(request.url, amiss))
            page.on("pageerror", lambda error: amiss.append(f"script: {error}"))
            page.on("response", lambda answer: answer.status >= 500 and amiss.append(f"{answer.status} {answer.url}"))
            page.goto(url or f"{site.url}/playground/")
            if tab is not None:
                page.get_by_role("tab", name=tab).click()
            return page

        yield visit
    assert amiss == []


def _note_foreign(url: str, amiss: list[str]) -> None:
    scheme, _, rest = url.partition("://")
    if scheme in ("http", "https", "ws", "wss") and rest.partition("/")[0].rpartition(":")[0] not in _LOCAL:
        amiss.append(f"left the machine: {url}")


@pytest.fixture
def picture(tmp_path: pathlib.Path) -> Callable[[Any, str], None]:
    """Takes a picture of the whole page, under a name."""
    folder = pathlib.Path(os.environ.get("DIFFUSION_KD_TEST_SCREENSHOTS") or tmp_path)

    def take(page: Any, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=folder / f"{name}.png", full_page=True)

    return take
