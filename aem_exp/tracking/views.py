"""How runs are looked at in MLflow: two saved views of a sweep's runs, and two of all runs, each behind one link.

`SWEEP: curves` shows a mean line per arm and the band between its lowest and highest seed; `SWEEP: table` shows the
runs, best first. `all runs: curves` has a line per run. All are in the menu `Views` of the experiment's page. A run belongs
to as many sweeps as it has tags `aem.sweep.NAME`. MLflow takes an arm's colour from the group's tag and value, and two arms
may get the same one.

MLflow documents neither the tag that holds a view nor the state in it; both were seen with the versions in
`TRIED_VERSIONS`, whose page loads 100 runs, and more when asked. With another version, and where a store refuses a view,
there is one link instead, to the runs of the experiment's page, filtered by the sweep's tag; it takes public parts of
MLflow alone.
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

TRIED_VERSIONS = ("3.17",)  # minor versions of MLflow whose page was seen to show these views
VIEW_TAG_PREFIX = "mlflow.sharedViewState."  # of the experiment's tags, those that are views
OWN_TAG_PREFIX = f"{VIEW_TAG_PREFIX}aem."
ALL_RUNS = "all runs"  # no sweep can be called so, and the key of its views is not one of `OWN_TAG_PREFIX`: they are not surplus
MAX_VIEWS = 30  # of our views in an experiment: at 40 in all, MLflow's page lets nobody save another
VIEW_MODES = {"curves": "CHART", "table": "TABLE"}  # and the page's modes; a view does not hold its mode, its link does
WORKFLOW_QUERY = "workflowType=machine_learning"  # that for trained models

GROUP_TAG = "aem.group"
CURVE_METRICS = ("train/success", "eval/success", "train/response_entropy", "train/loss", "aem/alpha_q50")
FOLDED_SECTIONS = ("train", "eval", "test", "aem", "time")  # sections that MLflow fills with all other metrics
TABLE_METRICS = {
    "test/success": 130,
    "eval/success": 130,
    "train/response_entropy": 190,
}  # columns of the table, in pixels


def sweep_tag(sweep: str) -> str:
    """Name the tag that puts a run into a sweep; any text but none will do as its value, the arm's name best."""
    if not re.fullmatch(r"[\w.\-]{1,100}", sweep, re.ASCII):
        raise ConfigError("sweep", sweep, "must be a name of letters, digits, _ - and .")
    return f"aem.sweep.{sweep}"


def minor_version() -> str:
    """The minor version of the MLflow that is installed, such as 3.17; empty where none is."""
    try:
        return ".".join(version("mlflow").split(".")[:2])
    except PackageNotFoundError:
        return ""


def save(client: Any, experiment_id: str, sweep: str = ALL_RUNS, group: str = GROUP_TAG) -> dict[str, str]:
    """Write or refresh a sweep's views, with an `MlflowClient`; return the name and key of those that were taken.

    `group` is the tag that tells the arms apart; among all runs, each has a line of its own. Asking twice changes nothing
    but the time of the last update. A version of MLflow that was not tried gets no views.
    """
    if minor_version() not in TRIED_VERSIONS:
        return {}
    states = {"curves": _curves_state(sweep, group), "table": _table_state(sweep, group)}
    saved: dict[str, str] = {}
    with suppress(Exception):  # MLflow's, of many kinds: nothing depends on a view
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
    """Return the name of each view of a sweep and the page that shows it, at the address where MLflow is served.

    `saved`: the names of the views that the store has taken, see `save`; None: all of them. Where one is missing, there is
    the experiment's page, filtered.
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
    """The part of a link that filters the runs of an experiment's page."""
    search = _search_filter(sweep)
    return f"searchFilter={quote(search, safe='')}&" if search else ""


def _search_filter(sweep: str) -> str:
    """MLflow's search for the runs of a sweep."""
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
    """Whether an experiment has the views of all of its runs."""
    return all(VIEW_TAG_PREFIX + _view_key(ALL_RUNS, kind) in tags for kind in VIEW_MODES)


def _serialize_view(name: str, state: Mapping[str, Any], old: str | None) -> str:
    now = round(time.time() * 1000)
    created = json.loads(old)["createdAt"] if old else now
    return json.dumps({"name": name, "createdAt": created, "updatedAt": now, "state": encode_state(state)})


def _find_surplus(tags: Mapping[str, str]) -> list[str]:
    """Name our views that were saved the longest ago; `save` brings any of them back under its old link."""
    ours = [key for key in tags if key.startswith(OWN_TAG_PREFIX)]
    fresh_last = sorted(ours, key=lambda key: json.loads(tags[key])["updatedAt"] if tags[key] else float("inf"))
    return fresh_last[: max(0, len(ours) - MAX_VIEWS)]


# ------------------------------------------------------------------------------------------------- the page's state


def _shared_state(sweep: str, order: str, ascending: bool) -> dict[str, Any]:
    """Return what both views share; the page fills in its own defaults for all that is not named."""
    return {
        "searchFilter": _search_filter(sweep),
        "orderByKey": order,
        "orderByAsc": ascending,
        "startTime": "ALL",
        "runsHiddenMode": "SHOW_ALL",  # the default draws ten runs
    }


def _curves_state(sweep: str, group: str) -> dict[str, Any]:
    keys = [{"mode": "tag", "groupByData": group}]
    return {
        **_shared_state(sweep, f"tags.`{group}`", ascending=True),
        **_columns({}),  # MLflow's list of views opens this one as a table, with a row per arm
        "groupBy": None if sweep == ALL_RUNS else {"aggregateFunction": "average", "groupByKeys": keys},
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,  # a sweep without AEM has no alpha
        "compareRunCharts": list(_charts()),
        "compareRunSections": [
            _section("curves", display=True),
            *(_section(name, display=False) for name in FOLDED_SECTIONS),
        ],
        "isAccordionReordered": True,  # or the sections are sorted by name
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
