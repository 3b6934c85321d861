"""Notes on settings that are allowed and have no effect."""

import pytest
from support.configs import FIXED

from aem_exp import config
from aem_exp.config import load

pytestmark = pytest.mark.usefixtures("clean")


@pytest.mark.parametrize(
    ("overrides", "fact"),
    [
        (["env.prompt.next=x"], "env.prompt.next"),
        (["env.history=window", "env.window=2", "env.prompt.window='{observation}'"], "env.window=2"),
        (["env.history=window", "env.prompt.pair=x"], "env.prompt.pair"),
        (["model.make=null", "model.path=a/b"], "trainer.learning_rate=0.0005"),
    ],
)
def test_prompts_without_fields_and_high_learning_rates_are_noted(overrides, fact):
    assert any(fact in note for note in config.notes(load(overrides)))


@pytest.mark.slow
def test_settings_without_effect_are_noted():
    assert config.notes(load(FIXED)) == []
    (note,) = config.notes(load([*FIXED, "trainer.mini_batch=all", "baseline=dapo"]))
    assert "trainer.mini_batch=all" in note and "trainer.epsilon_high" in note
    assert "trainer.mini_batch=64" in config.notes(load([*FIXED, "trainer.mini_batch=64"]))[0]
    assert config.notes(load([*FIXED, "trainer.mini_batch=64", "trainer.num_iterations=2"])) == []
    (note,) = config.notes(load([*FIXED, "trainer.mini_batch=all", "baseline=kl_cov"]))
    assert "trainer.kl_cov_coef" in note
    (note,) = config.notes(load([*FIXED, "baseline=sampo", "modulation=none"]))
    assert "step_compared" in note and "env.history=window" in note
    assert "modulation.gate=0" in config.notes(load([*FIXED, "modulation.gate=0"]))[0]


def test_servers_accept_correction_settings_and_missing_workers_are_noted():
    served = [*FIXED, "launch.sampler=served", "launch.servers=/s"]
    (note,) = config.notes(load([*served, "launch.trainer.vllm_importance_sampling_clip_max=2"]))
    assert "launch.workers=0" in note
    assert config.notes(load([*served, "launch.workers=4"])) == []
    assert config.signature(load(served)) == config.signature(load(FIXED)), "the sampler is not part of the science"
