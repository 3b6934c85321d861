"""Every block of code in README and the documentation is run, or checked, or says why not.

- `bash`: each command is parsed and resolved as its program would do it, and not run: no documented option is ever stale.
- `yaml`: a config file is composed, a sweep file is planned, another one is read.
- `python`: the blocks of a page are run as one script, in a folder of its own, with smaller defaults.
- `text` and blocks without a language are outputs. In them, lines that begin with `$ ` are commands.

The comment `<!-- not run: REASON -->` above a block says that it is only compiled. A page with a test of its own, such as a
tutorial, is left to that test. A block that is a file says so (see `FILE_MARKS`): it lies in the folder in which the page's
commands are checked and its Python is run.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support import ROOT, command_lines
from support.markdown import PAGES, Block, code_spans, name_of, read_blocks
from support.runs import DEADLINE

from aem_exp import config
from aem_exp.cluster.slurm import Site
from aem_exp.core import cli
from aem_exp.core.errors import ConfigError
from aem_exp.core.typed import build_from_mapping
from aem_exp.sweep import question

REASONS = ("needs a GPU", "needs SLURM", "needs model weights", "needs the network", "needs a server", "needs data")
LANGUAGES = {"bash", "yaml", "python", "text", "", "json", "csv"}
GROUPS = ("model", "env", "baseline", "modulation", "launch", "experiment")
# A command in the text: with arguments, for otherwise its name is mentioned.
COMMAND = re.compile(r"python -m aem_exp(?!\.tracking sync$)[\w.]* \S|python [\w/]+\.py|aem-exp \w+ \S|pip install ")
BLOCKS = {page: blocks for page in PAGES if (blocks := read_blocks(page))}


def has_own_test(page: Path) -> bool:
    """Whether all of its blocks are run by a test file that is named after it: docs/my-page.md, tests/docs/test_my_page.py."""
    return (Path(__file__).parent / f"test_{page.stem.replace('-', '_')}.py").exists()


def with_blocks(*languages: str) -> list:
    """The pages that have such blocks, without those that have a test of their own."""
    found = [
        page
        for page, blocks in BLOCKS.items()
        if any(block.language in languages for block in blocks) and not has_own_test(page)
    ]
    return [pytest.param(page, id=name_of(page)) for page in found]


def write_files(page: Path, folder: Path) -> None:
    """The files that the blocks of a page are, with missing folders."""
    for block in BLOCKS[page]:
        if block.file and block.language in ("yaml", "python"):
            place = folder / block.file
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(block.text)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder, whose modules can be named by configs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("AEM_OUTPUTS", "AEM_ROOT", "AEM_SITE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_every_block_has_a_language_that_is_tested_and_a_reason_that_is_known():
    for block in (block for blocks in BLOCKS.values() for block in blocks):
        assert block.language in LANGUAGES, f"{block.place}: the language is {block.language}, not one of {LANGUAGES}"
        assert not block.reason or block.reason.startswith(REASONS), f"{block.place}: {block.reason} is not in REASONS"
        outputs = block.language in ("text", "", "json", "csv")
        assert not (outputs and re.search(r"^(python|aem-exp|pip) ", block.text)), (
            f"{block.place}: commands are ```bash"
        )


@pytest.mark.slow
@pytest.mark.parametrize("page", with_blocks("bash", "text", ""))
def test_commands_are_understood(page, folder):
    write_files(page, folder)
    run_dir = command_lines.write_run_dir(folder / "outputs")
    wrong = []
    for place, text in scripts(page):
        for words in command_lines.commands_of(text):
            try:
                command_lines.check(words, run_dir)
            except (ConfigError, AssertionError, SystemExit) as error:
                wrong.append(f"{place}: {' '.join(words)}\n    {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


def scripts(page: Path) -> Iterator[tuple[str, str]]:
    """The shell scripts of a page, with their places: blocks, prompts in outputs, and code in the text without placeholders."""
    for block in BLOCKS[page]:
        if block.language == "bash":
            yield block.place, block.text
        elif block.language in ("text", ""):
            yield block.place, "\n".join(re.findall(r"^\$ (.*)$", block.text, re.MULTILINE))
    for code in code_spans(page):
        names = set(re.findall(r"\b[A-Z_]{2,}\b", code)) - {"RUN_DIR", "FOLDER", "DIR"}
        if COMMAND.match(code) and not names and not set(code) & set("{}…"):
            yield name_of(page), code


@pytest.mark.parametrize(
    "line",
    [
        "python -m aem_exp trainer.stepz=3",
        "python -m aem_exp --cfgg job",
        "aem-exp sweep household_quick --locally",
        "python -m aem_exp.report no_such_sweep",
        "python -m aem_exp.evaluate RUN_DIR --repeat-all 3",
        "python -m aem_exp.no_such_module",
        "python tests/bench/no_such_file.py",
        "pip install -e '.[no_such_extra]'",
        "no_such_program",
    ],
)
def test_what_no_program_would_understand_is_found(line, folder):
    run_dir = command_lines.write_run_dir(folder / "outputs")
    (words,) = command_lines.commands_of(line)
    with pytest.raises((ConfigError, AssertionError)):
        command_lines.check(words, run_dir)


@pytest.mark.parametrize("page", with_blocks("yaml"))
def test_yaml_is_what_it_seems(page, folder):
    write_files(page, folder)
    wrong = []
    for block in (block for block in BLOCKS[page] if block.language == "yaml"):
        try:
            check_yaml(block, folder)
        except (ConfigError, AssertionError, yaml.YAMLError) as error:
            wrong.append(f"{block.place}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


def check_yaml(block: Block, folder: Path) -> None:
    """A sweep file, a file of a group, the settings of a cluster, or part of a config."""
    data = yaml.safe_load(block.text)
    assert isinstance(data, dict), "no mapping"
    cli.add_user_modules(folder)
    if "question" in data:
        file = folder / (block.file or "asked.yaml")
        file.write_text(block.text)
        question.load(file)
    elif data.keys() <= Site.__dataclass_fields__.keys():
        build_from_mapping(Site, data, "site")
    else:
        compose_alone(block, data, folder)


def compose_alone(block: Block, data: dict, folder: Path) -> None:
    """Compose a config file as the choice of its group that its path names, or else as an experiment."""
    path = Path(block.file)
    if path.parent.name in GROUPS:
        group, name, over, text = path.parent.name, path.stem, folder / path.parent.parent, block.text
    elif "name" in (data.get("baseline") or {}):
        group, name, over, text = "baseline", data["baseline"]["name"], folder / "alone", block.text
    else:
        group, name, over, text = "experiment", "part", folder / "alone", f"# @package _global_\n{block.text}"
    (over / group).mkdir(parents=True, exist_ok=True)
    (over / group / f"{name}.yaml").write_text(text)
    cli.add_user_modules(over)
    config.load([f"{'+' if group == 'experiment' else ''}{group}={name}"], over)


@pytest.mark.slow
@pytest.mark.parametrize("page", with_blocks("python"))
def test_python_runs(page, folder, cache):
    """Line N of the script is line N of the page, so that a traceback leads to it."""
    write_files(page, folder)
    script = [""] * len(page.read_text().splitlines())
    for block in (block for block in BLOCKS[page] if block.language == "python"):
        compile(block.text, block.place, "exec")
        if not (block.reason or block.file):
            script[block.line - 1 : block.line - 1 + block.text.count("\n")] = block.text.splitlines()
    (folder / "page.py").write_text("\n".join(script))
    env = {**os.environ, "AEM_ROOT": str(smaller_root(folder)), "AEM_OUTPUTS": str(folder / "outputs")}
    env |= {"AEM_CACHE": str(cache), "MLFLOW_TRACKING_URI": "off", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "page.py"], cwd=folder, env=env, capture_output=True, text=True, timeout=DEADLINE
    )
    assert done.returncode == 0, f"{name_of(page)}, run as page.py:\n{done.stderr}"


def smaller_root(folder: Path) -> Path:
    """`conf/` with a policy that is hardly trained, small steps, and panels of 8 tasks."""
    root = folder / "root"
    for name in ("conf", "sweeps", "slurm"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("results"))
    for name, changes in {
        "conf/model/tiny.yaml": {"make": {"steps": 25, "habit_steps": 5, "episodes": 128}},
        "conf/config.yaml": {
            "trainer": {"steps": 4, "tasks_per_step": 3, "group_size": 4, "mini_batch": 6},
            "evaluation": {"tasks": 8},
        },
    }.items():
        text = (root / name).read_text()
        data = yaml.safe_load(text)
        for block, values in changes.items():
            data[block] |= values
        (root / name).write_text(yaml.safe_dump(data, sort_keys=False))
    return root
