"""Damaged files of a run directory: an error of one line or a reported gap, and no effect on other runs."""

import json
import logging
import shutil
import sys

import pytest

from aem_exp.cluster import run_state
from aem_exp.report import command as report
from aem_exp.run import command as run
from aem_exp.rundir import archive
from aem_exp.rundir.episodes import EpisodeWriter, check_file

pytestmark = pytest.mark.usefixtures("no_mlflow", "clean")


def garbage(file):
    file.write_bytes(b"\x00\xff" * 100)


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def wrong_type(file):
    file.write_text("[1, 2]\n")


def empty(file):
    file.write_text("{}\n")


def garbage_line(file):
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:2], b'{"step": \xff\x00\n', *lines[2:]]))


def corrupt_won_column(file):
    """Change some bytes of the column `won` of episodes.parquet; only checksums can detect this."""
    column = next(column for column in iterate_columns(file) if column.path_in_schema == "won")
    content = bytearray(file.read_bytes())
    end = (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size
    content[end - 4 : end] = bytes(~byte % 256 for byte in content[end - 4 : end])
    file.write_bytes(content)


def iterate_columns(file):
    """Yield the column chunks of the last row group first, because it has the final panel."""
    import pyarrow.parquet

    groups = pyarrow.parquet.ParquetFile(file).metadata
    for group in reversed(range(groups.num_row_groups)):
        yield from (groups.row_group(group).column(i) for i in range(groups.num_columns))


@pytest.fixture
def copy(unbroken, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("AEM_CACHE", str(cache))
    return shutil.copytree(unbroken[0], tmp_path / "out" / unbroken[0].name)


@pytest.fixture
def unfinished(copy):
    """A copy of the same run as it was before its end."""
    (copy / "result.json").unlink()
    shutil.rmtree(copy / "model")
    (copy / "episodes").mkdir()
    shutil.move(copy / "episodes.parquet", copy / "episodes" / "0000002.parquet")
    return copy


def run_main(monkeypatch, capsys, folder):
    """Call `python -m aem_exp.run` in this process; return the exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["run", str(folder)])
    code = run.main()
    return code, *capsys.readouterr()


FINISHED = [  # file, damage, exit code of `run`, state in `status` if it is not done and intact
    ("metrics.jsonl", garbage_line, 0, "failed"),
    ("episodes.parquet", truncate, 0, "done"),
    ("episodes.parquet", corrupt_won_column, 0, None),
    ("tracking.json", garbage, 0, None),
    ("tracking.json", empty, 0, None),
    ("provenance.json", truncate, 2, None),
    ("provenance.json", empty, 2, None),
    ("result.json", truncate, 2, "failed"),
    ("experiment.json", truncate, 2, "failed"),
    ("experiment.json", garbage, 2, "failed"),
    ("experiment.json", wrong_type, 2, "failed"),
    ("attempts.jsonl", garbage_line, 0, "failed"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "damage", "code", "status"), FINISHED, ids=lambda v: getattr(v, "__name__", v))
def test_damaged_file_of_a_finished_run(copy, monkeypatch, capsys, name, damage, code, status):
    (copy / "tracking.json").exists() or (copy / "tracking.json").write_text("{}")
    damage(copy / name)
    actual_code, out, err = run_main(monkeypatch, capsys, copy)
    assert actual_code == code, err
    if name != "attempts.jsonl":  # the summary does not read it
        assert f"{name} is damaged" in (err if code else out)
    assert len(err.splitlines()) == bool(code)
    state = run_state.read([copy])[copy]
    assert state.what == (status or "done")
    assert (f"{name} is damaged" in state.sentence) == (status is not None)
    archived = report._read_run_dir(copy, state)
    if name == "tracking.json" or (name, damage) == ("provenance.json", empty):  # a report does not need it
        assert archived.what == "done"
    else:
        assert archived.what == ("failed" if name == "result.json" else "unreadable")
        assert f"{name} is damaged" in archived.why[1]


UNFINISHED = [
    ("before.json", truncate),
    ("before.json", empty),
    ("provenance.json", garbage),
    ("provenance.json", empty),
    ("metrics.jsonl", garbage_line),
    ("episodes/0000002.parquet", truncate),
    ("episodes/0000002.parquet", corrupt_won_column),
    ("tracking.json", garbage),
    ("experiment.json", truncate),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "damage"), UNFINISHED, ids=lambda v: getattr(v, "__name__", v))
def test_damaged_file_of_an_unfinished_run(unfinished, monkeypatch, capsys, name, damage):
    damage(unfinished / name)
    before = {file: file.read_bytes() for file in unfinished.rglob("*.safetensors")}
    code, _, err = run_main(monkeypatch, capsys, unfinished)
    assert code == 2, err
    (error,) = [line for line in err.splitlines() if line.startswith("aem_exp: ")]
    assert error.startswith("aem_exp: RUN_DIR=") and f"{name.rpartition('/')[2]} is damaged" in error
    assert {file: file.read_bytes() for file in before} == before


def test_damaged_run_does_not_hide_other_runs(copy, unbroken):
    garbage(copy / "experiment.json")
    (copy / "slurm.json").write_text("{")
    states = run_state.read([copy, unbroken[0]])
    assert [state.what for state in states.values()] == ["failed", "done"]


def test_damaged_part_is_left_out_with_a_warning(tmp_path, caplog):
    """The run still gets its result. An evaluation drops the damaged part and all later parts, and plays them again."""
    writer = EpisodeWriter(tmp_path, None)
    for step in (1, 2, 3):
        writer.add([{"step": step, "split": "train", "task": "t", "habits": [], "turns": 1}])
        writer.write(step)
    truncate(tmp_path / "episodes" / "0000002.parquet")
    with caplog.at_level(logging.WARNING):
        check_file(writer.finish())
    assert "episodes.parquet" in caplog.text and "0000002.parquet" in caplog.text
    import pandas as pd

    assert list(pd.read_parquet(tmp_path / "episodes.parquet").step) == [1, 3]
    damaged = writer.drop_damaged()
    assert damaged.name == "0000002.parquet"
    assert [part.name for part in (tmp_path / "episodes").glob("*")] == ["0000001.parquet"]
    assert writer.drop_damaged() is None


def test_incomplete_last_line_is_not_damage(copy):
    """A process that is killed while it writes leaves such a line."""
    file = copy / "metrics.jsonl"
    rows = len(file.read_text().splitlines())
    with file.open("a") as more:
        more.write('{"step": 7, "tra')
    assert run_state.read([copy])[copy].what == "done"
    assert len(json.dumps(archive.from_run_dir(copy, "done").curves["step"]).split(",")) == rows
