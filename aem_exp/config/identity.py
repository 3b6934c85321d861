"""The identity of a run: its signature (the hash of its science), its run dir, and its differences from other runs."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from aem_exp.config.schema import Experiment, neutral_values, to_dict

# Recorded in `experiment.json`, but not part of the signature.
NOT_HASHED = ("name", "launch", "outputs", "tracking", "parent_dir", "parent_steps", "resume")


def signature(experiment: Experiment) -> str:
    """Hash of the science. Neutral values are left out, so a new option does not change existing signatures."""
    text = json.dumps(_science(experiment), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def arm_signature(experiment: Experiment) -> str:
    """Hash of the science without the seed. The runs of an arm share it."""
    return signature(replace(experiment, seed=0))


def run_dir(experiment: Experiment) -> Path:
    """The run dir of an experiment, which depends only on the experiment and the outputs folder."""
    e = experiment
    return outputs_root(e) / f"{e.name}-{e.baseline.name}-{e.modulation.name}-s{e.seed}-{signature(e)}"


def outputs_root(experiment: Experiment) -> Path:
    """The folder of run dirs: `outputs`, else $AEM_OUTPUTS, else ./outputs."""
    return Path(experiment.outputs or os.environ.get("AEM_OUTPUTS") or "outputs").expanduser().absolute()


def diff(a: Experiment, b: Experiment) -> list[str]:
    """The differences in science from `a` to `b`, one line per dotted key."""
    old, new = dict(_flatten(_hashed_fields(a))), dict(_flatten(_hashed_fields(b)))
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f"{key}: {_format_value(old.get(key))} -> {_format_value(new.get(key))}" for key in keys]


def _hashed_fields(e: Experiment) -> dict[str, Any]:
    """The complete science: without execution, and without names, which are labels only."""
    data = to_dict(e)
    parts = {key: value for key, value in data.items() if key not in NOT_HASHED}
    for part in ("model", "env", "baseline", "modulation", "warm_start"):
        parts.get(part, {}).pop("name", None)
    return parts


def _science(e: Experiment) -> dict[str, Any]:
    neutral, out = neutral_values(Experiment), {}
    for key, value in _hashed_fields(e).items():
        if isinstance(value, dict):
            out[key] = {k: v for k, v in value.items() if k not in neutral[key] or neutral[key][k] != v}
        elif value != neutral[key]:
            out[key] = value
    return {key: value for key, value in out.items() if value != {}}


def _flatten(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _format_value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57].replace("\n", " ") + "..."
