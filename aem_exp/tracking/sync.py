"""Sends the missing parts of runs from their run directories to MLflow."""

from collections.abc import Iterable
from pathlib import Path

from aem_exp.core import errors
from aem_exp.core.errors import ConfigError
from aem_exp.rundir import metrics
from aem_exp.tracking import store_uri
from aem_exp.tracking.mlflow_store import lock_sqlite, raise_store_error
from aem_exp.tracking.run_card import CARD_FILE, read_card, save_card
from aem_exp.tracking.writer import RemoteRun


def sync_run(run_dir: Path, uri: str | None = None) -> str:
    """Send the missing parts of a run to MLflow; return one sentence. A second call sends nothing twice.

    Raises:
        ConfigError: the folder is not a run, or the store cannot be used.
    """
    run_dir = run_dir.absolute()
    card = read_card(run_dir)
    if not card:
        raise ConfigError("RUN_DIR", str(run_dir), remedy=f"must be a run directory, which contains {CARD_FILE}")
    uri = uri or card["uri"]
    if uri == store_uri.OFF or "***" in uri:
        raise ConfigError("--uri", None, remedy=f"is required, because {run_dir.name} was logged to {card['uri']}")
    store_uri.probe(uri)
    run = RemoteRun(run_dir, uri, card)
    points = metrics.points(metrics.read(run_dir))
    files = [path for name in card["artifacts"] if (path := run_dir / name).exists()]
    try:
        with lock_sqlite(uri):
            run.connect()
            sent = run.send(points)
            for path in files:
                run.send_file(path)
            if card["status"] is not None:
                run.end(card["status"])
    except Exception as error:  # any error of MLflow becomes a ConfigError
        raise_store_error(uri, error)
    save_card(run_dir, {**card, "uri": errors.redact(uri)})
    return f"sent {sent} of {len(points)} points and {len(files)} artifacts of run {run.id} to {errors.redact(uri)}"


def find_run_dirs(folder: Path) -> list[Path]:
    """Return the run directories in a folder, or the folder itself if it is one."""
    inside = sorted(card.parent for card in folder.glob(f"*/{CARD_FILE}"))
    return inside if inside and not (folder / CARD_FILE).exists() else [folder]


def record_ends(runs: Iterable[Path]) -> None:
    """Record the end of killed runs, which could not record it; MLflow would show them as running for ever."""
    from aem_exp.cluster import run_state
    from aem_exp.cluster.run_state import RunStatus

    ends = {RunStatus.DONE: "FINISHED", RunStatus.FAILED: "FAILED", RunStatus.STOPPED: "KILLED"}
    for run_dir, found in run_state.read([run for run in runs if (run / CARD_FILE).exists()]).items():
        card = read_card(run_dir)
        if card["status"] is None and found.what in ends:
            save_card(run_dir, {**card, "status": ends[found.what]})
