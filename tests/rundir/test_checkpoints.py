"""A checkpoint that is no longer what was written is never resumed from; the older one is."""

import json
import logging
import shutil

import pytest
from support.runs import SMALL_RUN, read_metrics, run_here

from aem_exp.core.errors import ConfigError
from aem_exp.rundir import checkpoints


def saved(run_dir, number, step=None):
    """A checkpoint with a file in a folder, as sharded ones have."""
    folder = run_dir / f"checkpoint-{number}"
    (folder / "shards").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "shards" / "0.distcp").write_bytes(b"moments")
    checkpoints.mark_complete(folder, step or number, number, 1)
    return folder


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def remove(file):
    file.unlink()


DAMAGES = [
    ("model.safetensors", flip, "the content of model.safetensors has changed"),
    ("shards/0.distcp", flip, "the content of shards/0.distcp has changed"),
    ("model.safetensors", cut, "model.safetensors has 10,239 bytes instead of 10,240"),
    ("shards/0.distcp", remove, "shards/0.distcp is missing"),
    ("step.json", cut, "step.json cannot be read"),
]


@pytest.mark.parametrize(("name", "harm", "said"), DAMAGES, ids=[said for *_, said in DAMAGES])
def test_the_older_one_counts_where_the_newest_is_damaged(tmp_path, name, harm, said):
    older, newer = saved(tmp_path, 2), saved(tmp_path, 4)
    assert checkpoints.find_newest(tmp_path) == newer and not checkpoints.set_aside_damaged(tmp_path)
    harm(newer / name)
    assert checkpoints.describe_damage(newer).startswith(said) and not checkpoints.describe_damage(older)
    (sentence,) = checkpoints.set_aside_damaged(tmp_path)
    assert said in sentence and "damaged-checkpoint-4" in sentence
    assert checkpoints.find_newest(tmp_path) == older and checkpoints.steps(older) == 2
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]  # transformers counts these
    saved(tmp_path, 4)
    flip(tmp_path / "checkpoint-4" / name if name != "step.json" else tmp_path / "checkpoint-4/model.safetensors")
    assert len(checkpoints.set_aside_damaged(tmp_path)) == 1  # a second time


def test_where_none_is_left_nothing_is_trained_anew(tmp_path):
    for number in (2, 4):
        cut(saved(tmp_path, number) / "model.safetensors")
    for _ in range(2):  # also when it is asked again
        with pytest.raises(ConfigError, match=r"no checkpoint of it is undamaged \(checkpoint-4: .*; checkpoint-2: "):
            checkpoints.set_aside_damaged(tmp_path)


def test_those_of_older_versions_count(tmp_path):
    folder = saved(tmp_path, 4)
    (folder / "step.json").write_text(json.dumps({"step": 3}))
    flip(folder / "model.safetensors")
    assert not checkpoints.set_aside_damaged(tmp_path) and checkpoints.find_newest(tmp_path) == folder
    assert (checkpoints.steps(folder), checkpoints.updates(folder)) == (3, 4)


@pytest.fixture
def begun(unbroken, tmp_path, monkeypatch):
    """A run as it was before its end: with two checkpoints, the newest of them damaged; and its parent."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "off")
    copy = shutil.copytree(unbroken[0], tmp_path / "out" / unbroken[0].name)
    for name in ("result.json", "model", "tracking.json", "run.lock"):
        path = copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return copy


def test_a_run_goes_on_from_the_older_one_and_ends_alike(begun, unbroken, cache, caplog):
    newest = checkpoints.list_complete(begun)[0]
    flip(newest / "optimizer.pt")
    with caplog.at_level(logging.WARNING):
        folder = run_here(cache, begun.parent, *SMALL_RUN)
    assert folder == begun
    assert f"{newest.name} is damaged (the content of optimizer.pt has changed)" in caplog.text
    assert len([record for record in caplog.records if "damaged" in record.message]) == 1
    assert read_metrics(folder) == read_metrics(unbroken[0])
    weights = "model/model.safetensors"
    assert (folder / weights).read_bytes() == (unbroken[0] / weights).read_bytes()


def test_a_run_whose_checkpoints_are_all_damaged_says_so(begun, cache):
    for checkpoint in checkpoints.list_complete(begun):
        flip(checkpoint / "optimizer.pt")
    with pytest.raises(ConfigError, match="no checkpoint of it is undamaged"):
        run_here(cache, begun.parent, *SMALL_RUN)


def test_a_damaged_end_is_not_continued(unbroken, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "off")
    parent = shutil.copytree(unbroken[0], tmp_path / unbroken[0].name)
    cut(checkpoints.list_complete(parent)[0] / "model.safetensors")
    with pytest.raises(ConfigError, match=r"its last checkpoint is damaged: model\.safetensors has"):
        run_here(cache, tmp_path / "out", f"from={parent}", "trainer.steps=8")
    assert not list((tmp_path / "out").glob("*/checkpoint-*"))
