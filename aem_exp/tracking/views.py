"""Saved views in MLflow: two for the runs of each sweep and two for all runs, each opened by one link.

`SWEEP: curves` shows one mean line per arm, with a band from its lowest to its highest seed. `SWEEP: table` lists the runs,
best first. `all runs: curves` has one line per run. All views are in the menu `Views` of the experiment's page. A run has
one tag `aem.sweep.NAME` per sweep. MLflow derives the colour of an arm from its tag, so two arms may get the same colour.

MLflow does not document the tag of a view or its content. Both were tested with the versions in `TRIED_VERSIONS`, whose page
loads 100 runs at first, and more on request. With another version, or if a store refuses a view, there is one link instead:
the experiment's page, filtered by the sweep's tag. That link uses only public features of MLflow.
"""

import base64
import json
import re
import time
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from urllib.parse import quote

from aem_exp.core.errors import ConfigError

TRIED_VERSIONS = ("3.17",)  # minor versions of MLflow that were tested with these views
VIEW_TAG_PREFIX = "mlflow.sharedViewState."  # experiment tags with this prefix hold views
OWN_TAG_PREFIX = f"{VIEW_TAG_PREFIX}aem."
# Not a valid name of a sweep. Its views have another prefix than `OWN_TAG_PREFIX`, so `_find_surplus` never returns them.
ALL_RUNS = "all runs"
MAX_VIEWS = 30  # limit of our views per experiment; MLflow's page allows 40 in total
VIEW_MODES = {"curves": "CHART", "table": "TABLE"}  # modes of the page; only the link selects the mode
WORKFLOW_QUERY = "workflowType=machine_learning"  # menu for trained models

GROUP_TAG = "aem.group"
CURVE_METRICS = ("train/success", "eval/success", "train/response_entropy", "train/loss", "aem/alpha_q50")
FOLDED_SECTIONS = ("train", "eval", "test", "aem", "time")  # MLflow puts all other metrics into these sections
TABLE_METRICS = {"test/success": 130, "eval/success": 130, "train/response_entropy": 190}  # column widths in pixels


def sweep_tag(sweep: str) -> str:
    """Return the tag that puts a run into a sweep. Its value is the name of the arm; any non-empty text works."""
    if not re.fullmatch(r"[\w.\-]{1,100}", sweep, re.ASCII):
        raise ConfigError("sweep", sweep, "must be a name of letters, digits, _, - and .")
    return f"aem.sweep.{sweep}"


def minor_version() -> str:
    """Return the minor version of the installed MLflow, such as 3.17; "" if it is not installed."""
    try:
        return ".".join(version("mlflow").split(".")[:2])
    except PackageNotFoundError:
        return ""


def save(client: Any, experiment_id: str, sweep: str = ALL_RUNS, group: str = GROUP_TAG) -> dict[str, str]:
    """Save the views of a sweep; return the name and key of each saved view.

    A second call changes only the time of the last update. No views are saved with an untested version of MLflow.

    Args:
        client: an `MlflowClient`.
        group: tag that holds the arm of a run. The views of all runs do not group runs.
    """
    if minor_version() not in TRIED_VERSIONS:
        return {}
    states = {"curves": _curves_state(sweep, group), "table": _table_state(sweep, group)}
    saved: dict[str, str] = {}
    with suppress(Exception):  # any error of MLflow; a run does not depend on its views
        tags = client.get_experiment(experiment_id).tags
        for kind, state in states.items():
            name, key = _view_name(sweep, kind), _view_key(sweep, kind)
            client.set_experiment_tag(
                experiment_id, VIEW_TAG_PREFIX + key, _serialize_view(name, state, tags.get(VIEW_TAG_PREFIX + key))
            )
            saved[name] = key
        for surplus in _find_surplus({**tags, **{VIEW_TAG_PREFIX + key: "" for key in saved.values()}}):
            client.delete_experiment_tag(experiment_id, surplus)
    return saved


def links(site: str, experiment_id: str, sweep: str = ALL_RUNS, saved: Collection[str] | None = None) -> dict[str, str]:
    """Return the links to the views of a sweep, by name. If a view is missing, add a link to the filtered experiment page.

    Args:
        site: address of the MLflow server.
        saved: names of the saved views, from `save`; None means all.
    """
    runs = f"{site.rstrip('/')}/#/experiments/{experiment_id}/runs"
    modes = VIEW_MODES if minor_version() in TRIED_VERSIONS else {}
    views = {
        _view_name(sweep, kind): f"{runs}?viewStateShareKey={quote(_view_key(sweep, kind))}"
        f"&compareRunsMode={mode}&{WORKFLOW_QUERY}"
        for kind, mode in modes.items()
        if saved is None or _view_name(sweep, kind) in saved
    }
    if len(views) < len(VIEW_MODES):
        views[_view_name(sweep, "runs")] = f"{runs}?{_filter_query(sweep)}{WORKFLOW_QUERY}"
    return views


def _filter_query(sweep: str) -> str:
    """Return the query of a link that filters the runs on an experiment's page."""
    search = _search_filter(sweep)
    return f"searchFilter={quote(search, safe='')}&" if search else ""


def _search_filter(sweep: str) -> str:
    """Return MLflow's search expression for the runs of a sweep."""
    return "" if sweep == ALL_RUNS else f"tags.`{sweep_tag(sweep)}` != ''"


def encode_state(state: Mapping[str, Any]) -> str:
    return "deflate;" + base64.b64encode(zlib.compress(json.dumps(state).encode(), 9)).decode()


def decode_state(text: str) -> dict[str, Any]:
    return json.loads(zlib.decompress(base64.b64decode(text.removeprefix("deflate;"))))


def _view_name(sweep: str, kind: str) -> str:
    return f"{sweep}: {kind}"


def _view_key(sweep: str, kind: str) -> str:
    return f"aem-all-runs.{kind}" if sweep == ALL_RUNS else f"aem.{sweep}.{kind}"


def has_views(tags: Mapping[str, str]) -> bool:
    """Return whether an experiment has the views of all runs."""
    return all(VIEW_TAG_PREFIX + _view_key(ALL_RUNS, kind) in tags for kind in VIEW_MODES)


def _serialize_view(name: str, state: Mapping[str, Any], old: str | None) -> str:
    now = round(time.time() * 1000)
    created = json.loads(old)["createdAt"] if old else now
    return json.dumps({"name": name, "createdAt": created, "updatedAt": now, "state": encode_state(state)})


def _find_surplus(tags: Mapping[str, str]) -> list[str]:
    """Return the oldest of our views above `MAX_VIEWS`. `save` restores any of them under its old link."""
    ours = [key for key in tags if key.startswith(OWN_TAG_PREFIX)]
    fresh_last = sorted(ours, key=lambda key: json.loads(tags[key])["updatedAt"] if tags[key] else float("inf"))
    return fresh_last[: max(0, len(ours) - MAX_VIEWS)]


# ------------------------------------------------------------------------------------------------- the page's state


def _shared_state(sweep: str, order: str, ascending: bool) -> dict[str, Any]:
    """Return the part that both views share. The page uses its own defaults for the rest."""
    return {
        "searchFilter": _search_filter(sweep),
        "orderByKey": order,
        "orderByAsc": ascending,
        "startTime": "ALL",
        "runsHiddenMode": "SHOW_ALL",  # by default, MLflow draws ten runs
    }


def _curves_state(sweep: str, group: str) -> dict[str, Any]:
    keys = [{"mode": "tag", "groupByData": group}]
    return {
        **_shared_state(sweep, f"tags.`{group}`", ascending=True),
        **_columns({}),  # opened from MLflow's list of views, it is a table with one row per arm
        "groupBy": None if sweep == ALL_RUNS else {"aggregateFunction": "average", "groupByKeys": keys},
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,  # a sweep without AEM has no metric alpha
        "compareRunCharts": list(_charts()),
        "compareRunSections": [
            _section("curves", display=True),
            *(_section(name, display=False) for name in FOLDED_SECTIONS),
        ],
        "isAccordionReordered": True,  # otherwise MLflow sorts the sections by name
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }


def _charts() -> Iterator[dict[str, Any]]:
    for metric in CURVE_METRICS:
        yield {
            "uuid": f"aem.{metric}",
            "type": "LINE",
            "metricKey": metric,
            "metricSectionId": "aem.curves",
            "isGenerated": False,
            "deleted": False,
            "xAxisKey": "step",
            "selectedXAxisMetricKey": "",
            "xAxisScaleType": "linear",
            "scaleType": "linear",
            "range": {},
            "yAxisKey": "metric",
            "yAxisExpressions": [],
            "lineSmoothness": 0,
            "useGlobalXaxisKey": True,
            "useGlobalLineSmoothing": True,
        }


def _section(name: str, display: bool) -> dict[str, Any]:
    size = {"columns": 2, "cardHeight": 300} if display else {}
    return {"uuid": f"aem.{name}", "name": name, "display": display, "isReordered": False, "deleted": False, **size}


def _table_state(sweep: str, group: str) -> dict[str, Any]:
    return {
        **_shared_state(sweep, "metrics.`test/success`", ascending=False),  # MLflow puts runs without it last
        **_columns({f"tags.`{group}`": 180, "tags.`aem.seed`": 90}),
        "groupBy": None,
    }


def _columns(first: Mapping[str, int]) -> dict[str, Any]:
    widths = {**first, **{f"metrics.`{metric}`": pixels for metric, pixels in TABLE_METRICS.items()}}
    return {"selectedColumns": list(widths), "columnOrder": [*widths, "duration"], "columnWidths": widths}
