"""The site in a real browser: navigation and search work, and nothing comes from another host.

$AEM_SCREENSHOTS names a folder that keeps what the browser saw.
"""

import socket
import subprocess
import sys
import time

import pytest
from support.browser import Browser, find_driver, wait_for_answer

LOADED = "performance.getEntriesByType('resource').map(entry => entry.name)"


@pytest.fixture
def address(site):
    """The address of the site, served on the loopback interface."""
    find_driver()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(site)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_answer(f"http://127.0.0.1:{port}/", 60)
    yield f"http://127.0.0.1:{port}/"
    server.terminate()
    server.wait()


@pytest.fixture
def browser(tmp_path):
    browser = Browser(find_driver(), tmp_path / "profile")
    yield browser
    browser.close()


def type_text(browser, selector, text):
    """Type into an element, as with a keyboard."""
    element = next(iter(browser.ask("POST", "/element", using="css selector", value=selector).values()))
    browser.ask("POST", f"/element/{element}/value", text=text)


def wait_for(browser, script, seconds=120):
    """Wait until a script of the page returns something true, and return it."""
    end = time.monotonic() + seconds
    while not (found := browser.read(script)):
        assert time.monotonic() < end, (
            f"{script} did not come true; the page reads: {browser.read('document.body.innerText')}"
        )
        time.sleep(0.2)
    return found


@pytest.mark.slow
@pytest.mark.machine
def test_navigation_and_search_work_without_another_host(address, browser):
    text = browser.open(
        address, "document.images.length > 0 && [...document.images].every(image => image.naturalWidth)"
    )
    assert "Getting started" in text and "Where to go next" in text
    browser.screenshot("index.png")
    assert all(name.startswith(address) for name in browser.read(LOADED)), browser.read(LOADED)

    browser.read(
        "[...document.querySelectorAll('nav a')].find(link => link.innerText.trim() == 'Configuration').click()"
    )
    wait_for(browser, "document.title.startsWith('Configuration')")
    assert "trainer.learning_rate" in browser.read("document.body.innerText")

    browser.open(f"{address}reference/aem/", "document.readyState == 'complete'")
    assert "coefficients" in browser.read("document.querySelector('article').innerText")
    type_text(browser, "input[name=query]", "whitened")
    results = "[...document.querySelectorAll('.md-search-result__link')].map(link => link.href)"
    found = wait_for(browser, f"{results}.length && {results}")
    assert any("reference/advantages" in link for link in found), found
    browser.screenshot("search.png")
    assert all(name.startswith(address) for name in browser.read(LOADED)), browser.read(LOADED)
