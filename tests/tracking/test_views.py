"""The saved views of a sweep: their content in MLflow, and the page that they open in a real browser.

With $AEM_REQUIRE_ALL=1 a missing browser is a failure. $AEM_SCREENSHOTS names a folder for screenshots.
"""

import json
import math
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from support.browser import Browser, find_driver, wait_for_answer

from aem_exp.core.errors import ConfigError
from aem_exp.tracking import mlflow_store, publish, store_uri, views
from aem_exp.tracking.tracker import Tracker

ARMS = {"grpo": (0.62, 0.45), "grpo+aem": (0.74, 0.28)}  # final success, decrease of entropy
STEPS = 60


@pytest.fixture
def client(tmp_path: Path) -> Any:
    """A client of a new sqlite store, created as `tracker` does."""
    mlflow_store.create_sqlite(tmp_path / "mlflow.db")
    import mlflow

    return mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")


def read_views(client: Any, experiment: str) -> dict[str, dict[str, Any]]:
    """Return the views in the store by key, with decoded states."""
    tags = client.get_experiment(experiment).tags.items()
    envelopes = {
        key.removeprefix(views.VIEW_TAG_PREFIX): json.loads(text)
        for key, text in tags
        if key.startswith(views.VIEW_TAG_PREFIX)
    }
    return {key: {**envelope, "state": views.decode_state(envelope["state"])} for key, envelope in envelopes.items()}


def test_encoded_state_can_be_decoded() -> None:
    state = {"searchFilter": "tags.`aem.sweep.é` != ''", "orderByAsc": False, "groupBy": None, "columnWidths": {"a": 1}}
    assert views.encode_state(state).startswith("deflate;")
    assert views.decode_state(views.encode_state(state)) == state


def test_second_save_changes_only_the_time_of_the_update(client: Any) -> None:
    experiment = client.create_experiment("household")
    saved = views.save(client, experiment, "main")
    first = read_views(client, experiment)
    assert set(saved) == {"main: curves", "main: table"} == {view["name"] for view in first.values()}
    assert set(saved.values()) == set(first)

    time.sleep(0.01)
    assert views.save(client, experiment, "main") == saved
    second = read_views(client, experiment)
    for key, view in first.items():
        assert second[key]["updatedAt"] > view["updatedAt"]
        assert second[key] | {"updatedAt": 0} == view | {"updatedAt": 0}
    sizes = [
        len(text)
        for key, text in client.get_experiment(experiment).tags.items()
        if key.startswith(views.VIEW_TAG_PREFIX)
    ]
    assert max(sizes) < 5000, "MLflow allows tags of 20000 characters, older versions of 5000"


def test_table_view_filters_and_orders_the_runs_of_a_sweep(client: Any) -> None:
    experiment = client.create_experiment("household")
    for success, sweeps in (
        (0.3, ("main",)),
        (None, ("main",)),
        (0.8, ("main", "main.2")),
        (0.9, ("main.2",)),
        (1, ()),
    ):
        run = client.create_run(experiment, tags={views.sweep_tag(sweep): "arm" for sweep in sweeps})
        if success is not None:
            client.log_metric(run.info.run_id, "test/success", success)
    views.save(client, experiment, "main")
    state = read_views(client, experiment)["aem.main.table"]["state"]
    assert state["orderByAsc"] is False
    found = client.search_runs([experiment], state["searchFilter"], order_by=[f"{state['orderByKey']} DESC"])
    assert [run.data.metrics.get("test/success") for run in found] == [0.8, 0.3, None]


def test_runs_can_be_grouped_by_another_tag(client: Any) -> None:
    experiment = client.create_experiment("household")
    views.save(client, experiment, "main", group=views.sweep_tag("main"))
    states = {key: view["state"] for key, view in read_views(client, experiment).items()}
    keys = [{"mode": "tag", "groupByData": "aem.sweep.main"}]
    assert states["aem.main.curves"]["groupBy"] == {"aggregateFunction": "average", "groupByKeys": keys}
    assert states["aem.main.table"]["columnOrder"][0] == "tags.`aem.sweep.main`"


@pytest.mark.slow
def test_old_views_are_removed_and_those_of_users_are_kept(client: Any) -> None:
    experiment = client.create_experiment("household")
    theirs = views.VIEW_TAG_PREFIX + "3fd2"
    client.set_experiment_tag(experiment, theirs, json.dumps({"name": "mine", "createdAt": 1, "state": "{}"}))
    sweeps = [f"sweep{index}" for index in range(views.MAX_VIEWS // 2)]
    for sweep in sweeps:
        views.save(client, experiment, sweep)
    views.save(client, experiment, sweeps[0])
    views.save(client, experiment, "one_more")
    kept = {key for key in client.get_experiment(experiment).tags if key.startswith(views.VIEW_TAG_PREFIX)}
    expected = {
        f"{views.OWN_TAG_PREFIX}{sweep}.{kind}" for sweep in (*sweeps, "one_more") for kind in ("curves", "table")
    }
    assert kept == {theirs} | expected - {f"{views.OWN_TAG_PREFIX}sweep1.curves", f"{views.OWN_TAG_PREFIX}sweep1.table"}


@pytest.mark.slow
def test_views_of_all_runs_are_kept(client: Any) -> None:
    experiment = client.create_experiment("household")
    assert not views.has_views(client.get_experiment(experiment).tags)
    assert (
        set(views.save(client, experiment))
        == {"all runs: curves", "all runs: table"}
        == set(views.links("", experiment))
    )
    for index in range(views.MAX_VIEWS):
        views.save(client, experiment, f"sweep{index}")
    assert views.has_views(client.get_experiment(experiment).tags)
    states = {view["name"]: view["state"] for view in read_views(client, experiment).values()}
    assert [states[f"all runs: {kind}"]["searchFilter"] for kind in views.VIEW_MODES] == ["", ""]
    assert states["all runs: curves"]["groupBy"] is None
    with pytest.raises(ConfigError):
        views.sweep_tag(views.ALL_RUNS)


def test_store_that_refuses_views_raises_no_error(client: Any) -> None:
    assert views.save(client, "4711", "main") == {}
    experiment = client.create_experiment("household")
    client.delete_experiment(experiment)
    assert views.save(client, experiment, "main") == {}


def test_installed_mlflow_version_was_tested() -> None:
    assert views.minor_version() in views.TRIED_VERSIONS, (
        f"MLflow {views.minor_version()} may not show our saved views: run the tests of this file with a browser"
        " (-m slow). If they pass, add the version to views.TRIED_VERSIONS"
    )


def filter_of(link: str) -> str:
    """Return the search expression of a link to an experiment's page."""
    return parse_qs(link.partition("?")[2])["searchFilter"][0]


def test_untested_mlflow_version_gets_a_filtered_link(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views, "TRIED_VERSIONS", ("2.0",))
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    *_, (heading, link) = publish.save_views(tmp_path / "outputs", uri, ["household"], "main")
    experiment = client.get_experiment_by_name("household")
    assert not [key for key in experiment.tags if key.startswith(views.VIEW_TAG_PREFIX)]
    assert heading == "open" and f"/#/experiments/{experiment.experiment_id}/runs?searchFilter=" in link
    runs = [client.create_run(experiment.experiment_id, tags=tags) for tags in ({}, {views.sweep_tag("main"): "arm"})]
    found = client.search_runs([experiment.experiment_id], filter_of(link))
    assert [run.info.run_id for run in found] == [runs[1].info.run_id]
    assert list(views.links("", "7").values()) == ["/#/experiments/7/runs?workflowType=machine_learning"]


def test_store_that_refuses_views_gets_a_filtered_link(client: Any) -> None:
    links = views.links("http://127.0.0.1:5000", "4711", "main", views.save(client, "4711", "main"))
    assert list(links) == ["main: runs"] and filter_of(links["main: runs"]) == "tags.`aem.sweep.main` != ''"


@pytest.mark.parametrize("sweep", ["", "a b", "it's", "a`b", "a/b", "x" * 101])
def test_invalid_name_of_a_sweep_is_an_error(sweep: str) -> None:
    with pytest.raises(ConfigError, match=r"^sweep="):
        views.sweep_tag(sweep)


def test_links_open_each_view() -> None:
    assert views.links("http://127.0.0.1:5000/", "7", "main") == {
        "main: curves": "http://127.0.0.1:5000/#/experiments/7/runs?viewStateShareKey=aem.main.curves"
        "&compareRunsMode=CHART&workflowType=machine_learning",
        "main: table": "http://127.0.0.1:5000/#/experiments/7/runs?viewStateShareKey=aem.main.table"
        "&compareRunsMode=TABLE&workflowType=machine_learning",
    }


def train(outputs: Path, uri: str, arm: str, seed: int) -> None:
    """Log a synthetic run of the sweeps `main`, `all` (one arm per run) and `plain` (no AEM). grpo/s1 has no test score."""
    generator, (top, fall) = random.Random(f"{arm}{seed}"), ARMS[arm]
    offset = generator.gauss(0, 0.03)
    tags = {
        "aem.group": arm,
        "aem.seed": str(seed),
        views.sweep_tag("main"): "true",
        views.sweep_tag("all"): f"{arm} {seed}",
    }
    tags |= {views.sweep_tag("plain"): "true"} if arm == "grpo" else {}
    with Tracker.open(outputs / f"{arm}-s{seed}", uri, "household", f"{arm}/s{seed}", tags=tags) as tracker:
        for step in range(1, STEPS + 1):
            success = top / (1 + math.exp((22 - step) / 8)) + offset
            row = {"train/success": max(0, success + generator.gauss(0, 0.03)), "time/step": 30 + generator.random()}
            row["train/loss"] = 0.01 + generator.gauss(0, 0.003)
            row["train/response_entropy"] = 0.9 - fall * step / STEPS + generator.gauss(0, 0.02)
            if step % 5 == 0:
                row |= {"eval/success": max(0, success), "eval/response_entropy": 0.8 - fall * step / STEPS}
            if arm == "grpo+aem":
                row["aem/alpha_q50"] = 1 + 0.1 * math.sin(step / 9)
            tracker.log(step, row)
        if (arm, seed) != ("grpo", 1):
            tracker.log(STEPS, {"test/success": top + offset})


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Log twelve runs, six of them in the sweep `main`, and start an MLflow server; yield its address."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    find_driver()
    outputs = tmp_path / "outputs"
    uri = store_uri.resolve_uri(None, outputs)
    mlflow_store.create_sqlite(outputs / "mlflow.db")
    port = store_uri.first_free_port(5100)
    words, environment = store_uri.serve_command(uri, port)
    with (tmp_path / "server.log").open("w") as log:  # the server starts in parallel, because both take seconds
        server = subprocess.Popen(
            words, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=tmp_path
        )
    for arm in ARMS:
        for seed in range(3):
            train(outputs, uri, arm, seed)
    for seed in range(6):  # newer than the runs of `main`, so a view without a filter would show them
        tags = {"aem.group": "rloo", views.sweep_tag("all"): f"rloo {seed}"}
        with Tracker.open(outputs / f"rloo-s{seed}", uri, "household", f"rloo/s{seed}", tags=tags) as run:
            for step in range(1, 4):
                run.log(step, {"train/success": (step + seed) / 100, "test/success": 0.99})
    yield store_uri.local_address(port)
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()


@pytest.fixture
def browser(site: str, tmp_path: Path) -> Iterator[Browser]:
    browser = Browser(find_driver(), tmp_path / "profile")
    browser.ask("POST", "/window/rect", width=1900, height=1700)  # MLflow draws only what is in sight
    yield browser
    browser.close()


# For each chart: its title, the number of lines (without the invisible ones for the mouse), the number of non-empty bands.
CHARTS = """[...document.querySelectorAll('.js-plotly-plot')].map(plot => [
    plot.closest('[data-testid="experiment-view-compare-runs-card"]')?.innerText.split('\\n')[0],
    new Set(plot.data.filter(trace => trace.mode).map(trace => JSON.stringify([...trace.y]))).size,
    plot.data.filter(trace => trace.fill && trace.x.length > 1).length])"""
CELLS = """[...document.querySelectorAll('[role=gridcell]')].map(cell => [
    Number(cell.parentElement.getAttribute('row-index')), cell.getAttribute('col-id'), cell.innerText])"""
HEADERS = """[...document.querySelectorAll('.ag-header-cell[col-id]')].filter(cell => cell.innerText)
    .sort((a, b) => a.getBoundingClientRect().x - b.getBoundingClientRect().x).map(cell => cell.innerText)"""


@pytest.mark.slow
@pytest.mark.machine
def test_page_shows_the_curves_and_tables_of_the_views(site: str, browser: Browser) -> None:
    wait_for_answer(f"{site}/health", 120)
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=site)
    experiment = client.get_experiment_by_name("household").experiment_id
    saved = views.save(client, experiment, "main")
    links = views.links(site, experiment, "main")
    assert set(saved) == set(links)

    text = browser.open(links["main: curves"], "document.querySelectorAll('.js-plotly-plot .trace').length >= 20")
    for word in ("main: curves", "Group by: aem.group", "Group: grpo 3", "Group: grpo+aem 3", "6 matching runs"):
        assert word in text, f"{word!r} is not on the page:\n{text}"
    for word in ("grpo (train/success)", "grpo+aem (train/success)", "curves (5)", "train (", "Model registry"):
        assert word in text, f"{word!r} is not on the page:\n{text}"
    assert "rloo" not in text
    drawn = {title: (lines, bands) for title, lines, bands in browser.read(CHARTS)}
    browser.screenshot("curves.png")
    assert drawn == {metric: (1, 1) if metric == "aem/alpha_q50" else (2, 2) for metric in views.CURVE_METRICS}

    text = browser.open(links["main: table"], "document.querySelectorAll('[role=gridcell]').length >= 42")
    assert "6 matching runs" in text
    cells = {(row, column): value for row, column, value in browser.read(CELLS)}
    browser.screenshot("table.png")
    column = {name: [cells[row, name] for row in range(6)] for name in ("tags.`aem.group`", "metrics.`test/success`")}
    assert column["tags.`aem.group`"] == ["grpo+aem"] * 3 + ["grpo"] * 3
    *tested, untested = column["metrics.`test/success`"]
    assert untested == "-"
    assert [float(value) for value in tested] == sorted(map(float, tested), reverse=True)
    metrics = ["test/success", "eval/success", "train/response_entropy"]
    assert browser.read(HEADERS)[-6:] == ["aem.group", "aem.seed", *metrics, "Duration"]

    link = views.links(site, experiment, "plain", saved=())[
        "plain: runs"
    ]  # without a view, after the page of another sweep
    text = browser.open(link, "document.body.innerText.replace(/\\s+/g, ' ').includes('3 matching runs')")
    assert "grpo/s0" in text and "grpo+aem" not in text, "the link filters without a view"
    browser.screenshot("plain.png")

    links = views.links(site, experiment)  # each run saves these views
    assert views.has_views(client.get_experiment(experiment).tags)
    text = browser.open(links["all runs: table"], "document.querySelectorAll('[role=gridcell]').length >= 84")
    assert "12 matching runs" in text
    cells = {(row, column): value for row, column, value in browser.read(CELLS)}
    assert [cells[row, "metrics.`test/success`"] for row in range(6)] == ["0.99"] * 6, "the best run is first"
    assert browser.read(HEADERS)[-6:] == ["aem.group", "aem.seed", *metrics, "Duration"]
    browser.screenshot("all_table.png")
    text = browser.open(links["all runs: curves"], "document.querySelectorAll('.js-plotly-plot .trace').length >= 24")
    drawn = [(title, lines) for title, lines, _ in browser.read(CHARTS)]
    assert [title for title, _ in drawn] == list(views.CURVE_METRICS), "success first, then entropy and loss"
    assert drawn[0] == ("train/success", 12), "one line per run"
    browser.screenshot("all_curves.png")

    views.save(client, experiment, "all", group=views.sweep_tag("all"))
    link = views.links(site, experiment, "all")["all: curves"]
    browser.open(link, "document.body.innerText.includes('rloo 5 (train/success)')")
    assert {title: lines for title, lines, _ in browser.read(CHARTS)}["train/success"] == 12, (
        "by default, MLflow draws only ten"
    )
    browser.screenshot("all.png")

    views.save(client, experiment, "plain")
    link = views.links(site, experiment, "plain")["plain: curves"]
    text = browser.open(link, "document.querySelectorAll('.js-plotly-plot .trace').length >= 9")
    assert "curves (4)" in text, "without the metric alpha there is no chart of it"
