"""What was played, on disk: `episodes.parquet`, one row per episode, with every response of those that are kept in full.

While a run lives the rows stand in parts, one per checkpoint, so that a kill costs no more than the steps it costs anyway.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aem_exp.rollout import Response, Trajectory

Record = dict[str, Any]


def record(step: int, split: str, trajectory: Trajectory, in_full: bool) -> Record:
    """One episode; `in_full` keeps what was said, not only how it went. `step`: steps trained before it was played."""
    turns = trajectory.responses
    return {
        "step": step,
        "split": split,
        "task": trajectory.task.id,
        "kind": trajectory.task.kind,
        "draw": trajectory.draw,
        "member": trajectory.member,
        "won": trajectory.won,
        "return": trajectory.ret,
        "ended": trajectory.ended,
        "error": trajectory.error,
        "turns": len(turns),
        "tokens": trajectory.tokens,
        "response_entropy": sum(r.entropy for r in turns) / len(turns) if turns else None,
        "responses": [_said(r) for r in turns] if in_full else None,
    }


def _said(response: Response) -> Record:
    names = ("observation", "text", "reward", "valid", "entropy", "alpha", "advantage")
    return {name: getattr(response, name) for name in names}


class Episodes:
    """The episodes of a run, written part by part."""

    def __init__(self, run_dir: Path, resume_step: int | None):
        self.file, self._parts = run_dir / "episodes.parquet", run_dir / "episodes"
        self._parts.mkdir(parents=True, exist_ok=True)
        self._waiting: list[Record] = []
        for part in self._parts.glob("*.parquet"):
            if resume_step is None or int(part.stem) > resume_step:
                part.unlink()

    def add(self, records: Sequence[Record]) -> None:
        self._waiting += records

    def write(self, step: int) -> None:
        """Put what was played up to this step on disk; call it where a checkpoint is saved."""
        import pyarrow.parquet

        part = self._parts / f"{step:07d}.parquet"
        pyarrow.parquet.write_table(self._table(), part.with_suffix(".part"))
        os.replace(part.with_suffix(".part"), part)

    def finish(self) -> Path:
        """Join the parts, and what was played since the last of them."""
        import pyarrow.parquet

        with pyarrow.parquet.ParquetWriter(self.file.with_suffix(".part"), _schema(), compression="zstd") as writer:
            for part in sorted(self._parts.glob("*.parquet")):
                writer.write_table(pyarrow.parquet.read_table(part, schema=_schema()))
            writer.write_table(self._table())
        os.replace(self.file.with_suffix(".part"), self.file)
        return self.file

    def forget(self) -> None:
        """Drop the parts; only once the result is written, or a kill in between would cost them."""
        shutil.rmtree(self._parts)

    def _table(self) -> Any:
        import pyarrow

        records, self._waiting = self._waiting, []
        return pyarrow.Table.from_pylist(records, schema=_schema())


def _schema() -> Any:
    import pyarrow as pa

    text, number, count = pa.string(), pa.float64(), pa.int64()
    response = pa.struct(
        {
            "observation": text,
            "text": text,
            "reward": number,
            "valid": pa.bool_(),
            "entropy": number,
            "alpha": number,
            "advantage": number,
        }
    )
    return pa.schema(
        {
            "step": count,
            "split": text,
            "task": text,
            "kind": text,
            "draw": count,
            "member": count,
            "won": number,
            "return": number,
            "ended": text,
            "error": text,
            "turns": count,
            "tokens": count,
            "response_entropy": number,
            "responses": pa.list_(response),
        }
    )
