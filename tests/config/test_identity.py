"""Signatures, run dirs, and differences between experiments."""

import dataclasses
from typing import Any, get_args, get_type_hints

import pytest
from support.configs import with_trainer

from aem_exp import config
from aem_exp.config import load, trainer_keys
from aem_exp.config.schema import neutral_values

pytestmark = pytest.mark.usefixtures("clean")


def other_value(value: Any, hint: Any = None) -> Any:
    """Another value of the same type."""
    match value:
        case bool():
            return not value
        case int() | float():
            return value + 1
        case str():
            others = [choice for choice in get_args(hint) if choice != value]
            return others[0] if others else f"{value}x"
        case dict():
            return value | {"another": 1}
    return {"another": 1} if "dict" in str(hint) else "x"


PARTS = {
    "model": config.Model,
    "env": config.Env,
    "baseline": config.Baseline,
    "modulation": config.Modulation,
    "evaluation": config.Evaluation,
    "warm_start": config.WarmStart,
    "launch": config.Launch,
}


FIELDS = [(part, f.name) for part, block in PARTS.items() for f in dataclasses.fields(block)]


NEUTRAL = {key: value for key, value in neutral_values(config.Trainer).items() if value is not None}


@pytest.mark.parametrize(("part", "name"), FIELDS, ids=[".".join(pair) for pair in FIELDS])
def test_signature_follows_the_science_only(default, part, name):
    old = getattr(default, part)
    new = dataclasses.replace(old, **{name: other_value(getattr(old, name), get_type_hints(type(old))[name])})
    other = dataclasses.replace(default, **{part: new})
    science = part != "launch" and (name != "name" or part == "evaluation")
    assert (config.signature(other) != config.signature(default)) == science
    assert bool(config.diff(default, other)) == science


@pytest.mark.parametrize("key", [*trainer_keys.OWN_KEYS, *trainer_keys.GRPO_KEYS])
def test_signature_follows_every_trainer_key(default, key):
    hint = (trainer_keys.OWN_KEYS | trainer_keys.GRPO_KEYS)[key]
    other = with_trainer(default, **{key: other_value(getattr(default.trainer, key), hint)})
    assert config.signature(other) != config.signature(default)


def test_signature_follows_the_seed_and_not_the_names(default):
    for name, value in {"name": "x", "outputs": "/x", "tracking": "x"}.items():
        assert config.signature(dataclasses.replace(default, **{name: value})) == config.signature(default)
    assert config.signature(dataclasses.replace(default, seed=1)) != config.signature(default)


@pytest.mark.parametrize("key", NEUTRAL)
def test_a_neutral_key_changes_nothing(default, key):
    neutral = with_trainer(default, **{key: NEUTRAL[key]})
    data = config.to_dict(neutral)
    del data["trainer"][key]  # as written by a version without this key
    assert config.from_dict(data) == neutral
    assert config.signature(config.from_dict(data)) == config.signature(neutral)


def test_neutral_fields_are_left_out_of_the_hash(default):
    data = config.to_dict(default)
    for part, block in PARTS.items():
        blank = dataclasses.asdict(block())
        if part not in data:  # a warm start that is off is left out altogether
            continue
        data[part] = {key: value for key, value in data[part].items() if value != blank[key]}
    assert config.signature(config.from_dict(data)) == config.signature(default)


def test_the_hash_is_stable():
    """If this fails, every existing run dir has lost its signature."""
    words = {"loss_type": "dapo", "lr_scheduler_type": "constant", "optim": "adamw_torch"}
    sizes = {
        "steps": 1,
        "tasks_per_step": 2,
        "group_size": 4,
        "learning_rate": 1e-6,
        "epsilon": 0.2,
        "max_grad_norm": 1.0,
    }
    trainer = words | sizes | {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
    experiment = config.from_dict({"model": {"path": "a/b"}, "env": {"max_turns": 3}, "trainer": trainer})
    assert config.signature(experiment) == GOLDEN


GOLDEN = "f5f281ff5d3b"


def test_numbers_hash_by_value():
    one, same = load(["modulation.lam.value=1"]), load(["modulation.lam.value=1.0", "trainer.max_grad_norm=1"])
    assert config.signature(one) == config.signature(same)


def test_run_dir(monkeypatch, tmp_path, default):
    folder = f"household-tiny-grpo-aem-s0-{config.signature(default)}"
    assert config.run_dir(default) == tmp_path / "outputs" / folder
    assert config.run_dir(dataclasses.replace(default, outputs="there")) == tmp_path / "there" / folder
    monkeypatch.setenv("AEM_OUTPUTS", str(tmp_path / "env"))
    assert config.run_dir(dataclasses.replace(default, outputs="there")) == tmp_path / "there" / folder
    assert config.run_dir(default) == tmp_path / "env" / folder
