"""Contradictions between the settings of an experiment."""

import pytest
from support.configs import assert_refused, with_overrides

from aem_exp import config
from aem_exp.config import ConfigError, load

pytestmark = pytest.mark.usefixtures("clean")


def test_gspo_accepts_modulation_with_one_row_per_turn():
    load(["+experiment=webshop_1_5b", "trainer.importance_sampling_level=sequence", "trainer.loss_type=grpo"])
    load(["modulation=none", "trainer.importance_sampling_level=sequence", "trainer.loss_type=grpo"])


REFUSED = [  # overrides, the field of the error, and a fact that the error must state
    ("name=a/b", "name", "100"),
    ("tracking='http://me:pw@host'", "tracking", "MLFLOW_TRACKING_USERNAME"),
    ("tracking='postgresql://host/db?password=pw'", "tracking", "MLFLOW_TRACKING_URI"),
    ("model.path=x", "model.path", "model.make"),
    ("model.make=null", "model.path", "model.make"),
    ("model.revision=main", "model.revision", "model.path"),
    ("model.trust_remote_code=true", "model.trust_remote_code", "model.code_sha256"),
    ("model.code_sha256=abc", "model.code_sha256", "model.trust_remote_code=true"),
    ("model.lora={r:0}", "model.lora.r", "at least 1"),
    ("modulation.lam=null", "modulation.gate", "modulation.lam"),
    ("modulation.bonus=0.05 | modulation.unit=token", "modulation.bonus", "modulation.unit=response"),
    ("modulation.bonus_lam=2", "modulation.bonus_lam", "modulation.bonus above 0"),
    ("modulation.signal=length", "modulation.gate", "not in nats"),
    (
        "modulation.signal=noise | modulation.gate=0 | modulation.unit=token",
        "modulation.signal",
        "modulation.unit=response",
    ),
    ("modulation.entropy=shrunk | modulation.unit=token", "modulation.entropy", "modulation.unit=response"),
    ("modulation.entropy=shrunk | modulation.signal=surprisal", "modulation.entropy", "modulation.signal=entropy"),
    ("modulation.gate_complement=true | modulation.gate=0", "modulation.gate_complement", "modulation.gate above 0"),
    ("modulation.within=state", "modulation.within", "modulation.shuffle=true"),
    ("modulation.shuffle=true | modulation.average=sign", "modulation.average", "modulation.shuffle=true"),
    ("modulation.keep_by=mask", "modulation.keep_by", "modulation.keep=raising"),
    ("modulation.keep_random=true", "modulation.keep_random", "modulation.keep=raising"),
    (
        "modulation.keep=raising | modulation.keep_by=mask | trainer.loss_type=grpo",
        "modulation.keep_by",
        "trainer.loss_type=dapo",
    ),
    ("modulation.keep=raising | modulation.centred=true", "modulation.centred", "modulation.keep=raising"),
    ("modulation.keep=raising | modulation.bonus=0.1", "modulation.bonus", "modulation.keep=raising"),
    ("env.response_tokens=512", "env.response_tokens", "env.context_tokens=512"),
    ("env.window=2", "env.window", "env.history=window"),
    ("env.make.reward=0", "env.make.reward", "above 0"),
    ("trainer.mini_batch=65", "trainer.mini_batch", "trainer.group_size=8 = 64"),
    ("launch.gpus_per_node=3 | launch.trainer.use_cpu=null", "launch", "trainer.group_size=8 = 64"),
    ("trainer.rounds=3", "trainer.rounds", "trainer.drop_equal=true"),
    ("trainer.oversample=2", "trainer.oversample", "trainer.drop_equal=true"),
    ("trainer.keep_variance=0.9 | trainer.drop_equal=true", "trainer.keep_variance", "trainer.drop_equal=false"),
    ("trainer.importance_sampling_level=sequence", "trainer.importance_sampling_level", "modulation=none"),
    ("trainer.clip_cov_ratio=0.1 | trainer.clip_cov_max=5", "trainer.clip_cov_min", "trainer.clip_cov_ratio"),
    ("trainer.clip_cov_max=5", "trainer.clip_cov_max", "has no effect without trainer.clip_cov_ratio"),
    (
        "trainer.clip_cov_ratio=0.1 | trainer.clip_cov_min=5 | trainer.clip_cov_max=5",
        "trainer.clip_cov_min",
        "below trainer.clip_cov_max=5",
    ),
    ("trainer.kl_cov_coef=1", "trainer.kl_cov_coef", "has no effect without trainer.kl_cov_ratio"),
    (
        "trainer.top_entropy_quantile=0.2 | trainer.loss_type=grpo",
        "trainer.top_entropy_quantile",
        "trainer.loss_type=dapo",
    ),
    (
        "modulation={} | trainer.top_entropy_quantile=0.2 | trainer.importance_sampling_level=sequence",
        "trainer.top_entropy_quantile",
        "trainer.importance_sampling_level=token",
    ),
    ("trainer.count_masked=true", "trainer.count_masked", "trainer.mask_truncated_completions=true"),
    ("trainer.loss_type=luspo", "trainer.loss_type", "trainer.importance_sampling_level=sequence"),
    ("trainer.top_p=0.9", "trainer.top_p", "modulation=none"),
    ("trainer.top_k=50", "trainer.top_k", "modulation=none"),
    ("trainer.min_p=0.1", "trainer.min_p", "modulation=none"),
    ("trainer.repetition_penalty=1.1", "trainer.repetition_penalty", "modulation=none"),
    (
        "modulation={} | trainer.repetition_penalty=1.1",
        "trainer.repetition_penalty",
        "launch.trainer.use_vllm=true",
    ),
    ("evaluation.final=dev", "evaluation.final", "evaluation.panel"),
    ("evaluation.panel=train", "evaluation.panel", "held-out"),
]


@pytest.mark.parametrize(("overrides", "field", "fact"), REFUSED, ids=[case[0] for case in REFUSED])
def test_contradictions_are_refused(composed, overrides, field, fact):
    assert_refused(composed, overrides, field, fact)


def test_credentials_are_not_shown(composed):
    with pytest.raises(ConfigError) as caught:
        config.resolve(with_overrides(composed, "tracking='postgresql://host/db?password=pw'"))
    assert caught.value.value == "postgresql://host/db?password=***"
