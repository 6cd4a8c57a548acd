"""A headless Chromium for the tests of pages."""
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

# Without them it looks for updates in the network, or needs rights and a screen that a container has not.
_FLAGS = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
    # A picture that moves, in place of a webcam, and no question whether it may be seen.
    "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
)


@contextmanager
def browsing() -> Iterator[Any]:
    """Playwright's browser; skips the test where there is none, and says why."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="the page is tested by the package playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("the page is tested in Chromium, which is not here: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(_FLAGS))
        yield browser
        browser.close()


class Visit:
    """A page in a context of its own, and all that it said, asked for and threw.

    Args:
        browser: As `browsing` yields it.
        url: Of the page.
        **context: Of Playwright's `new_context`, a viewport for example.
    """

    def __init__(self, browser: Any, url: str, **context: Any):
        self.context = browser.new_context(**context)
        self.page = self.context.new_page()
        self.said, self.requests = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(url)

    def __enter__(self) -> "Visit":
        return self

    def __exit__(self, *error: object):
        self.context.close()
