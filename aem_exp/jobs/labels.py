"""Short labels of runs in a table, from the names and settings in which the runs differ."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from aem_exp.core.errors import format_value

NAMED_BLOCKS: Final = ("name", "env", "model", "baseline", "modulation")  # blocks with a name, most informative first
IGNORED_KEYS: Final = (
    "seed",
    "launch",
    "outputs",
    "tracking",
    "parent_dir",
    "resume",
)  # shown in another column, or without effect on results
MAX_SETTINGS: Final = 3  # maximum number of settings in a label

Data = Mapping[str, Any]  # content of an experiment.json


def make_labels(experiments: Sequence[Data]) -> list[str]:
    """A label for each experiment: the names that differ between experiments, then, if needed, the settings that differ."""
    named = [[_block_name(data, block) for block in NAMED_BLOCKS] for data in experiments]
    differs = [len(set(column)) > 1 for column in zip(*named, strict=True)]
    out = [" ".join(word for word, differ in zip(row, differs, strict=True) if differ) for row in named]
    out = [label or "+".join(row[3:]) for label, row in zip(out, named, strict=True)]
    alike: dict[tuple[str, Any], list[int]] = {}
    for i, label in enumerate(out):
        alike.setdefault((label, experiments[i].get("seed")), []).append(i)
    for group in alike.values():
        if len(group) > 1:
            for i, words in zip(group, _differing_settings([experiments[i] for i in group]), strict=True):
                out[i] = " ".join([out[i], *words])
    return out


def _block_name(data: Data, block: str) -> str:
    value = data.get(block, "")
    return str(value if block == "name" else value.get("name", ""))


def _differing_settings(experiments: Sequence[Data]) -> list[list[str]]:
    """For each experiment, the settings that differ, as overrides without their block."""
    flat = [dict(_flatten(data)) for data in experiments]
    keys = list(dict.fromkeys(key for each in flat for key in each))
    differ = [key for key in keys if len({repr(each.get(key)) for each in flat}) > 1]
    more = ["..."] if len(differ) > MAX_SETTINGS else []
    return [
        [f"{key.rpartition('.')[2]}={format_value(each.get(key))}" for key in differ[:MAX_SETTINGS]] + more
        for each in flat
    ]


def _flatten(data: Data, at: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if not at and key in IGNORED_KEYS:
            continue
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{at}{key}.")
        elif key != "name":
            yield f"{at}{key}", value
