"""GRPOConfig's keywords: which are accepted, and how the others are refused."""

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import pytest
from support.configs import assert_refused

from aem_exp import config
from aem_exp.config import ConfigError, trainer_keys, trainer_schema
from aem_exp.config.schema import neutral_values
from aem_exp.config.trainer_schema import trainer_keywords
from aem_exp.core.typed import convert

pytestmark = pytest.mark.usefixtures("clean")


PACKAGES = Path(find_spec("trl").submodule_search_locations[0]).parent


def test_the_trainer_block_is_complete_and_typed(default):
    keywords = trainer_keywords(default.trainer)
    for key, value in keywords.items():
        assert value is not None
        assert convert((trainer_keys.OWN_KEYS | trainer_keys.GRPO_KEYS)[key], value, key) == value
    neutral = {key for key, value in neutral_values(config.Trainer).items() if value is not None}
    assert neutral <= set(keywords) and config.to_dict(default)["trainer"] == keywords


def test_tables_are_grpo_keywords():
    known = trainer_keys.grpo_keywords()
    assert len(known) > 150
    for table in (trainer_keys.GRPO_KEYS, trainer_keys.LAUNCH_KEYS, trainer_keys.REPLACEMENTS):
        assert set(table) <= known
    assert not known & set(trainer_keys.OWN_KEYS)
    tables = [set(trainer_keys.GRPO_KEYS), set(trainer_keys.LAUNCH_KEYS), set(trainer_keys.REPLACEMENTS)]
    assert sum(map(len, tables)) == len(set().union(*tables))
    assert {key for keys in trainer_keys.LOSS_SPECIFIC_KEYS.values() for key in keys} <= set(
        trainer_keys.GRPO_KEYS | trainer_keys.OWN_KEYS
    )


def test_every_grpo_keyword_is_accepted_or_refused_by_name():
    for key in trainer_keys.grpo_keywords() - set(trainer_keys.GRPO_KEYS):
        with pytest.raises(ConfigError) as caught:
            trainer_keys.resolve_trainer({key: 1})
        assert caught.value.field == f"trainer.{key}" and "no such key" not in str(caught.value)


def test_keys_that_may_be_null_are_null_in_trl():
    """A key that is left out is not passed to TRL, so TRL's default must be the neutral value too."""
    defaults = {}
    for file in ("trl/trainer/grpo_config.py", "transformers/training_args.py"):
        for node in ast.walk(ast.parse((PACKAGES / file).read_text())):
            if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call):
                options = {keyword.arg: keyword.value for keyword in node.value.keywords}
                if "default" in options:
                    defaults.setdefault(node.target.id, ast.unparse(options["default"]))
    needed = {key for keys in trainer_keys.LOSS_SPECIFIC_KEYS.values() for key in keys}
    left_out = {key for key, hint in trainer_keys.GRPO_KEYS.items() if type(None) in get_args(hint)} - needed
    assert {key: defaults[key] for key in left_out} == dict.fromkeys(left_out, "None")


def test_choices_exist_in_the_libraries():
    def strings(file: str) -> set[str]:
        tree = ast.parse((PACKAGES / file).read_text())
        return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}

    assert set(get_args(trainer_schema.LossType)) <= strings("trl/trainer/grpo_trainer.py")
    assert set(get_args(trainer_schema.SchedulerType)) <= strings("transformers/trainer_utils.py")
    assert set(get_args(trainer_schema.Optimizer)) <= strings("transformers/training_args.py")


REFUSED = [  # overrides, the field of the error, and a fact that the error must state
    ("trainer.num_generations=4", "trainer.num_generations", "trainer.group_size"),
    ("trainer.max_steps=4", "trainer.max_steps", "trainer.steps"),
    ("trainer.max_completion_length=4", "trainer.max_completion_length", "env.response_tokens"),
    ("trainer.scale_rewards=none", "trainer.scale_rewards", "baseline.advantage"),
    (
        "launch.trainer.per_device_train_batch_size=1",
        "launch.trainer.per_device_train_batch_size",
        "launch.device_rows",
    ),
    ("trainer.use_vllm=true", "trainer.use_vllm", "launch.trainer.use_vllm"),
    ("launch.trainer.beta=1", "launch.trainer.beta", "trainer.beta"),
    ("trainer.use_adaptive_entropy=true", "trainer.use_adaptive_entropy", "GRPOConfig"),
    ("trainer.learning_rate=null", "trainer.learning_rate", "a number above 0"),
    ("trainer.loss_type=sapo", "trainer.sapo_temperature_neg", "a number above 0"),
    ("trainer.sapo_temperature_pos=1", "trainer.sapo_temperature_pos", "trainer.loss_type=sapo"),
    ("trainer.loss_constant=1", "trainer.loss_constant", "trainer.loss_type=dr_grpo"),
]


@pytest.mark.parametrize(("overrides", "field", "fact"), REFUSED, ids=[case[0] for case in REFUSED])
def test_keywords_that_belong_elsewhere_or_nowhere_are_refused(composed, overrides, field, fact):
    assert_refused(composed, overrides, field, fact)
