"""Files of a run dir that are no longer what was written: one sentence or a named gap, and no other run's affair."""

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


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def other(file):
    file.write_text("[1, 2]\n")


def empty(file):
    file.write_text("{}\n")


def garbage_line(file):
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:2], b'{"step": \xff\x00\n', *lines[2:]]))


def scratched(file):
    """A record of episodes, of whose won tasks some bytes are lost; only checksums show that."""
    column = next(column for column in columns(file) if column.path_in_schema == "won")
    content = bytearray(file.read_bytes())
    end = (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size
    content[end - 4 : end] = bytes(~byte % 256 for byte in content[end - 4 : end])
    file.write_bytes(content)


def columns(file):
    """Of the last group of rows first: there the final panel is."""
    import pyarrow.parquet

    groups = pyarrow.parquet.ParquetFile(file).metadata
    for group in reversed(range(groups.num_row_groups)):
        yield from (groups.row_group(group).column(i) for i in range(groups.num_columns))


@pytest.fixture
def copy(unbroken, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("AEM_CACHE", str(cache))
    return shutil.copytree(unbroken[0], tmp_path / "out" / unbroken[0].name)


@pytest.fixture
def begun(copy):
    """The same run before its end."""
    (copy / "result.json").unlink()
    shutil.rmtree(copy / "model")
    (copy / "episodes").mkdir()
    shutil.move(copy / "episodes.parquet", copy / "episodes" / "0000002.parquet")
    return copy


def ask(monkeypatch, capsys, folder):
    """`python -m aem_exp.run` in this process: the exit code, and what it said."""
    monkeypatch.setattr(sys, "argv", ["run", str(folder)])
    code = run.main()
    return code, *capsys.readouterr()


FINISHED = [  # file, harm, exit code of `run`, what `status` says of it
    ("metrics.jsonl", garbage_line, 0, "failed"),
    ("episodes.parquet", cut, 0, "done"),
    ("episodes.parquet", scratched, 0, None),
    ("tracking.json", garbage, 0, None),
    ("tracking.json", empty, 0, None),
    ("provenance.json", cut, 2, None),
    ("provenance.json", empty, 2, None),
    ("result.json", cut, 2, "failed"),
    ("experiment.json", cut, 2, "failed"),
    ("experiment.json", garbage, 2, "failed"),
    ("experiment.json", other, 2, "failed"),
    ("attempts.jsonl", garbage_line, 0, "failed"),
]


@pytest.mark.parametrize(("name", "harm", "code", "what"), FINISHED, ids=lambda v: getattr(v, "__name__", v))
def test_of_a_finished_run(copy, monkeypatch, capsys, name, harm, code, what):
    (copy / "tracking.json").exists() or (copy / "tracking.json").write_text("{}")
    harm(copy / name)
    found, out, err = ask(monkeypatch, capsys, copy)
    assert found == code, err
    if name != "attempts.jsonl":  # a summary does not read it
        assert f"{name} is damaged" in (err if code else out)
    assert len(err.splitlines()) == bool(code)
    how = run_state.read([copy])[copy]
    assert how.what == (what or "done")
    assert (f"{name} is damaged" in how.sentence) == (what is not None)
    read = report._read_run_dir(copy, how)
    if name == "tracking.json" or (name, harm) == ("provenance.json", empty):  # a report does not need it
        assert read.what == "done"
    else:
        assert read.what == ("failed" if name == "result.json" else "unreadable")
        assert f"{name} is damaged" in read.why[1]


BEGUN = [
    ("before.json", cut),
    ("before.json", empty),
    ("provenance.json", garbage),
    ("provenance.json", empty),
    ("metrics.jsonl", garbage_line),
    ("episodes/0000002.parquet", cut),
    ("episodes/0000002.parquet", scratched),
    ("tracking.json", garbage),
    ("experiment.json", cut),
]


@pytest.mark.parametrize(("name", "harm"), BEGUN, ids=lambda v: getattr(v, "__name__", v))
def test_of_a_run_that_would_go_on(begun, monkeypatch, capsys, name, harm):
    harm(begun / name)
    before = {file: file.read_bytes() for file in begun.rglob("*") if file.is_file() and file.suffix == ".safetensors"}
    code, _, err = ask(monkeypatch, capsys, begun)
    assert code == 2, err
    (sentence,) = [line for line in err.splitlines() if line.startswith("aem_exp: ")]
    assert f"{name.rpartition('/')[2]} is damaged" in sentence and "restore it" in sentence
    assert {file: file.read_bytes() for file in before} == before


def test_one_damaged_run_hides_no_other(copy, unbroken):
    garbage(copy / "experiment.json")
    (copy / "slurm.json").write_text("{")
    states = run_state.read([copy, unbroken[0]])
    assert [how.what for how in states.values()] == ["failed", "done"]


def test_a_part_that_is_damaged_while_a_run_lives_costs_no_result(tmp_path, caplog):
    """It is left out, by name. What comes after a damaged part of an evaluation is played again."""
    record = EpisodeWriter(tmp_path, None)
    for step in (1, 2, 3):
        record.add([{"step": step, "split": "train", "task": "t", "habits": [], "turns": 1}])
        record.write(step)
    cut(tmp_path / "episodes" / "0000002.parquet")
    with caplog.at_level(logging.WARNING):
        check_file(record.finish())
    assert "episodes.parquet lacks the episodes of 0000002.parquet: " in caplog.text
    import pandas as pd

    assert list(pd.read_parquet(tmp_path / "episodes.parquet").step) == [1, 3]
    lost = record.drop_damaged()
    assert lost.name == "0000002.parquet"
    assert [part.name for part in (tmp_path / "episodes").glob("*")] == ["0000001.parquet"]
    assert record.drop_damaged() is None


def test_a_last_line_that_a_kill_cut_short_is_no_damage(copy):
    file = copy / "metrics.jsonl"
    rows = len(file.read_text().splitlines())
    with file.open("a") as more:
        more.write('{"step": 7, "tra')
    assert run_state.read([copy])[copy].what == "done"
    assert len(json.dumps(archive.from_run_dir(copy, "done").curves["step"]).split(",")) == rows
