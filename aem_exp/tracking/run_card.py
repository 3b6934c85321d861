"""What a run is called in MLflow: `tracking.json` and `mlflow_run_id` of its run dir, and its params."""

import json
from pathlib import Path
from typing import Any

from aem_exp.core import disk
from aem_exp.rundir import metrics

RUN_ID_FILE = "mlflow_run_id"
CARD_FILE = "tracking.json"  # what this run is called in MLflow, and where: enough to send it again


def flatten_params(nested: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten a config to MLflow's params: `{"trainer.learning_rate": "0.001"}`."""
    flat: dict[str, str] = {}
    for key, value in nested.items():
        if isinstance(value, dict) and value:
            flat |= flatten_params(value, f"{prefix}{key}.")
        else:
            flat[metrics.sanitise_name(f"{prefix}{key}")] = (
                value if isinstance(value, str) else json.dumps(value, default=str)
            )
    return flat


def read_card(run_dir: Path) -> dict[str, Any]:
    """What this run is called in MLflow; empty where it is not there."""
    path = run_dir / CARD_FILE
    return disk.read_json(path, "uri", "run_id", "experiment_id") if path.exists() else {}


def save_card(run_dir: Path, card: dict[str, Any]) -> None:
    disk.write_atomically(run_dir / CARD_FILE, json.dumps(card, indent=1) + "\n")
