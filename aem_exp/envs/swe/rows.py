"""Reads rows of SWE-bench (version 5) and R2E-Gym data sets, and parses them into instances."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

from aem_exp.core import disk, extras
from aem_exp.core.errors import ConfigError, MissingResource
from aem_exp.envs.swe import git_objects
from aem_exp.envs.swe.protected import is_test
from aem_exp.sandboxes import PATH, Image

Format = Literal["swebench", "r2e"]
SWEBENCH_COLUMNS: Final = (
    *("instance_id", "repo", "version", "base_commit", "problem_statement", "patch", "image"),
    *("FAIL_TO_PASS", "PASS_TO_PASS", "eval_script", "log_parser", "eval_type"),
)
R2E_COLUMNS: Final = ("repo_name", "docker_image", "commit_hash", "problem_statement", "expected_output_json")
GOLD_COLUMN: Final = "parsed_commit_content"  # of R2E-Gym, with the gold patch; optional
CONDA_PATH: Final = "/opt/miniconda3/envs/testbed/bin:/opt/miniconda3/bin"  # in SWE-bench's images
VENV_PATH: Final = "/testbed/.venv/bin:/root/.venv/bin:/root/.local/bin:/root/.cargo/bin"  # in R2E-Gym's images
# R2E-Gym's images contain the tests that grade a patch. They are removed from an agent's sandbox.
HIDE_TESTS_SCRIPT: Final = (
    "rm -rf /testbed/run_tests.sh /testbed/r2e_tests /r2e_tests /run_tests.sh /root/run_tests.sh /root/r2e_tests"
)
MAX_ROW_CHARACTERS: Final = 4_000_000  # longest row


@dataclass(frozen=True)
class Instance:
    """A repository with an issue to solve."""

    id: str
    kind: str
    statement: str
    """The issue."""
    image: Image
    setup_script: str
    """A script that prepares a fresh sandbox for the agent."""
    setup_input: bytes
    """The stdin of `setup_script`."""
    gold_patch: str
    """The patch that solves the issue; empty if unknown."""
    format: Format
    row: Mapping[str, Any]
    """The original row, which grading needs."""


def parse_instance(row: Mapping[str, Any], where: str) -> Instance:
    """The instance of a row.

    Raises:
        ConfigError: a column is missing or malformed. `where` names the row in the error.
    """
    format: Format = "swebench" if "instance_id" in row else "r2e"
    columns = SWEBENCH_COLUMNS if format == "swebench" else R2E_COLUMNS
    if missing := [name for name in columns if not isinstance(row.get(name), str | list) or row[name] == ""]:
        remedy = f"has no {', '.join(missing)}; rows must be in the format of SWE-bench (version 5 or later) or R2E-Gym"
        raise ConfigError("env.make", where, remedy)
    if sum(len(value) for value in row.values() if isinstance(value, str)) > MAX_ROW_CHARACTERS:
        raise ConfigError("env.make", where, f"the row is longer than {MAX_ROW_CHARACTERS:,} characters")
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
        gold_patch=_r2e_gold(row.get(GOLD_COLUMN)),
        format="r2e",
        row=row,
    )


def _r2e_gold(content: Any) -> str:
    """The changes of a commit to files that are not tests, as a patch; empty if the row does not contain them."""
    try:
        files = json.loads(content)["file_diffs"]
        changes = [(f["header"]["file"]["path"], f["old_file_content"], f["new_file_content"]) for f in files]
        return "".join(git_objects.diff(*change) for change in changes if not is_test(change[0]))
    except (TypeError, ValueError, KeyError, AttributeError):
        return ""


def _r2e_id(repo: str, commit: str) -> str:
    return f"{repo}-{commit[:12]}"


def _parse_json(value: Any, kind: type, name: str, where: str) -> Any:
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        parsed = None
    if not isinstance(parsed, kind):
        raise ConfigError("env.make", where, f"its {name} is not a JSON {'list' if kind is list else 'object'}")
    return parsed


class Rows(Sequence[Mapping[str, Any]]):
    """The rows of a data set. They stay on disk.

    Args:
        source: hub id, or a `.jsonl` or `.parquet` file.
        split, revision: of a hub data set.
        field: the setting of `source`, for errors.
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
                f"has the columns {', '.join(rows.column_names)}; rows must be in the format of SWE-bench version 5"
            )
            raise ConfigError(field, source, f"{remedy} (with image, eval_script and log_parser) or R2E-Gym")
        more = [name for name in (GOLD_COLUMN,) if name in rows.column_names and needed is R2E_COLUMNS]
        self._rows = rows.select_columns([*needed, *more])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return self._rows[index]

    @cached_property
    def ids(self) -> list[str]:
        """The id of each row. This is fast because no other column is read."""
        if "instance_id" in self._rows.column_names:
            return list(self._rows["instance_id"])
        return list(map(_r2e_id, self._rows["repo_name"], self._rows["commit_hash"]))

    def images(self, indices: Sequence[int]) -> list[str]:
        names = self._rows["image" if "image" in self._rows.column_names else "docker_image"]
        return [names[index] for index in indices]


def digest(row: Mapping[str, Any]) -> str:
    """A hash of the columns that decide how a task plays. The gold patch of R2E-Gym is not one of them."""
    played = {name: value for name, value in row.items() if name != GOLD_COLUMN}
    return hashlib.sha256(json.dumps(played, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _is_file(source: str) -> bool:
    return source.endswith((".jsonl", ".json", ".parquet")) or Path(source).expanduser().exists()


def _load_file(path: Path, field: str) -> Any:
    extras.require_training(field, str(path), "reading its rows", ["datasets"])
    import datasets

    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(path.suffix)
    if kind is None or not path.is_file():
        raise MissingResource(field, str(path), "this .jsonl or .parquet file does not exist")
    try:
        return datasets.load_dataset(kind, data_files=str(path), split="train")
    except Exception as error:  # of datasets, or of the readers that it uses
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise ConfigError(field, str(path), f"cannot be read ({reason})") from error


def _cached_file(source: str, split: str, revision: str | None) -> Path:
    """The file in which `fetch` saves the needed columns of a hub data set. Compute nodes do not use the hub."""
    name = "-".join([source.replace("/", "--"), split, *([revision[:12]] if revision else [])])
    return disk.cache_dir() / "rows" / name / "rows.parquet"


def _load_hub(source: str, split: str, revision: str | None, field: str) -> Any:
    if not (file := _cached_file(source, split, revision)).is_file():
        remedy = f"its split {split} is not on this machine; run python -m aem_exp.prepare with the same arguments"
        raise MissingResource(field, source, remedy)
    return _load_file(file, field)


def fetch(source: str, split: str, revision: str | None, field: str, say: Callable[[str], None]) -> None:
    """Download a hub data set into the cache. The hub's own library checks the files and resumes downloads."""
    file = _cached_file(source, split, revision)
    if _is_file(source) or file.is_file():
        return
    extras.require_training(field, source, "downloading it", ["datasets"])
    import datasets

    say(f"fetch   {source} ({split})")
    try:
        rows = datasets.load_dataset(source, split=split, revision=revision)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise MissingResource(field, source, f"download failed ({reason}); check the network connection") from error
    with disk.create_folder_once(file.parent) as part:
        if part is not None:
            rows.select_columns(
                [n for n in rows.column_names if n in {*SWEBENCH_COLUMNS, *R2E_COLUMNS, GOLD_COLUMN}]
            ).to_parquet(str(part / file.name))
