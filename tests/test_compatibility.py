"""What other versions left is read as it was: run dirs, the record of a study, archives; what is written has the same keys.

`golden/runs` holds run dirs as a version wrote them, without weights and code, and what is shown of each. Where a text or a key
is changed on purpose, AEM_RECORD=1 records it anew (see test_identity.py). The runs themselves stay: other people have such
folders. Where a version writes other files, its runs are added: python tests/test_compatibility.py NAME trains them.
"""

import io
import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import zlib
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet
import pytest
from rich.console import Console
from support import ROOT
from support.golden import GOLDEN, check_golden

from aem_exp import config, status
from aem_exp.cluster import run_state
from aem_exp.config import saved
from aem_exp.core.errors import ConfigError
from aem_exp.report import command as report
from aem_exp.run import summary
from aem_exp.rundir import archive, checkpoints, episodes, examples, metrics
from aem_exp.sweep import command as sweep
from aem_exp.sweep import question

RESULTS = ROOT / "sweeps" / "results"
RUNS = GOLDEN / "runs"
LORA, SWE, STUDY = "lora", "swe", "study"
SMALL = "trainer.steps=2 trainer.tasks_per_step=2 trainer.group_size=4 evaluation.tasks=8 launch.save_every=1"
TINY = "model.make.steps=120 model.make.habit_steps=10 model.make.episodes=512 trainer.mini_batch=4 evaluation.every=1"
WORDS = {
    LORA: [*SMALL.split(), *TINY.split(), "trainer.beta=0.01", "model.lora={r: 4, target_modules: [q_proj, v_proj]}"],
    SWE: [
        *("+experiment=swe_tiny", *SMALL.split(), "model.make.episodes=64", "model.make.steps=40", "tracking=off"),
        *("model.make.habit_steps=4", "model.make.shyness=0.5", "trainer.oversample=1", "trainer.count_masked=false"),
        *("trainer.mask_truncated_completions=false", "env.invalid_penalty=0.1", "evaluation.every=0"),
    ],
}
SEARCH = f"""\
question: Which learning rate suits AEM in two steps of the embedded household?
base: {SMALL} {TINY} tracking=off
search:
  space:
    trainer.learning_rate: tag(log, interval(1e-4, 2e-3))
  trials: 1
seeds: 0
launch: launch=local
"""
KEPT = (
    *("*/*.json", "*/*.jsonl", "*/*.parquet", "*/*.yaml", "*/*.md", "*/mlflow_run_id", "*/checkpoint-*/step.json"),
    *("sweeps/*.json", "studies/*/journal.log", "studies/*/*/*.json"),
)


def escaped(path):
    """A path as Markdown has it."""
    return re.sub(r"([_*])", r"\\\1", str(path))


def told(text, outputs):
    """What is printed, without what differs from machine to machine and from hour to hour."""
    for path, name in ((outputs, "/outputs"), (ROOT, "/checkout")):
        text = text.replace(str(path), name).replace(escaped(path), name)
    text = re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:PORT", text)
    text = re.sub(r"^( *serve +).*", r"\1COMMAND", text, flags=re.MULTILINE)
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


@pytest.fixture(params=[LORA, SWE, STUDY])
def old(request, clean, tmp_path, monkeypatch):
    """The name of an old run, and a copy of its folder among its outputs."""
    outputs = shutil.copytree(RUNS / request.param, tmp_path / "outputs")
    monkeypatch.setenv("AEM_OUTPUTS", str(outputs))
    monkeypatch.setenv("COLUMNS", "500")  # no line of the table is folded, however long a path is
    for name in ("AEM_STUDY", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    (experiment,) = outputs.glob("*/experiment.json")
    return request.param, experiment.parent


# Old run dirs.


def test_the_experiment_of_an_old_run_is_read_as_it_was_written(old):
    name, folder = old
    experiment = config.read(folder)
    assert config.to_dict(experiment) == json.loads((folder / "experiment.json").read_text())
    assert config.run_dir(experiment).name == folder.name
    result = json.loads((folder / "result.json").read_text())
    assert folder.name.endswith(f"-{config.signature(experiment)}") and result["signature"] in folder.name
    longer = config.load([f"from={folder}", "trainer.steps=3"])
    check_golden(f"runs/{name}.continued.txt", f"{config.run_dir(longer).name} continues {longer.parent}\n")


def test_an_old_run_gives_the_archive_that_it_gave(old, tmp_path):
    name, folder = old
    how = run_state.read([folder])[folder]
    kept = archive.from_run_dir(folder, how.what, (how.kind, how.sentence))
    assert kept.done and archive.read(archive.write(kept, tmp_path)) == kept
    check_golden(f"runs/{name}.archive.json", json.dumps(asdict(kept), indent=1, sort_keys=True) + "\n")


def test_an_old_run_is_shown_as_it_was(old, capsys):
    """By the summary at the end of a run, in the table of all runs, and for programs."""
    name, folder = old
    console = Console(file=io.StringIO(), width=120, highlight=False)
    summary.print_summary(folder, console)
    assert status.main(["--once"]) == status.main(["--json"]) == 0
    check_golden(
        f"runs/{name}.shown.txt", told(console.file.getvalue() + "\n" + capsys.readouterr().out, folder.parent)
    )


def test_the_rows_of_an_old_run_are_read(old):
    _, folder = old
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert metrics.read(folder) == [json.loads(line) for line in lines] and len(lines) == 3
    episodes.check_file(folder / "episodes.parquet")
    table = episodes.read(folder / "episodes.parquet")
    assert {"train", "dev[:8]", "test[:8]"} == set(table["split"].to_pylist())
    assert examples.to_markdown(examples.select_examples(folder)) == (folder / "episodes.md").read_text()


def test_the_checkpoints_of_an_old_run_are_known_by_their_marks(old):
    _, folder = old
    found = checkpoints.list_complete(folder)
    assert [checkpoints.steps(each) for each in found] == [2, 1]
    assert [checkpoints.updates(each) for each in found] == [int(each.name.rpartition("-")[2]) for each in found]
    assert "is missing" in checkpoints.describe_damage(found[0], content=False)
    for name, facts in json.loads((found[0] / "step.json").read_text())["files"].items():
        (found[0] / name).parent.mkdir(exist_ok=True)
        with (found[0] / name).open("wb") as file:  # as large as it was
            file.truncate(facts["size"])
    assert checkpoints.find_newest(folder) == found[0]
    assert "has changed" in checkpoints.describe_damage(found[0])


@pytest.mark.parametrize("module", ["aem_exp.run", "aem_exp.trial", "aem_exp.serve"])
def test_what_a_job_starts_has_its_old_path(module):
    """A run or a trial that has begun keeps the code that it began with, and a newer version starts it again by this path."""
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0 and f"python -m {module} " in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("old", [STUDY], indirect=True)
def test_an_old_study_stands_where_it_stood(old, capsys, monkeypatch):
    """Its record is read: nothing of it is missing, and its trial is known to status by the study's name."""
    _, folder = old
    monkeypatch.chdir(folder.parents[1])
    Path("tiny.yaml").write_text(SEARCH)
    for words in (["tiny.yaml"], ["tiny.yaml", "--json"]):
        assert sweep.main(words) == 0
    assert status.main(["tiny", "--once"]) == 0
    check_golden("runs/study.standing.txt", told(capsys.readouterr().out, folder.parent))


@pytest.mark.parametrize("old", [LORA], indirect=True)
def test_a_retired_key_is_read_over_and_cannot_be_typed(old, monkeypatch):
    _, folder = old
    file, before = folder / "experiment.json", config.read(folder)
    data = json.loads(file.read_text())
    data["launch"]["gone"] = data["gone"] = {"deep": 1}
    data["launch"]["trainer"]["gone"] = 2
    file.write_text(json.dumps(data))
    with pytest.raises(ConfigError, match="no such key"):
        config.read(folder)
    monkeypatch.setattr(saved, "RETIRED", ("gone", "launch.gone", "launch.trainer.gone"))
    assert config.read(folder) == before
    for word in ("gone=1", "launch.gone=1", "launch.trainer.gone=1"):
        with pytest.raises(ConfigError, match=r"no such key|can be set"):
            config.load([word])


# Archives that come with the sweeps.


@pytest.mark.parametrize("name", sorted(path.name for path in RESULTS.iterdir()))
def test_our_own_results_make_their_report_again(name, clean, tmp_path, monkeypatch, capsys):
    """From a clean clone: no run dirs, no tracker; each run of the sweep is found, though the code has moved on since."""
    outputs = tmp_path / "out"
    monkeypatch.setenv("AEM_OUTPUTS", str(outputs))
    monkeypatch.setenv("COLUMNS", "120")
    assert report.main([name]) == 0
    said, folder = capsys.readouterr().out, outputs / "reports" / name
    page = (folder / "index.html").read_text()
    asked = question.load(name)
    assert "missing, failed or diverged" not in said and all(arm in said for arm in asked.arms)
    assert all(cell.folder.name in page for cell in asked.cells)
    assert page.count("<svg") >= 3 and "<script" not in page and not re.search(r'(src|href)="http', page)
    parts = [said, (folder / "report.md").read_text(), f"{page.count('<svg')} figures\n", *tables(folder, outputs)]
    check_golden(f"reports/{name}.txt", told("\n".join(parts), outputs))


def tables(folder, outputs):
    """Of each table its columns and rows, and a sum over all of its cells."""
    for file in sorted((folder / "tables").glob("*.csv")):
        text = told(file.read_text(), outputs)
        columns, *rows = text.splitlines()
        yield f"{file.name}: {columns}; {len(rows)} rows; crc32 {zlib.crc32(text.encode()):08x}\n"


# What is written now.


def dotted(data, at=""):
    """The keys of JSON; the items of a list are alike."""
    if isinstance(data, list):
        return {key for item in data for key in dotted(item, f"{at}[]")}
    if not isinstance(data, dict) or not data:
        return {at}
    return {key for name, value in data.items() for key in dotted(value, f"{at}.{name}".lstrip("."))}


def keys_of(folder):
    """The keys of each file of a run dir, over all its rows."""
    read = {name: json.loads((folder / name).read_text()) for name in ("experiment.json", "before.json", "result.json")}
    read |= {name: json.loads((folder / name).read_text()) for name in ("provenance.json", "owner.json")}
    card = json.loads((folder / "tracking.json").read_text())
    mark = json.loads((checkpoints.list_complete(folder)[0] / "step.json").read_text())
    mark["files"] = list(mark["files"].values())
    found = {name: dotted(data) for name, data in read.items()}
    found |= {"tracking.json": set(card), "step.json": dotted(mark), "metrics.jsonl": measured(folder)}
    for line in (folder / "attempts.jsonl").read_text().splitlines():
        event = json.loads(line)
        found.setdefault(f"attempts.jsonl: {event['event']}", set()).update(event)
    schema = pyarrow.parquet.read_schema(folder / "episodes.parquet")
    found["episodes.parquet"] = {f"{field.name}: {field.type}" for field in schema}
    kept = asdict(archive.from_run_dir(folder, "done"))
    found["archive"] = set(kept) | {f"{part}.{key}" for part in ("tasks", "spent") for key in kept[part]}
    return {name: sorted(keys) for name, keys in found.items()}


def lasting(names):
    """Without the metrics that occur only where a policy ends an episode so, or wins one."""
    return {name for name in names if not name.startswith(("train/ended_", "aem/alpha_positive"))}


def measured(folder):
    return lasting(name for row in metrics.read(folder) for name in row)


def test_a_run_writes_the_keys_that_it_did(unbroken):
    check_golden("keys.json", json.dumps(keys_of(unbroken[0]), indent=1, sort_keys=True) + "\n")


def test_a_run_measures_all_that_an_old_one_did(unbroken):
    (old,) = (RUNS / STUDY).glob("*/metrics.jsonl")
    assert measured(old.parent) <= measured(unbroken[0])


def test_mlflow_gets_the_names_that_it_did(unbroken):
    """From its store itself, as reading that takes no import of MLflow."""
    folder, _ = unbroken
    run = ((folder / "mlflow_run_id").read_text().strip(),)
    with closing(sqlite3.connect(f"file:{folder.parent / 'mlflow.db'}?mode=ro", uri=True)) as store:
        ask = {table: f"SELECT key FROM {table} WHERE run_uuid = ?" for table in ("params", "tags", "latest_metrics")}
        sent = {table: sorted(key for (key,) in store.execute(words, run)) for table, words in ask.items()}
        words = "SELECT key FROM experiment_tags JOIN runs USING (experiment_id) WHERE run_uuid = ?"
        sent["experiment_tags"] = sorted(key for (key,) in store.execute(words, run))
    assert lasting(sent.pop("latest_metrics")) == measured(folder) - {"step", metrics.LOGGED_AT}
    if json.loads((folder / "provenance.json").read_text())["commit"] is None:  # there is no git
        sent["tags"] = sorted([*sent["tags"], "git.commit", "mlflow.source.git.commit"])
    check_golden("mlflow.json", json.dumps(sent, indent=1, sort_keys=True) + "\n")


# How the old runs were made.


def make(name, folder):
    """Train a run, and keep of it what is read later."""
    folder.mkdir()
    outputs = folder / "outputs"
    env = {**os.environ, "AEM_CACHE": str(folder / "cache"), "AEM_OUTPUTS": str(outputs), "COLUMNS": "120"}
    for foreign in ("AEM_STUDY", "MLFLOW_TRACKING_URI"):
        env.pop(foreign, None)
    (folder / "tiny.yaml").write_text(SEARCH)
    words = ["aem_exp.sweep", "tiny.yaml", "--local"] if name == STUDY else ["aem_exp", *WORDS[name]]
    subprocess.run([sys.executable, "-m", *words], cwd=folder, env=env, check=True)
    target = RUNS / name
    shutil.rmtree(target, ignore_errors=True)
    for file in sorted({file for pattern in KEPT for file in outputs.glob(pattern)}):
        kept = target / file.relative_to(outputs)
        kept.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".parquet":
            shutil.copyfile(file, kept)
        else:
            text = file.read_text().replace(str(outputs), "/outputs")
            kept.write_text(re.sub(r'"(host|user)": "[^"]*"', r'"\1": "\1"', text))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        for each in sys.argv[1:]:
            make(each, Path(place) / each)
