"""Publishes in MLflow: the page and tags of a run, the views of a sweep, and its report."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from aem_exp.tracking import store_uri
from aem_exp.tracking import views as saved
from aem_exp.tracking.mlflow_store import error_reason, open_client
from aem_exp.tracking.run_card import read_card, save_card
from aem_exp.tracking.writer import NOTE_TAG, RemoteRun

REPORTS_HEADING = "Reports of sweeps:"  # begins our part of an experiment's description
REPORT_TAG = "aem.report"  # on the run that holds a report: name of the sweep
CHARTS_PATH = "model-metrics?workflowType=machine_learning"  # charts on a run's page, with the menu for trained models


def run_page(run_dir: Path) -> store_uri.MLflowPage | None:
    """Return the MLflow page of a run, from its run directory alone; None if MLflow has no page for it."""
    card = read_card(run_dir)
    uri = card.get("uri", store_uri.OFF)
    if uri == store_uri.OFF or card["run_id"] is None or store_uri.is_databricks(uri):
        return None
    number = card["experiment_id"]
    page = store_uri.store_page(uri, f"#/experiments/{number}/runs/{card['run_id']}/{CHARTS_PATH}")
    views_of_all = saved.links(page.link.partition("/#/")[0], number)
    return replace(page, more=tuple((name.rpartition(" ")[2], link) for name, link in views_of_all.items()))


def add_tags(run_dir: Path, tags: dict[str, str]) -> None:
    """Add tags to a run: to its card, and in MLflow if the run is there already."""
    card = read_card(run_dir)
    new = {name: value for name, value in tags.items() if card.get("tags", {}).get(name) != value}
    if not card or not new:
        return
    save_card(run_dir, {**card, "tags": {**card["tags"], **new}})
    if card["run_id"] and (client := open_client(card["uri"])):
        for name, value in new.items():
            client.set_tag(card["run_id"], name, value)


def save_views(outputs: Path, uri: str, experiments: Iterable[str], sweep: str) -> list[tuple[str, str]]:
    """Save a sweep's views. Return the lines that show how to open them: a command that serves a local store, and links.

    The store and its experiments are created if they do not exist, before any run writes to them.
    Errors are not raised: if the store is unavailable, only the links are missing.
    """
    if uri == store_uri.OFF:
        return []
    page, links = store_uri.store_page(uri), list[str]()
    try:
        store_uri.probe(uri)
        for experiment in experiments:
            store = RemoteRun(outputs / experiment, uri, {"experiment": experiment})
            number = store.open_experiment()
            taken = saved.save(store.client, number, sweep, saved.sweep_tag(sweep))
            links += saved.links(page.link, number, sweep, taken).values()
    except Exception as error:  # any error of MLflow; the sweep does not depend on it
        return [("mlflow", f"no links: {error_reason(error)}")]
    return page.lines(*links)


def log_report(
    outputs: Path, uri: str, experiment: str, sweep: str, folder: Path, files: Iterable[Path]
) -> list[tuple[str, str]]:
    """Log the files of a sweep's report as artifacts of their own MLflow run, and link it on the experiment's page.

    Return the lines that show how to open the report. Errors are not raised, as in `save_views`.
    """
    try:
        store_uri.probe(uri)
        store = RemoteRun(outputs / experiment, uri, {"experiment": experiment})
        number, client = store.open_experiment(), store.client
        reports = client.search_runs([number], f"tags.`{REPORT_TAG}` = '{sweep}'", max_results=1)
        run = (
            reports[0]
            if reports
            else client.create_run(number, run_name=f"report of {sweep}", tags={REPORT_TAG: sweep})
        )
        for file in files:
            inside = file.relative_to(folder).parent
            client.log_artifact(run.info.run_id, str(file), None if inside == Path(".") else str(inside))
        client.set_terminated(run.info.run_id)
        page = store_uri.store_page(uri, _report_path(number, run.info.run_id))
        client.set_experiment_tag(number, f"{saved.sweep_tag(sweep)}.report", run.info.run_id)
        _link_reports(client, number)
    except Exception as error:  # any error of MLflow; the sweep does not depend on it
        return [("mlflow", f"the report was not uploaded: {error_reason(error)}")]
    return page.lines()


def _report_path(experiment: str, run: str) -> str:
    """Return the path of a report in MLflow's pages."""
    return f"#/experiments/{experiment}/runs/{run}/artifacts/index.html?workflowType=machine_learning"


def _link_reports(client: Any, experiment: str) -> None:
    """Link the reports of all sweeps in the description of an experiment, and keep the other parts of the description."""
    tags = client.get_experiment(experiment).tags
    runs = {
        name.removeprefix("aem.sweep.").removesuffix(".report"): run
        for name, run in tags.items()
        if name.endswith(".report")
    }
    lines = [f"- [{sweep}]({_report_path(experiment, run)})" for sweep, run in sorted(runs.items())]
    others = [part for part in tags.get(NOTE_TAG, "").split("\n\n") if part and not part.startswith(REPORTS_HEADING)]
    client.set_experiment_tag(experiment, NOTE_TAG, "\n\n".join([*others, "\n".join([REPORTS_HEADING, *lines])]))
