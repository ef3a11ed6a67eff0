"""How long people wait in the playground: `python -m benchmarks.playground`.

A service of its own, and a real Chromium (--browser, or Playwright's own, or one on the PATH) that loads the page anew
each time and types. Times are the browser's: from navigation to turbo's first picture, and from the last keystroke of a
burst to the picture of what it made, which includes the 150 ms in which nobody types.
"""

import argparse
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence

from playwright import sync_api

_WATCH = """
window.dkdSeen = {};
new MutationObserver(() => {
    const card = document.querySelector('#turbo [data-state=done]');
    if (card && !(card.dataset.prompt in window.dkdSeen)) window.dkdSeen[card.dataset.prompt] = performance.now();
}).observe(document, {childList: true, subtree: true});
document.addEventListener('input', () => { window.dkdTyped = performance.now(); }, true);
"""
_PROMPTS = (
    "a red circle",
    "a large blue star",
    "a green square at the top",
    "a yellow ring",
    "a small purple triangle",
)


def measure(browser: sync_api.Browser, url: str, loads: int) -> tuple[list[float], list[float]]:
    """Milliseconds to the first picture of each load, and from keystroke to picture of each prompt."""
    first, typed = [], []
    for _ in range(loads):
        context = browser.new_context()
        page = context.new_page()
        page.add_init_script(_WATCH)
        page.goto(url)
        page.wait_for_selector("#turbo [data-state=done]")
        first.append(float(page.evaluate("Math.min(...Object.values(window.dkdSeen))")))
        field = page.locator("#prompt textarea")
        for prompt in _PROMPTS:
            field.fill("")
            field.press_sequentially(prompt, delay=40)
            page.wait_for_function("prompt => prompt in window.dkdSeen", arg=prompt)
            typed.append(float(page.evaluate("prompt => window.dkdSeen[prompt] - window.dkdTyped", prompt)))
        context.close()
    return first, typed


def _report(name: str, times_ms: Sequence[float]) -> None:
    ordered = sorted(times_ms)
    worst = ordered[max(0, round(0.95 * len(ordered)) - 1)]
    sys.stdout.write(
        f"{name:28}median {statistics.median(ordered):6.0f} ms   95 % within {worst:6.0f} ms   n {len(ordered)}\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.playground", description=__doc__.splitlines()[0])
    parser.add_argument("--loads", type=int, default=20)
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--browser", help="path of a Chromium")
    given = parser.parse_args(arguments)
    url = f"http://127.0.0.1:{given.port}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "serve", "--port", str(given.port), "--data-folder", folder]
        service = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            _wait_ready(service, url)
            with sync_api.sync_playwright() as started:
                own = started.chromium.executable_path
                path = given.browser or (own if pathlib.Path(own).is_file() else shutil.which("chromium"))
                browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
                measure(browser, f"{url}/playground/", 1)  # what is loaded once
                first, typed = measure(browser, f"{url}/playground/", given.loads)
                browser.close()
        finally:
            service.terminate()
            service.wait()
    _report("load to first picture", first)
    _report("keystroke to picture", typed)


def _wait_ready(service: subprocess.Popen[bytes], url: str) -> None:
    while service.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/readyz", timeout=1)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise SystemExit("the service did not start; try python -m serve")


if __name__ == "__main__":
    main()
