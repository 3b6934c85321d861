"""What a sweep asks: a file of `sweeps/`, or a grid of the command line, becomes cells, each one experiment.

A sweep is one question. Its cells are arms x points x seeds. An *arm* is a named difference against the base, and the
first one is the reference; a *point* is a choice out of one of the products; overrides are Hydra's, several values too:

    question: Does AEM help GRPO, and RLOO too?
    base: +experiment=household_window trainer.steps=40  # of every cell, as on the command line
    arms:
      none: modulation=none
      aem: modulation=aem
    pairs: [aem none]                                    # optional: what is compared; by default each arm with the first
    products:                                            # optional
      - baseline=grpo,rloo
    seeds: 0,1,2                                         # or range(0,3)
    launch: launch=local                                 # optional: how much machine
    config_dir: ../my_conf                               # optional: a folder over conf/, seen from this file

With `search:` in the place of arms and products it is a study (see `study`), and its one cell what the search goes around.
What stands later in a cell wins: base, launch, arm, point, what was typed, seed. Everything that is wrong with a cell is
said here, before any of them begins.
"""

import shlex
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import yaml

from aem_exp import config
from aem_exp.config import rules, safe_yaml
from aem_exp.core import cli
from aem_exp.core.errors import ConfigError, unknown_key_error
from aem_exp.core.typed import NonNegativeInt, convert

if TYPE_CHECKING:
    from aem_exp.config.compose import Composer

Overrides = tuple[str, ...]
KEYS: Final = ("question", "base", "arms", "pairs", "products", "search", "seeds", "launch", "config_dir")
SHARED_KEYS: Final = {  # what no arm and no point may set
    "seed": "seeds stand under seeds:, the same for every arm",
    "outputs": "one sweep has one folder of runs; set it in base: or on the command line",
    "tracking": "one sweep has one MLflow store; set it in base: or on the command line",
}


@dataclass(frozen=True)
class Label:
    """Where in the question a cell stands; `group` says it in short."""

    arm: str
    point: Overrides
    group: str


@dataclass(frozen=True)
class SweepCell:
    """One experiment of a sweep. Where several arms or products meet in it, it has all of their labels."""

    labels: tuple[Label, ...]
    seed: int
    overrides: tuple[str, ...]  # `config.load` makes the same experiment of them
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
        """Arm and point without the seed."""
        return self.labels[0].group


@dataclass(frozen=True)
class Sweep:
    name: str
    question: str
    file: Path | None  # null: a grid of the command line
    arms: Mapping[str, Overrides]  # name -> how it differs from the base; the first is the reference
    points: tuple[Overrides, ...]
    seeds: tuple[int, ...]
    cells: tuple[SweepCell, ...]
    pairs: tuple[tuple[str, str], ...]  # the comparisons that were declared: an arm, and what it stands against
    search: Mapping[str, Any] | None = None  # the block of a study, which `study` understands
    config_dir: Path | None = None  # that its configs were composed with


@dataclass(frozen=True)
class _SweepSpec:
    """A sweep as it was asked, before anything is resolved."""

    name: str
    question: str
    file: Path | None
    base: list[str]
    arms: dict[str, Overrides]
    products: list[list[Overrides]]  # the points of each
    seeds: list[str]  # as overrides
    overrides: list[str]
    search: Mapping[str, Any] | None = None
    pairs: Sequence[str] = ()


def load(file_or_name: str | Path, overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> Sweep:
    """The sweep of a file, or of that name in `sweeps/`.

    Args:
        overrides: over every cell, as typed; `seed=0,1` stands in the place of the file's seeds.
        config_dir: a folder laid over `conf/`, as in `config.load`; in the place of the one that the file names.

    Raises:
        ConfigError: anything that is wrong with it, or with a cell of it, which is named.
    """
    from aem_exp.config.compose import Composer, override_key

    file = _require_file(file_or_name)
    data, name = _read_sweep_file(file), file.stem
    config_dir = config_dir or _config_folder(file, data)
    composer = Composer(config_dir)
    typed = [text for text in overrides if override_key(text) != "seed"]
    seeds = [text.partition("=")[2] for text in overrides if override_key(text) == "seed"]
    given = seeds[-1] if seeds else data["seeds"]
    arms = {arm: tuple(_parse_overrides(f"{name}.arms.{arm}", words)) for arm, words in data["arms"].items()}
    base = [word for key in ("base", "launch") for word in _parse_overrides(f"{name}.{key}", data.get(key))]
    products = [_parse_overrides(f"{name}.products", words) for words in data.get("products", ())]
    for at, words in {
        "base": base,
        **{f"arms.{arm}": words for arm, words in arms.items()},
        "overrides": typed,
    }.items():
        _check_single_values(f"{name}.{at}", words, composer)
    sweep = _build_sweep(
        _SweepSpec(
            name=name,
            question=data["question"].strip(),
            file=file,
            base=base,
            arms=arms,
            products=[_expand_product(f"{name}.products", words, composer) for words in products] or [[()]],
            seeds=[
                words[-1] for words in _expand_product(f"{name}.seeds", [f"seed={_parse_seeds(name, given)}"], composer)
            ],
            overrides=typed,
            search=data.get("search"),
            pairs=data.get("pairs", ()),
        ),
        composer,
    )
    return replace(sweep, config_dir=Path(config_dir).expanduser().absolute() if config_dir else None)


def parse_grid(overrides: Sequence[str], config_dir: str | Path | None = None) -> Sweep:
    """The sweep of a command line, `-m seed=0,1,2 modulation=none,aem`: the first key of several values names the arms.

    Raises:
        ConfigError: as `load`.
    """
    from aem_exp.config.compose import Composer, override_key

    composer = Composer(config_dir)
    spread = {text: composer.expand_sweep(text) for text in overrides}
    single = [text for text, each in spread.items() if each == [text]]
    swept = [each for text, each in spread.items() if each != [text]]
    if not swept:
        raise ConfigError("-m", " ".join(overrides), "needs an override of several values, such as seed=0,1,2")
    varied = [each for each in swept if override_key(each[0]) != "seed"]
    seeds = [each for each in spread.values() if override_key(each[0]) == "seed"]
    base = [text for text in single if override_key(text) != "seed"]
    names = [_shorten(text) for text in varied[0]] if varied else ["base"]
    for i, arm in enumerate(names):
        if arm in names[:i]:
            raise ConfigError("-m", varied[0][i], "stands twice")
    arms: dict[str, Overrides] = (
        dict(zip(names, ((text,) for text in varied[0]), strict=True)) if varied else {"base": ()}
    )
    first = [*base, *(each[0] for each in varied)]
    return _build_sweep(
        _SweepSpec(
            name="-".join(["grid", *(override_key(each[0]).rpartition(".")[2] for each in varied or seeds)]),
            question=f"-m {shlex.join(overrides)}",
            file=None,
            base=base,
            arms=arms,
            products=[list(product(*varied[1:]))],
            seeds=seeds[-1] if seeds else [f"seed={config.load(first, config_dir).seed}"],
            overrides=[],
        ),
        composer,
    )


def list_sweeps() -> dict[str, str]:
    """The sweeps that come with the package: name -> question."""
    return {file.stem: _read_sweep_file(file)["question"].strip() for file in sorted(_sweeps_folder().glob("*.yaml"))}


# Files.


def _sweeps_folder() -> Path:
    """The folder of our sweeps, beside that of our configs."""
    return config.conf_root().parent / "sweeps"


def find_file(asked: str | Path) -> Path | None:
    """The file of a sweep, by its path or by its name in `sweeps/`."""
    name = Path(asked).expanduser()
    places = [name, _sweeps_folder() / f"{name}.yaml", _sweeps_folder().parent / name]
    found = next((place for place in places if place.is_file()), None)
    return found.absolute() if found else None


def _config_folder(file: Path, data: Mapping[str, Any]) -> Path | None:
    """The folder over `conf/` that the file names, seen from where it lies; its modules can be named by configs."""
    if "config_dir" not in data:
        return None
    folder = file.parent / Path(data["config_dir"]).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{file.stem}.config_dir", data["config_dir"], f"there is no folder {folder}")
    cli.add_user_modules(folder)
    return folder


def _require_file(asked: str | Path) -> Path:
    if found := find_file(asked):
        return found
    names = [file.stem for file in sorted(_sweeps_folder().glob("*.yaml"))]
    raise ConfigError("sweep", asked, names, "or the path of a file of yours")


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML, in which a key that stands twice is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        count = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        if twice := next((key for key, times in count.items() if times > 1), None):
            raise ConfigError(f"{Path(self.name).stem}.{twice}", None, "stands twice in one block; names differ")
        return super().construct_mapping(node, deep)


def _read_sweep_file(file: Path) -> dict[str, Any]:
    """The file's keys, each of the right kind and none of them empty."""
    name = file.stem
    loader = _UniqueKeyLoader(safe_yaml.read(file, "sweep"))
    loader.name = str(file)
    try:
        data = loader.get_single_data()
    except (yaml.YAMLError, ValueError) as error:  # a number of more digits than Python reads is a ValueError
        raise ConfigError("sweep", str(file), f"is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError("sweep", str(file), f"must hold the keys {', '.join(KEYS)}")
    for key, value in data.items():
        if key not in KEYS:
            raise unknown_key_error(f"{name}.{key}", value, KEYS)
    if "search" in data:
        data.setdefault("arms", {"base": None})
    for key in ("question", "arms", "seeds", *(key for key in ("pairs", "products", "search") if key in data)):
        if data.get(key) in (None, "", [], {}):
            raise ConfigError(f"{name}.{key}", data.get(key), "must hold something")
    kinds: dict[str, tuple[type, str]] = {
        "question": (str, "a sentence"),
        "products": (list, "a list, one product to an item"),
        "pairs": (list, "a list, two arms to an item: [aem none, aem shuffled]"),
        "arms": (dict, "a mapping, name: overrides"),
        "search": (dict, "a mapping with space, trials, and more"),
        "config_dir": (str, "a folder, seen from this file"),
    }
    for key, (kind, words) in kinds.items():
        if key in data and not isinstance(data[key], kind):
            raise ConfigError(f"{name}.{key}", data[key], f"must be {words}")
    for arm in data["arms"]:
        if not isinstance(arm, str) or not rules.NAME_PATTERN.fullmatch(arm):
            raise ConfigError(f"{name}.arms", arm, "must be named with letters, digits, and . _ + = -")
    return data


def _parse_overrides(at: str, given: Any) -> list[str]:
    """Overrides: a line as on the command line, or a list of them."""
    if isinstance(given, list) and all(isinstance(word, str) for word in given):
        for word in given:
            if "=" not in word and not word.startswith("~"):
                remedy = "must read key=value; within [] a comma ends an item, so write the line without brackets"
                raise ConfigError(at, word, remedy)
        return given
    if given is None or isinstance(given, str):
        try:
            return shlex.split(given or "")
        except ValueError as error:
            raise ConfigError(at, given, f"is not a command line: {error}") from error
    raise ConfigError(at, given, "must be overrides as on the command line, such as baseline=grpo trainer.steps=40")


def _parse_seeds(name: str, given: Any) -> str:
    seeds = ",".join(map(str, given)) if isinstance(given, list) else str(given)
    if not seeds.strip():
        raise ConfigError(f"{name}.seeds", given, "must hold something")
    return seeds


# From a question to cells.


def _check_single_values(at: str, words: Iterable[str], composer: "Composer") -> None:
    for word in words:
        try:
            single = composer.expand_sweep(word) == [word]
        except ConfigError as error:
            raise _add_location(at, error) from error
        if not single:
            raise ConfigError(at, word, "one value here; several belong in products:, or in seeds:")


def _expand_product(at: str, words: Sequence[str], composer: "Composer") -> list[Overrides]:
    """The points of one product."""
    if not words:
        raise ConfigError(at, None, "an empty product; its overrides are missing")
    try:
        points = list(product(*map(composer.expand_sweep, words)))
    except ConfigError as error:
        raise _add_location(at, error) from error
    for i, point in enumerate(points):
        if point in points[:i]:
            raise ConfigError(at, " ".join(point), "stands twice")
    return points


def _build_sweep(asked: _SweepSpec, composer: "Composer") -> Sweep:
    _check_shared_keys(asked)
    points = list(dict.fromkeys(point for points in asked.products for point in points))
    for key, given in {"arms": asked.arms, "products": points, "seeds": asked.seeds}.items():
        if asked.search is not None and len(given) > 1:
            remedy = "a search goes around one experiment: one arm, one point, one seed; vary the rest in search.space"
            raise ConfigError(f"{asked.name}.{key}", f"{len(given)} of them", remedy)
    labels = _make_labels(asked.arms, points)
    cells: dict[str, SweepCell] = {}
    reached: dict[tuple[str, Overrides], str] = {}  # with the first seed
    for label in labels:
        settled = composer.drop_replaced_choices([*asked.base, *asked.arms[label.arm], *label.point, *asked.overrides])
        experiments = _resolve_seeds(settled, asked.seeds, composer)
        for seed in asked.seeds:
            try:
                experiment = next(experiments)
            except ConfigError as error:
                raise _add_location(f"{asked.name}: {' '.join((label.arm, *label.point, seed))}", error) from error
            folder = config.run_dir(experiment)
            signature = folder.name.rpartition("-")[2]  # with which the name ends; hashed once
            new = SweepCell((label,), experiment.seed, (*settled, seed), experiment, folder)
            old = cells.get(signature)
            cells[signature] = replace(old, labels=(*old.labels, label)) if old else new
            reached.setdefault((label.arm, label.point), signature)
    _check_distinct(asked, points, reached)
    seeds = tuple(dict.fromkeys(cell.seed for cell in cells.values()))
    pairs, found = _parse_pairs(asked), tuple(cells.values())
    return Sweep(asked.name, asked.question, asked.file, asked.arms, tuple(points), seeds, found, pairs, asked.search)


def _parse_pairs(asked: _SweepSpec) -> tuple[tuple[str, str], ...]:
    """Which arms are compared: those that are asked for, or each with the first."""
    at, arms = f"{asked.name}.pairs", list(asked.arms)
    out: list[tuple[str, str]] = []
    for text in asked.pairs:
        words = text.split() if isinstance(text, str) else []
        if len(words) != 2 or words[0] == words[1]:
            raise ConfigError(at, text, "must be two arms, the second is what the first stands against: aem none")
        for arm in words:
            if arm not in arms:
                raise ConfigError(at, arm, arms)
        if (words[0], words[1]) in out or (words[1], words[0]) in out:
            raise ConfigError(at, text, "stands twice")
        out.append((words[0], words[1]))
    return tuple(out) or tuple((arm, arms[0]) for arm in arms[1:])


def _resolve_seeds(overrides: list[str], seeds: list[str], composer: "Composer") -> Iterator[config.Experiment]:
    """What `config.load` makes of the overrides with each seed. Where only the seed differs, one is resolved for all."""
    from aem_exp.config.compose import may_interpolate, override_value

    tree = composer.compose([*overrides, seeds[0]])
    yield (first := config.resolve(tree))
    alike = first.parent is None and not may_interpolate(tree, "seed")
    for seed in seeds[1:]:
        if alike and isinstance(override_value(seed), int):
            experiment = replace(first, seed=convert(NonNegativeInt, override_value(seed), "seed"))
            rules.check(experiment)
            yield experiment
        else:
            yield config.resolve(composer.compose([*overrides, seed]))


def _check_shared_keys(asked: _SweepSpec) -> None:
    """Refuse what is one for all cells and was set for some."""
    from aem_exp.config.compose import override_key

    places = {f"arms.{arm}": words for arm, words in asked.arms.items()}
    places |= {"products": tuple(word for points in asked.products for point in points for word in point)}
    places |= {"base": tuple(word for word in asked.base if override_key(word) == "seed")}
    for at, words in places.items():
        for word in words:
            if override_key(word) in SHARED_KEYS:
                raise ConfigError(f"{asked.name}.{at}", word, SHARED_KEYS[override_key(word)])


def _check_distinct(asked: _SweepSpec, points: list[Overrides], reached: Mapping[tuple[str, Overrides], str]) -> None:
    """Refuse two arms, or two points of a product, that are the same experiments."""
    decides = "the same experiments (name, launch and outputs decide no result)"
    for point in points:
        here = {arm: reached[arm, point] for arm in asked.arms}
        if twins := _find_duplicate(here, here.__getitem__):
            at, words = f" at {' '.join(point)}" if point else "", " ".join(asked.arms[twins[1]])
            why = f"changes nothing against {twins[0]}{at}: {decides}"
            raise ConfigError(f"{asked.name}.arms.{twins[1]}", words, why)
    for of_product in asked.products:
        if same := _find_duplicate(of_product, lambda point: tuple(reached[arm, point] for arm in asked.arms)):
            first, second = (" ".join(point) for point in same)
            raise ConfigError(f"{asked.name}.products", second, f"changes nothing against {first}: {decides}")


def _find_duplicate(items: Iterable[Any], of: Callable[[Any], Hashable]) -> tuple[Any, Any] | None:
    """The first two items that are equal in something."""
    seen: dict[Hashable, Any] = {}
    for item in items:
        if of(item) in seen:
            return seen[of(item)], item
        seen[of(item)] = item
    return None


def _make_labels(arms: Iterable[str], points: list[Overrides]) -> list[Label]:
    """Arm by arm, each point; the group is as short as it can be and still says which."""
    everywhere = set(points[0]).intersection(*points[1:])
    for word in (_shorten, lambda text: text.lstrip("+")):
        told = {
            point: [word(text) for text in point if text not in everywhere and _is_in_group_name(text)]
            for point in points
        }
        if len({tuple(words) for words in told.values()}) == len(points):
            break
    return [Label(arm, point, "/".join((arm, *told[point]))) for arm in arms for point in points]


def _is_in_group_name(text: str) -> bool:
    """A name is for people, and says what the rest of the point says."""
    return not text.startswith("name=")


def _shorten(text: str) -> str:
    """`baseline=rloo` as rloo, `trainer.learning_rate=1e-3` as learning_rate=1e-3."""
    key, is_set, value = text.lstrip("+").partition("=")
    last = key.rpartition(".")[2]
    return f"{last}={value}" if is_set and "." in key else value or text


def _add_location(at: str, error: ConfigError) -> ConfigError:
    """The same mistake, and where it was made."""
    return ConfigError(f"{at}: {error.field}", error.value, error.choices, error.remedy)
