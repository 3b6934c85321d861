"""`episodes.parquet`: one row per episode of a run, with all responses of a selected few.

While a run is active, rows are written in one part per checkpoint.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aem_exp.core import disk
from aem_exp.core.disk import DamagedFileError

if TYPE_CHECKING:
    from aem_exp.rollout.types import Response, Trajectory

Record = dict[str, Any]
log = logging.getLogger("aem_exp")
FILE, PARTS = "episodes.parquet", "episodes"
_MAGIC = b"PAR1"  # a Parquet file begins and ends with it


def build_record(step: int, split: str, trajectory: Trajectory, in_full: bool) -> Record:
    """The row of an episode; `in_full`: with its responses. `step`: steps trained before it was played."""
    turns = trajectory.responses
    entropies = [r.entropy for r in turns if r.entropy is not None]
    return {
        "step": step,
        "split": split,
        "task": trajectory.task.id,
        "kind": trajectory.task.kind,
        "goal": trajectory.goal,
        "draw": trajectory.draw,
        "member": trajectory.member,
        "won": trajectory.won,
        "score": trajectory.score,
        "return": trajectory.ret,
        "ended": str(trajectory.ended),
        "error": trajectory.error,
        "turns": len(turns),
        "tokens": trajectory.tokens,
        "response_entropy": sum(entropies) / len(entropies) if entropies else None,
        "habits": list(trajectory.habits.items()),
        "responses": [_response_record(r) for r in turns] if in_full else None,
    }


def _response_record(response: Response) -> Record:
    names = ("observation", "text", "reward", "valid", "entropy", "alpha", "advantage")
    return {name: getattr(response, name) for name in names}


class EpisodeWriter:
    """The episodes of a run, written part by part."""

    def __init__(self, run_dir: Path, resume_step: int | None):
        self.file, self._parts = run_dir / FILE, run_dir / PARTS
        self._parts.mkdir(parents=True, exist_ok=True)
        self._waiting: list[Record] = []
        for part in self._parts.glob("*.parquet"):
            if resume_step is None or int(part.stem) > resume_step:
                part.unlink()

    def add(self, records: Sequence[Record]) -> None:
        """Take rows, which the next part will have."""
        self._waiting += records

    def write(self, step: int) -> None:
        """Put what was played up to this step on disk; call it where a checkpoint is saved."""
        import pyarrow.parquet

        part = self._parts / f"{step:07d}.parquet"
        pyarrow.parquet.write_table(self._table(), part.with_suffix(".part"), write_page_checksum=True)
        os.replace(part.with_suffix(".part"), part)

    def finish(self) -> Path:
        """Join the parts, and what was played since the last of them.

        A part that was damaged meanwhile is left out with a warning: at this point, it must not cost the run its result.
        """
        import pyarrow.parquet

        options: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
        with pyarrow.parquet.ParquetWriter(self.file.with_suffix(".part"), _schema(), **options) as writer:
            for part in sorted(self._parts.glob("*.parquet")):
                try:
                    table = read(part, schema=_schema())
                except DamagedFileError as error:
                    log.warning("%s lacks the episodes of %s: %s", FILE, part.name, error.remedy.partition(";")[0])
                    continue
                writer.write_table(table)
            writer.write_table(self._table())
        os.replace(self.file.with_suffix(".part"), self.file)
        return self.file

    def remove_parts(self) -> None:
        """Drop the parts; only once the result is written, or a kill in between would cost them."""
        shutil.rmtree(self._parts)

    def drop_damaged(self) -> Path | None:
        """Remove the first part that is damaged, and all that follow it; return the damaged one."""
        parts = sorted(self._parts.glob("*.parquet"))
        for number, part in enumerate(parts):
            try:
                check_file(part)
            except DamagedFileError:
                for removed in parts[number:]:
                    removed.unlink()
                return part
        return None

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
            "goal": text,
            "draw": count,
            "member": count,
            "won": number,
            "score": number,
            "return": number,
            "ended": text,
            "error": text,
            "turns": count,
            "tokens": count,
            "response_entropy": number,
            "habits": pa.map_(text, number),
            "responses": pa.list_(response),
        }
    )


# To read.


def list_parts(run_dir: Path, step: int) -> list[Path]:
    """The parts of a live run that were written up to a step."""
    return [part for part in sorted((run_dir / PARTS).glob("*.parquet")) if int(part.stem) <= step]


def read(file: Path, **options: Any) -> Any:
    """A pyarrow table of episodes, its checksums checked; `options`: of pyarrow's `read_table`.

    Raises:
        DamagedFileError: with its name.
    """
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(file, page_checksum_verification=True, **options)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged_error(file, error) from error


def check_file(file: Path) -> None:
    """Read all of a file to find damage.

    Raises:
        DamagedFileError: with its name.
    """
    import pyarrow.parquet

    try:
        for _ in pyarrow.parquet.ParquetFile(file, page_checksum_verification=True).iter_batches():
            pass
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged_error(file, error) from error


def _damaged_error(file: Path, error: Exception) -> DamagedFileError:
    further = ", or remove it: then the record lacks these episodes" if file.parent.name == PARTS else ""
    return disk.damaged_file_error(file, error, further)


def describe_truncation(run_dir: Path) -> str:
    """A sentence where the episodes of a run are no whole Parquet file, else ""; only the ends of the file are read."""
    file = run_dir / FILE
    if not file.exists():
        return ""
    with file.open("rb") as data:
        begin, size = data.read(4), data.seek(0, os.SEEK_END)
        data.seek(max(0, size - 8))
        length, end = int.from_bytes(data.read(4), "little"), data.read(4)
    whole = begin == end == _MAGIC and length + 12 <= size
    return "" if whole else f"{FILE} is damaged (it is no whole Parquet file)"
