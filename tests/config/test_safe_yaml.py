"""Malformed files of a user's: each is one sentence, in configs, in sweeps and in what is typed; nothing hangs or is shown."""

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


def laughs(levels=9):
    """Each list holds nine times the one before."""
    lines = ["a0: &a0 [x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)]
    return "\n".join(lines)


BAD = {  # text, what is said of it
    "itself": (b"a: &a [*a]", "holds itself: *a"),
    "itself in a mapping": (b"a: &a {b: {c: *a}}", "holds itself: *a"),
    "merged": (b"a: &a\n  <<: *a", "holds itself: *a"),
    "laughs": (laughs().encode(), "holds too much: more than 20,000 values"),
    "wide": (b"a: [" + b"x, " * 30_000 + b"]", "holds too much"),
    "digits": (b"seed: " + b"1" * 5000, "a number of more than a thousand digits"),
    "digits apart": (b"seed: " + b"1_" * 5000 + b"1", "is not YAML: Exceeds the limit"),
    "hexadecimal": (b"seed: 0x" + b"f" * 5000, "must be at most"),
    "latin": (b"name: caf\xe9", "must be UTF-8 text; byte"),
    "utf-16": ("name: x".encode("utf-16"), "must be UTF-8 text; byte"),
    "binary": (b"\0\1\2\3", "is not YAML"),
    "deep": (b"a: " + b"[" * 3000 + b"]" * 3000, "nest"),
    "deep, barely": (b"a: " + b"[" * 60 + b"]" * 60, "nested too deeply: more than 50 blocks"),
    "deep blocks": (b"".join(b" " * i + b"a:\n" for i in range(900)), "nested too deeply"),
    "environment": (b"name: x-${oc.env:AEM_TEST_SECRET}", "must not call a function in ${...}"),
    "environment within": (b"name: x-${${oc.env:X}:AEM_TEST_SECRET}", "must not call a function in ${...}"),
    "large": (b"a: 1\n" + b"# x\n" * 400_000, "is too large; such a file has at most 1 MB"),
    "tag": (b"name: !!python/object/apply:os.system [true]", "must not have tags"),
    "twice": (b"name: a\nname: b", ""),
    "open": (b"a: [", "is not YAML"),
    "scalar": (b"just words", ""),
}


def folder_with(tmp_path, content):
    """A folder for --config-dir, whose experiment `own` is this file."""
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "own.yaml").write_bytes(b"# @package _global_\n" + content)
    return tmp_path / "mine"


@pytest.mark.parametrize("name", BAD)
def test_a_config_is_one_sentence(name, tmp_path, capsys):
    content, said = BAD[name]
    folder = folder_with(tmp_path, content)
    assert main(["--config-dir", str(folder), "+experiment=own", "plan=true"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err and SECRET not in err
    assert len(err) < 1000
    with pytest.raises(ConfigError) as caught:
        Composer(folder).compose(["+experiment=own"])  # as the cells of a sweep
        load(["+experiment=own"], folder)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("name", sorted(set(BAD) - {"hexadecimal"}))
def test_a_sweep_is_one_sentence(name, tmp_path):
    content, said = BAD[name]
    (tmp_path / "own.yaml").write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        question.load(tmp_path / "own.yaml")
    assert "\n" not in str(caught.value) and said in str(caught.value) and SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=" + "1" * 5000, "a number of more than a thousand digits"),
        ("trainer.steps=1" + "0" * 30, "must be at most 4,294,967,295"),
        ("evaluation.temperature=1" + "0" * 400, "must be at most"),
        ("env.make.receptacles=1" + "0" * 30, "must be at most"),
        ("env.make.x=" + "[" * 500 + "]" * 500, "nested too deeply: more than 50 brackets"),
        ("env.make.x=" + "{a:" * 500 + "1" + "}" * 500, "nested too deeply"),
        ("name=${oc.env:AEM_TEST_SECRET}", "must not call a function in ${...}"),
        ("name='x${oc.env:AEM_TEST_SECRET}'", "must not call a function in ${...}"),
        ("name=${oc.decode:x}", "must not call a function in ${...}"),
        ("+experiment=${oc.env:AEM_TEST_SECRET}", "must not call a function in ${...}"),
        ("model=${oc.env:AEM_TEST_SECRET}", "must not call a function in ${...}"),
        ("name=${seed}${name}", "Recursive"),
        ("name=${nowhere}", "not found"),
    ],
    ids=lambda text: text[:40],
)
def test_what_is_typed_is_one_sentence(override, said, capsys):
    assert main([override, "plan=true"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err and SECRET not in err


def test_defaults_in_a_circle_are_one_sentence(tmp_path, capsys):
    folder = folder_with(tmp_path, b"defaults:\n- other\n- _self_\n")
    (folder / "experiment" / "other.yaml").write_text("# @package _global_\ndefaults:\n- own\n- _self_\n")
    assert main(["--config-dir", str(folder), "+experiment=own"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "lead in a circle" in err
    with pytest.raises(ConfigError, match="lead in a circle"):
        Composer(folder).compose(["+experiment=own"])


def test_a_variable_in_defaults_is_not_shown(tmp_path, capsys):
    folder = folder_with(tmp_path, b"defaults:\n- override /model: ${oc.env:AEM_TEST_SECRET}\n- _self_\n")
    assert main(["--config-dir", str(folder), "+experiment=own"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "must not call a function" in err and SECRET not in err


@pytest.mark.parametrize("kind", ["fifo", "folder", "loop", "device", "gone"])
def test_what_is_no_file_is_one_sentence(kind, tmp_path, capsys):
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


def test_help_reads_what_is_no_text(tmp_path, capsys):
    folder = folder_with(tmp_path, b"# caf\xe9 au lait\n")
    assert main(["--config-dir", str(folder), "--help"]) == 0
    assert "au lait" in capsys.readouterr().out


def test_what_people_write_is_well(tmp_path):
    text = "x: &x {gate: 0.2}\nmodulation: *x\nname: mine-${env.name}\nseed: !!int 3\n"
    folder = folder_with(
        tmp_path, text.replace("x: &x {gate: 0.2}\nmodulation: *x", "modulation: {gate: 0.2}").encode()
    )
    for experiment in (load(["+experiment=own"], folder),):
        assert (experiment.modulation.gate, experiment.name, experiment.seed) == (0.2, "mine-household", 3)
    (folder / "experiment" / "linked.yaml").symlink_to(folder / "experiment" / "own.yaml")
    assert load(["+experiment=linked"], folder).seed == 3, "a link to a file is a file"
    assert load(["env.prompt.first='{task}: {observation}'"]).env.prompt["first"] == "{task}: {observation}"
