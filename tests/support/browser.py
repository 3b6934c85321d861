"""A headless Chromium for tests, controlled by WebDriver."""

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

from support.runs import skip_or_fail

FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --window-size=1500,1100"


class Browser:
    """A headless Chromium, controlled by WebDriver's HTTP protocol (no client library)."""

    def __init__(self, driver: str, profile: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, start_new_session=True)
        self.address = f"http://127.0.0.1:{port}"
        wait_for_answer(f"{self.address}/status", 30)
        options = {"args": [*FLAGS.split(), f"--user-data-dir={profile}"]}
        timeouts = {
            "script": 300_000,
            "pageLoad": 300_000,
        }  # ms; the default of 30 s for scripts is short for a busy machine
        wanted = {"goog:chromeOptions": options, "timeouts": timeouts}
        session = self.ask("POST", "/session", capabilities={"alwaysMatch": wanted})
        self.address += f"/session/{session['sessionId']}"

    def ask(self, method: str, path: str, **body: Any) -> Any:
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)["value"]

    def read(self, script: str) -> Any:
        return self.ask("POST", "/execute/sync", script=f"return {script}", args=[])

    def open(self, address: str, until: str, seconds: float = 300) -> str:
        """Open a page, wait until the script `until` returns a true value, and return the page's text."""
        self.ask("POST", "/url", url=address)
        end = time.monotonic() + seconds
        while not self.read(until):
            assert time.monotonic() < end, f"{until} is not true on {address}: {self.read('document.body.innerText')}"
            time.sleep(0.2)
        return " ".join(self.read("document.body.innerText").split())

    def screenshot(self, name: str) -> bytes:
        png = base64.b64decode(self.ask("GET", "/screenshot"))
        if folder := os.environ.get("AEM_SCREENSHOTS"):
            (Path(folder) / name).write_bytes(png)
        return png

    def close(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def wait_for_answer(address: str, seconds: float) -> None:
    """Wait until a server answers at this address."""
    end = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(address, timeout=20).read()
            return
        except OSError:
            assert time.monotonic() < end, f"{address} does not answer"
            time.sleep(0.1)


def find_driver() -> str:
    driver = shutil.which("chromedriver")
    if driver is None or not (shutil.which("chromium") or shutil.which("google-chrome")):
        skip_or_fail("Chromium and its driver are missing: apt-get install chromium chromium-driver")
    return driver
