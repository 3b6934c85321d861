"""The keywords of TRL's GRPOConfig and peft's LoraConfig, read from the source of these libraries.

If a library is not installed, its keywords come from the snapshot `library_keywords.json`, so that a config gives the same
experiment or the same error. This command writes the snapshot from the installed libraries:

  AEM_RECORD=1 python -m pytest -n0 tests/config/test_library_keywords.py
"""

import ast
import json
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from aem_exp.config.call_signatures import CallSignature, parse_hint

SNAPSHOT: Final = Path(__file__).with_suffix(".json")
GRPO_CONFIG, LORA_CONFIG = "trl.GRPOConfig", "peft.LoraConfig"
_GRPO_SOURCES: Final = (  # GRPOConfig and its base classes
    ("trl", "trainer/grpo_config.py"),
    ("trl", "trainer/base_config.py"),
    ("transformers", "training_args.py"),
)


@cache
def grpo_keywords() -> frozenset[str]:
    """The field names of GRPOConfig."""
    installed = read_grpo_keywords()
    return frozenset(_read_snapshot(GRPO_CONFIG)) if installed is None else installed


def read_grpo_keywords() -> frozenset[str] | None:
    """The field names of the installed GRPOConfig, from its source, because importing it takes seconds. None if it is missing."""
    names = set[str]()
    for package, file in _GRPO_SOURCES:
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            return None
        names.update(_field_names(Path(spec.submodule_search_locations[0]) / file))
    return frozenset(names)


def _field_names(file: Path) -> Iterable[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    fields = [node for cls in classes for node in cls.body if isinstance(node, ast.AnnAssign)]
    return [node.target.id for node in fields if isinstance(node.target, ast.Name)]


@cache
def lora_signature() -> CallSignature:
    """The signature of LoraConfig from the snapshot; every keyword has a default."""
    hints = {name: parse_hint(text) for name, text in _read_snapshot(LORA_CONFIG).items()}
    return CallSignature(positional=list(hints), hints=hints)


def _read_snapshot(name: str) -> Any:
    return json.loads(SNAPSHOT.read_text(encoding="utf-8"))[name]
