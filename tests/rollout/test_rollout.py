"""Exact tokens: what was sampled is what is trained, for both histories."""

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
PLAIN, SOUND = SamplingParams(), toy.ChatterWorld()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("toy")


def play(folder, history, episodes=None, sampling=PLAIN, world=SOUND, **changes):
    model, tokenizer = toy.policy(folder, history)
    chat = Chat(tokenizer)
    rollout = Rollout(SerialExecutor(world), toy.env(history, **changes), chat)
    played = rollout.play(episodes or toy.draw(0), LocalSampler(model.eval(), chat.end_ids, sampling))
    return played, model, tokenizer


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_sampler_measures_what_a_scoring_pass_measures(folder, history, temperature):
    """Log-probs and entropies of a session that keeps its cache across turns, against one plain forward pass."""
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


def test_full_history_only_appends(folder):
    """A row is the sampled tokens with the template's tokens between them, once; nothing is rendered anew."""
    played, _, tokenizer = play(folder, "full")
    for row in build_rows(played, "full"):
        trajectory = played[row.trajectory]
        sampled = [i for r in trajectory.responses for i in r.sample.ids]
        assert [i for i, own in zip(row.completion, row.mask, strict=True) if own] == sampled
        template = [i for i, own in zip(row.completion, row.mask, strict=True) if not own]
        text = tokenizer.decode(row.prompt + template)  # a random policy may say anything: look at the rest
        assert text.count("<|im_start|>user") == len(trajectory.responses)
        assert text.count("<|im_start|>assistant") == len(trajectory.responses)
        ends = [(i == tokenizer.eos_token_id, own) for i, own in zip(row.completion, row.mask, strict=True)]
        assert ((True, 1), (True, 0)) not in pairwise(ends)  # a sampled end token is not followed by the template's


def test_a_response_that_was_cut_is_closed_by_a_masked_token(folder):
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


def test_a_window_asks_afresh(folder):
    played, _, tokenizer = play(folder, "window")
    long = max(played, key=lambda t: len(t.responses))
    assert len(long.responses) >= 3
    last = tokenizer.decode(long.responses[2].prompt)
    assert last.count("<|im_start|>") == 2  # one user message, and the header of the answer
    quoted = [long.responses[k].observation for k in range(2)]
    assert all(text in last for text in quoted)
    assert [row.turns for row in build_rows([long], "window")] == [[k] for k in range(len(long.responses))]


@pytest.mark.parametrize("history", HISTORIES)
def test_members_of_a_group_differ_and_a_key_repeats_itself(folder, history):
    played, *_ = play(folder, history)
    said = [tuple(r.text for r in t.responses) for t in played]
    assert len(set(said[:4])) > 1
    again, *_ = play(folder, history)
    assert [tuple(r.text for r in t.responses) for t in again] == said


@pytest.mark.parametrize("history", HISTORIES)
def test_who_else_is_in_the_batch_changes_nothing(folder, history):
    played, *_ = play(folder, history)
    alone, *_ = play(folder, history, [toy.draw(0)[5]])
    assert [r.sample.ids for r in alone[0].responses] == [r.sample.ids for r in played[5].responses]


def test_a_crash_is_marked_and_the_others_go_on(folder):
    episodes = [Episode(toy.ChatterWorld().tasks("train")[3], 0, m, ("crash", m)) for m in range(200)]
    played, *_ = play(folder, "full", episodes, world=toy.ChatterWorld(breaks=True))
    crashed = [t for t in played if t.ended == Ending.CRASHED]
    assert crashed
    assert all("the world broke" in t.error for t in crashed)
    assert {t.ended for t in played if t not in crashed} == {"over"}


def test_a_full_context_ends_the_episode(folder):
    played, *_ = play(
        folder, "full", [Episode(toy.ChatterWorld().tasks("train")[3], 0, m, (m,)) for m in range(8)], context_tokens=25
    )
    assert Ending.CONTEXT in {t.ended for t in played}
    assert all(len(row.prompt) + len(row.completion) <= 25 for row in build_rows(played, "full"))


def test_a_window_drops_its_history_before_it_gives_up(folder):
    episodes = [Episode(toy.ChatterWorld().tasks("train")[3], 0, m, (m,)) for m in range(8)]
    played, *_ = play(folder, "window", episodes, context_tokens=16)
    assert max(len(t.responses) for t in played) == 4  # the whole episode fits, a turn at a time
    played, *_ = play(folder, "window", episodes, context_tokens=8)
    assert {t.ended for t in played} == {Ending.CONTEXT}


def test_sampling_follows_the_distribution():
    """Inverse-CDF draws from a known distribution: chi-square over 20,000 draws."""
    from scipy.stats import chisquare

    from aem_exp.rollout.sampling.local import _sample_tokens

    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1])
    draws = torch.from_numpy(keyed_generator(("chi",)).random(20_000))
    tokens, logps, entropies = _sample_tokens(logits.expand(20_000, 5), draws, SamplingParams(0.8))
    expected = (logits.double() / 0.8).softmax(0)
    assert chisquare(torch.bincount(tokens, minlength=5).numpy(), expected.numpy() * 20_000).pvalue > 1e-3
    torch.testing.assert_close(logps, expected.log().float()[tokens])
    torch.testing.assert_close(entropies[0], -(expected * expected.log()).sum().float())


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [(SamplingParams(top_k=2), {2, 4}), (SamplingParams(top_p=0.6), {2, 4}), (SamplingParams(min_p=0.9), {2})],
)
def test_filters_keep_the_likely_tokens(sampling, kept):
    from aem_exp.rollout.sampling.local import _sample_tokens

    logits = torch.tensor([0.3, -1.0, 2.0, 0.0, 1.1]).expand(500, 5)
    tokens, *_ = _sample_tokens(logits, torch.from_numpy(keyed_generator(("f",)).random(500)), sampling)
    assert set(tokens.tolist()) == kept


class Stubborn:
    """A policy that always says the same tokens: a sampler like any other."""

    def __init__(self, ids):
        self.ids = ids

    def session(self):
        return self

    def generate(self, slots, prompts, keys, budgets):
        said = [self.ids[:n] for n in budgets]
        return [Sample(list(ids), [], []) for ids in said]


@pytest.mark.parametrize("history", ["full", "window"])
@pytest.mark.parametrize("what", ["only the end", "never the end", "bytes that are no text"])
def test_a_policy_that_says_nothing_sensible_is_played_and_trained(folder, history, what):
    """Every episode ends, every token is accounted for, and a step trains on it without a number that is not finite."""
    run = toy.experiment(history, steps=1, entropy_coef=0.01)  # all returns are equal: the bonus alone trains
    chat = Chat(toy.policy(folder, history)[1])
    end, word = chat.end_ids[0], chat.tokenizer.convert_tokens_to_ids("c")
    unknown = chat.tokenizer.convert_tokens_to_ids(chat.tokenizer.unk_token or "z")
    said = {"only the end": [end], "never the end": [word] * 5, "bytes that are no text": [unknown] * 3 + [end]}[what]
    trainer = toy.trainer(folder, run, lam=1.0, make_sampler=lambda _: Stubborn(said), trust_sampler=False)
    rows = []
    trainer.aem_callback.report = lambda step, row: rows.append(row)
    trainer.train()
    assert rows[0]["train/tokens_generated"] == rows[0]["train/tokens_trained"] > 0
    assert all(value == value for value in rows[0].values())


def test_a_panel_may_be_played_by_other_rules(folder):
    model, tokenizer = toy.policy(folder, "full")
    chat = Chat(tokenizer)
    rollout = Rollout(SerialExecutor(SOUND), toy.env("full"), chat)
    sampler = LocalSampler(model.eval(), chat.end_ids, PLAIN)
    with rollout.override_rules(toy.env("full", max_turns=1)):
        assert {len(t.responses) for t in rollout.play(toy.draw(0), sampler)} == {1}
    assert max(len(t.responses) for t in rollout.play(toy.draw(0), sampler)) > 1


@pytest.mark.parametrize("history", HISTORIES)
def test_who_watches_is_told_of_every_turn_and_token(folder, history):
    class Watching:
        def __init__(self):
            self.heard = []

        def turn(self, live):
            self.heard.append(live)

        def token(self, count):
            self.heard.append(str(count))

        def slot_turn(self, slot, turn):
            raise AssertionError("these episodes are played together")

    watcher = Watching()
    assert isinstance(watcher, Watcher)
    model, tokenizer = toy.policy(folder, history)
    chat = Chat(tokenizer)
    sampler = LocalSampler(model.eval(), chat.end_ids, PLAIN, watcher.token)
    played = Rollout(SerialExecutor(SOUND), toy.env(history), chat, watcher=watcher).play(toy.draw(0), sampler)
    expected = []
    for turn in range(max(len(t.responses) for t in played)):
        said = [len(t.responses[turn].sample.ids) for t in played if len(t.responses) > turn]
        expected += [*map(str, range(1, max(said) + 1)), len(said)]
    assert watcher.heard == [*expected, 0]
