"""Files of older versions are still read (run directories, studies, archives), and new files have the same keys.

`golden/runs` contains run directories as a version wrote them, without weights and code, and the printed texts about each. If a
text or a key changes on purpose, AEM_RECORD=1 records it again (see test_identity.py). The recorded runs are never changed,
because users have such folders. If a version writes other files, add runs of it: `python tests/test_compatibility.py NAME`
trains them.
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
from aem_exp.config import Evaluation, Launch, Modulation, saved
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
RECORDED_FILES = (
    *("*/*.json", "*/*.jsonl", "*/*.parquet", "*/*.yaml", "*/*.md", "*/mlflow_run_id", "*/checkpoint-*/step.json"),
    *("sweeps/*.json", "studies/*/journal.log", "studies/*/*/*.json"),
)


def escape_markdown(path):
    """Escape a path as in Markdown."""
    return re.sub(r"([_*])", r"\\\1", str(path))


def normalize(text, outputs):
    """Replace the parts of a printed text that depend on the machine or the time."""
    for path, name in ((outputs, "/outputs"), (ROOT, "/checkout")):
        text = text.replace(str(path), name).replace(escape_markdown(path), name)
    text = re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:PORT", text)
    text = re.sub(r"^( *serve +).*", r"\1COMMAND", text, flags=re.MULTILINE)
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


@pytest.fixture(params=[LORA, SWE, STUDY])
def old(request, clean, tmp_path, monkeypatch):
    """The name of an old run, and the path of a copy of its run directory."""
    outputs = shutil.copytree(RUNS / request.param, tmp_path / "outputs")
    monkeypatch.setenv("AEM_OUTPUTS", str(outputs))
    monkeypatch.setenv("COLUMNS", "500")  # wide enough for any path in a table
    for name in ("AEM_STUDY", "SSH_CONNECTION"):
        monkeypatch.delenv(name, raising=False)
    (experiment,) = outputs.glob("*/experiment.json")
    return request.param, experiment.parent


# Old run directories.


def test_experiment_of_an_old_run_is_read(old):
    """Options that were added since then have their neutral values, and retired ones are left out."""
    name, folder = old
    experiment = config.read(folder)
    recorded = saved._without_retired(json.loads((folder / "experiment.json").read_text()))
    for block, neutral in (("modulation", Modulation()), ("evaluation", Evaluation()), ("launch", Launch())):
        recorded[block] = asdict(neutral) | recorded[block]
    assert config.to_dict(experiment) == recorded
    assert config.run_dir(experiment).name == folder.name
    result = json.loads((folder / "result.json").read_text())
    assert folder.name.endswith(f"-{config.signature(experiment)}") and result["signature"] in folder.name
    longer = config.load([f"from={folder}", "trainer.steps=3"])
    check_golden(f"runs/{name}.continued.txt", f"{config.run_dir(longer).name} continues {longer.parent}\n")


def test_old_run_gives_the_same_archive(old, tmp_path):
    name, folder = old
    state = run_state.read([folder])[folder]
    archived = archive.from_run_dir(folder, state.what, (state.kind, state.sentence))
    assert archived.done and archive.read(archive.write(archived, tmp_path)) == archived
    check_golden(f"runs/{name}.archive.json", json.dumps(asdict(archived), indent=1, sort_keys=True) + "\n")


def test_old_run_is_shown_as_before(old, capsys):
    """In its summary, and by `status` as a table and as JSON."""
    name, folder = old
    console = Console(file=io.StringIO(), width=120, highlight=False)
    summary.print_summary(folder, console)
    assert status.main(["--once"]) == status.main(["--json"]) == 0
    check_golden(
        f"runs/{name}.shown.txt", normalize(console.file.getvalue() + "\n" + capsys.readouterr().out, folder.parent)
    )


def test_metrics_and_episodes_of_an_old_run_are_read(old):
    _, folder = old
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert metrics.read(folder) == [json.loads(line) for line in lines] and len(lines) == 3
    episodes.check_file(folder / "episodes.parquet")
    table = episodes.read(folder / "episodes.parquet")
    assert {"train", "dev[:8]", "test[:8]"} == set(table["split"].to_pylist())
    assert examples.to_markdown(examples.select_examples(folder)) == (folder / "episodes.md").read_text()


def test_checkpoints_of_an_old_run_are_found(old):
    _, folder = old
    found = checkpoints.list_complete(folder)
    assert [checkpoints.steps(each) for each in found] == [2, 1]
    assert [checkpoints.updates(each) for each in found] == [int(each.name.rpartition("-")[2]) for each in found]
    assert "missing" in checkpoints.describe_damage(found[0], content=False)
    for name, facts in json.loads((found[0] / "step.json").read_text())["files"].items():
        (found[0] / name).parent.mkdir(exist_ok=True)
        with (found[0] / name).open("wb") as file:  # a file of the recorded size
            file.truncate(facts["size"])
    assert checkpoints.find_newest(folder) == found[0]
    assert "content" in checkpoints.describe_damage(found[0])


@pytest.mark.parametrize("module", ["aem_exp.run", "aem_exp.trial", "aem_exp.serve"])
def test_old_module_paths_of_jobs_exist(module):
    """A newer version restarts runs, trials and servers in their frozen code, with these module paths."""
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0 and f"python -m {module} " in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("old", [STUDY], indirect=True)
def test_old_study_is_shown_as_before(old, capsys, monkeypatch):
    """Its record is complete, and `status` finds its trial by the name of the study."""
    _, folder = old
    monkeypatch.chdir(folder.parents[1])
    Path("tiny.yaml").write_text(SEARCH)
    for words in (["tiny.yaml"], ["tiny.yaml", "--json"]):
        assert sweep.main(words) == 0
    assert status.main(["tiny", "--once"]) == 0
    check_golden("runs/study.standing.txt", normalize(capsys.readouterr().out, folder.parent))


@pytest.mark.parametrize("old", [LORA], indirect=True)
def test_retired_key_is_ignored_in_files_and_refused_in_overrides(old, monkeypatch):
    _, folder = old
    file, before = folder / "experiment.json", config.read(folder)
    data = json.loads(file.read_text())
    data["launch"]["gone"] = data["gone"] = {"deep": 1}
    data["launch"]["trainer"]["gone"] = 2
    file.write_text(json.dumps(data))
    with pytest.raises(ConfigError) as error:
        config.read(folder)
    assert error.value.field.rpartition(".")[2] == "gone"
    monkeypatch.setattr(saved, "RETIRED", (*saved.RETIRED, "gone", "launch.gone", "launch.trainer.gone"))
    assert config.read(folder) == before
    for word in ("gone=1", "launch.gone=1", "launch.trainer.gone=1"):
        with pytest.raises(ConfigError) as error:
            config.load([word])
        assert error.value.field in (word, word.removesuffix("=1")), error.value


# Archives in sweeps/results.


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in RESULTS.iterdir()))
def test_archived_results_give_the_same_report(name, clean, tmp_path, monkeypatch, capsys):
    """As in a clean clone, without run directories and MLflow. All runs of the sweep are found although the code has changed."""
    outputs = tmp_path / "out"
    monkeypatch.setenv("AEM_OUTPUTS", str(outputs))
    monkeypatch.setenv("COLUMNS", "120")
    assert report.main([name]) == 0
    printed, folder = capsys.readouterr().out, outputs / "reports" / name
    page = (folder / "index.html").read_text()
    planned = question.load(name)
    assert "missing, failed or diverged" not in printed and all(arm in printed for arm in planned.arms)
    assert all(cell.folder.name in page for cell in planned.cells)
    assert page.count("<svg") >= 3 and "<script" not in page and not re.search(r'(src|href)="http', page)
    parts = [printed, (folder / "report.md").read_text(), f"{page.count('<svg')} figures\n", *tables(folder, outputs)]
    check_golden(f"reports/{name}.txt", normalize("\n".join(parts), outputs))


def tables(folder, outputs):
    """Yield the columns of each table, its number of rows, and a checksum of its text."""
    for file in sorted((folder / "tables").glob("*.csv")):
        text = normalize(file.read_text(), outputs)
        columns, *rows = text.splitlines()
        yield f"{file.name}: {columns}; {len(rows)} rows; crc32 {zlib.crc32(text.encode()):08x}\n"


# New files.


def dotted_keys(data, prefix=""):
    """Return the dotted keys of JSON data; all items of a list have the same prefix."""
    if isinstance(data, list):
        return {key for item in data for key in dotted_keys(item, f"{prefix}[]")}
    if not isinstance(data, dict) or not data:
        return {prefix}
    return {key for name, value in data.items() for key in dotted_keys(value, f"{prefix}.{name}".lstrip("."))}


def keys_of(folder):
    """Return the keys of each file of a run directory, over all its rows."""
    read = {name: json.loads((folder / name).read_text()) for name in ("experiment.json", "before.json", "result.json")}
    read |= {name: json.loads((folder / name).read_text()) for name in ("provenance.json", "owner.json")}
    card = json.loads((folder / "tracking.json").read_text())
    mark = json.loads((checkpoints.list_complete(folder)[0] / "step.json").read_text())
    mark["files"] = list(mark["files"].values())
    found = {name: dotted_keys(data) for name, data in read.items()}
    found |= {"tracking.json": set(card), "step.json": dotted_keys(mark), "metrics.jsonl": metric_names(folder)}
    for line in (folder / "attempts.jsonl").read_text().splitlines():
        event = json.loads(line)
        found.setdefault(f"attempts.jsonl: {event['event']}", set()).update(event)
    schema = pyarrow.parquet.read_schema(folder / "episodes.parquet")
    found["episodes.parquet"] = {f"{field.name}: {field.type}" for field in schema}
    archived = asdict(archive.from_run_dir(folder, "done"))
    found["archive"] = set(archived) | {f"{part}.{key}" for part in ("tasks", "spent") for key in archived[part]}
    return {name: sorted(keys) for name, keys in found.items()}


def stable_names(names):
    """Remove the metrics that exist only if an episode ends in a certain way, or is won."""
    return {name for name in names if not name.startswith(("train/ended_", "aem/alpha_positive"))}


def metric_names(folder):
    return stable_names(name for row in metrics.read(folder) for name in row)


def test_keys_of_a_run_directory_are_unchanged(unbroken):
    check_golden("keys.json", json.dumps(keys_of(unbroken[0]), indent=1, sort_keys=True) + "\n")


def test_all_metrics_of_an_old_run_still_exist(unbroken):
    (old,) = (RUNS / STUDY).glob("*/metrics.jsonl")
    assert metric_names(old.parent) <= metric_names(unbroken[0])


def test_names_in_mlflow_are_unchanged(unbroken):
    """Reads the sqlite store directly, which needs no import of MLflow."""
    folder, _ = unbroken
    run = ((folder / "mlflow_run_id").read_text().strip(),)
    with closing(sqlite3.connect(f"file:{folder.parent / 'mlflow.db'}?mode=ro", uri=True)) as store:
        queries = {
            table: f"SELECT key FROM {table} WHERE run_uuid = ?" for table in ("params", "tags", "latest_metrics")
        }
        sent = {table: sorted(key for (key,) in store.execute(words, run)) for table, words in queries.items()}
        words = "SELECT key FROM experiment_tags JOIN runs USING (experiment_id) WHERE run_uuid = ?"
        sent["experiment_tags"] = sorted(key for (key,) in store.execute(words, run))
    assert stable_names(sent.pop("latest_metrics")) == metric_names(folder) - {"step", metrics.LOGGED_AT}
    if json.loads((folder / "provenance.json").read_text())["commit"] is None:  # without git
        sent["tags"] = sorted([*sent["tags"], "git.commit", "mlflow.source.git.commit"])
    check_golden("mlflow.json", json.dumps(sent, indent=1, sort_keys=True) + "\n")


# Recording of runs.


def make(name, folder):
    """Train a run, and copy the files of it that the tests read."""
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
    for file in sorted({file for pattern in RECORDED_FILES for file in outputs.glob(pattern)}):
        copy = target / file.relative_to(outputs)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".parquet":
            shutil.copyfile(file, copy)
        else:
            text = file.read_text().replace(str(outputs), "/outputs")
            copy.write_text(re.sub(r'"(host|user)": "[^"]*"', r'"\1": "\1"', text))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        for each in sys.argv[1:]:
            make(each, Path(place) / each)
