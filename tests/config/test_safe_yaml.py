"""Malformed YAML in configs, sweeps and overrides: each gives one sentence; nothing hangs, and no secret is shown."""

import os

import pytest

from aem_exp.__main__ import main
from aem_exp.config import load
from aem_exp.config.compose import Composer
from aem_exp.core.errors import ConfigError
from aem_exp.sweep import question

SECRET = "hunter2-of-the-environment"

pytestmark = pytest.mark.usefixtures("clean")


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    monkeypatch.setenv("AEM_TEST_SECRET", SECRET)


def billion_laughs(levels=9):
    """Aliases that expand exponentially: each list contains the previous one nine times."""
    lines = ["a0: &a0 [x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines)


BAD = {  # text of the file, and a fact that the error must state
    "itself": (b"a: &a [*a]", "*a"),
    "itself in a mapping": (b"a: &a {b: {c: *a}}", "*a"),
    "merged": (b"a: &a\n  <<: *a", "*a"),
    "laughs": (billion_laughs().encode(), "20,000"),
    "wide": (b"a: [" + b"x, " * 30_000 + b"]", "20,000"),
    "digits": (b"seed: " + b"1" * 5000, "digits"),
    "digits apart": (b"seed: " + b"1_" * 5000 + b"1", "Exceeds the limit"),
    "hexadecimal": (b"seed: 0x" + b"f" * 5000, "at most"),
    "latin": (b"name: caf\xe9", "UTF-8"),
    "utf-16": ("name: x".encode("utf-16"), "UTF-8"),
    "binary": (b"\0\1\2\3", "YAML"),
    "deep": (b"a: " + b"[" * 3000 + b"]" * 3000, "nest"),
    "deep, barely": (b"a: " + b"[" * 60 + b"]" * 60, "50"),
    "deep blocks": (b"".join(b" " * i + b"a:\n" for i in range(900)), "50"),
    "environment": (b"name: x-${oc.env:AEM_TEST_SECRET}", "${...}"),
    "environment within": (b"name: x-${${oc.env:X}:AEM_TEST_SECRET}", "${...}"),
    "large": (b"a: 1\n" + b"# x\n" * 400_000, "1 MB"),
    "tag": (b"name: !!python/object/apply:os.system [true]", "system"),
    "twice": (b"name: a\nname: b", ""),
    "open": (b"a: [", "YAML"),
    "scalar": (b"just words", ""),
}


def folder_with(tmp_path, content):
    """A folder for --config-dir with this text as its experiment `own`."""
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "own.yaml").write_bytes(b"# @package _global_\n" + content)
    return tmp_path / "mine"


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_config_gives_one_sentence(name, tmp_path, capsys):
    content, fact = BAD[name]
    folder = folder_with(tmp_path, content)
    assert main(["--config-dir", str(folder), "+experiment=own", "plan=true"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and fact in err and SECRET not in err
    assert len(err) < 1000
    with pytest.raises(ConfigError) as caught:
        Composer(folder).compose(["+experiment=own"])  # composes the cells of a sweep
        load(["+experiment=own"], folder)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("name", sorted(set(BAD) - {"hexadecimal"}))
def test_a_malformed_sweep_gives_one_sentence(name, tmp_path):
    content, fact = BAD[name]
    (tmp_path / "own.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        question.load(tmp_path / "own.yaml")
    assert "\n" not in str(caught.value) and fact in str(caught.value) and SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "fact"),
    [
        ("seed=" + "1" * 5000, "digits"),
        ("trainer.steps=1" + "0" * 30, "4,294,967,295"),
        ("evaluation.temperature=1" + "0" * 400, "at most"),
        ("env.make.receptacles=1" + "0" * 30, "at most"),
        ("env.make.x=" + "[" * 500 + "]" * 500, "50"),
        ("env.make.x=" + "{a:" * 500 + "1" + "}" * 500, "50"),
        ("name=${oc.env:AEM_TEST_SECRET}", "${...}"),
        ("name='x${oc.env:AEM_TEST_SECRET}'", "${...}"),
        ("name=${oc.decode:x}", "${...}"),
        ("+experiment=${oc.env:AEM_TEST_SECRET}", "${...}"),
        ("model=${oc.env:AEM_TEST_SECRET}", "${...}"),
        ("name=${seed}${name}", "Recursive"),
        ("name=${nowhere}", "not found"),
    ],
    ids=lambda text: text[:40],
)
def test_a_malformed_override_gives_one_sentence(override, fact, capsys):
    assert main([override, "plan=true"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and fact in err and SECRET not in err


def test_circular_defaults_give_one_sentence(tmp_path, capsys):
    folder = folder_with(tmp_path, b"defaults:\n- other\n- _self_\n")
    (folder / "experiment" / "other.yaml").write_text("# @package _global_\ndefaults:\n- own\n- _self_\n")
    assert main(["--config-dir", str(folder), "+experiment=own"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "defaults:" in err
    with pytest.raises(ConfigError) as caught:
        Composer(folder).compose(["+experiment=own"])
    assert caught.value.field == "config" and "defaults:" in caught.value.remedy


def test_an_environment_variable_in_defaults_is_not_shown(tmp_path, capsys):
    folder = folder_with(tmp_path, b"defaults:\n- override /model: ${oc.env:AEM_TEST_SECRET}\n- _self_\n")
    assert main(["--config-dir", str(folder), "+experiment=own"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "${...}" in err and SECRET not in err


@pytest.mark.parametrize("kind", ["fifo", "folder", "loop", "device", "gone"])
def test_a_path_that_is_no_file_gives_one_sentence(kind, tmp_path, capsys):
    folder = folder_with(tmp_path, b"")
    file = folder / "experiment" / "own.yaml"
    file.unlink()
    {
        "fifo": lambda: os.mkfifo(file),
        "folder": file.mkdir,
        "loop": lambda: file.symlink_to(file),
        "device": lambda: file.symlink_to("/dev/zero"),
        "gone": lambda: file.symlink_to("nowhere"),
    }[kind]()
    assert main(["--config-dir", str(folder), "+experiment=own"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert main(["--config-dir", str(folder), "--help"]) == 0
    with pytest.raises(ConfigError):
        question.load(file)


def test_help_reads_files_that_are_not_utf_8(tmp_path, capsys):
    folder = folder_with(tmp_path, b"# caf\xe9 au lait\n")
    assert main(["--config-dir", str(folder), "--help"]) == 0
    assert "au lait" in capsys.readouterr().out


def test_ordinary_yaml_is_accepted(tmp_path):
    folder = folder_with(tmp_path, b"modulation: {gate: 0.2}\nname: mine-${env.name}\nseed: !!int 3\n")
    experiment = load(["+experiment=own"], folder)
    assert (experiment.modulation.gate, experiment.name, experiment.seed) == (0.2, "mine-household", 3)
    (folder / "experiment" / "linked.yaml").symlink_to(folder / "experiment" / "own.yaml")
    assert load(["+experiment=linked"], folder).seed == 3, "a link to a file is a file"
    assert load(["env.prompt.first='{task}: {observation}'"]).env.prompt["first"] == "{task}: {observation}"
