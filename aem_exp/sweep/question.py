"""Turns a sweep file or a command-line grid into a sweep, whose cells are experiments.

A sweep answers one question. Its cells are arms x points x seeds. An *arm* is a named difference from the base; the first arm
is the reference. A *point* is one combination of the values of a product. Overrides use Hydra's syntax:

    question: Does AEM help GRPO, and RLOO too?
    base: +experiment=household_window trainer.steps=40  # overrides of every cell
    arms:
      none: modulation=none
      aem: modulation=aem
    pairs: [aem none]                                    # optional: compared arms; default: each arm with the first
    contrasts:                                           # optional: weighted sums of arms or cells; the first one is primary
      AEM over all baselines: {aem: 1, none: -1}
    products:                                            # optional
      - baseline=grpo,rloo
    seeds: 0,1,2                                         # or range(0,3)
    launch: launch=local                                 # optional: machine and processes
    config_dir: ../my_conf                               # optional: searched before conf/; relative to this file

A file with `search:` instead of arms and products is a study (see `study_spec`); its only cell is the base of the search. Later
overrides win: base, launch, arm, point, command line, seed. All errors of all cells are reported before a cell starts.
"""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from aem_exp import config
from aem_exp.core.errors import ConfigError
from aem_exp.sweep.cells import (
    Overrides,
    Sweep,
    SweepSpec,
    build_sweep,
    check_single_values,
    expand_product,
    shorten,
)
from aem_exp.sweep.sweep_file import config_folder, parse_overrides, parse_seeds, read_sweep_file, require_file


def load(file_or_name: str | Path, overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> Sweep:
    """Load the sweep of a file, or of a name in `sweeps/`.

    Args:
        overrides: overrides of every cell; `seed=0,1` replaces the seeds of the file.
        config_dir: a folder that is searched before `conf/`, as in `config.load`; replaces the folder named in the file.

    Raises:
        ConfigError: the file or one of its cells is invalid; the error names the cell.
    """
    from aem_exp.config.compose import Composer, override_key

    file = require_file(file_or_name)
    data, name = read_sweep_file(file), file.stem
    config_dir = config_dir or config_folder(file, data)
    composer = Composer(config_dir)
    typed = [text for text in overrides if override_key(text) != "seed"]
    seeds = [text.partition("=")[2] for text in overrides if override_key(text) == "seed"]
    seeds_value = seeds[-1] if seeds else data["seeds"]
    arms = {arm: tuple(parse_overrides(f"{name}.arms.{arm}", words)) for arm, words in data["arms"].items()}
    base = [word for key in ("base", "launch") for word in parse_overrides(f"{name}.{key}", data.get(key))]
    products = [parse_overrides(f"{name}.products", words) for words in data.get("products", ())]
    for at, words in {
        "base": base,
        **{f"arms.{arm}": words for arm, words in arms.items()},
        "overrides": typed,
    }.items():
        check_single_values(f"{name}.{at}", words, composer)
    sweep = build_sweep(
        SweepSpec(
            name=name,
            question=data["question"].strip(),
            file=file,
            base=base,
            arms=arms,
            products=[expand_product(f"{name}.products", words, composer) for words in products] or [[()]],
            seeds=[
                words[-1]
                for words in expand_product(f"{name}.seeds", [f"seed={parse_seeds(name, seeds_value)}"], composer)
            ],
            overrides=typed,
            search=data.get("search"),
            pairs=data.get("pairs", ()),
            contrasts=data.get("contrasts", {}),
        ),
        composer,
    )
    return replace(sweep, config_dir=Path(config_dir).expanduser().absolute() if config_dir else None)


def parse_grid(overrides: Sequence[str], config_dir: str | Path | None = None) -> Sweep:
    """The sweep of a command line such as `-m seed=0,1,2 modulation=none,aem`. The first key with several values gives the arms.

    Raises:
        ConfigError: as `load`.
    """
    from aem_exp.config.compose import Composer, override_key

    composer = Composer(config_dir)
    spread = {text: composer.expand_sweep(text) for text in overrides}
    single = [text for text, each in spread.items() if each == [text]]
    swept = [each for text, each in spread.items() if each != [text]]
    if not swept:
        raise ConfigError("-m", " ".join(overrides), "needs an override with several values, such as seed=0,1,2")
    varied = [each for each in swept if override_key(each[0]) != "seed"]
    seeds = [each for each in spread.values() if override_key(each[0]) == "seed"]
    base = [text for text in single if override_key(text) != "seed"]
    names = [shorten(text) for text in varied[0]] if varied else ["base"]
    for i, arm in enumerate(names):
        if arm in names[:i]:
            raise ConfigError("-m", varied[0][i], "is listed twice")
    arms: dict[str, Overrides] = (
        dict(zip(names, ((text,) for text in varied[0]), strict=True)) if varied else {"base": ()}
    )
    first = [*base, *(each[0] for each in varied)]
    return build_sweep(
        SweepSpec(
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
