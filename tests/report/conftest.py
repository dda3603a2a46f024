"""A real browser without a window, for pages that people will open."""

import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

SLOW = 30_000  # milliseconds that a machine with other work to do may take

NAMES = ("chromium", "chromium-headless-shell", "google-chrome")


@pytest.fixture(scope="module")  # its event loop must end before tests that need one of their own
def browser() -> Iterator[Browser]:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser is installed: none of {', '.join(NAMES)} is in the PATH")
    expect.set_options(timeout=SLOW)
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """An empty page; at the end nothing may have been fetched from outside, or gone wrong."""
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    opened = context.new_page()
    fetched: list[str] = []
    wrong: list[str] = []
    opened.on("request", lambda request: fetched.append(request.url))
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on(
        "console",
        lambda message: wrong.append(message.text) if message.type == "error" else None,
    )
    yield opened
    context.close()
    assert [url for url in fetched if not url.startswith(("file:", "data:", "blob:"))] == []
    assert wrong == []
