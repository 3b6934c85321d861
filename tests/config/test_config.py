"""What a command line resolves to: every file in conf/, every refusal, identity, and the door."""

import ast
import copy
import dataclasses
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from support import ROOT

from aem_exp import config
from aem_exp.__main__ import main
from aem_exp.config import ConfigError, Experiment, hydra_internals, load, targets, trainer_keys, trainer_schema
from aem_exp.config.compose import Composer, compose
from aem_exp.config.schema import neutral_values
from aem_exp.config.trainer_schema import trainer_keywords
from aem_exp.core import disk
from aem_exp.core.errors import closest_match
from aem_exp.core.typed import convert

GROUPS = config.list_choices([ROOT / "conf"])
FIXED = [  # what these tests count on, however conf/ is tuned
    *("model=tiny", "env=household", "baseline=grpo", "modulation=aem", "launch=local"),
    *("trainer.steps=60", "trainer.tasks_per_step=8", "trainer.group_size=8", "trainer.mini_batch=32"),
    *("env.make={_target_: aem_exp.envs.household.Household}", "env.history=full", "env.window=0"),
    *("env.response_tokens=12", "env.context_tokens=512", "env.prompt={first: '{observation}', next: '{observation}'}"),
    *("evaluation.every=10", "launch.trainer={use_cpu: true}"),
]
pytestmark = pytest.mark.usefixtures("clean")
PACKAGES = Path(find_spec("trl").submodule_search_locations[0]).parent


@pytest.fixture(scope="module")
def default() -> Experiment:
    return load(FIXED)


def at(experiment: Experiment, dotted: str) -> Any:
    value: Any = config.to_dict(experiment)
    for key in dotted.split("."):
        value = value[key]
    return value


def with_trainer(experiment: Experiment, **changes: Any) -> Experiment:
    return dataclasses.replace(experiment, trainer=dataclasses.replace(experiment.trainer, **changes))


# conf/


@pytest.mark.parametrize("choice", [f"{group}={name}" for group, files in GROUPS.items() for name in files])
def test_every_file_resolves_and_says_what_it_is(choice):
    group, _, name = choice.partition("=")
    alone = ["modulation=none"] if name == "gspo" else []  # which takes modulation where each turn is its own row
    experiment = load([f"+{choice}" if group == "experiment" else choice, *alone])
    if group != "experiment":
        assert at(experiment, f"{group}.name") == name
    text = GROUPS[group][name].read_text()
    assert text.startswith("# ")
    assert len(next(line for line in text.splitlines() if not line.startswith("# @"))) > 15


def test_no_file_is_without_a_group():
    assert {file.name for file in (ROOT / "conf").iterdir() if file.is_file()} == {"config.yaml"}
    defaults = yaml.safe_load((ROOT / "conf/config.yaml").read_text())["defaults"]
    assert not any("experiment" in entry for entry in defaults if isinstance(entry, dict))


VERL_AGENT = {
    "model.path": "Qwen/Qwen2.5-1.5B-Instruct",
    "env.history": "window",
    "env.window": 2,
    "env.response_tokens": 512,
    "env.invalid_penalty": 0.1,
    "env.make.reward": 10.0,
    "baseline.name": "grpo",
    "baseline.advantage._target_": "aem_exp.advantages.group_normalised",
    "baseline.advantage.over": "turns",
    "baseline.advantage.eps": 1e-6,
    "modulation.lam": {"_target_": "aem_exp.schedules.Constant", "value": 1.0},
    "modulation.gate": 0.1,
    "trainer.steps": 150,
    "trainer.tasks_per_step": 16,
    "trainer.group_size": 8,
    "trainer.num_iterations": 1,
    "trainer.learning_rate": 1e-6,
    "trainer.lr_scheduler_type": "constant",
    "trainer.warmup_steps": 0.0,
    "trainer.weight_decay": 0.01,
    "trainer.max_grad_norm": 1.0,
    "trainer.loss_type": "dapo",
    "trainer.importance_sampling_level": "token",
    "trainer.epsilon": 0.2,
    "trainer.delta": 3.0,
    "trainer.beta": 0.01,
    "trainer.use_bias_correction_kl": False,
    "trainer.entropy_coef": 0.001,
    "trainer.temperature": 1.0,
    "trainer.top_p": 1.0,
    "trainer.top_k": 0,
    "evaluation.temperature": 0.4,
}
REFERENCES = {
    "alfworld_1_5b": VERL_AGENT
    | {
        "env.max_turns": 50,
        "env.context_tokens": 2048 + 512,
        "trainer.mini_batch": 256,
        "evaluation.final": "test_seen",
    },
    "webshop_1_5b": VERL_AGENT
    | {
        "env.max_turns": 15,
        "env.context_tokens": 4096 + 512,
        "trainer.mini_batch": 64,
        "env.make.catalogue": "small",
        "env.make.goals": "synthetic",
        "env.make.nouns": "spacy",
        "env.make.pays": "success",
    },
    "swebench_32b": {
        "model.path": "Qwen/Qwen3-32B",
        "model.thinking": "on",
        "env.history": "full",
        "env.max_turns": 50,
        "env.context_tokens": 4096 + 32768,
        "env.make.episode_seconds": 5400,
        "env.make.command_seconds": 90,
        "env.make.tests_seconds": 300,
        "baseline.advantage": {"_target_": "aem_exp.advantages.leave_one_out", "over": "trajectories"},
        "trainer.steps": 250,
        "trainer.tasks_per_step": 64,
        "trainer.group_size": 8,
        "trainer.mini_batch": "all",
        "trainer.learning_rate": 1e-6,
        "trainer.weight_decay": 0.01,
        "trainer.max_grad_norm": 1.0,
        "trainer.loss_type": "dr_grpo",
        "trainer.loss_constant": 1,
        "trainer.epsilon": 0.2,
        "trainer.epsilon_high": 0.28,
        "trainer.mask_truncated_completions": True,
        "trainer.count_masked": True,
        "trainer.drop_equal": True,
        "trainer.oversample": 2,
        "trainer.beta": 0.0,
        "trainer.entropy_coef": 0.0,
        "evaluation.temperature": 1.0,
        "evaluation.max_turns": 100,
        "evaluation.context_tokens": 4096 + 65536,
    },
}


@pytest.mark.parametrize("name", REFERENCES)
def test_experiments_are_the_reference_settings(name):
    experiment = load([f"+experiment={name}"])
    assert {key: at(experiment, key) for key in REFERENCES[name]} == REFERENCES[name]
    if name != "swebench_32b":
        assert experiment.trainer.epsilon_high is None
        assert {"<think>", "</think>", "<action>", "</action>"} <= set(experiment.env.prompt["window"].split())


@pytest.mark.parametrize(("name", "norm"), [("alfworld_1_5b", "std"), ("webshop_1_5b", "mean")])
def test_gigpo_has_the_norm_that_the_reference_has_for_the_env(name, norm):
    """verl-agent's scripts: mode=mean_std_norm in ALFWorld, mode=mean_norm in WebShop."""
    for overrides in ([f"+experiment={name}", "baseline=gigpo"], ["baseline=gigpo", f"+experiment={name}"]):
        advantage = load(overrides).baseline.advantage
        assert (advantage["norm"], advantage["over"]) == (norm, "turns")
        assert config.to_dict(load(overrides)) == config.to_dict(config.resolve(Composer().compose(overrides)))
    assert (
        load([f"+experiment={name}", "baseline=gigpo", "baseline.advantage.norm=std"]).baseline.advantage["norm"]
        == "std"
    )
    with pytest.raises(ConfigError, match="choose from"):
        load(["baseline=gigpo/webshop"])


# Where ours depart from verl-agent on purpose: train, dev and test are disjoint, and whole panels are scored.
DEPARTURES = {"env.make.split": ("original", "verl_agent")}


@pytest.mark.parametrize("name", ["alfworld_1_5b", "webshop_1_5b"])
def test_the_reference_itself_differs_in_split_and_panel_alone(name):
    ours, theirs = load([f"+experiment={name}"]), load([f"+experiment={name}_verl_agent"])
    changed = {line.partition(":")[0] for line in config.diff(ours, theirs)}
    assert changed == {*DEPARTURES, "evaluation.every"}
    for key, pair in DEPARTURES.items():
        assert (at(ours, key), at(theirs, key)) == pair
    assert theirs.evaluation.every == 5


def test_panels_may_be_played_by_rules_of_their_own(default):
    assert config.apply_evaluation_limits(default) == default
    roomy = config.apply_evaluation_limits(load(["evaluation.max_turns=30", "evaluation.context_tokens=900"]))
    assert (roomy.env.max_turns, roomy.env.context_tokens) == (30, 900)
    assert config.signature(load(["evaluation.max_turns=30"])) != config.signature(default)


def test_an_experiment_keeps_its_recipe_under_another_baseline():
    plain, other = load(["+experiment=alfworld_1_5b"]), load(["+experiment=alfworld_1_5b", "baseline=dr_grpo"])
    changed = {line.partition(":")[0] for line in config.diff(plain, other)}
    assert changed == {"baseline.advantage._target_", "baseline.advantage.eps", "trainer.loss_type"}
    none = load(["+experiment=alfworld_1_5b", "modulation=none"])
    assert {line.partition(".")[0] for line in config.diff(plain, none)} == {"modulation"}


# Refusals: overrides, the field that is named, and words of the sentence. First what composing finds, then what resolving
# does: the latter are put into a config that was composed once, since composing takes a tenth of a second.

AT_COMPOSING = [
    ("+experimnt=x", "experimnt", "did you mean experiment?"),
    ("+experiment=alfworld_15b", "experiment", "did you mean alfworld_1_5b?"),
    ("modulaton=none", "modulaton", "did you mean modulation?"),
    ("env=houshold", "env", "did you mean household? choose from alfworld, alfworld_generated, frozen_lake, household"),
    ("model=null", "model", "choose from"),
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
    ("~modulation", "modulation", "choose from aem"),
    ("env.prompt.window=x", "env.prompt.window", "only read with env.history=window"),
]
TWO = "launch.gpus_per_node=2 | launch.trainer={fsdp:true"
SERVED, MODE = "launch.sampler=served | launch.servers=/s", "launch.trainer.vllm_importance_sampling_mode"
ENGINE = "launch.sampler=engine | launch.gpus_per_node=1 | launch.trainer={use_vllm:true}"
AT_RESOLVING = [
    ("tracking=${nothing}", "tracking", "'nothing' not found"),
    ("seed=???", "seed", "must be given"),
    ("trainer.steps=many", "trainer.steps", "a whole number"),
    ("trainer.steps=1.5", "trainer.steps", "a whole number"),
    ("trainer.bf16=1", "trainer.bf16", "true or false"),
    ("trainer.learning_rate=fast", "trainer.learning_rate", "a number above 0"),
    ("trainer.learning_rate=nan", "trainer.learning_rate", "a number above 0"),
    ("trainer.learning_rate=null", "trainer.learning_rate", "nothing sets it"),
    (
        "launch=gpu1 | launch.sampler=engine | launch.trainer={use_vllm: true, vllm_tensor_parallel_size: 2}",
        "launch.trainer.vllm_tensor_parallel_size",
        "must be 1",
    ),
    ("env.make=3", "env.make", "a mapping"),
    ("env.make.reward=0", "env.make.reward", "must be above 0"),
    ("model.revision=123", "model.revision", "quotes"),
    ("name=a/b", "name", "file name"),
    # Out of range.
    ("trainer.learning_rate=0", "trainer.learning_rate", "above 0"),
    ("trainer.steps=-1", "trainer.steps", "at least 0"),
    ("trainer.tasks_per_step=0", "trainer.tasks_per_step", "at least 1"),
    ("trainer.group_size=1", "trainer.group_size", "at least 2"),
    ("trainer.mini_batch=0", "trainer.mini_batch", "all or a whole number of at least 1"),
    ("trainer.mini_batch=some", "trainer.mini_batch", "all or"),
    ("trainer.temperature=0", "trainer.temperature", "above 0"),
    ("trainer.adam_beta2=1", "trainer.adam_beta2", "below 1"),
    ("trainer.loss_type=ppo", "trainer.loss_type", "choose from grpo"),
    ("modulation.gate=-0.1", "modulation.gate", "at least 0"),
    ("seed=-1", "seed", "at least 0"),
    ("evaluation.temperature=0", "evaluation.temperature", "above 0"),
    ("evaluation.repeats=0", "evaluation.repeats", "at least 1"),
    ("env.max_turns=0", "env.max_turns", "at least 1"),
    ("launch.nodes=0", "launch.nodes", "at least 1"),
    ("launch.where=cloud", "launch.where", "choose from local, slurm"),
    ("model.lora={r:0}", "model.lora.r", "at least 1"),
    # Keywords of TRL that stand elsewhere, or nowhere.
    ("trainer.num_generations=4", "trainer.num_generations", "trainer.group_size"),
    ("trainer.max_steps=4", "trainer.max_steps", "trainer.steps"),
    ("trainer.max_completion_length=4", "trainer.max_completion_length", "env.response_tokens"),
    ("trainer.scale_rewards=none", "trainer.scale_rewards", "baseline.advantage"),
    ("trainer.rounds=3", "trainer.rounds", "only read with trainer.drop_equal=true"),
    ("trainer.oversample=2", "trainer.oversample", "only read with trainer.drop_equal=true"),
    ("trainer.count_masked=true", "trainer.count_masked", "only read with trainer.mask_truncated_completions=true"),
    ("modulation.bonus=0.05 | modulation.unit=token", "modulation.bonus", "modulation.unit=response"),
    ("modulation.bonus_lam=2", "modulation.bonus_lam", "modulation.bonus above 0"),
    ("modulation.keep=raising | modulation.centred=true", "modulation.centred", "modulation.keep=raising"),
    ("modulation.keep=rising", "modulation.keep", "did you mean raising?"),
    ("modulation.scope=groups", "modulation.scope", "did you mean group?"),
    (
        "launch.trainer.per_device_train_batch_size=1",
        "launch.trainer.per_device_train_batch_size",
        "launch.device_rows",
    ),
    ("trainer.use_vllm=true", "trainer.use_vllm", "launch.trainer.use_vllm"),
    ("launch.trainer.beta=1", "launch.trainer.beta", "belongs to trainer.beta"),
    ("trainer.use_adaptive_entropy=true", "trainer.use_adaptive_entropy", "ignored"),
    # Targets.
    ("env.make.receptcles=3", "env.make.receptcles", "did you mean receptacles?"),
    ("env.make.receptacles=few", "env.make.receptacles", "a whole number"),
    ("env.make.kinds=[1]", "env.make.kinds[0]", "text"),
    ("env.make.kinds=look", "env.make.kinds", "a list, each item text"),
    ("env.make.sizes={dev:many}", "env.make.sizes.dev", "a whole number"),
    ("env.make.sizes=5", "env.make.sizes", "a mapping"),
    ("env.make._target_=aem_exp.envs.houshold.Household", "env.make._target_", "aem_exp.envs.household?"),
    ("env.make._target_=aem_exp.envs.household.Houshold", "env.make._target_", "did you mean Household"),
    ("env.make._target_=Household", "env.make._target_", "package.module.name"),
    ("env.make._target_=null", "env.make._target_", "dotted name"),
    ("modulation.lam._target_=aem_exp.schedules.Linear", "modulation.lam.value", "end, start"),
    ("modulation.lam.valu=1", "modulation.lam.valu", "did you mean value?"),
    ("modulation.lam={_target_:aem_exp.schedules.Linear,end:0}", "modulation.lam.start", "required by"),
    ("baseline.advantage.played=1", "baseline.advantage.played", "no such key"),
    ("baseline.advantage._target_=aem_exp.core.disk.cache_dir", "baseline.advantage._target_", "1 argument by"),
    ("baseline.advantage.over=turn", "baseline.advantage.over", "did you mean turns? choose from trajectories, turns"),
    ("tracking='http://me:pw@host'", "tracking", "MLFLOW_TRACKING_USERNAME"),
    ("tracking='postgresql://host/db?password=pw'", "tracking", "password=***"),
    ("modulation.lam=null", "modulation.gate", "only read with modulation.lam"),
    ("model.make.folder=x", "model.make.folder", "no such key"),
    ("model.lora={rr:4}", "model.lora.rr", "did you mean r?"),
    # Contradictions.
    ("trainer.mini_batch=65", "trainer.mini_batch", "trainer.group_size=8 = 64"),
    ("trainer.importance_sampling_level=sequence", "trainer.importance_sampling_level", "cancels the modulation"),
    ("trainer.loss_type=luspo", "trainer.loss_type", "importance_sampling_level=sequence"),
    ("trainer.loss_type=sapo", "trainer.sapo_temperature_neg", "nothing sets it"),
    ("trainer.sapo_temperature_pos=1", "trainer.sapo_temperature_pos", "loss_type=sapo"),
    ("trainer.loss_constant=1", "trainer.loss_constant", "loss_type=dr_grpo"),
    ("env.window=2", "env.window", "env.history=window"),
    ("env.window=-1", "env.window", "at least 0"),
    ("env.prompt={next: hi}", "env.prompt.first", "a template"),
    ("env.prompt={first: hi}", "env.prompt.next", "env.history=full"),
    ("env.prompt.second=hi", "env.prompt.second", "no such key"),
    ("env.prompt.next='{obs}'", "env.prompt.next", "{observation}"),
    ("env.prompt.next='{history}'", "env.prompt.next", "choose from"),
    ("env.prompt.next='a { b'", "env.prompt.next", "braces"),
    ("env.response_tokens=512", "env.response_tokens", "env.context_tokens=512"),
    ("trainer.top_p=0.9", "trainer.top_p", "unfiltered"),
    ("trainer.top_k=50", "trainer.top_k", "unfiltered"),
    ("trainer.min_p=0.1", "trainer.min_p", "unfiltered"),
    ("trainer.repetition_penalty=1.1", "trainer.repetition_penalty", "unfiltered"),
    ("modulation={} | trainer.repetition_penalty=1.1", "trainer.repetition_penalty", "use_vllm"),
    ("model.path=x", "model.path", "both are set"),
    ("model.make=null", "model.path", "neither is set"),
    ("model.revision=main", "model.revision", "model.path"),
    ("model.trust_remote_code=true", "model.trust_remote_code", "code_sha256"),
    ("model.code_sha256=abc", "model.code_sha256", "trust_remote_code=true"),
    ("evaluation.final=dev", "evaluation.final", "must differ"),
    ("evaluation.panel=train", "evaluation.panel", "held-out"),
    ("launch.trainer.vllm_mode=server", "launch.trainer.vllm_mode", "use_vllm=true"),
    ("launch.trainer.use_vllm=true", "launch.trainer.use_vllm", "launch.sampler=engine"),
    ("launch.sampler=engine | launch.trainer.use_vllm=true", "launch.trainer.use_vllm", "gpus_per_node=0"),
    ("launch.env_seconds=3", "launch.env_seconds", "launch.workers above 0"),
    ("launch.sampler=served", "launch.servers", "launch.server_nodes above 0"),
    ("launch.servers=/s", "launch.servers", "launch.sampler=served"),
    ("launch.server_seconds=9", "launch.server_seconds", "launch.sampler=served"),
    (f"{SERVED} | launch.server_nodes=1", "launch.servers", "not both"),
    ("launch.sampler=served | launch.server_nodes=1", "launch.server_nodes", "launch.where=slurm"),
    (f"{SERVED} | launch.server_weights=nccl", "launch.server_weights", "gpus_per_node=0: files"),
    (f"{SERVED} | launch.trainer.use_vllm=true", "launch.trainer.use_vllm", "launch.sampler=engine"),
    (f"{SERVED} | launch.trainer.vllm_mode=server", "launch.trainer.vllm_mode", "use_vllm=true"),
    (f"{ENGINE} | launch.trainer.vllm_mode=server", "launch.trainer.vllm_mode", "launch.sampler=served"),
    (f"{SERVED} | launch.trainer.vllm_group_port=1", "launch.trainer.vllm_group_port", "use launch.servers"),
    (f"{SERVED} | {MODE}=sequence_mask", MODE, "token_truncate"),
    ("launch.gpus_per_node=3 | launch.trainer.use_cpu=null", "launch", "3 processes"),
    ("launch.gpus_per_node=1", "launch.trainer.use_cpu", "gpus_per_node=1"),
    ("launch.nodes=2", "launch.nodes", "launch.where=slurm"),
    ("launch.where=slurm", "launch.hours", "time limit"),
    ("launch.trainer.fsdp=true", "launch.trainer.fsdp", "several processes"),
    ("launch.trainer.deepspeed=x.json", "launch.trainer.deepspeed", "use launch.trainer.fsdp"),
    ("launch.trainer={fsdp_config:{version:2}}", "launch.trainer.fsdp_config", "fsdp=true"),
    ("launch.trainer={fsdp:true,fsdp_config:{cpu_ofload:1}}", "launch.trainer.fsdp_config.cpu_ofload", "cpu_offload?"),
    (f"{TWO},fsdp_config:{{version:1}}}}", "launch.trainer.fsdp_config.version", "must be 2"),
    (f"{TWO},gradient_checkpointing:true}}", "launch.trainer.gradient_checkpointing", "activation_checkpointing"),
    (f"{TWO}}} | launch.sampler=engine", "launch.sampler", "vLLM"),
    (
        f"{TWO},fsdp_config:{{state_dict_type:SHARDED_STATE_DICT}}}} | model.lora={{r: 4}}",
        "launch.trainer.fsdp_config.state_dict_type",
        "FULL_STATE_DICT",
    ),
    (
        f"{TWO},fsdp_config:{{cpu_ram_efficient_loading:true}}}} | +trainer.beta=0.01",
        "launch.trainer.fsdp_config.cpu_ram_efficient_loading",
        "reference policy",
    ),
]


def edited(tree: DictConfig, overrides: str) -> DictConfig:
    """The composed config with overrides put in, as Hydra would."""
    tree = copy.deepcopy(tree)
    for override in OverridesParser.create().parse_overrides(overrides.split(" | ")):
        OmegaConf.update(tree, override.key_or_group, override.value(), merge=False, force_add=True)
    return tree


def refusal(caught: pytest.ExceptionInfo[ConfigError]) -> tuple[str, str]:
    assert "\n" not in str(caught.value)
    return caught.value.field, str(caught.value)


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    return compose(FIXED)


@pytest.mark.parametrize(("override", "field", "words"), AT_COMPOSING, ids=[case[0] for case in AT_COMPOSING])
def test_refused_when_composing(override, field, words):
    with pytest.raises(ConfigError) as caught:
        load([override])
    named, sentence = refusal(caught)
    assert named == field and words in sentence


@pytest.mark.parametrize(("overrides", "field", "words"), AT_RESOLVING, ids=[case[0] for case in AT_RESOLVING])
def test_refused_when_resolving(composed, overrides, field, words):
    with pytest.raises(ConfigError) as caught:
        config.resolve(edited(composed, overrides))
    named, sentence = refusal(caught)
    assert named == field and words in sentence


def test_both_ways_are_one(composed):
    texts = (
        "trainer.beta=0.5 | model.lora={r: 4} | env.prompt.next='go: {actions}' | seed=4",
        "env.make.receptacles=3 | +trainer.delta=2",
    )
    for text in texts:
        assert config.resolve(edited(composed, text)) == load([*FIXED, *text.split(" | ")])


def test_gspo_goes_with_modulation_where_each_turn_is_a_row():
    load(["+experiment=webshop_1_5b", "trainer.importance_sampling_level=sequence", "trainer.loss_type=grpo"])
    load(["modulation=none", "trainer.importance_sampling_level=sequence", "trainer.loss_type=grpo"])


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["env.prompt.next=x"], "env.prompt.next has no {observation}"),
        (["env.history=window", "env.window=2", "env.prompt.window='{observation}'"], "has no {history}: env.window=2"),
        (["env.history=window", "env.prompt.pair=x"], "env.prompt.pair has no {observation}"),
        (["model.make=null", "model.path=a/b"], "trainer.learning_rate=0.0005 is for a tiny policy"),
    ],
)
def test_what_hides_the_world_or_spoils_the_weights_is_said(overrides, said):
    assert any(said in note for note in config.notes(load(overrides)))


def test_what_does_nothing_is_said():
    assert config.notes(load(FIXED)) == []
    (note,) = config.notes(load([*FIXED, "trainer.mini_batch=all", "baseline=dapo"]))
    assert "trainer.mini_batch=all" in note and "trainer.epsilon_high" in note
    assert "one update per step" in config.notes(load([*FIXED, "trainer.mini_batch=64"]))[0]
    assert config.notes(load([*FIXED, "trainer.mini_batch=64", "trainer.num_iterations=2"])) == []
    assert "gate=0" in config.notes(load([*FIXED, "modulation.gate=0"]))[0]


def test_servers_go_with_settings_of_the_correction_and_workers_are_missed():
    served = [*FIXED, "launch.sampler=served", "launch.servers=/s"]
    (note,) = config.notes(load([*served, "launch.trainer.vllm_importance_sampling_clip_max=2"]))
    assert "launch.workers=0" in note
    assert config.notes(load([*served, "launch.workers=4"])) == []
    assert config.signature(load(served)) == config.signature(load(FIXED)), "who generates decides no result"


def test_suggestions_know_initials_and_spelling():
    assert closest_match("lr", ["trainer.loss_type", "trainer.learning_rate"]) == "trainer.learning_rate"
    assert closest_match("betta", ["beta", "delta"]) == "beta"
    assert closest_match("zzz", ["beta", "delta"]) is None


# Hydra's private names


def test_hydra_is_of_a_tested_version():
    version = hydra_internals.hydra_version()
    assert version in hydra_internals.TESTED_VERSIONS, f"add {version} to TESTED_VERSIONS when the tests pass with it"
    assert hydra_internals.is_supported(), "this version of Hydra lacks one of hydra_internals.PRIVATE_NAMES"


@pytest.mark.parametrize(("name", "value"), [("TESTED_VERSIONS", ("0.0",)), ("PRIVATE_NAMES", ("defaults_list:none",))])
def test_an_unknown_hydra_composes_the_same_without_its_private_names(monkeypatch, tmp_path, name, value):
    words = ["+experiment=alfworld_1_5b", "baseline=gigpo", "seed=3", "trainer.steps=2"]
    quick = Composer().compose(words)
    monkeypatch.setattr(hydra_internals, name, value)
    assert not hydra_internals.is_supported()
    assert Composer().compose(words) == compose(words) == quick
    (tmp_path / "baseline").mkdir()
    (tmp_path / "baseline" / "mine.yaml").write_text("advantage: !!python/name:os.system\n")
    with pytest.raises(ConfigError, match=re.escape("mine.yaml: must not have tags")):
        compose(["baseline=mine"], tmp_path)


# Values


def test_keys_need_no_plus_and_yaml_spells_on_as_true():
    experiment = load(["trainer.beta=0.1", "+trainer.delta=3", "model.lora={r:8,lora_alpha:16}", "model.thinking=on"])
    assert (experiment.trainer.beta, experiment.trainer.delta) == (0.1, 3.0)
    assert experiment.model.lora == {"r": 8, "lora_alpha": 16}
    assert convert(Literal["on", "off"], True, "x") == "on"


def test_the_trainer_block_is_complete_and_typed(default):
    keywords = trainer_keywords(default.trainer)
    for key, value in keywords.items():
        assert value is not None
        assert convert((trainer_keys.OWN_KEYS | trainer_keys.GRPO_KEYS)[key], value, key) == value
    assert set(NEUTRAL) <= set(keywords) and config.to_dict(default)["trainer"] == keywords


def test_the_value_is_frozen(default):
    with pytest.raises(dataclasses.FrozenInstanceError):
        default.seed = 1


def test_dataclass_defaults_are_neutral():
    modulation, evaluation = config.Modulation(), config.Evaluation()
    assert (modulation.lam, modulation.gate, config.Env().invalid_penalty) == (None, 0.0, 0.0)
    assert (evaluation.every, evaluation.temperature, config.Model().lora) == (0, 1.0, None)


@pytest.mark.parametrize("overrides", [[], ["+experiment=alfworld_1_5b"], ["+experiment=swebench_32b", "seed=3"]])
def test_experiment_json_brings_back_the_same_value(overrides):
    experiment = load(overrides)
    again = config.from_dict(json.loads(json.dumps(config.to_dict(experiment))))
    assert again == experiment
    assert config.signature(again) == config.signature(experiment)
    assert config.diff(again, experiment) == []


def test_a_plain_mapping_resolves_too(default):
    assert config.resolve(config.to_dict(default)) == default


# Identity


def changed(value: Any, hint: Any = None) -> Any:
    """Another value of the same kind."""
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
    "launch": config.Launch,
}
FIELDS = [(part, f.name) for part, block in PARTS.items() for f in dataclasses.fields(block)]
NEUTRAL = {key: value for key, value in neutral_values(config.Trainer).items() if value is not None}


@pytest.mark.parametrize(("part", "name"), FIELDS, ids=[".".join(pair) for pair in FIELDS])
def test_signature_follows_the_science_and_nothing_else(default, part, name):
    old = getattr(default, part)
    new = dataclasses.replace(old, **{name: changed(getattr(old, name), get_type_hints(type(old))[name])})
    other = dataclasses.replace(default, **{part: new})
    science = part != "launch" and (name != "name" or part == "evaluation")
    assert (config.signature(other) != config.signature(default)) == science
    assert bool(config.diff(default, other)) == science


@pytest.mark.parametrize("key", [*trainer_keys.OWN_KEYS, *trainer_keys.GRPO_KEYS])
def test_signature_follows_every_trainer_key(default, key):
    hint = (trainer_keys.OWN_KEYS | trainer_keys.GRPO_KEYS)[key]
    other = with_trainer(default, **{key: changed(getattr(default.trainer, key), hint)})
    assert config.signature(other) != config.signature(default)


def test_signature_of_the_rest(default):
    for name, value in {"name": "x", "outputs": "/x", "tracking": "x"}.items():
        assert config.signature(dataclasses.replace(default, **{name: value})) == config.signature(default)
    assert config.signature(dataclasses.replace(default, seed=1)) != config.signature(default)


@pytest.mark.parametrize("key", NEUTRAL)
def test_a_neutral_key_changes_nothing(default, key):
    neutral = with_trainer(default, **{key: NEUTRAL[key]})
    data = config.to_dict(neutral)
    del data["trainer"][key]  # as a version wrote it that did not have the key
    assert config.from_dict(data) == neutral
    assert config.signature(config.from_dict(data)) == config.signature(neutral)


def test_neutral_fields_are_left_out_of_the_hash(default):
    data = config.to_dict(default)
    for part, block in PARTS.items():
        blank = dataclasses.asdict(block())
        data[part] = {key: value for key, value in data[part].items() if value != blank[key]}
    assert config.signature(config.from_dict(data)) == config.signature(default)


def test_the_hash_itself_does_not_drift():
    """A value written down once: where this fails, every run dir out there is orphaned."""
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


def test_diff_and_nearest(default, tmp_path):
    near, far = with_trainer(default, beta=0.5), dataclasses.replace(with_trainer(default, beta=0.7, steps=1), seed=3)
    for experiment in (near, far):
        folder = config.run_dir(experiment)
        folder.mkdir(parents=True)
        (folder / "experiment.json").write_text(json.dumps(config.to_dict(experiment)))
    (tmp_path / "outputs/broken").mkdir()
    (tmp_path / "outputs/broken/experiment.json").write_text("{")
    assert config.diff(far, default) == ["seed: 3 -> 0", "trainer.steps: 1 -> 60", "trainer.beta: 0.7 -> 0.0"]
    assert config.nearest_run(default) == (config.run_dir(near), ["trainer.beta: 0.5 -> 0.0"])


# TRL's own keywords


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


def test_every_grpo_keyword_is_taken_or_refused_in_a_sentence():
    for key in trainer_keys.grpo_keywords() - set(trainer_keys.GRPO_KEYS):
        with pytest.raises(ConfigError) as caught:
            trainer_keys.resolve_trainer({key: 1})
        assert caught.value.field == f"trainer.{key}" and "no such key" not in str(caught.value)


def test_what_may_be_null_is_null_in_trl():
    """A key that is left out is passed on to nobody, so TRL's default must be the neutral value too."""
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


def test_choices_are_those_of_the_libraries():
    def strings(file: str) -> set[str]:
        tree = ast.parse((PACKAGES / file).read_text())
        return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}

    assert set(get_args(trainer_schema.LossType)) <= strings("trl/trainer/grpo_trainer.py")
    assert set(get_args(trainer_schema.SchedulerType)) <= strings("transformers/trainer_utils.py")
    assert set(get_args(trainer_schema.Optimizer)) <= strings("transformers/training_args.py")


# Targets

MODULE = """
import nothing_of_this_name
from dataclasses import dataclass, field
from typing import ClassVar, Literal

@dataclass
class Base:
    size: int
    note: str = "x"

@dataclass
class Child(Base):
    shared: ClassVar[int] = 0
    items: list = field(default_factory=list)
    hidden: int = field(init=False)
    kind: Literal["a", "b"] = "a"

class Plain(Unknown): ...

class Init:
    def __init__(self, width: float, /, *, deep: "bool | None" = None): ...

def estimate(played, *, gamma: float = 0.5): ...
def anything(**options): ...
alias = estimate
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A package of the user's, importable from the working directory, whose import would fail."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").write_text(
        "from .things import Child as Renamed\nfrom mine.things import estimate\n"
    )
    (tmp_path / "mine/things.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize(
    ("target", "keywords_", "field"),
    [
        ("mine.Renamed", {"size": 1, "kind": "b", "items": [1]}, None),
        ("mine.things.Child", {}, "x.size"),
        ("mine.things.Child", {"size": "big"}, "x.size"),
        ("mine.things.Child", {"size": 1, "kind": "c"}, "x.kind"),
        ("mine.things.Child", {"size": 1, "hidden": 1}, "x.hidden"),
        ("mine.things.Child", {"size": 1, "shared": 1}, "x.shared"),
        ("mine.things.Init", {"width": 1, "deep": True}, None),
        ("mine.things.Init", {"width": 1, "deep": "very"}, "x.deep"),
        ("mine.things.Plain", {"whatever": 1}, None),
        ("mine.things.anything", {"whatever": 1}, None),
        ("mine.things.alias", {"whatever": 1}, None),
        ("mine.things.Chld", {}, "x._target_"),
        ("mine.thing.Child", {}, "x._target_"),
        ("yours.things.Child", {}, "x._target_"),
        ("mine.things.Child", {"size": 1, "items": {"_target_": "mine.things.Child", "sise": 1}}, "x.items.sise"),
    ],
)
def test_targets_are_bound_without_importing(mine, target, keywords_, field):
    block = {"_target_": target, **keywords_}
    if field is None:
        assert targets.bind_target("x", block) == block
    else:
        with pytest.raises(ConfigError) as caught:
            targets.bind_target("x", block)
        assert caught.value.field == field
    assert "mine.things" not in sys.modules


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("builtins.eval", "builtins is a module of Python's standard library"),
        ("os.system", "os is a module of Python's standard library"),
        ("posix.system", "standard library"),
        ("importlib.import_module", "standard library"),
        ("shutil.rmtree", "standard library"),
        ("msvcrt.getch", "standard library"),
        ("torch.hub.load", "torch comes with torch, a library of this program"),
        ("yaml.unsafe_load", "comes with pyyaml"),
        ("joblib.load", "comes with joblib"),  # a library's library
        ("pip.main", "comes with pip"),
        ("numpy.os.system", "comes with numpy"),
        ("aem_exp.config.launch_rules.find_spec", "importlib is a module"),  # imported there, for itself
        ("aem_exp.config.rules.os.system", "no module aem_exp.config.rules.os"),
    ],
)
def test_targets_that_run_whatever_they_are_given_are_refused_by_name(mine, target, said):
    nested = {"_target_": "mine.things.Plain", "whatever": {"_target_": target}}
    for block, field in (({"_target_": target}, "x._target_"), (nested, "x.whatever._target_")):
        with pytest.raises(ConfigError, match=re.escape(said)) as caught:
            targets.bind_target("x", block)
        assert caught.value.field == field
    if not target.startswith("aem_exp."):
        with pytest.raises(ConfigError, match=re.escape(said)):
            targets.instantiate({"_target_": target})
    assert "mine.things" not in sys.modules


def test_a_package_that_the_user_installed_may_be_named(tmp_path, monkeypatch):
    """By pip, beside the libraries of this package; or in place (`pip install -e`)."""
    site = tmp_path / "site-packages"
    (site / "installed_plugin").mkdir(parents=True)
    (site / "installed_plugin/__init__.py").write_text("def estimate(played):\n    return played\n")
    record = site / "installed_plugin-1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: installed-plugin\nVersion: 1.0\nRequires-Dist: torch\n"
    )
    (record / "RECORD").write_text("installed_plugin/__init__.py,,\n")
    monkeypatch.syspath_prepend(str(site))
    block = {"_target_": "installed_plugin.estimate"}
    assert targets.bind_target("x", block, positional=1) == block
    assert targets.instantiate(block, partial=True)(5) == 5


def test_instantiate():
    block = {"_target_": "aem_exp.schedules.Linear", "start": 1.0}
    assert config.instantiate(block | {"end": 0.0})(0.5) == 0.5
    assert config.instantiate(block, partial=True)(end=0.0)(0.5) == 0.5


def test_a_user_lays_a_folder_over_ours(mine, tmp_path):
    overlay = tmp_path / "it's my, conf"
    for file, text in {
        "experiment/own.yaml": "# @package _global_\n# own\ndefaults:\n- override /baseline: own\n- _self_\nseed: 5\n",
        "baseline/own.yaml": "# @package _global_\n# own baseline\nbaseline:\n  name: own\n  advantage:\n"
        "    _target_: mine.estimate\ntrainer:\n  loss_type: dapo\n  epsilon: 0.1\n",
        "modulation/none.yaml": "# ours is hidden\nname: hidden\n",
    }.items():
        (overlay / file).parent.mkdir(parents=True)
        (overlay / file).write_text(text)
    experiment = load(["+experiment=own", "baseline.advantage.gamma=1", "modulation=none"], overlay)
    assert (experiment.seed, experiment.trainer.epsilon, experiment.modulation.name) == (5, 0.1, "hidden")
    assert experiment.baseline.advantage == {"_target_": "mine.estimate", "gamma": 1.0}
    with pytest.raises(ConfigError, match="did you mean gamma"):
        load(["+experiment=own", "baseline.advantage.gama=1"], overlay)
    with pytest.raises(ConfigError, match="no such folder"):
        load([], tmp_path / "missing")
    (overlay / "config.yaml").write_text((ROOT / "conf/config.yaml").read_text().replace("seed: 0", "seed: 9"))
    assert load(["modulation=none"], overlay).seed == 9
    (overlay / "baseline/own.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match=r"baseline/own\.yaml: is not YAML"):
        load(["baseline=own"], overlay)


def test_conf_comes_from_the_environment_the_wheel_or_the_checkout(monkeypatch, tmp_path):
    assert config.conf_root() == ROOT / "conf"
    monkeypatch.setenv("AEM_ROOT", str(tmp_path))
    assert config.conf_root() == tmp_path / "conf"
    with pytest.raises(ConfigError, match="AEM_ROOT"):
        load([])
    monkeypatch.delenv("AEM_ROOT")
    monkeypatch.setattr(disk, "PACKAGE", tmp_path / "aem_exp")
    (tmp_path / "aem_exp/_bundled/conf").mkdir(parents=True)
    assert config.conf_root() == tmp_path / "aem_exp/_bundled/conf"


# The door


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--cgf", "job"], "did you mean --cfg?"),
        (["--cfg"], "expected one argument"),
        (["--cfg", "all"], "choose from job"),
        (["--resolve"], "--cfg job"),
        (["-m", "seed=0"], "needs an override of several values"),
        (["--submit"], "only read with -m"),
        (["-m", "seed=0,1", "--cfg", "job"], "without -m"),
        (["plan=maybe"], "true, false"),
        (["--config-dir", "nowhere"], "no such folder"),
        (["--config-dir", "nowhere", "--help"], "no such folder"),
        (["+experimnt=x", "--cfg", "job"], "did you mean experiment?"),
        (["launch.nodes=2", "launch.where=slurm"], "needs a time limit"),
    ],
    ids=" ".join,
)
def test_mistakes_are_one_sentence_and_exit_2(capsys, argv, words):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err
    assert err.startswith("aem_exp: ") and err.count("\n") == 1


def test_help_lists_every_choice(capsys):
    assert main(["--help"]) == 0
    page = capsys.readouterr().out
    for group, files in GROUPS.items():
        assert f"{group}=" in page
        for name in files:
            lines = [line for line in page.splitlines() if line.startswith(f"  {name} ")]
            assert lines and all(len(line.split()) > 3 for line in lines)
    assert max(map(len, page.splitlines())) < 132


def test_cfg_job_prints_what_was_composed(capsys):
    assert main(["trainer.steps=7", "--cfg", "job"]) == 0
    page = capsys.readouterr().out
    assert "steps: 7" in page and "${model.name}" in page
    assert main(["--cfg", "job", "--resolve", "seed=4"]) == 0
    assert "name: household-tiny" in capsys.readouterr().out


def test_plan_shows_and_runs_nothing(capsys, tmp_path):
    asked = [*FIXED, "trainer.mini_batch=all"]
    assert main([*asked, "plan=true"]) == 0
    page = capsys.readouterr().out
    assert str(tmp_path / "outputs") in page and "new" in page and "one update per step" in page
    assert not (tmp_path / "outputs").exists()
    folder = config.run_dir(load(asked))
    folder.mkdir(parents=True)
    (folder / "experiment.json").write_text(json.dumps(config.to_dict(load(asked))))
    main([*asked, "plan=true"])
    assert "begun" in capsys.readouterr().out
    main([*FIXED, "plan=true"])
    assert "trainer.mini_batch: all -> 32" in capsys.readouterr().out


HEAVY = ("torch", "transformers", "trl", "mlflow", "optuna", "datasets", "pandas", "matplotlib", "peft", "submitit")
LAZY = f"""
import sys
from aem_exp.__main__ import main
assert main(["--help"]) == 0
assert not {{"hydra", "omegaconf"}} & set(sys.modules)
assert main(["+experiment=alfworld_1_5b", "--cfg", "job"]) == main(["model.lora={{r: 8}}", "plan=true"]) == 0
assert main(["trainer.max_steps=1"]) == main(["env=alfworld"]) == 2
assert not set({HEAVY}) & set(sys.modules), set({HEAVY}) & set(sys.modules)
"""


def test_nothing_heavy_is_imported_before_a_run(tmp_path):
    subprocess.run([sys.executable, "-c", LAZY], check=True, capture_output=True, cwd=tmp_path, env=environment())


def test_works_from_any_folder(tmp_path):
    (tmp_path / "own_world.py").write_text(
        "import torch\nfrom aem_exp.envs import Task\nclass World:\n    def __init__(self, size: int = 1): ...\n"
        "    external = True\n    fingerprint, splits = 'own', ('train', 'dev', 'test')\n"
        "    def tasks(self, split): return [Task(f'{split}-{i}') for i in range(9)]\n"
        "    def env(self): ...\n"
        "    def words(self): ...\n"
        "    def expert(self, *_): ...\n"
    )
    argv = [sys.executable, "-m", "aem_exp", "env.make={_target_: own_world.World, size: 3}", "plan=true"]
    done = subprocess.run(argv, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert str(tmp_path / "outputs") in done.stdout
    done = subprocess.run([*argv, "seed=x"], capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert done.returncode == 2 and done.stderr == "aem_exp: seed=x: must be a whole number of at least 0\n"


def environment() -> dict[str, str]:
    """The package is found also where it is not installed."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}
