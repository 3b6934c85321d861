"""Whether the coefficient sees relative surprisal: the statistics by hand, the states exactly, the door asked again."""

import json

import numpy as np
import pytest
import torch
from support import toy

from aem_exp import proxy
from aem_exp.core.disk import DamagedFileError
from aem_exp.envs.executor import SerialExecutor
from aem_exp.rollout.chat import Chat
from aem_exp.rollout.play import Rollout
from aem_exp.rollout.sampling.base import SamplingParams
from aem_exp.rollout.sampling.local import LocalSampler
from aem_exp.training import diagnostics

# The statistics.

STATE_R = torch.tensor([0, 0, 0, 1, 1, 2, 2])
CLEAR_R = torch.tensor([0.5, -0.25, -0.25, -0.5, 0.5, 0.0, 0.0])  # 1 - alpha; the third state is gated
RELATIVE_R = torch.tensor([3.0, -2.0, -1.0, 1.0, -1.0, 4.0, -4.0])


def test_validity_by_hand():
    found = diagnostics.proxy_validity(1 - CLEAR_R, RELATIVE_R, STATE_R)
    assert found["r"] == pytest.approx(np.corrcoef(CLEAR_R, RELATIVE_R)[0, 1])
    assert (found["states"], found["states_open"], found["states_agree"]) == (3, 2, 1)
    assert found["responses_agree"] == 3 / 5
    assert found["states_agree_interval"] == [0.0, 1.0]


def test_intervals_are_those_of_the_states():
    """As wide as the luck of the draw: nine intervals in ten or more hold what is true."""
    rng = np.random.default_rng(0)
    state_R, held = torch.arange(64).repeat_interleave(8), 0
    for seed in range(40):
        clear = rng.normal(size=(64, 8))
        relative = 0.6 * clear + 0.8 * rng.normal(size=(64, 8))
        x_R, y_R = (torch.from_numpy((v - v.mean(1, keepdims=True)).ravel()) for v in (clear, relative))
        low, high = diagnostics.proxy_validity(1 - x_R, y_R, state_R, draws=500, seed=seed)["r_interval"]
        held += low < 0.6 < high
        assert 0.03 < high - low < 0.2
    assert held >= 35


def test_where_all_states_are_gated_nothing_is_known():
    found = diagnostics.proxy_validity(torch.ones(7), RELATIVE_R, STATE_R)
    assert found["states_open"] == 0
    assert np.isnan([found["r"], found["responses_agree"], *found["r_interval"]]).all()


# The states.


@pytest.mark.parametrize("history", ["full", "window"])
def test_a_state_is_the_exact_tokens_in_front_of_a_response(history, tmp_path):
    """What was sampled there is as likely after them as it was in its episode; sampled anew, it may differ."""
    model, tokenizer = toy.policy(tmp_path, history)
    chat, env = Chat(tokenizer), toy.env(history)
    sampler = LocalSampler(model, chat.end_ids, SamplingParams())
    played = Rollout(SerialExecutor(toy.ChatterWorld()), env, chat).play(toy.draw(0), sampler)
    turns = set()
    for t in played:
        (state,) = proxy.pick_state(t, env)
        said = t.responses[state.turn].sample
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([state.prompt + said.ids])).logits[0, len(state.prompt) - 1 : -1]
        logps = logits.log_softmax(-1).gather(1, torch.tensor(said.ids)[:, None]).squeeze(1)
        torch.testing.assert_close(logps, torch.tensor(said.logps), atol=1e-4, rtol=0)
        turns.add(state.turn)
        (found,) = proxy.sample_responses([state], 5, sampler)
        assert len(set(found["surprisal"])) > 1 and max(found["tokens"]) <= state.budget
    assert 0 in turns and max(turns) > 0


def test_what_is_sampled_at_a_state_does_not_depend_on_the_others(tmp_path):
    model, tokenizer = toy.policy(tmp_path)
    chat, env = Chat(tokenizer), toy.env("full")
    sampler = LocalSampler(model, chat.end_ids, SamplingParams())
    played = Rollout(SerialExecutor(toy.ChatterWorld()), env, chat).play(toy.draw(0), sampler)
    states = [state for t in played[:4] for state in proxy.pick_state(t, env)]
    together = proxy.sample_responses(states, 3, sampler)
    alone = [found for state in states for found in proxy.sample_responses([state], 3, sampler)]
    for one, other in zip(together, alone, strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["surprisal"] == pytest.approx(other["surprisal"], abs=1e-3)


# The door.


@pytest.fixture
def ask(unbroken, cache, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("AEM_CACHE", str(cache))

    def found(*more):
        words = [unbroken[0], f"outputs={tmp_path}", "--states", 12, "--samples", 4, *more]
        assert proxy.main([*map(str, words)]) == 0
        return capsys.readouterr().out

    return found


def test_a_run_and_what_it_started_from_asked_again_broken_off_and_shown(ask, tmp_path, monkeypatch):
    rows = json.loads(ask("--json"), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert rows.keys() == {"policy", "untrained"}
    for row in rows.values():
        assert row["ungated"]["responses"] == 12 * 4
        assert len(row["turns"]) == row["gated"]["states"] == 12
    folders = sorted(tmp_path.glob("*/proxy/*"))
    for folder in folders:
        assert (folder / "proxy.png").stat().st_size > 5000
    file, result = (folders[0] / name for name in ("samples.jsonl", "result.json"))
    whole, said = file.read_text(), result.read_text()
    file.write_text(whole[: len(whole) // 2])
    result.unlink()
    ask()
    assert result.read_text() == said
    assert len(file.read_text().splitlines()) == 12
    monkeypatch.setattr(proxy, "_sample_states", lambda *_: pytest.fail("it samples again"))
    page = ask()
    assert "12 states, 4 responses at each" in page and str(folders[0]) in page


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["x", "--samples", "1"], "--samples=1: must be at least 2"),
        (["x", "--states", "0"], "--states=0: must be a whole number of at least 1"),
        (["trainer.steps=3"], "RUN_DIR|MODEL=trainer.steps=3: "),
        (["nowhere"], "RUN_DIR|MODEL=nowhere: "),
    ],
)
def test_a_mistake_is_one_sentence(capsys, argv, said):
    assert proxy.main(argv) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1


@pytest.mark.parametrize("text", ['[{"task": "a"', "[1]", "{}x", '[{"tusk": 1}]'])
def test_states_that_are_damaged_are_one_sentence(tmp_path, text):
    (tmp_path / proxy.STATES).write_text(text)
    with pytest.raises(DamagedFileError, match=r"states\.json is damaged"):
        proxy._read_states(tmp_path)
