"""Turns the arms, points and seeds of a sweep into cells. Each cell is one resolved experiment; no two cells are the same."""

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from aem_exp import config
from aem_exp.config import rules
from aem_exp.core.errors import ConfigError
from aem_exp.core.typed import NonNegativeInt, convert
from aem_exp.sweep.contrasts import Contrast, parse_contrasts

if TYPE_CHECKING:
    from aem_exp.config.compose import Composer


Overrides = tuple[str, ...]
SHARED_KEYS: Final = {  # keys that an arm or a point must not set -> remedy
    "seed": "list seeds under seeds:, the same for every arm",
    "outputs": "a sweep has one outputs folder; set it in base: or on the command line",
    "tracking": "a sweep has one MLflow store; set it in base: or on the command line",
}


@dataclass(frozen=True)
class Label:
    """The arm and the point that a cell belongs to."""

    arm: str
    point: Overrides
    group: str
    """Short name of arm and point."""


@dataclass(frozen=True)
class SweepCell:
    """One experiment of a sweep. A cell that belongs to several arms or products has one label for each."""

    labels: tuple[Label, ...]
    seed: int
    overrides: tuple[str, ...]
    """Overrides from which `config.load` makes the same experiment."""
    experiment: config.Experiment
    folder: Path

    @property
    def arm(self) -> str:
        return self.labels[0].arm

    @property
    def point(self) -> Overrides:
        return self.labels[0].point

    @property
    def group(self) -> str:
        """Short name of arm and point, without the seed."""
        return self.labels[0].group


@dataclass(frozen=True)
class Sweep:
    """A question, and the experiments that answer it."""

    name: str
    question: str
    file: Path | None
    """The sweep file; None for a command-line grid."""
    arms: Mapping[str, Overrides]
    """Name -> overrides that differ from the base. The first arm is the reference."""
    points: tuple[Overrides, ...]
    seeds: tuple[int, ...]
    cells: tuple[SweepCell, ...]
    pairs: tuple[tuple[str, str], ...]
    """The declared comparisons: (arm, reference arm)."""
    contrasts: tuple[Contrast, ...] = ()
    """The declared contrasts; the first one is the primary hypothesis."""
    search: Mapping[str, Any] | None = None
    """The `search:` block of a study; see `study_spec`."""
    config_dir: Path | None = None
    """The configuration folder that was searched before `conf/`."""


@dataclass(frozen=True)
class SweepSpec:
    """The content of a sweep file or grid, before its cells are resolved."""

    name: str
    question: str
    file: Path | None
    base: list[str]
    arms: dict[str, Overrides]
    products: list[list[Overrides]]
    """The points of each product."""
    seeds: list[str]
    """One override `seed=N` per seed."""
    overrides: list[str]
    search: Mapping[str, Any] | None = None
    pairs: Sequence[str] = ()
    contrasts: Mapping[str, Any] = field(default_factory=dict)


def check_single_values(at: str, words: Iterable[str], composer: "Composer") -> None:
    for word in words:
        try:
            single = composer.expand_sweep(word) == [word]
        except ConfigError as error:
            raise _add_location(at, error) from error
        if not single:
            raise ConfigError(at, word, "must have one value; write several values in products: or seeds:")


def expand_product(at: str, words: Sequence[str], composer: "Composer") -> list[Overrides]:
    """The points of one product."""
    if not words:
        raise ConfigError(at, None, "is an empty product; add its overrides")
    try:
        points = list(product(*map(composer.expand_sweep, words)))
    except ConfigError as error:
        raise _add_location(at, error) from error
    for i, point in enumerate(points):
        if point in points[:i]:
            raise ConfigError(at, " ".join(point), "is listed twice")
    return points


def build_sweep(spec: SweepSpec, composer: "Composer") -> Sweep:
    """Resolve every cell.

    Raises:
        ConfigError: a cell is invalid, or two arms or points are the same experiments.
    """
    _check_shared_keys(spec)
    points = list(dict.fromkeys(point for points in spec.products for point in points))
    for key, values in {"arms": spec.arms, "products": points, "seeds": spec.seeds}.items():
        if spec.search is not None and len(values) > 1:
            remedy = "a study has one arm, one point and one seed; vary other keys in search.space"
            raise ConfigError(f"{spec.name}.{key}", f"{len(values)} values", remedy)
    labels = _make_labels(spec.arms, points)
    cells: dict[str, SweepCell] = {}
    signatures: dict[tuple[str, Overrides], str] = {}  # of the first seed
    for label in labels:
        overrides = composer.drop_replaced_choices([*spec.base, *spec.arms[label.arm], *label.point, *spec.overrides])
        experiments = _resolve_seeds(overrides, spec.seeds, composer)
        for seed in spec.seeds:
            try:
                experiment = next(experiments)
            except ConfigError as error:
                raise _add_location(f"{spec.name}: {' '.join((label.arm, *label.point, seed))}", error) from error
            folder = config.run_dir(experiment)
            signature = folder.name.rpartition("-")[2]  # the end of the name, so that it is hashed only once
            new = SweepCell((label,), experiment.seed, (*overrides, seed), experiment, folder)
            old = cells.get(signature)
            cells[signature] = replace(old, labels=(*old.labels, label)) if old else new
            signatures.setdefault((label.arm, label.point), signature)
    _check_distinct(spec, points, signatures)
    seeds = tuple(dict.fromkeys(cell.seed for cell in cells.values()))
    return Sweep(
        name=spec.name,
        question=spec.question,
        file=spec.file,
        arms=spec.arms,
        points=tuple(points),
        seeds=seeds,
        cells=tuple(cells.values()),
        pairs=_parse_pairs(spec),
        contrasts=parse_contrasts(spec.name, spec.contrasts, labels),
        search=spec.search,
    )


def _parse_pairs(spec: SweepSpec) -> tuple[tuple[str, str], ...]:
    """The compared pairs of arms: the declared ones, else each arm with the first."""
    at, arms = f"{spec.name}.pairs", list(spec.arms)
    out: list[tuple[str, str]] = []
    for text in spec.pairs:
        words = text.split() if isinstance(text, str) else []
        if len(words) != 2 or words[0] == words[1]:
            raise ConfigError(at, text, "must be an arm and its reference arm, such as: aem none")
        for arm in words:
            if arm not in arms:
                raise ConfigError(at, arm, arms)
        if (words[0], words[1]) in out or (words[1], words[0]) in out:
            raise ConfigError(at, text, "is listed twice")
        out.append((words[0], words[1]))
    return tuple(out) or tuple((arm, arms[0]) for arm in arms[1:])


def _resolve_seeds(overrides: list[str], seeds: list[str], composer: "Composer") -> Iterator[config.Experiment]:
    """The experiment of the overrides for each seed. If only the seed can differ, the configuration is resolved once."""
    from aem_exp.config.compose import may_interpolate, override_value

    tree = composer.compose([*overrides, seeds[0]])
    yield (first := config.resolve(tree))
    only_seed_differs = first.parent is None and not may_interpolate(tree, "seed")
    for seed in seeds[1:]:
        if only_seed_differs and isinstance(override_value(seed), int):
            experiment = replace(first, seed=convert(NonNegativeInt, override_value(seed), "seed"))
            rules.check(experiment)
            yield experiment
        else:
            yield config.resolve(composer.compose([*overrides, seed]))


def _check_shared_keys(spec: SweepSpec) -> None:
    """Check that no arm or point sets a key that all cells share."""
    from aem_exp.config.compose import override_key

    places = {f"arms.{arm}": words for arm, words in spec.arms.items()}
    places |= {"products": tuple(word for points in spec.products for point in points for word in point)}
    places |= {"base": tuple(word for word in spec.base if override_key(word) == "seed")}
    for at, words in places.items():
        for word in words:
            if override_key(word) in SHARED_KEYS:
                raise ConfigError(f"{spec.name}.{at}", word, SHARED_KEYS[override_key(word)])


def _check_distinct(spec: SweepSpec, points: list[Overrides], signatures: Mapping[tuple[str, Overrides], str]) -> None:
    """Check that no two arms, and no two points of a product, are the same experiments."""
    decides = "both are the same experiments (name, launch and outputs do not affect results)"
    for point in points:
        by_arm = {arm: signatures[arm, point] for arm in spec.arms}
        if duplicates := _find_duplicate(by_arm, by_arm.__getitem__):
            at, words = f" at {' '.join(point)}" if point else "", " ".join(spec.arms[duplicates[1]])
            why = f"does not differ from {duplicates[0]}{at}: {decides}"
            raise ConfigError(f"{spec.name}.arms.{duplicates[1]}", words, why)
    for product_points in spec.products:
        if duplicates := _find_duplicate(
            product_points, lambda point: tuple(signatures[arm, point] for arm in spec.arms)
        ):
            first, second = (" ".join(point) for point in duplicates)
            raise ConfigError(f"{spec.name}.products", second, f"does not differ from {first}: {decides}")


def _find_duplicate(items: Iterable[Any], key: Callable[[Any], Hashable]) -> tuple[Any, Any] | None:
    """The first two items with the same key, or None."""
    seen: dict[Hashable, Any] = {}
    for item in items:
        if key(item) in seen:
            return seen[key(item)], item
        seen[key(item)] = item
    return None


def _make_labels(arms: Iterable[str], points: list[Overrides]) -> list[Label]:
    """One label for each arm and point, with the shortest group names that are unique."""
    everywhere = set(points[0]).intersection(*points[1:])
    for spell in (shorten, lambda text: text.lstrip("+")):
        words = {
            point: [spell(text) for text in point if text not in everywhere and _is_in_group_name(text)]
            for point in points
        }
        if len(set(map(tuple, words.values()))) == len(points):
            break
    return [Label(arm, point, "/".join((arm, *words[point]))) for arm in arms for point in points]


def _is_in_group_name(text: str) -> bool:
    """Whether an override is part of the group name; `name=` only repeats other overrides."""
    return not text.startswith("name=")


def shorten(text: str) -> str:
    """Shorten `baseline=rloo` to rloo, and `trainer.learning_rate=1e-3` to learning_rate=1e-3."""
    key, is_set, value = text.lstrip("+").partition("=")
    last = key.rpartition(".")[2]
    return f"{last}={value}" if is_set and "." in key else value or text


def _add_location(at: str, error: ConfigError) -> ConfigError:
    """The same error, with its location in the sweep."""
    return ConfigError(f"{at}: {error.field}", error.value, error.choices, error.remedy)
