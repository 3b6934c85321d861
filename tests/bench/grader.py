"""The audited grade of repositories: its cost against the official grade, false rejections, and forgeries in three formats.

.venv/bin/python tests/bench/grader.py               # cost, and 210 correct patches
.venv/bin/python tests/bench/grader.py --formats     # all forgeries in the formats of SWE-bench and R2E-Gym

The forgeries of `swe`: python -m aem_exp.evaluate env=swe --audit
"""

import argparse
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from sandbox import episodes
from support import repository_rows
from support.rewrites import rewrites

from aem_exp.config import instantiate, load
from aem_exp.envs import audit
from aem_exp.envs.swe import patch
from aem_exp.envs.swe.grade import grade_changes

TASKS = 15
EPISODES = 12


def world(**settings):
    return instantiate(load(["env=swe"]).env.make | settings)


def rejected() -> tuple[int, list[str]]:
    """The number of correct patches, and those that the audited grade does not resolve."""
    one, count, wrong = world(), 0, []
    for task in one.tasks("train")[:TASKS]:
        for kind, files in rewrites(task.id).items():
            written = {
                path: patch.File("100644", content if isinstance(content, bytes) else content.encode())
                for path, content in files.items()
                if content is not None
            }
            changes = patch.Changes(written, frozenset(path for path, content in files.items() if content is None))
            grade = grade_changes(one, one.instance(task), changes)
            count += 1
            if not (grade.resolved and grade.official == "resolved"):
                wrong.append(f"{task.id}: {kind}: {grade.official}: {grade.reason}")
    return count, wrong


def formats() -> None:
    """Print for each format and class: the episodes, those that the audited grade believes, and those of the official rule."""
    for name, split, command in (
        ("SWE-bench", "test", repository_rows.PLAIN_PYTEST),
        ("R2E-Gym", "train", repository_rows.PLAIN_PYTEST),
        ("not pytest", "test", repository_rows.OTHER_RUNNER),
    ):
        folder = Path(tempfile.mkdtemp(prefix="grader-"))
        folder.chmod(0o755)
        repository_rows.write(folder, command)
        repository_rows.prepare(folder, lambda _: None)
        rows = repository_rows.open_world(folder, limits={"memory_mb": 400, "disk_mb": 64}, turns=4, grader="audited")
        trials = audit.play_forgeries(rows, rows.tasks(split)[:1], lambda _: True, lambda _: None)
        kinds = Counter(trial.forgery.kind for trial in trials)
        for kind, count in kinds.items():
            of_kind = [trial for trial in trials if trial.forgery.kind == kind]
            official = sum(trial.metrics.get("end_resolved", 0) for trial in of_kind)
            print(
                f"{name:10} {kind:16} {count:3} {sum(trial.succeeded for trial in of_kind):3} {official:3.0f}",
                flush=True,
            )
        for trial in trials:
            if not trial.is_as_expected:
                print(f"    {trial.forgery.kind}: {trial.forgery.name}: {trial.note}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--formats", action="store_true")
    if parser.parse_args().formats:
        formats()
        return
    official, audited = (statistics.median(episodes(EPISODES, grader=grader)) for grader in ("official", "audited"))
    print(f"an episode with grading: official {official:.2f} s, audited {audited:.2f} s ({audited / official:.2f} x)")
    count, wrong = rejected()
    print(f"correct patches that are resolved: {count - len(wrong)} of {count}")
    print("\n".join(wrong))


if __name__ == "__main__":
    main()
