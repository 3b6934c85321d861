"""The policy that is made here: a tokenizer that says every word of its world, and a warm start that is repeatable."""

import random
from dataclasses import replace
from functools import cache
from random import Random

import pytest
import torch

from aem_exp import tiny
from aem_exp.config import instantiate, load
from aem_exp.core.errors import ConfigError, RunError
from aem_exp.envs.household import Household
from aem_exp.rollout.chat import Chat

SMALL = {"hidden_size": 16, "layers": 1, "heads": 2, "episodes": 16, "steps": 3, "habit_steps": 1, "batch": 8}
WORLDS = ["default", "roomy", "tags"]


@cache
def rules():
    return load(["env=household"]).env


@cache
def world(which="default"):
    return instantiate(rules().make) if which == "default" else Household(tags=which == "tags")


@cache
def tokenizer(which="default"):
    return tiny.make_tokenizer(world(which).words(), rules())


def encode(tok, text):
    return tok(text, add_special_tokens=False)["input_ids"]


def made(folder, seed=0, **changes):
    tiny.make(world(), rules(), folder, seed=seed, **(SMALL | changes))
    return (folder / "model.safetensors").read_bytes()


# The tokenizer.


@pytest.mark.parametrize("which", WORLDS)
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_every_word_of_the_world_is_known(which, noise):
    """Through whole episodes: nothing unknown is read or said, and what is said is read as what was meant."""
    tok, dice = tokenizer(which), Random(1)
    env, twin = world(which).env(), world(which).env()
    for task in world(which).tasks("train")[:100]:
        turn, other = env.reset(task), twin.reset(task)
        for _ in range(rules().max_turns * 2):
            assert tok.unk_token_id not in encode(tok, turn.observation), turn.observation
            response = world(which).expert(env, dice, noise)
            ids = encode(tok, response)
            assert tok.unk_token_id not in ids, response
            heard = tok.decode(ids, skip_special_tokens=True)
            assert env.parse(heard) == env.parse(response)
            turn, other = env.step(response), twin.step(heard)
            assert turn == other
            assert turn.valid
            if turn.done:
                break


@pytest.mark.parametrize("which", WORLDS)
def test_every_listed_action_survives_the_tokenizer(which):
    tok, env, dice = tokenizer(which), world(which).env(), Random(2)
    for task in world(which).tasks("dev")[:20]:
        turn = env.reset(task)
        for _ in range(15):
            heard = [tok.decode(encode(tok, action)) for action in turn.actions]
            if which != "tags":
                assert [env.parse(text) for text in heard] == list(turn.actions)
            assert all(" ".join(text.split()) == action for text, action in zip(heard, turn.actions, strict=True))
            action = dice.choice(turn.actions)
            turn = env.step(f"<think></think><action>{action}</action>" if which == "tags" else action)
            if turn.done:
                break


def test_words_are_tokens_and_the_world_is_small():
    tok = tokenizer()
    assert all(len(encode(tok, word)) == 1 for word in world().words())
    assert len(encode(tok, "flibbertigibbet")) == 1
    assert encode(tok, "flibbertigibbet") == [tok.unk_token_id]
    assert tok.decode(encode(tok, "mug\n\n  plate")) == "mug plate"
    assert len(tok) < 500
    assert len({tok.pad_token_id, tok.unk_token_id, tok.eos_token_id}) == 3


def test_what_a_response_may_hold_is_enough():
    """The longest action, with its end, fits into the budget of a response."""
    tok, dice = tokenizer(), Random(3)
    for task in world().tasks("train")[:50]:
        env = world().env()
        env.reset(task)
        while not env.won:
            response = world().expert(env, dice)
            assert len(encode(tok, response)) + 1 <= rules().response_tokens
            env.step(response)


# The chat template.


def test_a_longer_conversation_begins_with_the_shorter_one():
    tok = tokenizer()
    chat = Chat(tok)
    env = world().env()
    observation = env.reset(world().tasks("dev")[0]).observation
    messages = [{"role": "user", "content": observation}]
    ids = chat.first_prompt(observation)
    dice = Random(0)
    while True:
        rendered = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert encode(tok, rendered) == ids
        assert tok.unk_token_id not in ids
        response = world().expert(env, dice)
        turn = env.step(response)
        if turn.done:
            break
        messages += [{"role": "assistant", "content": response}, {"role": "user", "content": turn.observation}]
        reply = [*encode(tok, response), tok.eos_token_id]
        cut = chat.next_prompt(turn.observation, reply[-2])
        assert cut == [tok.eos_token_id, *chat.next_prompt(turn.observation, reply[-1])]
        ids = ids + reply + chat.next_prompt(turn.observation, reply[-1])
    assert len(messages) >= 5


def test_a_response_ends_with_the_end_token():
    chat = Chat(tokenizer())
    assert chat.end_ids == (tokenizer().eos_token_id,)


# Demonstrations.


@pytest.mark.parametrize("history", ["full", "window"])
def test_demonstrations_are_rows_of_the_rollout(history):
    env = replace(rules(), history=history, window=2 if history == "window" else 0)
    tok = tiny.make_tokenizer(world().words(), env)
    packed = tiny.demonstrate(world(), env, tok, 24, 0.0, 0.0, Random(0))
    assert len({row.trajectory for row in packed}) == 24
    for row in packed:
        assert len(row.prompt) + len(row.completion) <= env.context_tokens
        assert tok.unk_token_id not in row.prompt + row.completion
        assert row.completion[-1] == tok.eos_token_id
        said = [i for i, own in zip(row.completion, row.mask, strict=True) if own]
        assert said.count(tok.eos_token_id) == len(row.turns)
    ids, labels = tiny._pad_batch(packed[:4], tok.pad_token_id)
    assert ids.shape == labels.shape
    assert (labels != -100).sum() == sum(sum(row.mask) for row in packed[:4])
    assert torch.equal(ids[labels != -100], labels[labels != -100])


def test_imitation_lowers_the_loss():
    tok = tokenizer()
    packed = tiny.demonstrate(world(), rules(), tok, 48, 0.0, 0.0, Random(0))
    torch.manual_seed(0)
    model = tiny.make_policy(tok, rules(), 32, 1, 2, 0.1)
    ids, labels = tiny._pad_batch(packed[32:], tok.pad_token_id)

    def loss():
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=(ids != tok.pad_token_id).long()).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item()

    before = loss()
    tiny.imitate(model, [packed[:16], packed[16:32]] * 15, 8e-3)
    assert loss() < 0.5 * before  # on demonstrations that it did not see
    assert not model.training


# The folder.


def test_a_folder_is_an_ordinary_model(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made(tmp_path)
    model, tok = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert model.get_input_embeddings().num_embeddings == len(tok) == len(tokenizer())
    assert tok.chat_template == tiny.CHAT_TEMPLATE
    assert tok.get_vocab() == tokenizer().get_vocab()
    task = world().tasks("dev")[0]
    observation = world().env().reset(task).observation
    ids = Chat(tok).first_prompt(observation)
    assert ids == Chat(tokenizer()).first_prompt(observation)
    assert model.generation_config.eos_token_id == tok.eos_token_id == model.config.eos_token_id
    assert model.generation_config.pad_token_id == tok.pad_token_id == model.config.pad_token_id
    with torch.no_grad():
        assert model(input_ids=torch.tensor([ids])).logits.isfinite().all()


def test_a_seed_is_a_policy(tmp_path):
    first = made(tmp_path / "a")
    torch.manual_seed(99)  # nobody else's random numbers matter
    random.seed(99)
    assert made(tmp_path / "b") == first
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
    assert made(tmp_path / "c", seed=1) != first
    assert made(tmp_path / "d", habit_steps=0) != first


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("fails", [False, True], ids=["made", "failed"])
@pytest.mark.usefixtures("two_threads")
def test_torch_is_left_as_it_was(tmp_path, monkeypatch, fails):
    def fail(*_):
        assert torch.get_num_threads() == 1
        raise OSError("disk full")

    if fails:
        monkeypatch.setattr(tiny, "imitate", fail)
    dice, state = random.getstate(), torch.get_rng_state()
    if fails:
        with pytest.raises(OSError, match="disk full"):
            made(tmp_path)
    else:
        made(tmp_path)
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == dice


class Silent:
    """A world without words of its own, or without a player: whatever is asked of it later, it should not be asked."""

    fingerprint = "silent"

    def __init__(self, **has):
        vars(self).update(has)


LACKING = {"player": {"words": lambda: ["go"]}, "words": {"expert": lambda *_: "go"}, "both": {}}


@pytest.mark.parametrize("has", LACKING.values(), ids=LACKING)
def test_a_world_that_cannot_teach_is_refused(tmp_path, has):
    with pytest.raises(ConfigError) as caught:
        tiny.make(Silent(**has), rules(), tmp_path / "policy")
    assert caught.value.field == "model.make"
    assert caught.value.remedy
    assert not (tmp_path / "policy").exists()


class Crumbling:
    """The household, some of whose games cannot be entered."""

    def __init__(self, fails):
        self.house, self.fails = world(), fails

    def __getattr__(self, name):
        return getattr(self.house, name)

    def env(self):
        env = self.house.env()
        enter = env.reset

        def reset(task):
            if self.fails(task):
                raise RuntimeError("the door is stuck")
            return enter(task)

        env.reset = reset
        return env


def test_nothing_to_imitate_is_no_batch():
    assert list(tiny._batches([], 5, 32, random.Random(0))) == []


def test_a_world_that_cannot_be_entered_ends_with_a_sentence(tmp_path):
    with pytest.raises(RunError) as told:
        tiny.make(Crumbling(lambda task: True), rules(), tmp_path / "policy", **SMALL)
    said = str(told.value)
    assert told.value.kind == "env"
    assert said.startswith(
        "no episode of the scripted player could be played; task train-0: RuntimeError: the door is stuck"
    )
    assert not (tmp_path / "policy").exists()


def test_demonstrations_that_crash_are_said_and_left_out(caplog):
    odd = Crumbling(lambda task: task.seed % 2)
    packed = tiny.demonstrate(odd, rules(), tokenizer(), 8, 0.0, 0.0, Random(0))
    assert len(packed) == 4
    assert "4 of 8 episodes of the scripted player crashed and are not imitated; task train-1: " in caplog.text


class Wordless(Crumbling):
    """The household, whose words lack two that are needed."""

    def __init__(self, lacks):
        super().__init__(lambda task: False)
        self.lacks = lacks

    def words(self):
        return [word for word in self.house.words() if not any(lack in word.split() for lack in self.lacks)]


def test_words_that_the_world_lacks_are_named(tmp_path, caplog):
    tiny.make(Wordless({"mug", "take"}), rules(), tmp_path / "policy", **SMALL)
    said, seen = [record.getMessage() for record in caplog.records]
    assert said.startswith("its words() lack what the scripted player says, and the policy cannot: ") and "take" in said
    assert seen == "its words() lack what is seen, and the policy reads <unk> for it: mug"


def test_of_a_world_that_lists_its_words_nothing_is_said(tmp_path, caplog):
    made(tmp_path / "policy")
    assert not caplog.records
