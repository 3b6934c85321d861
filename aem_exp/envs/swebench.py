"""SWE-bench Verified for evaluation, R2E-Gym for training.

This module decides which rows are train, dev and test. Everything else is in `swe`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any, Final

from aem_exp.core.errors import ConfigError, MissingResource, unknown_key_error
from aem_exp.envs import LazyTasks, Task
from aem_exp.envs.swe import rows
from aem_exp.envs.swe.grade import Grader
from aem_exp.envs.swe.rows import Instance, Rows, parse_instance
from aem_exp.envs.swe.world import Repositories
from aem_exp.sandboxes import Backend

TRAIN_DATASET: Final = "R2E-Gym/R2E-Gym-Subset"
TEST_DATASET: Final = "SWE-bench/SWE-bench_Verified"
DEV_ROWS: Final = 100


class SWEBench(Repositories):
    """Rows of two data sets: the panel `test` has all rows of one, and the panel `dev` has rows held out of the other one.

    The hash of their ids decides which rows are held out.

    Args:
        train: hub id or file (.jsonl, .parquet) of the training rows, in the format of SWE-bench (version 5) or R2E-Gym.
        test: hub id or file of the test rows, in the same formats.
        train_revision: commit of the training rows on the hub.
        test_revision: commit of the test rows on the hub.
        dev: number of rows held out of train.
        sizes: use only this many tasks of a split, chosen by the same hash. For machines without space for all images.
    """

    def __init__(
        self,
        sandbox: Backend,
        train: str = TRAIN_DATASET,
        test: str = TEST_DATASET,
        train_revision: str | None = None,
        test_revision: str | None = None,
        dev: int = DEV_ROWS,
        sizes: dict[str, int] | None = None,
        limits: dict[str, int] | None = None,
        turns: int = 50,
        command_seconds: float = 90.0,
        tests_seconds: float = 300.0,
        episode_seconds: float = 5400.0,
        reward: float = 1.0,
        grader: Grader = "official",
        review: bool = False,
    ):
        super().__init__(
            sandbox, limits, turns, command_seconds, tests_seconds, episode_seconds, reward, grader, review
        )
        self._rows, self._indices = _choose_rows(train, test, train_revision, test_revision, dev, sizes)
        for split, indices in self._indices.items():
            (first,) = self._rows[split].images(indices[:1])
            if reason := sandbox.lacks(first):
                raise MissingResource("env.make.sandbox", type(sandbox).__name__.lower(), reason)
        names = {split: [self._rows[split].ids[i] for i in indices] for split, indices in self._indices.items()}
        self.fingerprint = f"swebench-{self._digest(names, train_revision, test_revision)}"

    def tasks(self, split: str) -> Sequence[Task]:
        if split not in self.splits:
            raise ConfigError("split", split, choices=self.splits)
        return LazyTasks(len(self._indices[split]), lambda index: self._task(split, self._indices[split][index]))

    def instance(self, task: Task) -> Instance:
        split, row = task.payload["split"], task.payload["row"]
        instance = parse_instance(self._rows[split][row], f"{self._rows[split].source}, row {row}")
        return replace(instance, id=task.id)

    @classmethod
    def prepare(
        cls,
        say: Callable[[str], None],
        sandbox: Backend,
        train: str = TRAIN_DATASET,
        test: str = TEST_DATASET,
        train_revision: str | None = None,
        test_revision: str | None = None,
        dev: int = DEV_ROWS,
        sizes: dict[str, int] | None = None,
        **_: Any,
    ) -> None:
        """Download the rows, then the images of all tasks. Resumes after an interruption."""
        if reason := sandbox.missing():
            raise MissingResource("env.make.sandbox", type(sandbox).__name__.lower(), reason)
        rows.fetch(train, "train", train_revision, "env.make.train", say)
        rows.fetch(test, "test", test_revision, "env.make.test", say)
        tables, chosen = _choose_rows(train, test, train_revision, test_revision, dev, sizes)
        images = dict.fromkeys(name for split, indices in chosen.items() for name in tables[split].images(indices))
        missing = [image for image in images if sandbox.lacks(image)]
        say(
            f"images  {len(images)} for {sum(map(len, chosen.values()))} tasks; "
            f"{len(images) - len(missing)} already on this machine"
        )
        sandbox.prepare(missing, say)

    def _task(self, split: str, row: int) -> Task:
        instance = parse_instance(data := self._rows[split][row], f"{self._rows[split].source}, row {row}")
        return Task(instance.id, kind=instance.kind, payload={"split": split, "row": row, "sha256": rows.digest(data)})


def _choose_rows(
    train: str,
    test: str,
    train_revision: str | None,
    test_revision: str | None,
    dev: int,
    sizes: Mapping[str, int] | None,
) -> tuple[dict[str, Rows], dict[str, list[int]]]:
    """The data set of each split, and the rows that are its tasks; `dev` is held out of train."""
    training = Rows(train, "train", train_revision, "env.make.train")
    final = Rows(test, "test", test_revision, "env.make.test")
    order, tests = _order_by_hash(training.ids), _order_by_hash(final.ids)
    if not 1 <= dev < len(order):
        raise ConfigError("env.make.dev", dev, f"{train} has {len(order)} rows: choose 1 to {len(order) - 1}")
    chosen = {"train": order[dev:], "dev": order[:dev], "test": tests}
    for split, size in (sizes or {}).items():
        if split not in chosen:
            raise unknown_key_error(f"env.make.sizes.{split}", size, chosen)
        if not 1 <= size <= len(chosen[split]):
            raise ConfigError(f"env.make.sizes.{split}", size, f"choose 1 to {len(chosen[split])}")
        chosen[split] = chosen[split][:size]
    return {"train": training, "dev": training, "test": final}, {split: sorted(rows) for split, rows in chosen.items()}


def _order_by_hash(ids: Sequence[str]) -> list[int]:
    """Row numbers in an order that depends only on the ids."""
    return sorted(range(len(ids)), key=lambda row: sha256(ids[row].encode()).digest())
