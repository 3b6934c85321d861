"""The MLflow page that a run's link opens, in a real browser: the run, its charts and its artifacts.

With $AEM_REQUIRE_ALL=1 a missing browser is a failure. $AEM_SCREENSHOTS names a folder for screenshots.
"""

import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.browser import Browser, find_driver, wait_for_answer

from aem_exp.run import summary
from aem_exp.tracking import mlflow_store, publish, store_uri
from aem_exp.tracking.store_uri import MLflowPage
from aem_exp.tracking.tracker import Tracker


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MLflowPage]:
    """Log a run and serve it with the `aem-exp ui` command that its summary shows; yield its page."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    find_driver()
    run_dir, uri = tmp_path / "outputs" / "run", store_uri.resolve_uri(None, tmp_path / "outputs")
    mlflow_store.create_sqlite(tmp_path / "outputs" / "mlflow.db")
    with (tmp_path / "server.log").open("w") as log:  # the server starts in parallel, because both take seconds
        words = shlex.split(store_uri.ui_command(uri, port := store_uri.first_free_port()))
        server = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=tmp_path)
    monkeypatch.setattr(store_uri, "first_free_port", lambda: port)
    params, tags = {"trainer": {"learning_rate": 1e-3}}, {"aem.seed": "0", "aem.group": "grpo+aem"}
    with Tracker.open(run_dir, uri, "household", "grpo+aem/s0", params, tags) as tracker:
        for step in range(31):
            learned = {"train/success": step / 40, "train/response_entropy": 0.6 - step / 100, "train/loss": 0.01}
            tracker.log(step, learned | {"aem/alpha_q05": 0.7, "aem/alpha_q50": 1.0, "aem/alpha_q95": 1.4})
        for path in summary.write_artifacts(run_dir):
            tracker.log_artifact(path)
    page = publish.run_page(run_dir)
    assert page is not None
    assert page.command == shlex.join(words)
    yield page
    server.terminate()
    server.wait()


@pytest.fixture
def browser(page: MLflowPage, tmp_path: Path) -> Iterator[Browser]:
    browser = Browser(find_driver(), tmp_path / "profile")
    yield browser
    browser.close()


@pytest.mark.slow
@pytest.mark.machine
def test_link_opens_the_charts_of_the_run(page: MLflowPage, browser: Browser) -> None:
    wait_for_answer(page.link.split("/#")[0] + "/health", 120)
    text = browser.open(page.link, "document.querySelectorAll('.js-plotly-plot .trace').length >= 3")
    for word in ("household", "grpo+aem/s0", "Model metrics", "aem (3)", "train (3)", "response_entropy", "success"):
        assert word in text, f"{word!r} is not on the page:\n{text}"
    assert "Evaluation runs" not in text, "the menu must be that of trained models"
    png = browser.screenshot("charts.png")
    assert png.startswith(b"\x89PNG")
    assert len(png) > 20_000, "the page is empty"

    overview = page.link.split("/model-metrics")[0]
    text = browser.open(overview, "document.body.innerText.includes('trainer.learning_rate')")
    for word in ("Finished", "aem.seed", "aem.group", "Run dir:", "0.001", "train/success"):
        assert word in text, f"{word!r} is not on the page:\n{text}"
    browser.screenshot("overview.png")

    link = browser.read("[...document.links].find(link => link.innerText.startsWith('Success, entropy')).href")
    browser.open(link, "document.querySelectorAll('.js-plotly-plot .trace').length >= 3")
    title = "train/success vs train/response_entropy vs train/loss"
    text = browser.open(link, f"document.body.innerText.includes('{title}')")
    assert "grpo+aem/s0" in text and "0.75 (step=30)" in text
    browser.screenshot("headlines.png")

    more = dict(page.more)
    browser.ask("POST", "/window/rect", width=1900, height=1700)  # MLflow draws only the charts in sight
    text = browser.open(more["curves"], "document.body.innerText.includes('train/loss')")
    assert text.index("train/success") < text.index("train/response_entropy") < text.index("train/loss")
    browser.screenshot("curves.png")
    text = browser.open(more["table"], "document.querySelectorAll('[role=gridcell]').length >= 6")
    assert "all runs: table" in text and "test/success" in text and "1 matching run" in text
    browser.screenshot("table.png")

    figure = "[...document.images].some(image => image.naturalWidth > 800)"
    browser.open(f"{overview}/artifacts/plots/success_entropy.png", figure)
    browser.screenshot("artifacts.png")
