"""The snapshot of GRPOConfig's and LoraConfig's keywords says what the installed libraries say."""

import json
from importlib.metadata import version
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest
from support.golden import RECORD

from aem_exp.config import library_keywords, targets

COMMAND = "AEM_RECORD=1 python -m pytest -n0 tests/config/test_library_keywords.py writes it anew"


def text_of(hint):
    """A type as an annotation spells it."""
    if get_origin(hint) in (Union, UnionType):
        return " | ".join(map(text_of, get_args(hint)))
    if get_origin(hint) is Literal:
        return f"Literal[{', '.join(map(repr, get_args(hint)))}]"
    assert hint in (Any, bool, int, float, str, type(None)), "the snapshot cannot hold this type yet"
    return "None" if hint is type(None) else hint.__name__


def installed_lora():
    signature = targets._read_signature("model.lora", library_keywords.LORA_CONFIG)
    assert not signature.required
    assert not signature.accepts_any
    return signature


@pytest.fixture(scope="module", autouse=True)
def recorded():
    if RECORD:
        snapshot = {
            "read from": {name: version(name) for name in ("trl", "transformers", "peft")},
            library_keywords.GRPO_CONFIG: sorted(library_keywords.read_grpo_keywords()),
            library_keywords.LORA_CONFIG: {name: text_of(hint) for name, hint in installed_lora().hints.items()},
        }
        library_keywords.SNAPSHOT.write_text(json.dumps(snapshot, indent=1) + "\n")


def test_the_snapshot_of_grpo_config_is_what_trl_says():
    snapshot = json.loads(library_keywords.SNAPSHOT.read_text())[library_keywords.GRPO_CONFIG]
    assert set(snapshot) == library_keywords.read_grpo_keywords(), COMMAND


def test_the_snapshot_of_lora_config_is_what_peft_says():
    snapshot, installed = library_keywords.lora_signature(), installed_lora()
    assert list(snapshot.hints.items()) == list(installed.hints.items()), COMMAND
    assert snapshot == installed
