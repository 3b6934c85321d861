"""The command `aem_exp.proxy`: its statistics by hand, the exact tokens of states, and repeated and interrupted commands."""

import json

import numpy as np
import pytest
import torch
from support import toy

from aem_exp.core.disk import DamagedFileError
from aem_exp.envs.executor import SerialExecutor
from aem_exp.evaluate import states
from aem_exp.proxy import command as proxy
from aem_exp.proxy import groups, statistics
from aem_exp.rollout.chat import Chat
from aem_exp.rollout.play import Rollout
from aem_exp.rollout.sampling.base import SamplingParams
from aem_exp.rollout.sampling.local import LocalSampler
from aem_exp.training import diagnostics

# The statistics.

STATE_R = torch.tensor([0, 0, 0, 1, 1, 2, 2])
ONE_MINUS_ALPHA_R = torch.tensor([0.5, -0.25, -0.25, -0.5, 0.5, 0.0, 0.0])  # the third state is gated
RELATIVE_R = torch.tensor([3.0, -2.0, -1.0, 1.0, -1.0, 4.0, -4.0])


def test_validity_by_hand():
    validity = diagnostics.proxy_validity(1 - ONE_MINUS_ALPHA_R, RELATIVE_R, STATE_R)
    assert validity["r"] == pytest.approx(np.corrcoef(ONE_MINUS_ALPHA_R, RELATIVE_R)[0, 1])
    assert (validity["states"], validity["states_open"], validity["states_agree"]) == (3, 2, 1)
    assert validity["responses_agree"] == 3 / 5
    assert validity["states_agree_interval"] == [0.0, 1.0]


def test_intervals_cover_the_true_correlation():
    """At least 35 of 40 of the 95 % intervals contain it, and their width is plausible."""
    rng = np.random.default_rng(0)
    state_R, covered = torch.arange(64).repeat_interleave(8), 0
    for seed in range(40):
        x = rng.normal(size=(64, 8))
        relative = 0.6 * x + 0.8 * rng.normal(size=(64, 8))
        x_R, y_R = (torch.from_numpy((v - v.mean(1, keepdims=True)).ravel()) for v in (x, relative))
        low, high = diagnostics.proxy_validity(1 - x_R, y_R, state_R, draws=500, seed=seed)["r_interval"]
        covered += low < 0.6 < high
        assert 0.03 < high - low < 0.2
    assert covered >= 35


def test_statistics_are_nan_if_all_states_are_gated():
    validity = diagnostics.proxy_validity(torch.ones(7), RELATIVE_R, STATE_R)
    assert validity["states_open"] == 0
    assert np.isnan([validity["r"], validity["responses_agree"], *validity["r_interval"]]).all()


# The states.


@pytest.mark.parametrize("history", ["full", "window"])
def test_state_has_the_exact_tokens_in_front_of_a_response(history, tmp_path):
    """After these tokens, the response of the episode has the log-probs that its sampler reported. New samples differ."""
    model, tokenizer = toy.policy(tmp_path, history)
    chat, env = Chat(tokenizer), toy.env(history)
    sampler = LocalSampler(model, chat.end_ids, SamplingParams())
    played = Rollout(SerialExecutor(toy.ChatterWorld()), env, chat).play(toy.draw(0), sampler)
    turns = set()
    for t in played:
        (state,) = states.pick_state(t, env)
        sample = t.responses[state.turn].sample
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([state.prompt + sample.ids])).logits[0, len(state.prompt) - 1 : -1]
        logps = logits.log_softmax(-1).gather(1, torch.tensor(sample.ids)[:, None]).squeeze(1)
        torch.testing.assert_close(logps, torch.tensor(sample.logps), atol=1e-4, rtol=0)
        turns.add(state.turn)
        (sampled,) = proxy.sample_responses([state], 5, sampler)
        assert len(set(sampled["surprisal"])) > 1 and max(sampled["tokens"]) <= state.budget
    assert 0 in turns and max(turns) > 0


def test_samples_of_a_state_do_not_depend_on_other_states(tmp_path):
    model, tokenizer = toy.policy(tmp_path)
    chat, env = Chat(tokenizer), toy.env("full")
    sampler = LocalSampler(model, chat.end_ids, SamplingParams())
    played = Rollout(SerialExecutor(toy.ChatterWorld()), env, chat).play(toy.draw(0), sampler)
    chosen = [state for t in played[:4] for state in states.pick_state(t, env)]
    together = proxy.sample_responses(chosen, 3, sampler)
    alone = [sampled for state in chosen for sampled in proxy.sample_responses([state], 3, sampler)]
    for one, other in zip(together, alone, strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["surprisal"] == pytest.approx(other["surprisal"], abs=1e-3)


# The command.


@pytest.fixture
def run_proxy(unbroken, cache, monkeypatch, tmp_path, capsys):
    """Run the command on a finished run; return its output."""
    monkeypatch.setenv("AEM_CACHE", str(cache))

    def run(*options):
        argv = [unbroken[0], f"outputs={tmp_path}", "--states", 12, "--samples", 4, *options]
        assert proxy.main([*map(str, argv)]) == 0
        return capsys.readouterr().out

    return run


@pytest.mark.slow
def test_command_measures_both_policies_resumes_and_shows_the_result(run_proxy, tmp_path, monkeypatch):
    rows = json.loads(run_proxy("--json"), parse_constant=lambda name: pytest.fail(f"{name} is not valid in JSON"))
    assert rows.keys() == {"policy", "untrained"}
    for row in rows.values():
        assert row["ungated"]["responses"] == 12 * 4
        assert len(row["turns"]) == row["gated"]["states"] == 12
    folders = sorted(tmp_path.glob("*/proxy/*"))
    for folder in folders:
        assert (folder / "proxy.png").stat().st_size > 5000
    file, result = (folders[0] / name for name in ("samples.jsonl", "result.json"))
    samples, expected = file.read_text(), result.read_text()
    file.write_text(samples[: len(samples) // 2])
    result.unlink()
    run_proxy()
    assert result.read_text() == expected
    assert len(file.read_text().splitlines()) == 12
    monkeypatch.setattr(proxy, "_sample_states", lambda *_: pytest.fail("it samples again"))
    table = run_proxy()
    assert "12 states, 4 responses" in table and str(folders[0]) in table


@pytest.mark.parametrize(
    ("argv", "fact"),
    [
        (["x", "--samples", "1"], "--samples=1: "),
        (["x", "--states", "0"], "--states=0: "),
        (["trainer.steps=3"], "RUN_DIR|MODEL=trainer.steps=3: "),
        (["nowhere"], "RUN_DIR|MODEL=nowhere: "),
    ],
)
def test_invalid_arguments_exit_with_one_line(capsys, argv, fact):
    assert proxy.main(argv) == 2
    err = capsys.readouterr().err
    assert fact in err and err.count("\n") == 1


@pytest.mark.parametrize("text", ['[{"task": "a"', "[1]", "{}x", '[{"tusk": 1}]'])
def test_damaged_states_file_is_named(tmp_path, text):
    (tmp_path / states.STATES).write_text(text)
    with pytest.raises(DamagedFileError, match=r"states\.json"):
        states.read_states(tmp_path)


# Rollout groups.


def test_group_statistics_split_the_correlation():
    """64 groups of 4 states with 16 responses: within states 1 - alpha follows S - H(s), between states it follows H(s)."""
    rng, (count_G, each, samples) = np.random.default_rng(0), (64, 4, 16)
    count = count_G * each
    x_SK, relative_SK, entropy_S = (
        rng.normal(size=(count, samples)),
        rng.normal(size=(count, samples)),
        rng.normal(size=count),
    )
    relative_SK = x_SK + relative_SK
    clear_SK = x_SK + 2 * entropy_S[:, None]
    tokens_SK = rng.integers(1, 9, size=(count, samples)).astype(float)
    got = statistics.group_validity(
        alpha_R=1 - clear_SK.ravel(),
        relative_R=relative_SK.ravel(),
        entropy_R=entropy_S.repeat(samples),
        tokens_R=tokens_SK.ravel(),
        turn_R=np.arange(count).repeat(samples) % 3.0,
        position_R=np.zeros(count * samples),
        state_R=np.arange(count).repeat(samples),
        group_S=np.arange(count_G).repeat(each),
        draws=200,
    )
    assert got["r"] == pytest.approx(np.corrcoef(clear_SK.ravel(), relative_SK.ravel())[0, 1])
    assert got["r"] == pytest.approx(got["r_within"] + got["r_between"])
    assert got["r_between"] == pytest.approx(0, abs=0.05)  # S - H(s) has mean 0 at each state
    assert got["r"] == pytest.approx(got["within"] * got["within_share"] ** 0.5, abs=0.05)
    assert got["within"] == pytest.approx(0.5**0.5, abs=0.1) and got["within_share"] < 0.4
    assert got["state_entropy"] < -0.8 and np.isnan(got["position"])
    design = np.stack([np.ones(count * samples), tokens_SK.ravel()], 1)
    rest = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (clear_SK.ravel(), relative_SK.ravel())]
    assert got["equal_length"] == pytest.approx(np.corrcoef(*rest)[0, 1])
    low, high = got["within_interval"]
    assert low < got["within"] < high and 0.005 < high - low < 0.1


def test_a_sample_takes_the_place_of_a_response_in_its_group():
    played = groups.PlayedGroups([[9.0, 9.0], [0.2, 0.5, 0.8, 1.1]], [groups.GroupState(1, 1, 2)])
    alphas = groups.replaced_coefficients([{"entropy": [0.5, 1.1, 0.2]}], played, gate=0.1, lam=1.0)
    weights = [[1, np.exp(-1 / 3 * k), np.exp(-2 / 3), np.exp(-1)] for k in (1, 3, 0)]
    assert alphas == pytest.approx([w[1] / np.mean(w) for w in weights], abs=1e-4)
    assert alphas[0] == pytest.approx(1.1033, abs=1e-4)
    assert groups.replaced_coefficients([{"entropy": [0.5]}], played, gate=5.0, lam=1.0) == [1.0]


@pytest.mark.parametrize("history", ["full", "window"])
def test_sharing_equal_prompts_changes_no_sample(history, tmp_path):
    model, tokenizer = toy.policy(tmp_path, history)
    chat, env, played = Chat(tokenizer), toy.env(history), []
    for share in (False, True):
        sampler = LocalSampler(model, chat.end_ids, SamplingParams())
        sampler.share_prompts = share
        played.append(Rollout(SerialExecutor(toy.ChatterWorld()), env, chat).play(toy.draw(0), sampler))
    for one, other in zip(*played, strict=True):
        assert [r.sample.ids for r in one.responses] == [r.sample.ids for r in other.responses]
        for r, s in zip(one.responses, other.responses, strict=True):
            assert r.sample.logps == pytest.approx(s.sample.logps, abs=1e-4)


@pytest.mark.slow
def test_command_samples_at_states_of_groups(run_proxy, tmp_path, monkeypatch):
    rows = json.loads(run_proxy("--json", "--groups"), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert rows.keys() == {"policy", "untrained"}
    for row in rows.values():
        assert (row["states"], row["groups"]) == (12, 3)
        assert row["ungated"]["r"] == pytest.approx(row["ungated"]["r_within"] + row["ungated"]["r_between"])
        assert row["ungated"]["open"] > 0.9
    folder, _ = sorted(tmp_path.glob("*/proxy/groups-*"))
    places = groups.read_groups(folder)
    assert len(places.states) == 12 and {
        len({s.response for s in places.states if s.group == g}) for g in range(3)
    } == {4}
    for place, state in zip(places.states, states.read_states(folder), strict=True):
        assert 0 <= state.turn < place.turns and place.response < len(places.entropies[place.group])
    monkeypatch.setattr(proxy, "_sample_states", lambda *_: pytest.fail("it samples again"))
    table = run_proxy("--groups")
    assert "12 states of 3 groups, 4 responses at each" in table and str(folder) in table


def test_policy_before_the_warm_start_needs_a_warm_start(unbroken, cache, monkeypatch, capsys):
    monkeypatch.setenv("AEM_CACHE", str(cache))
    assert proxy.main([str(unbroken[0]), "--only", "before_warm_start"]) == 2
    assert "--only=before_warm_start: needs" in capsys.readouterr().err


def test_damaged_groups_file_is_named(tmp_path):
    (tmp_path / groups.GROUPS).write_text('{"entropies": [], "states": [{"group": 1}]}')
    with pytest.raises(DamagedFileError, match=r"groups\.json"):
        groups.read_groups(tmp_path)
