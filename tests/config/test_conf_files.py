"""The files of conf/: each resolves, and the experiments have the settings of their references."""

import pytest
import yaml
from support import ROOT
from support.configs import GROUPS, get_key

from aem_exp import config
from aem_exp.config import ConfigError, load
from aem_exp.config.compose import Composer

pytestmark = pytest.mark.usefixtures("clean")
NEEDED_WITH = {
    "baseline=gspo": ["modulation=none"],  # gspo takes modulation only with one row per turn
    "baseline=sampo": ["modulation=none"],
    "model=local": ["model.path=any/local"],
}


@pytest.mark.slow
@pytest.mark.parametrize("choice", [f"{group}={name}" for group, files in GROUPS.items() for name in files])
def test_every_file_resolves_and_has_a_description(choice):
    group, _, name = choice.partition("=")
    experiment = load([f"+{choice}" if group == "experiment" else choice, *NEEDED_WITH.get(choice, [])])
    if group != "experiment":
        assert getattr(experiment, group).name == name
    text = GROUPS[group][name].read_text()
    assert text.startswith("# ")
    assert len(next(line for line in text.splitlines() if not line.startswith("# @"))) > 15


def test_no_file_is_without_a_group():
    assert {file.name for file in (ROOT / "conf").iterdir() if file.is_file()} == {"config.yaml"}
    defaults = yaml.safe_load((ROOT / "conf/config.yaml").read_text())["defaults"]
    assert not any("experiment" in entry for entry in defaults if isinstance(entry, dict))


@pytest.mark.parametrize("name", ["local", "smollm2_135m", "smollm2_135m_q4"])
def test_a_language_model_comes_with_its_settings(name):
    experiment = load([f"model={name}", *NEEDED_WITH.get(f"model={name}", [])])
    assert (experiment.trainer.learning_rate, experiment.trainer.max_grad_norm) == (1e-6, 1.0)
    assert experiment.launch.device_tokens == (2048 if name == "local" else 1024)
    assert not any("learning_rate" in note for note in config.notes(experiment))
    adapter = load([f"model={name}", *NEEDED_WITH.get(f"model={name}", []), "model.lora={r: 8}"])
    assert any("low for LoRA" in note for note in config.notes(adapter))


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
def test_experiments_have_the_settings_of_their_reference(name):
    experiment = load([f"+experiment={name}"])
    assert {key: get_key(experiment, key) for key in REFERENCES[name]} == REFERENCES[name]
    if name != "swebench_32b":
        assert experiment.trainer.epsilon_high is None
        assert {"<think>", "</think>", "<action>", "</action>"} <= set(experiment.env.prompt["window"].split())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "norm"), [("alfworld_1_5b", "std"), ("webshop_1_5b", "mean")])
def test_gigpo_uses_the_norm_of_the_reference_for_each_env(name, norm):
    """verl-agent's scripts: mode=mean_std_norm in ALFWorld, mode=mean_norm in WebShop."""
    for overrides in ([f"+experiment={name}", "baseline=gigpo"], ["baseline=gigpo", f"+experiment={name}"]):
        advantage = load(overrides).baseline.advantage
        assert (advantage["norm"], advantage["over"]) == (norm, "turns")
        assert config.to_dict(load(overrides)) == config.to_dict(config.resolve(Composer().compose(overrides)))
    assert (
        load([f"+experiment={name}", "baseline=gigpo", "baseline.advantage.norm=std"]).baseline.advantage["norm"]
        == "std"
    )
    with pytest.raises(ConfigError) as caught:
        load(["baseline=gigpo/webshop"])
    assert "gigpo" in caught.value.choices and "gigpo/webshop" not in caught.value.choices


# Our deliberate difference from verl-agent: train, dev and test are disjoint, and whole panels are scored.
DEPARTURES = {"env.make.split": ("original", "verl_agent")}


@pytest.mark.parametrize("name", ["alfworld_1_5b", "webshop_1_5b"])
def test_the_verl_agent_variant_differs_only_in_split_and_evaluation(name):
    ours, theirs = load([f"+experiment={name}"]), load([f"+experiment={name}_verl_agent"])
    changed = {line.partition(":")[0] for line in config.diff(ours, theirs)}
    assert changed == {*DEPARTURES, "evaluation.every"}
    for key, pair in DEPARTURES.items():
        assert (get_key(ours, key), get_key(theirs, key)) == pair
    assert theirs.evaluation.every == 5


@pytest.mark.slow
def test_an_experiment_keeps_its_recipe_under_another_baseline():
    plain, other = load(["+experiment=alfworld_1_5b"]), load(["+experiment=alfworld_1_5b", "baseline=dr_grpo"])
    changed = {line.partition(":")[0] for line in config.diff(plain, other)}
    assert changed == {"baseline.advantage._target_", "baseline.advantage.eps", "trainer.loss_type"}
    none = load(["+experiment=alfworld_1_5b", "modulation=none"])
    assert {line.partition(".")[0] for line in config.diff(plain, none)} == {"modulation"}
