"""The space of a study: each parameter's range as Optuna's distribution, and the checks before the first trial."""

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


NOT_SEARCHABLE: Final = {  # what a search must not vary, and why
    "seed": "a seed is luck; choose it in seeds:",
    "outputs": "a study has one folder of runs; set it in base:",
    "tracking": "a study has one MLflow store; set it in base:",
    "launch": "how much machine decides no result",
    "evaluation": "trials are compared by one measure; set it in base:",
}


def from_sweep(sweep: "Sweep", typed: Sequence[str] = (), config_dir: str | None = None) -> Study:
    """The study of a sweep with `search:`; `typed`: what was typed over it.

    Raises:
        ConfigError: anything that is wrong with it, before any trial.
    """
    from aem_exp.config.compose import override_key
    from aem_exp.tracking import views

    (cell,) = sweep.cells
    at = f"{sweep.name}.search"
    views.sweep_tag(sweep.name)  # refuses a name that is none
    assert sweep.search is not None
    search = parse_search(sweep.search, at)
    folder = cell.folder.parent / FOLDER / sweep.name
    configs = Path(config_dir).expanduser().absolute() if config_dir else sweep.config_dir
    study = Study(folder, sweep.question, cell.overrides, configs, search)
    for text in typed:
        if override_key(text) in search.space:
            raise ConfigError("overrides", text, f"is searched; change it in {at}.space")
    _check_search(study, at)
    return study


def _check_search(study: Study, at: str) -> None:
    from aem_exp.core.errors import redact

    search, panels = study.search, study.base.evaluation
    if search.metric.startswith("test/"):
        raise ConfigError(f"{at}.metric", search.metric, "tuning reads the dev panel only: eval/success, for example")
    if panels.panel == "test":
        raise ConfigError(
            "evaluation.panel", panels.panel, "is the final test; tuning reads another panel, such as dev"
        )
    if search.storage and redact(search.storage) != search.storage:
        remedy = "holds credentials; those come from the environment: the whole URL in AEM_STUDY"
        raise ConfigError(f"{at}.storage", redact(search.storage), remedy)
    _check_parameters_matter(study, at)


def _check_parameters_matter(study: Study, at: str) -> None:
    """Refuse a parameter whose values make the same experiment, or one that cannot be."""
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
            remedy = f"changes nothing between {' and '.join(values[:2])}; does the base use it?"
            raise ConfigError(f"{at}.space.{key}", study.search.space[key], remedy)


def representative_values(study: Study, key: str, at: str) -> list[str]:
    """Values of a parameter that show whether it is taken: all choices, or both ends."""
    values = distribution(study, key, at)
    if hasattr(values, "choices"):
        return [str(choice) for choice in values.choices]
    return [format_override(values.low), format_override(values.high)]


def distribution(study: Study, key: str, at: str = "space") -> Any:
    """A parameter's range, as optuna calls it. Choices are kept as they are written, so that overrides are made of them."""
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
        raise ConfigError(where, text, "must go from a lower to a higher number" + (", both above 0" if log else ""))
    if log and step not in (None, 1):
        raise ConfigError(where, text, "a range with the tag log has steps of 1")
    return IntDistribution(low, high, log, step or 1) if whole else FloatDistribution(low, high, log, step)


def _parse_swept(key: str, text: str, where: str) -> Any:
    """What Hydra makes of a range's text."""
    from aem_exp.config.compose import override_key, override_value

    if why := NOT_SEARCHABLE.get(override_key(f"{key}=0").partition(".")[0]):
        raise ConfigError(where, text, why)
    swept = override_value(f"{key}={text}")
    if unknown := set(getattr(swept, "tags", ())) - {"log"}:
        raise ConfigError(where, text, f"only read with the tag log, not {', '.join(sorted(unknown))}")
    return swept


def _expand_values(study: Study, key: str, where: str) -> list[str]:
    """The values of a choice or a range."""
    text = study.search.space[key]
    values = [word.partition("=")[2] for word in study.composer.expand_sweep(f"{key}={text}")]
    if len(set(values)) < 2:
        raise ConfigError(where, text, "one value; it belongs in base:, or write interval(1e-4, 1e-3)")
    return values


def parameter_values(trial: "FrozenTrial") -> dict[str, str]:
    """A trial's parameters as overrides have them."""
    return {key: format_override(value) for key, value in trial.params.items()}
