"""The types of an experiment: frozen values with neutral defaults, each within its range."""

import dataclasses

import pytest
from support.configs import assert_refused

from aem_exp import config
from aem_exp.config import load

pytestmark = pytest.mark.usefixtures("clean")


def test_an_experiment_is_frozen(default):
    with pytest.raises(dataclasses.FrozenInstanceError):
        default.seed = 1


def test_dataclass_defaults_are_neutral():
    modulation, evaluation = config.Modulation(), config.Evaluation()
    assert (modulation.lam, modulation.gate, config.Env().invalid_penalty) == (None, 0.0, 0.0)
    assert (evaluation.every, evaluation.temperature, config.Model().lora) == (0, 1.0, None)


def test_evaluation_may_have_limits_of_its_own(default):
    assert config.apply_evaluation_limits(default) == default
    roomy = config.apply_evaluation_limits(load(["evaluation.max_turns=30", "evaluation.context_tokens=900"]))
    assert (roomy.env.max_turns, roomy.env.context_tokens) == (30, 900)
    assert config.signature(load(["evaluation.max_turns=30"])) != config.signature(default)


REFUSED = [  # overrides, the field of the error, and a fact that the error must state
    ("trainer.steps=many", "trainer.steps", "a whole number"),
    ("trainer.steps=1.5", "trainer.steps", "a whole number"),
    ("trainer.bf16=1", "trainer.bf16", "true or false"),
    ("trainer.learning_rate=fast", "trainer.learning_rate", "a number above 0"),
    ("trainer.learning_rate=nan", "trainer.learning_rate", "a number above 0"),
    ("trainer.learning_rate=0", "trainer.learning_rate", "above 0"),
    ("env.make=3", "env.make", "a mapping"),
    ("model.revision=123", "model.revision", "quotes"),
    ("trainer.steps=-1", "trainer.steps", "at least 0"),
    ("trainer.tasks_per_step=0", "trainer.tasks_per_step", "at least 1"),
    ("trainer.group_size=1", "trainer.group_size", "at least 2"),
    ("trainer.mini_batch=0", "trainer.mini_batch", "all or a whole number of at least 1"),
    ("trainer.mini_batch=some", "trainer.mini_batch", "all or"),
    ("trainer.temperature=0", "trainer.temperature", "above 0"),
    ("trainer.adam_beta2=1", "trainer.adam_beta2", "below 1"),
    ("trainer.loss_type=ppo", "trainer.loss_type", "choose from grpo"),
    ("modulation.gate=-0.1", "modulation.gate", "at least 0"),
    ("modulation.keep=rising", "modulation.keep", "did you mean raising?"),
    ("modulation.scope=groups", "modulation.scope", "did you mean group?"),
    ("seed=-1", "seed", "at least 0"),
    ("evaluation.temperature=0", "evaluation.temperature", "above 0"),
    ("evaluation.repeats=0", "evaluation.repeats", "at least 1"),
    ("env.max_turns=0", "env.max_turns", "at least 1"),
    ("env.window=-1", "env.window", "at least 0"),
    ("launch.nodes=0", "launch.nodes", "at least 1"),
    ("launch.where=cloud", "launch.where", "choose from local, slurm"),
]


@pytest.mark.parametrize(("overrides", "field", "fact"), REFUSED, ids=[case[0] for case in REFUSED])
def test_values_of_another_type_or_out_of_range_are_refused(composed, overrides, field, fact):
    assert_refused(composed, overrides, field, fact)
