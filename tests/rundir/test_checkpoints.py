"""A damaged checkpoint is never resumed from: the run resumes from the next older one."""

import json
import logging
import shutil

import pytest
from support.runs import SMALL_RUN, read_metrics, run_here

from aem_exp.core.errors import ConfigError
from aem_exp.rundir import checkpoints


def save_checkpoint(run_dir, number, step=None):
    """Write a complete checkpoint; one file is in a subfolder, as in sharded checkpoints."""
    folder = run_dir / f"checkpoint-{number}"
    (folder / "shards").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "shards" / "0.distcp").write_bytes(b"moments")
    checkpoints.mark_complete(folder, step or number, number, 1)
    return folder


def flip_bit(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def remove(file):
    file.unlink()


DAMAGES = [  # damaged file, damage, words of its description
    ("model.safetensors", flip_bit, ("content", "changed")),
    ("shards/0.distcp", flip_bit, ("content", "changed")),
    ("model.safetensors", truncate, ("10,239", "10,240")),
    ("shards/0.distcp", remove, ("missing",)),
    ("step.json", truncate, ("read",)),
]


@pytest.mark.parametrize(("name", "damage", "words"), DAMAGES)
def test_older_checkpoint_is_used_if_the_newest_is_damaged(tmp_path, name, damage, words):
    older, newer = save_checkpoint(tmp_path, 2), save_checkpoint(tmp_path, 4)
    assert checkpoints.find_newest(tmp_path) == newer and not checkpoints.set_aside_damaged(tmp_path)
    damage(newer / name)
    description = checkpoints.describe_damage(newer)
    assert all(word in description for word in (name, *words)) and not checkpoints.describe_damage(older)
    (sentence,) = checkpoints.set_aside_damaged(tmp_path)
    assert description in sentence and "damaged-checkpoint-4" in sentence
    assert checkpoints.find_newest(tmp_path) == older and checkpoints.steps(older) == 2
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]  # transformers counts these
    save_checkpoint(tmp_path, 4)
    flip_bit(tmp_path / "checkpoint-4" / name if name != "step.json" else tmp_path / "checkpoint-4/model.safetensors")
    assert len(checkpoints.set_aside_damaged(tmp_path)) == 1  # damaged-checkpoint-4 exists already


def test_all_checkpoints_damaged_is_an_error(tmp_path):
    """Training must not start from step 0 without notice."""
    for number in (2, 4):
        truncate(save_checkpoint(tmp_path, number) / "model.safetensors")
    for _ in range(2):  # nothing is renamed: the second call raises the same error
        with pytest.raises(ConfigError) as error:
            checkpoints.set_aside_damaged(tmp_path)
        assert (error.value.field, error.value.value) == ("RUN_DIR", str(tmp_path))
        assert "checkpoint-4: model.safetensors" in error.value.remedy
        assert "checkpoint-2: model.safetensors" in error.value.remedy


def test_checkpoints_of_older_versions_are_valid(tmp_path):
    """They have no checksums and no number of updates."""
    folder = save_checkpoint(tmp_path, 4)
    (folder / "step.json").write_text(json.dumps({"step": 3}))
    flip_bit(folder / "model.safetensors")
    assert not checkpoints.set_aside_damaged(tmp_path) and checkpoints.find_newest(tmp_path) == folder
    assert (checkpoints.steps(folder), checkpoints.updates(folder)) == (3, 4)


@pytest.fixture
def unfinished(unbroken, tmp_path, monkeypatch):
    """A copy of the finished run without its result: two complete checkpoints are left."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "off")
    copy = shutil.copytree(unbroken[0], tmp_path / "out" / unbroken[0].name)
    for name in ("result.json", "model", "tracking.json", "run.lock"):
        path = copy / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return copy


@pytest.mark.slow
def test_run_resumes_from_the_older_checkpoint_with_equal_results(unfinished, unbroken, cache, caplog):
    newest = checkpoints.list_complete(unfinished)[0]
    flip_bit(newest / "optimizer.pt")
    with caplog.at_level(logging.WARNING):
        folder = run_here(cache, unfinished.parent, *SMALL_RUN)
    assert folder == unfinished
    (warning,) = [record.message for record in caplog.records if "damaged" in record.message]
    assert newest.name in warning and "optimizer.pt" in warning
    assert read_metrics(folder) == read_metrics(unbroken[0])
    weights = "model/model.safetensors"
    assert (folder / weights).read_bytes() == (unbroken[0] / weights).read_bytes()


def test_run_with_only_damaged_checkpoints_is_not_started(unfinished, cache):
    damaged = checkpoints.list_complete(unfinished)
    for checkpoint in damaged:
        flip_bit(checkpoint / "optimizer.pt")
    with pytest.raises(ConfigError) as error:
        run_here(cache, unfinished.parent, *SMALL_RUN)
    assert error.value.field == "RUN_DIR"
    assert all(checkpoint.name in error.value.remedy for checkpoint in damaged)


def test_run_is_not_continued_from_a_damaged_last_checkpoint(unbroken, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "off")
    parent = shutil.copytree(unbroken[0], tmp_path / unbroken[0].name)
    truncate(checkpoints.list_complete(parent)[0] / "model.safetensors")
    with pytest.raises(ConfigError) as error:
        run_here(cache, tmp_path / "out", f"from={parent}", "trainer.steps=8")
    assert (error.value.field, error.value.value) == ("from", str(parent))
    assert "model.safetensors" in error.value.remedy
    assert not list((tmp_path / "out").glob("*/checkpoint-*"))
