"""The tiny policy: a tokenizer that covers all words of its world, and a reproducible warm start."""

import hashlib
import json
import random
import re
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


def make_weights(folder, seed=0, **changes):
    """The bytes of the weights of a new policy in a folder."""
    tiny.make(world(), rules(), folder, seed=seed, **(SMALL | changes))
    return (folder / "model.safetensors").read_bytes()


# The tokenizer.


@pytest.mark.parametrize("which", WORLDS)
@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_episodes_have_no_unknown_words_and_decoded_responses_act_equally(which, noise):
    tok, rng = tokenizer(which), Random(1)
    env, decoded_env = world(which).env(), world(which).env()
    for task in world(which).tasks("train")[:100]:
        turn, decoded_turn = env.reset(task), decoded_env.reset(task)
        for _ in range(rules().max_turns * 2):
            assert tok.unk_token_id not in encode(tok, turn.observation), turn.observation
            response = world(which).expert(env, rng, noise)
            ids = encode(tok, response)
            assert tok.unk_token_id not in ids, response
            decoded = tok.decode(ids, skip_special_tokens=True)
            assert env.parse(decoded) == env.parse(response)
            turn, decoded_turn = env.step(response), decoded_env.step(decoded)
            assert turn == decoded_turn
            assert turn.valid
            if turn.done:
                break


@pytest.mark.parametrize("which", WORLDS)
def test_admissible_actions_survive_encoding_and_decoding(which):
    tok, env, rng = tokenizer(which), world(which).env(), Random(2)
    for task in world(which).tasks("dev")[:20]:
        turn = env.reset(task)
        for _ in range(15):
            decoded = [tok.decode(encode(tok, action)) for action in turn.actions]
            if which != "tags":
                assert [env.parse(text) for text in decoded] == list(turn.actions)
            assert all(" ".join(text.split()) == action for text, action in zip(decoded, turn.actions, strict=True))
            action = rng.choice(turn.actions)
            turn = env.step(f"<think></think><action>{action}</action>" if which == "tags" else action)
            if turn.done:
                break


def test_each_word_is_one_token_and_the_vocabulary_is_small():
    tok = tokenizer()
    assert all(len(encode(tok, word)) == 1 for word in world().words())
    assert len(encode(tok, "flibbertigibbet")) == 1
    assert encode(tok, "flibbertigibbet") == [tok.unk_token_id]
    assert tok.decode(encode(tok, "mug\n\n  plate")) == "mug plate"
    assert len(tok) < 500
    assert len({tok.pad_token_id, tok.unk_token_id, tok.eos_token_id}) == 3


def test_whole_lines_of_prompts_are_one_token_each():
    env = load(["env=household_chat"]).env
    tok = tiny.make_tokenizer(world("tags").words(), env, whole_lines=True)
    lines = [line for text in env.prompt.values() for line in re.split(r"{\w+}|\n", text) if len(line.split()) > 1]
    assert lines
    assert all(len(encode(tok, line)) == 1 for line in lines)
    assert len(encode(tok, "You are an expert")) == 4


def test_actions_with_end_token_fit_into_the_response_budget():
    tok, rng = tokenizer(), Random(3)
    for task in world().tasks("train")[:50]:
        env = world().env()
        env.reset(task)
        while not env.won:
            response = world().expert(env, rng)
            assert len(encode(tok, response)) + 1 <= rules().response_tokens
            env.step(response)


# The chat template.


def test_tokens_of_a_conversation_are_a_prefix_of_longer_ones():
    tok = tokenizer()
    chat = Chat(tok)
    env = world().env()
    observation = env.reset(world().tasks("dev")[0]).observation
    messages = [{"role": "user", "content": observation}]
    ids = chat.first_prompt(observation)
    rng = Random(0)
    while True:
        rendered = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert encode(tok, rendered) == ids
        assert tok.unk_token_id not in ids
        response = world().expert(env, rng)
        turn = env.step(response)
        if turn.done:
            break
        messages += [{"role": "assistant", "content": response}, {"role": "user", "content": turn.observation}]
        reply = [*encode(tok, response), tok.eos_token_id]
        cut = chat.next_prompt(turn.observation, reply[-2])
        assert cut == [tok.eos_token_id, *chat.next_prompt(turn.observation, reply[-1])]
        ids = ids + reply + chat.next_prompt(turn.observation, reply[-1])
    assert len(messages) >= 5


def test_only_the_eos_token_ends_a_response():
    chat = Chat(tokenizer())
    assert chat.end_ids == (tokenizer().eos_token_id,)


# Demonstrations.


@pytest.mark.parametrize("history", ["full", "window"])
def test_demonstrations_are_rows_with_known_words_and_end_tokens(history):
    env = replace(rules(), history=history, window=2 if history == "window" else 0)
    tok = tiny.make_tokenizer(world().words(), env)
    packed = tiny.demonstrate(world(), env, tok, 24, 0.0, 0.0, Random(0))
    assert len({row.trajectory for row in packed}) == 24
    for row in packed:
        assert len(row.prompt) + len(row.completion) <= env.context_tokens
        assert tok.unk_token_id not in row.prompt + row.completion
        assert row.completion[-1] == tok.eos_token_id
        generated = [i for i, own in zip(row.completion, row.mask, strict=True) if own]
        assert generated.count(tok.eos_token_id) == len(row.turns)
    ids, labels = tiny.pad_batch(packed[:4], tok.pad_token_id)
    assert ids.shape == labels.shape
    assert (labels != -100).sum() == sum(sum(row.mask) for row in packed[:4])
    assert torch.equal(ids[labels != -100], labels[labels != -100])


DEMONSTRATIONS = {  # hashes of their tokens; another one means other policies in all existing experiments
    "env.history=full": "2a6e6bef21b6f18786bbad9bd6cbbaf1a0b34575f13cde72e97a351641e55650",
    "env.history=window": "9c98d0105699d51d35e7e2c5e3b51e328aace50ab0b5698777081075e22ac43e",
}


@pytest.mark.parametrize("history", DEMONSTRATIONS)
def test_demonstrations_stay_the_same(history):
    window = history.endswith("window")
    env = load(["env=household", history, f"env.window={2 if window else 0}"]).env
    chosen, digest, rng = instantiate(env.make), hashlib.sha256(), Random(0)
    tok = tiny.make_tokenizer(chosen.words(), env)
    for shyness in (0.0, 0.9):
        for row in tiny.demonstrate(chosen, env, tok, 32, 0.05, shyness, rng):
            facts = [row.prompt, row.completion, row.mask, row.trajectory, row.turns]
            digest.update(json.dumps(facts).encode())
    assert digest.hexdigest() == DEMONSTRATIONS[history]


@pytest.mark.parametrize("learn_prompts", [False, True])
def test_imitation_lowers_the_loss(learn_prompts):
    tok = tokenizer()
    packed = tiny.demonstrate(world(), rules(), tok, 48, 0.0, 0.0, Random(0))
    torch.manual_seed(0)
    model = tiny.make_policy(tok, rules(), 32, 1, 2, 0.1)
    ids, labels = tiny.pad_batch(packed[32:], tok.pad_token_id)
    if learn_prompts:
        labels = ids.masked_fill(ids == tok.pad_token_id, -100)

    def loss():
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=(ids != tok.pad_token_id).long()).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item()

    before = loss()
    tiny.imitate(model, [packed[:16], packed[16:32]] * 15, 8e-3, learn_prompts)
    assert loss() < 0.5 * before  # on held-out demonstrations
    assert not model.training


# The folder.


def test_folder_is_an_ordinary_hugging_face_model(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_weights(tmp_path)
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


def test_weights_depend_on_seed_and_settings_only(tmp_path):
    first = make_weights(tmp_path / "a")
    torch.manual_seed(99)  # the global random states must not matter
    random.seed(99)
    assert make_weights(tmp_path / "b") == first
    assert (tmp_path / "a/tokenizer.json").read_bytes() == (tmp_path / "b/tokenizer.json").read_bytes()
    assert make_weights(tmp_path / "c", seed=1) != first
    assert make_weights(tmp_path / "d", habit_steps=0) != first


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("fails", [False, True], ids=["success", "failure"])
@pytest.mark.usefixtures("two_threads")
def test_threads_and_random_states_are_restored(tmp_path, monkeypatch, fails):
    def fail(*_):
        assert torch.get_num_threads() == 1
        raise OSError("disk full")

    if fails:
        monkeypatch.setattr(tiny, "imitate", fail)
    python_state, torch_state = random.getstate(), torch.get_rng_state()
    if fails:
        with pytest.raises(OSError, match="disk full"):
            make_weights(tmp_path)
    else:
        make_weights(tmp_path)
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state


class IncompleteWorld:
    """A world with these methods only."""

    fingerprint = "incomplete"

    def __init__(self, **methods):
        vars(self).update(methods)


INCOMPLETE = {"no player": {"words": lambda: ["go"]}, "no words": {"expert": lambda *_: "go"}, "neither": {}}


@pytest.mark.parametrize("methods", INCOMPLETE.values(), ids=INCOMPLETE)
def test_world_without_words_or_player_is_refused(tmp_path, methods):
    with pytest.raises(ConfigError) as caught:
        tiny.make(IncompleteWorld(**methods), rules(), tmp_path / "policy")
    assert caught.value.field == "model.make"
    assert caught.value.remedy
    assert not (tmp_path / "policy").exists()


class CrashingWorld:
    """The household; the reset of tasks for which `fails` is true raises an error."""

    def __init__(self, fails):
        self.house, self.fails = world(), fails

    def __getattr__(self, name):
        return getattr(self.house, name)

    def env(self):
        env = self.house.env()
        original_reset = env.reset

        def reset(task):
            if self.fails(task):
                raise RuntimeError("the door is stuck")
            return original_reset(task)

        env.reset = reset
        return env


def test_no_demonstrations_give_no_batches():
    assert list(tiny.iterate_batches([], 5, 32, random.Random(0))) == []


def test_crash_of_all_demonstrations_is_a_run_error(tmp_path):
    with pytest.raises(RunError, match="train-0: RuntimeError: the door is stuck") as caught:
        tiny.make(CrashingWorld(lambda task: True), rules(), tmp_path / "policy", **SMALL)
    assert caught.value.kind == "env"
    assert not (tmp_path / "policy").exists()


def test_crashed_demonstrations_are_reported_and_left_out(caplog):
    odd = CrashingWorld(lambda task: task.seed % 2)
    packed = tiny.demonstrate(odd, rules(), tokenizer(), 8, 0.0, 0.0, Random(0))
    assert len(packed) == 4
    (warning,) = caplog.messages
    assert "4 of 8" in warning and "train-1: RuntimeError: the door is stuck" in warning


class MissingWordsWorld(CrashingWorld):
    """The household with some words missing from `words()`."""

    def __init__(self, missing):
        super().__init__(lambda task: False)
        self.missing = missing

    def words(self):
        return [word for word in self.house.words() if not any(lack in word.split() for lack in self.missing)]


def test_missing_words_are_reported(tmp_path, caplog):
    tiny.make(MissingWordsWorld({"mug", "take"}), rules(), tmp_path / "policy", **SMALL)
    responses, observations = caplog.messages
    assert "words()" in responses and "take" in responses.split()
    assert "words()" in observations and observations.endswith(": mug")


def test_complete_words_cause_no_warning(tmp_path, caplog):
    make_weights(tmp_path / "policy")
    assert not caplog.records
