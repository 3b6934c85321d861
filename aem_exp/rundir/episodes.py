"""`episodes.parquet`: one row per episode of a run, with all responses of a selected few, and a sample of it as readable
Markdown.

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


def select_examples(run_dir: Path, tasks: int = 3, members: int = 3) -> list[dict[str, Any]]:
    """Choose episodes to read: held-out tasks before and after training, then members of the last trained group."""
    file = run_dir / FILE
    files = [file] if file.exists() else sorted((run_dir / PARTS).glob("*.parquet"))
    if not files:
        return []
    import pyarrow.compute

    in_full = pyarrow.compute.field("responses").is_valid()
    rows = [row for part in files for row in read(part, filters=in_full).to_pylist()]
    held_out = [row for row in rows if row["split"] != "train" and row["member"] == 0]
    trained = [row for row in rows if row["split"] == "train"]
    first = min((row["step"] for row in held_out), default=0)
    chosen = list(dict.fromkeys(row["task"] for row in held_out if row["step"] == first))[:tasks]
    last = max((row["step"] for row in held_out), default=0)
    pairs = [row for task in chosen for row in held_out if row["task"] == task and row["step"] in (first, last)]
    newest = max((row["step"] for row in trained), default=0)
    return pairs + [row for row in trained if row["step"] == newest][:members]


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Write episodes for reading: observations, responses, rewards, and how sure the policy was."""
    about = (
        "Entropy is the mean over a response's tokens, in nats; alpha is what the advantage of the response was "
        "multiplied by (absent where nothing was trained on the episode).\n"
    )
    return "\n".join(["# Episodes\n", about, *(_episode_markdown(row) for row in rows)])


def _episode_markdown(row: dict[str, Any]) -> str:
    outcome = "won" if row.get("won") else "not won"
    ended = {"over": "", "turns": ", out of turns", "context": ", out of context"}.get(
        row["ended"], f", {row['ended']}"
    )
    facts = f"{outcome}{ended}, return {row['return']:g}, after {row['step']} steps of training"
    error = f"\n{_code_block(row['error'])}" if row.get("error") else ""
    turns = (_turn_markdown(number, response) for number, response in enumerate(row.get("responses") or [], start=1))
    goal = [f"{_block_quote(row['goal'])}\n"] if row.get("goal") else []
    return "\n".join([f"## {row['split']}: {row['task']}\n", *goal, f"**{facts}**\n{error}", *turns])


def _turn_markdown(number: int, response: dict[str, Any]) -> str:
    alpha = response.get("alpha")
    facts = [
        f"reward {response['reward']:g}",
        *([f"entropy {response['entropy']:.3f}"] if response["entropy"] is not None else []),
        *([f"alpha {alpha:.3f}"] if alpha is not None else []),
        *([] if response.get("valid", True) else ["invalid"]),
    ]
    observation, text = _block_quote(response["observation"]), _code_block(response["text"])
    return f"### Turn {number}: {', '.join(facts)}\n\n{observation}\n\n{text}\n"


def _block_quote(text: str, max_characters: int = 2000) -> str:
    return "\n".join(f"> {line}" for line in _truncate(text, max_characters).splitlines())


def _code_block(text: str, max_characters: int = 4000) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{_truncate(text, max_characters)}\n{fence}"


def _truncate(text: str, max_characters: int) -> str:
    more = len(text) - max_characters
    return text if more <= 0 else f"{text[:max_characters]}… ({more} more characters)"
