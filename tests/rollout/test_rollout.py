"""The rollout with the local sampler: trained tokens are exactly the sampled tokens, for both histories."""

from itertools import pairwise

import pytest
import torch
from support import toy

from aem_exp.aem import responses
from aem_exp.envs.executor import SerialExecutor
from aem_exp.rollout.chat import Chat
from aem_exp.rollout.play import Rollout, Watcher
from aem_exp.rollout.rows import build_rows
from aem_exp.rollout.sampling.base import Sample, SamplingParams, keyed_generator
from aem_exp.rollout.sampling.local import LocalSampler
from aem_exp.rollout.types import Ending, Episode
from aem_exp.training.packing import pack_rows, sampler_logps_and_entropies

HISTORIES = ["full", "window"]
PLAIN, WORLD = SamplingParams(), toy.ChatterWorld()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("toy")


def play(folder, history, episodes=None, sampling=PLAIN, world=WORLD, **changes):
    """Play episodes of the toy world with its random policy: the trajectories, the model and the tokenizer."""
    model, tokenizer = toy.policy(folder, history)
    chat = Chat(tokenizer)
    rollout = Rollout(SerialExecutor(world), toy.env(history, **changes), chat)
    played = rollout.play(episodes or toy.draw(0), LocalSampler(model.eval(), chat.end_ids, sampling))
    return played, model, tokenizer


@pytest.mark.slow
@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_log_probs_and_entropies_equal_those_of_a_forward_pass(folder, history, temperature):
    """The session keeps its KV cache across turns; the reference is one forward pass without a cache."""
    played, model, tokenizer = play(folder, history, sampling=SamplingParams(temperature))
    packed = build_rows([t for t in played if t.ended != Ending.CRASHED], history)
    chosen = list(range(len(packed)))
    batch = pack_rows(packed, chosen, tokenizer.pad_token_id)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits / temperature
    logp = logits.log_softmax(-1)[:, batch["prompt_ids"].shape[1] - 1 : -1]
    own = batch["tool_mask"].bool()
    logps, entropies = sampler_logps_and_entropies(packed, chosen, own.shape[1])
    torch.testing.assert_close(
        logp.gather(2, batch["completion_ids"][..., None])[..., 0][own], logps[own], atol=2e-5, rtol=0
    )
    torch.testing.assert_close(-(logp.exp() * logp).sum(-1)[own], entropies[own], atol=2e-5, rtol=0)


def test_full_history_row_has_sampled_tokens_and_template_tokens_once(folder):
    """Responses are not rendered again."""
    played, _, tokenizer = play(folder, "full")
    for row in build_rows(played, "full"):
        trajectory = played[row.trajectory]
        sampled = [i for r in trajectory.responses for i in r.sample.ids]
        assert [i for i, own in zip(row.completion, row.mask, strict=True) if own] == sampled
        template = [i for i, own in zip(row.completion, row.mask, strict=True) if not own]
        text = tokenizer.decode(row.prompt + template)  # a random policy may also generate headers, so leave it out
        assert text.count("<|im_start|>user") == len(trajectory.responses)
        assert text.count("<|im_start|>assistant") == len(trajectory.responses)
        ends = [(i == tokenizer.eos_token_id, own) for i, own in zip(row.completion, row.mask, strict=True)]
        assert ((True, 1), (True, 0)) not in pairwise(ends)  # a sampled end token is not followed by the template's


def test_cut_response_gets_a_masked_end_token(folder):
    played, _, tokenizer = play(folder, "full")
    cut = [
        (row, k) for row in build_rows(played, "full") for k, r in enumerate(played[row.trajectory].responses[:-1])
        if r.sample.ids[-1] != tokenizer.eos_token_id
    ]  # fmt: skip
    assert cut
    row, k = cut[0]
    response_T = responses(torch.tensor([row.mask]))[0]
    after = int((response_T == k).nonzero()[-1]) + 1
    assert row.completion[after] == tokenizer.eos_token_id
    assert row.mask[after] == 0


@pytest.mark.slow
def test_window_prompt_is_one_message_that_quotes_past_observations(folder):
    played, _, tokenizer = play(folder, "window")
    long = max(played, key=lambda t: len(t.responses))
    assert len(long.responses) >= 3
    last = tokenizer.decode(long.responses[2].prompt)
    assert last.count("<|im_start|>") == 2  # one user message, and the header of the response
    quoted = [long.responses[k].observation for k in range(2)]
    assert all(text in last for text in quoted)
    assert [row.turns for row in build_rows([long], "window")] == [[k] for k in range(len(long.responses))]


@pytest.mark.slow
@pytest.mark.parametrize("history", HISTORIES)
def test_members_of_a_group_differ_and_equal_keys_give_equal_responses(folder, history):
    played, *_ = play(folder, history)
    texts = [tuple(r.text for r in t.responses) for t in played]
    assert len(set(texts[:4])) > 1
    again, *_ = play(folder, history)
    assert [tuple(r.text for r in t.responses) for t in again] == texts


@pytest.mark.parametrize("history", HISTORIES)
def test_an_episode_does_not_depend_on_the_batch(folder, history):
    played, *_ = play(folder, history)
    alone, *_ = play(folder, history, [toy.draw(0)[5]])
    assert [r.sample.ids for r in alone[0].responses] == [r.sample.ids for r in played[5].responses]


@pytest.mark.slow
def test_crash_is_recorded_and_other_episodes_continue(folder):
    episodes = [Episode(toy.ChatterWorld().tasks("train")[3], 0, m, ("crash", m)) for m in range(200)]
    played, *_ = play(folder, "full", episodes, world=toy.ChatterWorld(breaks=True))
    crashed = [t for t in played if t.ended == Ending.CRASHED]
    assert crashed
    assert all("the world broke" in t.error for t in crashed)
    assert {t.ended for t in played if t not in crashed} == {"over"}


def test_full_history_ends_when_the_context_is_full(folder):
    played, *_ = play(
        folder, "full", [Episode(toy.ChatterWorld().tasks("train")[3], 0, m, (m,)) for m in range(8)], context_tokens=25
    )
    assert Ending.CONTEXT in {t.ended for t in played}
    assert all(len(row.prompt) + len(row.completion) <= 25 for row in build_rows(played, "full"))


def test_window_drops_past_turns_before_the_episode_ends(folder):
    episodes = [Episode(toy.ChatterWorld().tasks("train")[3], 0, m, (m,)) for m in range(8)]
    played, *_ = play(folder, "window", episodes, context_tokens=16)
    assert max(len(t.responses) for t in played) == 4  # each turn fits without past turns
    played, *_ = play(folder, "window", episodes, context_tokens=8)
    assert {t.ended for t in played} == {Ending.CONTEXT}


def test_inverse_cdf_sampling_follows_the_distribution():
    """Chi-square test over 20,000 draws from a known distribution."""
    from scipy.stats import chisquare

    from aem_exp.rollout.sampling.local import sample_tokens

    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1])
    draws = torch.from_numpy(keyed_generator(("chi",)).random(20_000))
    tokens, logps, entropies = sample_tokens(logits.expand(20_000, 5), draws, SamplingParams(0.8))
    expected = (logits.double() / 0.8).softmax(0)
    assert chisquare(torch.bincount(tokens, minlength=5).numpy(), expected.numpy() * 20_000).pvalue > 1e-3
    torch.testing.assert_close(logps, expected.log().float()[tokens])
    torch.testing.assert_close(entropies[0], -(expected * expected.log()).sum().float())


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [(SamplingParams(top_k=2), {2, 4}), (SamplingParams(top_p=0.6), {2, 4}), (SamplingParams(min_p=0.9), {2})],
)
def test_filters_keep_only_likely_tokens(sampling, kept):
    from aem_exp.rollout.sampling.local import sample_tokens

    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1]).expand(500, 5)
    tokens, *_ = sample_tokens(logits, torch.from_numpy(keyed_generator(("f",)).random(500)), sampling)
    assert set(tokens.tolist()) == kept


class ConstantSampler:
    """A sampler that always returns the same tokens."""

    def __init__(self, ids):
        self.ids = ids

    def session(self):
        return self

    def generate(self, slots, prompts, keys, budgets):
        return [Sample(list(self.ids[:n]), [], []) for n in budgets]


@pytest.mark.slow
@pytest.mark.parametrize("history", ["full", "window"])
@pytest.mark.parametrize("kind", ["only the end token", "no end token", "unknown tokens"])
def test_degenerate_responses_are_played_and_trained(folder, history, kind):
    """Every episode ends, every token is counted, and all metrics of the step are finite or absent."""
    run = toy.experiment(history, steps=1, entropy_coef=0.01)  # all returns are equal: only the entropy bonus trains
    chat = Chat(toy.policy(folder, history)[1])
    end, word = chat.end_ids[0], chat.tokenizer.convert_tokens_to_ids("c")
    unknown = chat.tokenizer.convert_tokens_to_ids(chat.tokenizer.unk_token or "z")
    ids = {"only the end token": [end], "no end token": [word] * 5, "unknown tokens": [unknown] * 3 + [end]}[kind]
    trainer = toy.trainer(folder, run, lam=1.0, make_sampler=lambda _: ConstantSampler(ids), trust_sampler=False)
    rows = []
    trainer.aem_callback.report = lambda step, row: rows.append(row)
    trainer.train()
    assert rows[0]["train/tokens_generated"] == rows[0]["train/tokens_trained"] > 0
    assert all(value == value for value in rows[0].values())


def test_override_rules_holds_within_its_context(folder):
    model, tokenizer = toy.policy(folder, "full")
    chat = Chat(tokenizer)
    rollout = Rollout(SerialExecutor(WORLD), toy.env("full"), chat)
    sampler = LocalSampler(model.eval(), chat.end_ids, PLAIN)
    with rollout.override_rules(toy.env("full", max_turns=1)):
        assert {len(t.responses) for t in rollout.play(toy.draw(0), sampler)} == {1}
    assert max(len(t.responses) for t in rollout.play(toy.draw(0), sampler)) > 1


@pytest.mark.parametrize("history", HISTORIES)
def test_watcher_receives_every_turn_and_token(folder, history):
    class RecordingWatcher:
        def __init__(self):
            self.events = []

        def turn(self, live):
            self.events.append(live)

        def token(self, count):
            self.events.append(str(count))

        def slot_turn(self, slot, turn):
            raise AssertionError("these episodes advance in lockstep")

    watcher = RecordingWatcher()
    assert isinstance(watcher, Watcher)
    model, tokenizer = toy.policy(folder, history)
    chat = Chat(tokenizer)
    sampler = LocalSampler(model.eval(), chat.end_ids, PLAIN, watcher.token)
    played = Rollout(SerialExecutor(WORLD), toy.env(history), chat, watcher=watcher).play(toy.draw(0), sampler)
    expected = []
    for turn in range(max(len(t.responses) for t in played)):
        lengths = [len(t.responses[turn].sample.ids) for t in played if len(t.responses) > turn]
        expected += [*map(str, range(1, max(lengths) + 1)), len(lengths)]
    assert watcher.events == [*expected, 0]
