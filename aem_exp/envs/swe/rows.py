"""Parses rows of SWE-bench (version 5) and R2E-Gym data sets into instances: what the agent is given, and what its patch
is graded by.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

from aem_exp.core import disk, extras
from aem_exp.core.errors import ConfigError, MissingResource
from aem_exp.sandboxes import PATH, Image

Format = Literal["swebench", "r2e"]
SWEBENCH_COLUMNS: Final = (
    *("instance_id", "repo", "version", "base_commit", "problem_statement", "patch", "image"),
    *("FAIL_TO_PASS", "PASS_TO_PASS", "eval_script", "log_parser", "eval_type"),
)
R2E_COLUMNS: Final = ("repo_name", "docker_image", "commit_hash", "problem_statement", "expected_output_json")
CONDA_PATH: Final = "/opt/miniconda3/envs/testbed/bin:/opt/miniconda3/bin"  # of SWE-bench's images
VENV_PATH: Final = "/testbed/.venv/bin:/root/.venv/bin:/root/.local/bin:/root/.cargo/bin"  # of R2E-Gym's
# The tests that a patch is graded by lie in R2E-Gym's images: an agent's sandbox has none of them.
HIDE_TESTS_SCRIPT: Final = (
    "rm -rf /testbed/run_tests.sh /testbed/r2e_tests /r2e_tests /run_tests.sh /root/run_tests.sh /root/r2e_tests"
)
MAX_ROW_CHARACTERS: Final = 4_000_000  # characters of a row that is read


@dataclass(frozen=True)
class Instance:
    """A repository with an issue to solve."""

    id: str
    kind: str
    statement: str
    """The issue."""
    image: Image
    setup_script: str
    """Prepares a fresh sandbox for the agent."""
    setup_input: bytes
    """The stdin of `setup_script`."""
    gold_patch: str
    """The patch that solved the issue; empty if unknown."""
    format: Format
    row: Mapping[str, Any]
    """The row as it was read, which grading needs."""


def parse_instance(row: Mapping[str, Any], where: str) -> Instance:
    """The instance of a row.

    Raises:
        ConfigError: it has not what it should; `where` says which row of what it is.
    """
    format: Format = "swebench" if "instance_id" in row else "r2e"
    columns = SWEBENCH_COLUMNS if format == "swebench" else R2E_COLUMNS
    if absent := [name for name in columns if not isinstance(row.get(name), str | list) or row[name] == ""]:
        remedy = f"has no {', '.join(absent)}; rows must be SWE-bench's of version 5 or later, or R2E-Gym's"
        raise ConfigError("env.make", where, remedy)
    if sum(len(value) for value in row.values() if isinstance(value, str)) > MAX_ROW_CHARACTERS:
        raise ConfigError("env.make", where, f"is longer than {MAX_ROW_CHARACTERS:,} characters")
    return _parse_swebench(row, where) if format == "swebench" else _parse_r2e(row, where)


def _parse_swebench(row: Mapping[str, Any], where: str) -> Instance:
    for name in ("FAIL_TO_PASS", "PASS_TO_PASS"):
        _parse_json(row[name], list, name, where)
    return Instance(
        id=row["instance_id"],
        kind=row["repo"],
        statement=row["problem_statement"],
        image=Image(row["image"], env={"PATH": f"{CONDA_PATH}:{PATH}"}),
        setup_script="",
        setup_input=b"",
        gold_patch=row["patch"],
        format="swebench",
        row=row,
    )


def _parse_r2e(row: Mapping[str, Any], where: str) -> Instance:
    _parse_json(row["expected_output_json"], dict, "expected_output_json", where)
    head, mark, rest = row["problem_statement"].partition("[ISSUE]")
    return Instance(
        id=_r2e_id(row["repo_name"], row["commit_hash"]),
        kind=row["repo_name"],
        statement=(rest.partition("[/ISSUE]")[0] if mark else head).strip(),
        image=Image(row["docker_image"], env={"PATH": f"{VENV_PATH}:{PATH}"}),
        setup_script=HIDE_TESTS_SCRIPT,
        setup_input=b"",
        gold_patch="",
        format="r2e",
        row=row,
    )


def _r2e_id(repo: str, commit: str) -> str:
    return f"{repo}-{commit[:12]}"


def _parse_json(value: Any, kind: type, name: str, where: str) -> Any:
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        parsed = None
    if not isinstance(parsed, kind):
        raise ConfigError("env.make", where, f"its {name} is no JSON {'list' if kind is list else 'object'}")
    return parsed


class Rows(Sequence[Mapping[str, Any]]):
    """The rows of a data set, on disk and not in memory.

    Args:
        source: hub id, or a file of `.jsonl` or `.parquet`.
        split: of a hub data set.
        revision: of a hub data set.
        field: the setting that named it.
    """

    def __init__(self, source: str, split: str, revision: str | None, field: str):
        self.source = source
        rows = (
            _load_file(Path(source).expanduser(), field)
            if _is_file(source)
            else _load_hub(source, split, revision, field)
        )
        needed = next(
            (columns for columns in (SWEBENCH_COLUMNS, R2E_COLUMNS) if set(columns) <= set(rows.column_names)), None
        )
        if needed is None:
            remedy = (
                f"has the columns {', '.join(rows.column_names)}; rows must be SWE-bench's of version 5, with image,"
            )
            raise ConfigError(field, source, f"{remedy} eval_script and log_parser, or R2E-Gym's")
        self._rows = rows.select_columns(list(needed))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    @cached_property
    def ids(self) -> list[str]:
        """What names each row: quick, as no other column is read."""
        if "instance_id" in self._rows.column_names:
            return list(self._rows["instance_id"])
        return list(map(_r2e_id, self._rows["repo_name"], self._rows["commit_hash"]))

    def images(self, indices: Sequence[int]) -> list[str]:
        names = self._rows["image" if "image" in self._rows.column_names else "docker_image"]
        return [names[index] for index in indices]


def digest(row: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(row), sort_keys=True, default=str).encode()).hexdigest()[:16]


def _is_file(source: str) -> bool:
    return source.endswith((".jsonl", ".json", ".parquet")) or Path(source).expanduser().exists()


def _load_file(path: Path, field: str) -> Any:
    extras.require_training(field, str(path), "reading its rows", ["datasets"])
    import datasets

    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(path.suffix)
    if kind is None or not path.is_file():
        raise MissingResource(field, str(path), "there is no such file of .jsonl or .parquet")
    try:
        return datasets.load_dataset(kind, data_files=str(path), split="train")
    except Exception as error:  # datasets', and those of the readers below it
        why = " ".join(str(error.__cause__ or error).split())[:200]
        raise ConfigError(field, str(path), f"cannot be read ({why})") from error


def _cached_file(source: str, split: str, revision: str | None) -> Path:
    """Where `fetch` puts the columns of a hub data set that are read: nodes ask the hub for nothing."""
    name = "-".join([source.replace("/", "--"), split, *([revision[:12]] if revision else [])])
    return disk.cache_dir() / "rows" / name / "rows.parquet"


def _load_hub(source: str, split: str, revision: str | None, field: str) -> Any:
    if not (file := _cached_file(source, split, revision)).is_file():
        remedy = f"its split {split} is not on this machine: python -m aem_exp.prepare, with the same words, fetches it"
        raise MissingResource(field, source, remedy)
    return _load_file(file, field)


def fetch(source: str, split: str, revision: str | None, field: str, say: Callable[[str], None]) -> None:
    """Bring a hub data set here; its files are checked and resumed by the hub's own library."""
    file = _cached_file(source, split, revision)
    if _is_file(source) or file.is_file():
        return
    extras.require_training(field, source, "fetching it", ["datasets"])
    import datasets

    say(f"fetch   {source} ({split})")
    try:
        rows = datasets.load_dataset(source, split=split, revision=revision)
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise MissingResource(field, source, f"the hub does not give it ({why}); is there a network here?") from error
    with disk.create_folder_once(file.parent) as part:
        if part is not None:
            rows.select_columns([n for n in rows.column_names if n in {*SWEBENCH_COLUMNS, *R2E_COLUMNS}]).to_parquet(
                str(part / file.name)
            )
