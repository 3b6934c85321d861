"""Checks that a documented command line is understood: it is parsed and resolved, and nothing is run."""

import contextlib
import io
import json
import re
import shlex
import tomllib
from pathlib import Path

from aem_exp import __main__ as program
from aem_exp import commands, config
from aem_exp.config.compose import compose
from aem_exp.core import cli
from aem_exp.evaluate import request
from aem_exp.rundir import EXPERIMENT, RESULT
from support import ROOT

EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
# Programs whose command lines are not checked, and why.
NOT_CHECKED = {
    "cd": "the shell",
    "chmod": "the system",
    "cp": "the system",
    "curl": "needs the network",
    "deactivate": "the shell",
    "eval": "the shell",
    "export": "the shell",
    "git": "needs the network",
    "jq": "the system",
    "ls": "the system",
    "mkdir": "the system",
    "mkdocs": "tests/docs/test_site.py builds the site",
    "pre-commit": "needs the network",
    "pytest": "runs this very test",
    "source": "the shell",
    "sudo": "needs administrator rights",
    "vllm": "needs a GPU",
}
MODULES = {f"aem_exp.{name}": name for name in commands.COMMANDS} | {"aem_exp.tracking": "tracking", "aem_exp": None}


def commands_of(text: str) -> list[list[str]]:
    """The commands of a shell script, as lists of words. Lines are joined at a backslash, and split at && || ; and |."""
    out = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("&|;"):
                out += [words] if words else []
                words = []
            else:
                words.append(word)
    return out


def write_run_dir(folder: Path) -> Path:
    """Write a finished run directory, for command lines with RUN_DIR."""
    experiment = config.load([f"outputs={folder}"])
    run_dir = config.run_dir(experiment)
    run_dir.mkdir(parents=True)
    (run_dir / EXPERIMENT).write_text(json.dumps(config.to_dict(experiment)))
    (run_dir / RESULT).write_text("{}")
    return run_dir


def check(words: list[str], run_dir: Path) -> None:
    """Check that a program accepts a command. RUN_DIR is a placeholder.

    Raises:
        ConfigError, AssertionError: the program does not accept it.
    """
    words = [word.replace("RUN_DIR", str(run_dir)) for word in words]
    while re.match(r"\w+=", words[0]):  # variables of the environment
        words = words[1:]
    name = Path(words[0]).name
    if name in ("srun", "sbatch"):
        wrapped = words.index("--wrap") + 1 if "--wrap" in words else 0
        return check(shlex.split(words[wrapped]) if wrapped else words[words.index("python") :], run_dir)
    if name == "aem-exp":
        return _check_program(words[1:])
    if name.startswith("python"):
        return _check_python(words[1:])
    if name == "pip":
        return _check_pip(words[1:])
    assert name in NOT_CHECKED, f"this test does not know the program {name}"


def _check_python(words: list[str]) -> None:
    if words[0] != "-m":
        assert (ROOT / words[0]).exists(), f"there is no {words[0]}"
        return
    module, rest = words[1], words[2:]
    if module in ("venv", "spacy", "pytest", "mkdocs", "pip", "build"):
        return
    assert module in MODULES, f"this test does not know the module {module}"
    name = MODULES[module]
    if name == "tracking":
        assert rest[0] == "sync"
        name, rest = "sync", rest[1:]
    _check_program(rest if name is None else [name, *rest])


def _check_pip(words: list[str]) -> None:
    for extra in re.findall(r"\[([\w,-]+)\]", " ".join(words)):
        assert set(extra.split(",")) <= set(EXTRAS), f"there is no extra {extra}"


def _check_program(words: list[str]) -> None:
    """The words after `aem-exp`."""
    name = commands.find_command(words)
    if name is None or (name == "run" and commands.find_run_dir(words[1:]) is None):
        return _check_experiment(words if name is None else words[1:])
    module = commands.COMMANDS[name].module
    parse = __import__(f"aem_exp.{module}", fromlist=["_parse_arguments"])._parse_arguments
    rest = [*commands.COMMANDS[name].leading_arguments, *words[1:]]
    if "--help" in rest:
        return None
    if name == "run":
        config.read(commands.find_run_dir(rest))
        return None
    asked = parse(rest)
    cli.add_user_modules(getattr(asked, "config_dir", None))
    if name in ("sweep", "report", "status") and asked.sweep:
        _load_sweep(asked.sweep, asked.overrides, asked.config_dir)
    if name == "prepare":
        if asked.words and "=" not in asked.words[0]:
            _load_sweep(asked.words[0], asked.words[1:], asked.config_dir)
        else:
            config.load(asked.words, asked.config_dir)
    if getattr(asked, "audit", False):
        config.load(asked.overrides, asked.config_dir)
    elif name in ("evaluate", "proxy"):
        is_run = request.is_run_dir(asked.target)
        (request.read_run if is_run else request._experiment_of_model)(asked)
    if name == "branch":
        request.check_overrides(asked.overrides, ("launch", "outputs"))
        request.read_run(asked, finished=False)
    return None


def _load_sweep(name: str, overrides: list[str], config_dir: str | None) -> None:
    from aem_exp.sweep import question

    question.load("household_quick" if name == "NAME" else name, overrides, config_dir)


def _check_experiment(words: list[str]) -> None:
    asked = program._parse_arguments(words)
    cli.add_user_modules(asked.config_dir)
    if asked.multirun:
        from aem_exp.sweep import question

        question.parse_grid(asked.overrides, asked.config_dir)
    elif not (asked.help or asked.version or asked.completion or asked.hydra_help):
        with contextlib.redirect_stdout(io.StringIO()):
            config.resolve(compose(asked.overrides, asked.config_dir, asked.trust))
