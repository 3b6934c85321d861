"""Composing overrides: what is refused before Hydra sees it, and how values are set."""

import pytest
from support.configs import FIXED, assert_error, assert_refused, with_overrides

from aem_exp import config
from aem_exp.config import ConfigError, load

pytestmark = pytest.mark.usefixtures("clean")


REFUSED = [  # an override, the field of the error, and a fact that the error must state
    ("+experimnt=x", "experimnt", "did you mean experiment?"),
    ("+experiment=alfworld_15b", "experiment", "did you mean alfworld_1_5b?"),
    ("modulaton=none", "modulaton", "did you mean modulation?"),
    (
        "env=houshold",
        "env",
        "did you mean household? choose from alfworld, alfworld_generated, babyai, bfcl, frozen_lake, household",
    ),
    ("model=null", "model", "qwen3_32b"),
    ("trainer.learning_rat=1", "trainer.learning_rat", "did you mean learning_rate?"),
    ("trainr.steps=1", "trainr.steps", "did you mean trainer.steps?"),
    ("learning_rate=1", "learning_rate", "did you mean trainer.learning_rate?"),
    ("lr=1", "lr", "did you mean trainer.learning_rate?"),
    ("num_generations=8", "num_generations", "did you mean trainer.group_size?"),
    ("+model.nam=x", "model.nam", "did you mean name?"),
    ("foo", "override", "key=value"),
    ("seed=0,1", "seed", "aem_exp.sweep"),
    ("seed=range(3)", "seed", "aem_exp.sweep"),
    ("~trainer.beta", "config", "trainer.beta"),
    ("~modulation", "modulation", "aem"),
    ("env.prompt.window=x", "env.prompt.window", "env.history=window"),
]


@pytest.mark.parametrize(("override", "field", "fact"), REFUSED, ids=[case[0] for case in REFUSED])
def test_refused_when_composing(override, field, fact):
    with pytest.raises(ConfigError) as caught:
        load([override])
    assert_error(caught.value, field, fact)


@pytest.mark.slow
def test_a_composed_tree_with_changes_resolves_like_a_new_one(composed):
    texts = (
        "trainer.beta=0.5 | model.lora={r: 4} | env.prompt.next='go: {actions}' | seed=4",
        "env.make.receptacles=3 | +trainer.delta=2",
    )
    for text in texts:
        assert config.resolve(with_overrides(composed, text)) == load([*FIXED, *text.split(" | ")])


def test_keys_need_no_plus_and_yaml_spells_on_as_true():
    experiment = load(["trainer.beta=0.1", "+trainer.delta=3", "model.lora={r:8,lora_alpha:16}", "model.thinking=on"])
    assert (experiment.trainer.beta, experiment.trainer.delta) == (0.1, 3.0)
    assert experiment.model.lora == {"r": 8, "lora_alpha": 16}


@pytest.mark.parametrize(
    ("overrides", "field", "fact"), [("tracking=${nothing}", "tracking", "nothing"), ("seed=???", "seed", "value")]
)
def test_values_that_cannot_be_filled_in_are_refused(composed, overrides, field, fact):
    assert_refused(composed, overrides, field, fact)
