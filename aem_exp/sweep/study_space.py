"""The search space of a study: Optuna distributions of its parameters, and checks before the first trial."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from aem_exp import config
from aem_exp.core.errors import ConfigError
from aem_exp.sweep.study_spec import FOLDER, Study, format_override, parse_search

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from aem_exp.sweep.cells import Sweep


NOT_SEARCHABLE: Final = {  # keys that a study must not vary -> reason
    "seed": "the best seed is chance; set one seed in seeds:",
    "outputs": "a study has one outputs folder; set it in base:",
    "tracking": "a study has one MLflow store; set it in base:",
    "launch": "launch settings do not affect results",
    "evaluation": "all trials must have the same evaluation; set it in base:",
}


def from_sweep(sweep: "Sweep", typed: Sequence[str] = (), config_dir: str | None = None) -> Study:
    """The study of a sweep with a `search:` block. `typed` are the overrides of the command line.

    Raises:
        ConfigError: the study is invalid.
    """
    from aem_exp.config.compose import override_key
    from aem_exp.tracking import views

    (cell,) = sweep.cells
    at = f"{sweep.name}.search"
    views.sweep_tag(sweep.name)  # raises for an invalid name
    assert sweep.search is not None
    search = parse_search(sweep.search, at)
    folder = cell.folder.parent / FOLDER / sweep.name
    configs = Path(config_dir).expanduser().absolute() if config_dir else sweep.config_dir
    study = Study(folder, sweep.question, cell.overrides, configs, search)
    for text in typed:
        if override_key(text) in search.space:
            raise ConfigError("overrides", text, f"is a parameter of the search; change it in {at}.space")
    _check_search(study, at)
    return study


def _check_search(study: Study, at: str) -> None:
    from aem_exp.core.errors import redact

    search, panels = study.search, study.base.evaluation
    if search.metric.startswith("test/"):
        raise ConfigError(
            f"{at}.metric", search.metric, "tuning must not read the test panel; use eval/success, for example"
        )
    if panels.panel == "test":
        raise ConfigError(
            "evaluation.panel", panels.panel, "tuning must not read the test panel; use another panel, such as dev"
        )
    if search.storage and redact(search.storage) != search.storage:
        remedy = "contains credentials; set the whole URL in the environment variable AEM_STUDY instead"
        raise ConfigError(f"{at}.storage", redact(search.storage), remedy)
    _check_parameters_matter(study, at)


def _check_parameters_matter(study: Study, at: str) -> None:
    """Check that the values of each parameter give valid and different experiments."""
    space = {key: representative_values(study, key, f"{at}.space") for key in study.search.space}
    first = {key: values[0] for key, values in space.items()}
    for key, values in space.items():
        signatures = set()
        for value in values:
            try:
                signatures.add(config.signature(study.experiment({**first, key: value})))
            except ConfigError as error:
                where = f"{at}.space.{key}: {error.field}"
                raise ConfigError(where, error.value, error.choices, error.remedy) from error
        if len(signatures) < len(values):
            remedy = f"{' and '.join(values[:2])} give the same experiment; does the base use this key?"
            raise ConfigError(f"{at}.space.{key}", study.search.space[key], remedy)


def representative_values(study: Study, key: str, at: str) -> list[str]:
    """Values with which a parameter is checked: all choices, or both ends of its range."""
    values = distribution(study, key, at)
    if hasattr(values, "choices"):
        return [str(choice) for choice in values.choices]
    return [format_override(values.low), format_override(values.high)]


def distribution(study: Study, key: str, at: str = "space") -> Any:
    """The Optuna distribution of a parameter. Choices stay text, from which overrides are made.

    Raises:
        ConfigError: the text is not a valid range or choice.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    text, where = study.search.space[key], f"{at}.{key}"
    try:
        swept = _parse_swept(key, text, where)
        if hasattr(swept, "end"):  # an interval
            low, high, step = swept.start, swept.end, None
        else:
            values = _expand_values(study, key, where)
            if not hasattr(swept, "stop"):  # not a range
                return CategoricalDistribution(values)
            ends = swept.start, swept.start + (len(values) - 1) * swept.step
            low, high, step = min(ends), max(ends), abs(swept.step)
    except ConfigError as error:
        if error.field == where:
            raise
        raise ConfigError(where, text, error.choices, error.remedy) from error
    log = "log" in getattr(swept, "tags", ())
    whole = all(isinstance(number, int) for number in (low, high, step or 0))
    if not low < high or not all(map(math.isfinite, (low, high))) or (log and low <= 0):
        raise ConfigError(
            where, text, "must run from a lower to a higher finite number" + (", both above 0" if log else "")
        )
    if log and step not in (None, 1):
        raise ConfigError(where, text, "must have a step of 1, because it has the tag log")
    return IntDistribution(low, high, log, step or 1) if whole else FloatDistribution(low, high, log, step)


def _parse_swept(key: str, text: str, where: str) -> Any:
    """Parse the text of a range with Hydra's grammar."""
    from aem_exp.config.compose import override_key, override_value

    if why := NOT_SEARCHABLE.get(override_key(f"{key}=0").partition(".")[0]):
        raise ConfigError(where, text, why)
    swept = override_value(f"{key}={text}")
    if unknown := set(getattr(swept, "tags", ())) - {"log"}:
        raise ConfigError(where, text, f"has an unknown tag ({', '.join(sorted(unknown))}); the only tag is log")
    return swept


def _expand_values(study: Study, key: str, where: str) -> list[str]:
    """The values of a choice or a range."""
    text = study.search.space[key]
    values = [word.partition("=")[2] for word in study.composer.expand_sweep(f"{key}={text}")]
    if len(set(values)) < 2:
        raise ConfigError(where, text, "has one value; set it in base:, or write a range such as interval(1e-4, 1e-3)")
    return values


def parameter_values(trial: "FrozenTrial") -> dict[str, str]:
    """The parameters of a trial, as texts of overrides."""
    return {key: format_override(value) for key, value in trial.params.items()}
