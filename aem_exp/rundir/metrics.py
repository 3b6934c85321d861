"""`metrics.jsonl`: the metrics of a run, one row per step. MLflow can be rebuilt from this file."""

import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from aem_exp.core import disk

METRICS = "metrics.jsonl"
LOGGED_AT = "time/logged_at"  # ms since 1970, in each row; the timestamp of the row's points in MLflow
NAME_CHARS = 250  # MLflow's limit for the name of a metric

MetricPoint = tuple[str, float, int, int]  # metric, value, ms since 1970, step
MetricRow = dict[str, float]


def sanitise_name(name: str) -> str:
    """Replace the characters that MLflow does not allow in a name: `pass@1` becomes `pass_at_1`."""
    name = re.sub(r"[^\w\-. /:]", "_", name.replace("@", "_at_"), flags=re.ASCII)
    return "/".join(part for part in name.split("/") if part not in ("", ".", ".."))[:NAME_CHARS]


def read(run_dir: Path) -> list[MetricRow]:
    """Return the rows of a run in step order, without an incomplete last line (left by a killed process)."""
    return disk.read_json_lines(run_dir / METRICS, "step")


class MetricsFile:
    """`metrics.jsonl`, open for writing: one row per step."""

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        """Keep only the rows up to `resume_step` (None: no rows), because later steps are trained and measured again."""
        path = run_dir / METRICS
        self.rows = [row for row in read(run_dir) if resume_step is not None and row["step"] <= resume_step]
        lines = [_line(row) for row in self.rows]
        disk.write_atomically(path, "".join(lines))
        self.file = path.open("r+b")
        self.end = self.file.seek(0, os.SEEK_END)
        self.start = self.end - (len(lines[-1]) if lines else 0)  # byte offset of the last row

    def add(self, step: int, metrics: Mapping[str, float | None]) -> list[MetricPoint]:
        """Write the new metrics of a step and return them. The first value of a metric at a step is kept, as in MLflow."""
        fresh = {sanitise_name(name): float(value) for name, value in metrics.items() if value is not None}
        if not self.rows or self.rows[-1]["step"] != step:
            assert not self.rows or self.rows[-1]["step"] < step, f"step {step} after step {self.rows[-1]['step']}"
            self.rows.append({"step": step, LOGGED_AT: round(time.time() * 1000)})
            self.start = self.end
        row = self.rows[-1]
        fresh = {name: value for name, value in fresh.items() if name not in row}
        row.update(fresh)
        self.file.seek(self.start)  # overwrite the row in place with the longer row: the file always has it
        self.file.write(_line(row).encode())
        self.file.flush()
        self.end = self.file.tell()
        return [(name, value, int(row[LOGGED_AT]), step) for name, value in fresh.items()]

    def sync(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())


def points(rows: Iterable[MetricRow]) -> list[MetricPoint]:
    return [
        (name, value, int(row[LOGGED_AT]), int(row["step"]))
        for row in rows
        for name, value in row.items()
        if name not in ("step", LOGGED_AT)
    ]


def _line(row: MetricRow) -> str:
    return json.dumps(row) + "\n"
