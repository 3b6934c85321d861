"""Sampling with TRL's own engine: exact tokens, budgets, end tokens, seeds, and training from its samples."""

import inspect

import pytest
import torch
from support import toy
from trl.generation.vllm_generation import VLLMGeneration

from aem_exp.rollout.chat import Chat
from aem_exp.rollout.sampling.base import SamplingParams
from aem_exp.rollout.sampling.local import LocalSampler
from aem_exp.rollout.sampling.trl_engine import VLLM_FIELDS, EngineSampler


@pytest.fixture
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("engine")


def engine(folder, history="full", sampling=None, **settings):
    """A trainer on the toy world whose responses come from Hugging Face `generate`."""
    run = toy.experiment(history, **settings)
    chat = Chat(toy.policy(folder, history)[1])
    make = lambda trainer: EngineSampler(trainer, chat.end_ids, sampling or SamplingParams())  # noqa: E731
    return toy.trainer(folder, run, lam=1.0, make_sampler=make, trust_sampler=False), chat


def test_turns_append_exact_tokens_within_their_budgets(folder):
    trainer, chat = engine(folder)
    session = trainer.sampler.session()
    prompts = [chat.first_prompt("hello a"), chat.first_prompt("hello b c")]
    first = session.generate([0, 1], prompts, [("k", 0), ("k", 1)], [3, 5])
    assert [len(s.ids) <= n for s, n in zip(first, (3, 5), strict=True)] == [True, True]
    assert all(not set(s.ids[:-1]) & set(chat.end_ids) for s in first)
    (second,) = session.generate([1], [chat.next_prompt("go", first[1].ids[-1])], [("k", 1, 1)], [4])
    assert session._ids[1] == [*prompts[1], *first[1].ids, *chat.next_prompt("go", first[1].ids[-1]), *second.ids]
    assert not first[0].entropies and not first[0].logps


@pytest.mark.slow
def test_equal_keys_give_equal_samples_and_other_keys_differ(folder):
    trainer, chat = engine(folder)

    def draw(key):
        return trainer.sampler.session().generate([0], [chat.first_prompt("hello a")], [key], [5])[0].ids

    torch.manual_seed(1)
    one = draw(("a",))
    torch.manual_seed(2)
    assert draw(("a",)) == one
    assert len({tuple(draw((i,))) for i in range(10)}) > 3


@pytest.mark.slow
def test_samples_follow_the_policy_at_the_sampling_temperature(folder):
    """Frequencies of the first token, against the policy's probabilities at this temperature."""
    trainer, chat = engine(folder, sampling=SamplingParams(temperature=0.7))
    prompt, n = chat.first_prompt("hello a"), 3000
    drawn = trainer.sampler.session().generate(list(range(n)), [prompt] * n, [("x",)] * n, [1] * n)
    logits = trainer.model(input_ids=torch.tensor([prompt])).logits[0, -1]
    wanted = torch.softmax(logits / 0.7, -1)
    shares = torch.bincount(torch.tensor([s.ids[0] for s in drawn]), minlength=len(wanted)) / n
    assert (shares - wanted).abs().max() < 4 * (0.25 / n) ** 0.5
    assert trainer.generation_config.temperature == 1.0, "the temperature is set for one turn only"


@pytest.mark.slow
@pytest.mark.parametrize("history", ["full", "window"])
def test_trainer_measures_what_the_engine_does_not_report(folder, history):
    """It measures entropies and old log-probs, computes coefficients, and counts every token."""
    trainer, _ = engine(folder, history, steps=2, mini_batch=8)
    rows = []
    trainer.aem_callback.report = lambda step, row: rows.append(row)
    trainer.train()
    assert len(rows) == 2
    for row in rows:
        assert row["train/response_entropy"] > 0
        assert row["aem/alpha_q95"] > 1
        assert row["train/tokens_generated"] == row["train/tokens_trained"]


@pytest.mark.slow
def test_scored_entropies_equal_those_of_the_local_sampler(folder):
    """The same tokens, measured by the scoring pass and by the local sampler."""
    trainer, _ = engine(folder)
    local = toy.trainer(folder, toy.experiment("full"), lam=1.0)
    played = local.play(0)[0]
    seen = []
    for t in (trainer, local):
        credit, _ = t.build_updates(t.assign_credit(played), 0)
        seen.append(credit.entropy_R)
    torch.testing.assert_close(*seen, atol=1e-4, rtol=1e-4)
    assert isinstance(local.sampler, LocalSampler)


@pytest.mark.slow
def test_importance_ratio_is_applied_and_an_engine_with_other_weights_is_refused(folder):
    from aem_exp.core.errors import RunError

    trainer, _ = engine(folder)
    played = toy.trainer(folder, toy.experiment("full")).play(0)[0]
    credit = trainer.assign_credit(played)  # with the local sampler's log-probs
    trainer.use_vllm, trainer.vllm_importance_sampling_correction = True, True
    for row in credit.rows:
        row.logps = [p - 0.05 * m for p, m in zip(row.logps, row.mask, strict=True)]
    _, (update,) = trainer.build_updates(credit, 0)
    ratio, mask = update[0]["importance_sampling_ratio"], update[0]["tool_mask"].bool()
    torch.testing.assert_close(ratio[mask], torch.full((int(mask.sum()),), 1.0513), atol=1e-3, rtol=0)
    for row in credit.rows:
        row.logps = [p - 1.0 * m for p, m in zip(row.logps, row.mask, strict=True)]
    with pytest.raises(RunError, match=r"log-probs .*\b1\b.* nats .*\b0\.1\b"):
        trainer.build_updates(credit, 0)


def test_fields_set_on_vllm_exist_in_trl():
    """vLLM needs a GPU, so only the names of the fields are compared with the source of the installed TRL."""
    source = inspect.getsource(VLLMGeneration)
    for name in VLLM_FIELDS:
        assert f"self.{name} = {name}" in source, name
        assert f"= self.{name}" in source or f"self.{name}" in inspect.getsource(VLLMGeneration.generate), name
