"""The card of a run (`tracking.json`): its store, ids, params and tags in MLflow. `mlflow_run_id` holds the id alone."""

import json
from pathlib import Path
from typing import Any

from aem_exp.core import disk
from aem_exp.rundir import metrics

RUN_ID_FILE = "mlflow_run_id"
CARD_FILE = "tracking.json"  # store, ids, params and tags in MLflow: enough to send the run again


def flatten_params(nested: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten a nested config to MLflow params, such as `{"trainer.learning_rate": "0.001"}`."""
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
    """Read the card of a run; empty if it has none."""
    path = run_dir / CARD_FILE
    return disk.read_json(path, "uri", "run_id", "experiment_id") if path.exists() else {}


def save_card(run_dir: Path, card: dict[str, Any]) -> None:
    disk.write_atomically(run_dir / CARD_FILE, json.dumps(card, indent=1) + "\n")
