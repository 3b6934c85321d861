"""A study: the `search:` block of a sweep file, and the folder that its workers share.

There is no master process. `python -m aem_exp.sweep NAME` submits workers, and each worker runs one trial (see `trial`). Trials
are selected on the dev panel.

    search:
      space:                     # Hydra's syntax for choices and ranges
        trainer.learning_rate: tag(log, interval(1e-4, 1e-3))
        modulation.lam.value: choice(0.5, 1, 2)
        env.window: range(1, 9)  # or int(interval(1, 8))
      trials: 12
      metric: eval/success       # the value of a trial is the last value of this metric
      direction: maximize        # or minimize
      pruner: median             # or hyperband, none
      storage: null              # null: $AEM_STUDY, else a journal file next to the workers; or the URL of a database
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

from aem_exp import config
from aem_exp.config import Experiment
from aem_exp.core.errors import ConfigError
from aem_exp.core.typed import AT_LEAST_1, build_from_mapping

if TYPE_CHECKING:
    from aem_exp.config.compose import Composer

FOLDER: Final = "studies"  # in the outputs folder
STUDY_FILE, TRIAL_FILE, JOURNAL_FILE = "study.json", "trial.json", "journal.log"
PrintLine = Callable[[str], None]


@dataclass(frozen=True)
class Search:
    """The `search:` block of a sweep file."""

    space: dict[str, str] = field(default_factory=dict)
    """Key -> the text of its choices or range."""
    trials: Annotated[int, AT_LEAST_1] = 1
    """Trials of the study."""
    metric: str = "eval/success"
    """The logged metric whose last value is the value of a trial."""
    direction: Literal["maximize", "minimize"] = "maximize"
    """Whether larger or smaller values are better."""
    pruner: Literal["hyperband", "median", "none"] = "none"
    """How trials are stopped early."""
    storage: str | None = None
    """URL of a database; null: $AEM_STUDY, else a journal file in the folder of the study."""


@dataclass(frozen=True)
class Study:
    """A search and its folder."""

    folder: Path
    """OUTPUTS/studies/NAME"""
    question: str
    overrides: tuple[str, ...]
    """The overrides of every trial."""
    config_dir: Path | None
    """The configuration folder that is searched before `conf/`."""
    search: Search

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def outputs(self) -> Path:
        return self.folder.parents[1]

    @cached_property
    def composer(self) -> "Composer":
        from aem_exp.config.compose import Composer

        return Composer(self.config_dir)

    @cached_property
    def base(self) -> Experiment:
        return self.experiment({})

    @cached_property
    def storage_url(self) -> str | None:
        """The URL of a database; None for a journal file."""
        return self.search.storage or os.environ.get("AEM_STUDY") or None

    def trial_overrides(self, values: Mapping[str, str]) -> list[str]:
        """The overrides of a trial with these parameter values."""
        return self.composer.drop_replaced_choices(
            [*self.overrides, *(f"{key}={value}" for key, value in values.items())]
        )

    def experiment(self, values: Mapping[str, str]) -> Experiment:
        experiment = config.resolve(self.composer.compose(self.trial_overrides(values)))
        return replace(experiment, outputs=str(self.outputs))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """While this lock is held, no other process asks for a trial, reconciles workers or records runs."""
        from filelock import FileLock

        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            yield


def parse_search(block: Mapping[str, Any], at: str) -> Search:
    """Convert the `search:` block of a file.

    Raises:
        ConfigError: a key is unknown, missing or of the wrong type.
    """
    space = block.get("space")
    for key, text in space.items() if isinstance(space, Mapping) else ():
        if not isinstance(text, str):
            remedy = "must be text such as interval(1e-4, 1e-3), range(1, 9) or choice(a, b)"
            raise ConfigError(f"{at}.space.{key}", text, remedy)
    search = build_from_mapping(Search, block, at)
    for key in ("space", "trials"):
        if not block.get(key):
            raise ConfigError(f"{at}.{key}", block.get(key), "must not be empty")
    return search


def format_override(value: Any) -> str:
    """The text of a parameter value. Floats have six digits, which also enter the name of the run directory."""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def read_card(worker: Path) -> dict[str, Any]:
    """The trial of a worker, and the message for its other processes; empty if it has no trial yet."""
    file = worker / TRIAL_FILE
    return json.loads(file.read_text()) if file.exists() else {}
