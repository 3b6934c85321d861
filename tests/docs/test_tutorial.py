"""docs/tutorial.md, word for word: its files are written and its commands run in order, and the outcome is what it claims."""

import json
import re
from statistics import mean

import pandas
import pytest
from support import ROOT, page_reader

PAGE = "tutorial.md"
REPORT = "outputs/reports/early_wins"
VERDICTS = ("better", "worse", "no difference shown")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(page_reader.DEADLINE + 60)]


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """The folder that a reader of the page has at the end, and the output of each block of commands."""
    folder, outputs = tmp_path_factory.mktemp("reader"), tmp_path_factory.mktemp("outputs")
    done = page_reader.follow(PAGE, folder, outputs, AEM_CACHE=str(folder / "cache"))
    assert done.returncode == 0, done.stderr[-3000:]
    count = len(list(outputs.iterdir()))
    return folder / "tutorial", [(outputs / f"{i}.txt").read_text() for i in range(count)]


def test_the_folder_has_what_the_page_lists(followed):
    folder, _ = followed
    page = (ROOT / "docs" / PAGE).read_text()
    listed = re.findall(r"^\| `([\w/]+(?:\.py|\.yaml|/))` \|", page, re.MULTILINE)
    assert len(listed) == 7
    for name in listed:
        assert (folder / name).exists(), name


def test_the_policy_learns_and_beats_its_teacher(followed):
    folder, said = followed
    (run_dir,) = (folder / "outputs").glob("lock-tiny-grpo-aem-s0-*")
    result = json.loads((run_dir / "result.json").read_text())
    # The sums of processors of other kinds differ in their last digits, and the learning curves of single runs therefore widely.
    results = [json.loads(file.read_text()) for file in folder.glob("outputs/lock-*/result.json")]
    assert len(results) == 6
    assert mean(one["after"]["success"] - one["before"]["success"] for one in results) > 0.3
    before, after, final = (result[key]["success"] for key in ("before", "after", "final"))
    assert after > before + 0.1
    scores = {name: float(share) for name, share in re.findall(r"^(\w+) +([\d.]+)%", said[3], re.MULTILINE)}
    assert scores["policy"] > scores["scripted"] + 30
    assert scores["policy"] > scores["untrained"] + 20
    assert final > 0.5


def test_the_game_is_winnable_by_halving(followed, monkeypatch):
    folder, _ = followed
    monkeypatch.syspath_prepend(str(folder))
    from lock import Lock

    world = Lock()
    env, splits = world.env(), {split: world.tasks(split) for split in world.splits}
    assert len({task.id for tasks in splits.values() for task in tasks}) == sum(map(len, splits.values())) == 343
    for task in splits["test"]:
        env.reset(task)
        turns = [env.step(" ".join(str((low + high) // 2) for low, high in env.possible)) for _ in range(3)]
        assert any(turn.metrics["won"] for turn in turns)


def test_the_sweep_reuses_the_first_run_and_the_report_has_a_verdict(followed):
    folder, said = followed
    assert "5 of 6 cells" in said[5]
    assert len(list((folder / "outputs").glob("lock-*"))) == 6
    verdict = next(line for line in said[7].splitlines() if line.startswith("early against grpo"))
    assert any(word in verdict for word in VERDICTS)
    page = (folder / REPORT / "index.html").read_text()
    assert "Does it help to count an early win more than a late one?" in page
    commands = re.findall(r"`(python -m aem_exp \+experiment=lock .*)`", (folder / REPORT / "report.md").read_text())
    assert len(commands) == 6 and all(command.endswith(f"--config-dir {folder}") for command in commands)


def test_both_arms_open_the_lock(followed):
    folder, _ = followed
    for arm in ("grpo", "early"):
        results = list((folder / "outputs").glob(f"lock-tiny-{arm}-aem-s*/result.json"))
        assert len(results) == 3
        assert mean(json.loads(file.read_text())["final"]["success"] for file in results) > 0.5


def test_episodes_show_every_turn(followed):
    folder, _ = followed
    (run_dir,) = (folder / "outputs").glob("lock-tiny-grpo-aem-s0-*")
    assert len(pandas.read_parquet(run_dir / "episodes.parquet")) > 80 * 64
