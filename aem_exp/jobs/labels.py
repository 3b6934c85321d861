"""What tells the runs of a table apart, in as few words as that takes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from aem_exp.core.errors import shown

BLOCKS: Final = ("name", "env", "model", "baseline", "modulation")  # named by people; the first two tell most
APART: Final = (
    "seed",
    "launch",
    "outputs",
    "tracking",
    "parent_dir",
    "resume",
)  # has its own column, or decides nothing
MOST: Final = 3  # settings in a label

Data = Mapping[str, Any]  # of an experiment.json


def labels(experiments: Sequence[Data]) -> list[str]:
    """A label for each: the names that are not the same everywhere, and where those leave two alike, the settings that differ."""
    named = [[_name(data, block) for block in BLOCKS] for data in experiments]
    differs = [len(set(column)) > 1 for column in zip(*named, strict=True)]
    out = [" ".join(word for word, differ in zip(row, differs, strict=True) if differ) for row in named]
    out = [label or "+".join(row[3:]) for label, row in zip(out, named, strict=True)]
    alike: dict[tuple[str, Any], list[int]] = {}
    for i, label in enumerate(out):
        alike.setdefault((label, experiments[i].get("seed")), []).append(i)
    for group in alike.values():
        if len(group) > 1:
            for i, words in zip(group, _differences([experiments[i] for i in group]), strict=True):
                out[i] = " ".join([out[i], *words])
    return out


def _name(data: Data, block: str) -> str:
    value = data.get(block, "")
    return str(value if block == "name" else value.get("name", ""))


def _differences(experiments: Sequence[Data]) -> list[list[str]]:
    """For each, its values of the settings that are not the same in all, as overrides without their block."""
    flat = [dict(_dotted(data)) for data in experiments]
    keys = list(dict.fromkeys(key for each in flat for key in each))
    differ = [key for key in keys if len({repr(each.get(key)) for each in flat}) > 1]
    more = ["..."] if len(differ) > MOST else []
    return [[f"{key.rpartition('.')[2]}={shown(each.get(key))}" for key in differ[:MOST]] + more for each in flat]


def _dotted(data: Data, at: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if not at and key in APART:
            continue
        if isinstance(value, dict) and value:
            yield from _dotted(value, f"{at}{key}.")
        elif key != "name":
            yield f"{at}{key}", value
