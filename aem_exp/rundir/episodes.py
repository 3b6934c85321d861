"""`episodes.parquet`: one row per episode of a run. A few selected episodes also keep all their responses.

An active run writes its rows in parts, one part per checkpoint.
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
_MAGIC = b"PAR1"  # first and last bytes of a Parquet file


def build_record(step: int, split: str, trajectory: Trajectory, in_full: bool) -> Record:
    """Build the row of an episode.

    Args:
        step: number of trained steps before the episode was played.
        in_full: include the responses.
    """
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
    """Writes the episodes of a run, in parts."""

    def __init__(self, run_dir: Path, resume_step: int | None):
        self.file, self._parts = run_dir / FILE, run_dir / PARTS
        self._parts.mkdir(parents=True, exist_ok=True)
        self._waiting: list[Record] = []
        for part in self._parts.glob("*.parquet"):
            if resume_step is None or int(part.stem) > resume_step:
                part.unlink()

    def add(self, records: Sequence[Record]) -> None:
        """Add rows to the next part."""
        self._waiting += records

    def write(self, step: int) -> None:
        """Write the rows added since the last part to disk. Call this when a checkpoint is saved."""
        import pyarrow.parquet

        part = self._parts / f"{step:07d}.parquet"
        pyarrow.parquet.write_table(self._table(), part.with_suffix(".part"), write_page_checksum=True)
        os.replace(part.with_suffix(".part"), part)

    def finish(self) -> Path:
        """Join the parts and the rows added since the last part into one file; return its path.

        A damaged part is left out with a warning, so that the run still gets its result.
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
        """Remove the parts. Call this after the result is written; a process killed earlier would lose the episodes."""
        shutil.rmtree(self._parts)

    def drop_damaged(self) -> Path | None:
        """Remove the first damaged part and all later parts; return the path of the damaged one, or None."""
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


# Reading.


def list_parts(run_dir: Path, step: int) -> list[Path]:
    """Return the parts of an active run that were written up to `step`."""
    return [part for part in sorted((run_dir / PARTS).glob("*.parquet")) if int(part.stem) <= step]


def read(file: Path, **options: Any) -> Any:
    """Read episodes as a pyarrow table and verify checksums. `options` are passed to pyarrow's `read_table`.

    Raises:
        DamagedFileError: the file cannot be read.
    """
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(file, page_checksum_verification=True, **options)
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged_error(file, error) from error


def check_file(file: Path) -> None:
    """Read the whole file to detect damage.

    Raises:
        DamagedFileError: the file cannot be read.
    """
    import pyarrow.parquet

    try:
        for _ in pyarrow.parquet.ParquetFile(file, page_checksum_verification=True).iter_batches():
            pass
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged_error(file, error) from error


def _damaged_error(file: Path, error: Exception) -> DamagedFileError:
    further = ", or remove it (episodes.parquet will then lack these episodes)" if file.parent.name == PARTS else ""
    return disk.damaged_file_error(file, error, further)


def describe_truncation(run_dir: Path) -> str:
    """Describe a truncated episodes.parquet; "" if it is whole or absent. Reads only the first and last bytes."""
    file = run_dir / FILE
    if not file.exists():
        return ""
    with file.open("rb") as data:
        begin, size = data.read(4), data.seek(0, os.SEEK_END)
        data.seek(max(0, size - 8))
        length, end = int.from_bytes(data.read(4), "little"), data.read(4)
    whole = begin == end == _MAGIC and length + 12 <= size
    return "" if whole else f"{FILE} is damaged (it is not a complete Parquet file)"
