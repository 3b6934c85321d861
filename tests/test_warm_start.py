"""The warm start: imitation of a scripted player and training on own successes, its cache, and the run that starts from it."""

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import ROOT, torchrun_warm_start, toy
from support.runs import DEADLINE, find_run_dir, needs, run_command, run_here, torchrun, wait_until

from aem_exp import config, demonstrations, policy, prepare, tiny, warm_start
from aem_exp.config import ConfigError, Experiment, load
from aem_exp.core.errors import RunError
from aem_exp.envs import opening
from aem_exp.rollout.chat import Chat
from aem_exp.rollout.rows import Row
from aem_exp.run.resume import ResumePoint
from aem_exp.run.warm_start import _check_record
from aem_exp.rundir import checkpoints

MADE = ["model.make.steps=30", "model.make.habit_steps=2", "model.make.episodes=64"]  # a policy that does not succeed
IMITATE = ["warm_start=imitate", "warm_start.episodes=64", "warm_start.lora=null", "warm_start.learning_rate=5e-3"]
OFF = config.WarmStart()


# The configuration.


@pytest.mark.parametrize(
    ("words", "field", "fact"),
    [
        (["warm_start.episodes=8"], "warm_start.episodes", "has no effect without warm_start.method"),
        (["warm_start.lora={r: 4}"], "warm_start.lora", "has no effect without warm_start.method"),
        (["warm_start.method=imitate"], "warm_start.episodes", "must be at least 1"),
        (["warm_start=imitate", "warm_start.temperature=0.7"], "warm_start.temperature", "method=own_successes"),
        (["warm_start=own_successes", "warm_start.noise=0.1"], "warm_start.noise", "method=imitate"),
        (["warm_start=imitate", "warm_start.lora.r=0"], "warm_start.lora.r", "at least 1"),
        (["warm_start=imitate", "warm_start.lora.rank=4"], "warm_start.lora.rank", "no such key"),
        (["warm_start=imitation"], "warm_start", "did you mean imitate?"),
        (["warm_start=imitate", "warm_start.noise=1.0"], "warm_start.noise", "below 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("clean")
def test_bad_settings_are_refused(words, field, fact):
    with pytest.raises(ConfigError) as refused:
        load(words)
    assert refused.value.field == field and fact in str(refused.value)


@pytest.mark.usefixtures("clean")
def test_a_warm_start_is_part_of_the_signature_and_its_seed_is_its_own():
    plain, warm = load([]), load(["warm_start=imitate"])
    assert plain.warm_start == OFF and "warm_start" not in config.to_dict(plain)
    assert config.signature(warm) != config.signature(plain)
    assert config.signature(load(["warm_start=imitate", "warm_start.seed=1"])) != config.signature(warm)
    assert load(["warm_start=imitate", "seed=3"]).warm_start == warm.warm_start
    assert config.from_dict(config.to_dict(warm)) == warm


def test_an_environment_without_a_scripted_player_cannot_be_imitated():
    experiment = replace(toy.experiment("window"), warm_start=load(["warm_start=imitate"]).warm_start)
    with pytest.raises(ConfigError, match=r"has no scripted player .*warm_start=own_successes") as refused:
        warm_start.check_world(experiment, toy.ChatterWorld())
    assert refused.value.field == "warm_start.method"
    own = replace(experiment, warm_start=load(["warm_start=own_successes"]).warm_start)
    warm_start.check_world(own, toy.ChatterWorld())


def test_submission_refuses_imitation_without_a_scripted_player():
    from aem_exp.jobs import dispatch

    needs("gymnasium")
    plain = load(["env=frozen_lake", "model=local", "model.path=any"])
    dispatch.check_worlds([plain])
    imitating = replace(plain, warm_start=load(["warm_start=imitate"]).warm_start)
    with pytest.raises(ConfigError, match="env frozen_lake has no scripted player"):
        dispatch.check_worlds([plain, imitating])


def test_gated_share_is_that_of_the_modulation():
    measured = {"entropy_spans": [0.0, 0.05, 0.1, 0.4]}
    assert warm_start.gated_share(measured, 0.1) == 0.5
    assert warm_start.gated_share(measured, 0.0) == 0.25


# The rows.


def row(prompt: int, mask: list[int]) -> Row:
    return Row(list(range(100, 100 + prompt)), list(range(1, len(mask) + 1)), mask, [], [], 0, [0])


def test_only_tokens_of_responses_have_labels():
    from aem_exp.training import imitation

    (item,) = imitation.build_dataset([row(2, [1, 1, 0, 1])])
    assert item == {"input_ids": [100, 101, 1, 2, 3, 4], "labels": [-100, -100, 1, 2, -100, 4]}


@pytest.mark.parametrize(
    ("device_rows", "device_tokens", "size"), [(0, 0, 12), (0, 25, 2), (0, 45, 4), (0, 5, 1), (3, 1000, 3), (5, 0, 4)]
)
def test_micro_batches_divide_the_batch_and_fit(device_rows, device_tokens, size):
    from aem_exp.training import imitation

    settings = imitation.ImitationSettings(1, 12, 1e-3, device_rows, device_tokens, 0, True, False, False)
    assert imitation.micro_batch_rows([row(4, [1] * 6), row(2, [1])], settings) == size


def test_responses_above_the_budget_are_refused():
    env = load([]).env
    chat, world = Chat(tiny.make_tokenizer(open_world([]).words(), env)), open_world([])
    from random import Random

    from aem_exp.rollout.types import Episode

    episodes = [Episode(world.tasks("train")[0], 0, 0, ())]
    played, texts = demonstrations.play_scripted(world, env, chat, episodes, 0.0, 0.0, Random(0))
    assert texts and all(r.sample.ids[-1] == chat.end_ids[0] for r in played[0].responses)
    warm_start.check_lengths(played, env)
    with pytest.raises(ConfigError, match="the longest response of the scripted player"):
        warm_start.check_lengths(played, replace(env, response_tokens=2))


# Training.


def open_world(words):
    return opening.open_world(load(words))


def make(words, cache, monkeypatch) -> tuple[Experiment, str, warm_start.WarmStarted, list[str]]:
    """The experiment, the folder of its model, its warm start, and the reported lines."""
    monkeypatch.setenv("AEM_CACHE", str(cache))
    experiment, lines = load([*MADE, *words]), list[str]()
    world = opening.open_world(experiment)
    weights = policy.make_cached(experiment, world)
    return experiment, weights, warm_start.make_cached(experiment, world, weights, lines.append), lines


@pytest.mark.slow
def test_loss_is_the_mean_over_the_tokens_of_responses(cache, monkeypatch, tmp_path):
    """Of an update, for any micro-batches."""
    from aem_exp.training import imitation

    monkeypatch.setenv("AEM_CACHE", str(cache))
    experiment = load(MADE)
    world = opening.open_world(experiment)
    folder = policy.make_cached(experiment, world)
    from random import Random

    tokenizer = policy.load_tokenizer(experiment.model, folder)
    rows = tiny.demonstrate(world, experiment.env, tokenizer, 8, 0.0, 0.0, Random(0))
    found = []
    for device_rows in (0, 2):
        model, _ = policy.load(experiment.model, folder, 0)
        ids, labels = tiny.pad_batch(rows, tokenizer.pad_token_id)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=(ids != tokenizer.pad_token_id).long()).logits
        expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item()
        settings = imitation.ImitationSettings(1, 8, 1e-3, device_rows, 0, 0, True, False, False)
        losses: list[float] = []
        updates = imitation.train_on_rows(
            model, tokenizer, rows, settings, tmp_path, lambda *facts, to=losses: to.append(facts[2])
        )
        assert updates == 1
        assert losses == [pytest.approx(expected, rel=1e-3)]
        found.append(model.state_dict())
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-5) for name in found[0])


@pytest.mark.slow
@pytest.mark.parametrize("lora", ["null", "{r: 8, target_modules: all-linear}"], ids=["full", "lora"])
def test_imitation_trains_the_weights(cache, monkeypatch, lora):
    words = [*IMITATE, f"warm_start.lora={lora}", "warm_start.epochs=12", "warm_start.batch=8"]
    experiment, weights, started, lines = make(words, cache, monkeypatch)
    facts = started.facts
    assert facts["rows"] == 64 and facts["updates"] == 96
    losses = [float(line.partition("loss ")[2].partition(",")[0]) for line in lines if "loss" in line]
    assert losses[-1] < 0.6  # 1.0 at the start
    assert len(facts["after"]["entropy_spans"]) == warm_start.MEASURED_GROUPS
    assert facts["weights"] == policy.fingerprint(started.weights) != policy.fingerprint(weights)
    assert not (Path(started.weights) / "adapter").exists()
    model, _ = policy.load(experiment.model, started.weights, 0)  # refuses missing and unexpected tensors
    assert model.num_parameters() == policy.load(experiment.model, weights, 0)[0].num_parameters()
    assert any("left" in line for line in lines)
    again = warm_start.make_cached(experiment, opening.open_world(experiment), weights, lines.append)
    assert again == started
    assert sum("only once" in line for line in lines) <= 1


@pytest.mark.slow
def test_own_successes_are_trained_on(cache, monkeypatch):
    """The world counts a short response as a success."""
    words = ["warm_start=own_successes", "warm_start.episodes=8", "warm_start.lora=null"]
    with pytest.raises(RunError, match=r"0 of 8 episodes succeeded; imitate a scripted player first"):
        make(words, cache, monkeypatch)
    assert not list((cache / "warm_starts").glob("*.part"))
    experiment = load(MADE)
    world = opening.open_world(experiment)
    weights = policy.make_cached(experiment, world)
    skilled = replace(experiment, warm_start=load([*IMITATE, "warm_start.epochs=12"]).warm_start)
    start = warm_start.make_cached(skilled, world, weights, lambda line: None).weights
    own = load([*words, "warm_start.episodes=48", "warm_start.epochs=4", "warm_start.learning_rate=1e-3"]).warm_start
    lines: list[str] = []
    started = warm_start.make_cached(replace(experiment, warm_start=own), world, start, lines.append)
    (told,) = [line for line in lines if "of 48 episodes succeeded" in line]
    wins = int(told.split()[2])
    assert 0 < wins == started.facts["rows"] < 48  # with full history, an episode is one row


# The run.

RUN = ["trainer.steps=2", "trainer.tasks_per_step=2", "trainer.group_size=4", "trainer.mini_batch=4"]
RUN += ["evaluation.tasks=4", "evaluation.every=0", "launch.save_every=1", "tracking=off", "env.invalid_penalty=0.1"]


@pytest.mark.slow
def test_run_starts_from_the_warm_start_and_saves_a_whole_model(cache, tmp_path):
    words = [*MADE, *IMITATE, *RUN, "model.lora={r: 4, target_modules: [q_proj]}"]
    folder = run_here(cache, tmp_path, *words)
    result, recorded = (json.loads((folder / f"{name}.json").read_text()) for name in ("result", "warm_start"))
    assert result["warm_start"]["weights"] == recorded["weights"]
    assert {"gated_share", "response_entropy", "success"} <= result["warm_start"]["before"].keys()
    (started,) = [
        file.parent
        for file in (cache / "warm_starts").glob("*/warm_start.json")
        if json.loads(file.read_text())["weights"] == recorded["weights"]
    ]
    first, last = (load_file(place / "model" / "model.safetensors") for place in (started, folder))
    moved = {name for name, tensor in last.items() if not torch.equal(tensor, first[name])}
    assert first.keys() == last.keys() and moved == {name for name in last if "q_proj" in name}
    from aem_exp.evaluate import request

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AEM_CACHE", str(cache))
        assert request.initial_weights(config.read(folder)) == str(started / "model")
        assert policy.fingerprint(request.model_weights(config.read(folder))) != recorded["weights"]
        with pytest.raises(ConfigError, match=r"warm_start\.epochs=2: must stay 1"):
            load([f"from={folder}", "trainer.steps=3", "warm_start.epochs=2"])
        assert load([f"from={folder}", "trainer.steps=3"]).warm_start == config.read(folder).warm_start


def test_a_resumed_run_must_have_the_same_warm_start(tmp_path):
    experiment, file = load([]), tmp_path / "warm_start.json"
    scored, new = ResumePoint(1, None, True), ResumePoint(0, None, False)
    _check_record(experiment, file, {"weights": "a"}, new)
    _check_record(experiment, file, {"weights": "b"}, new)  # nothing is trained yet
    with pytest.raises(ConfigError, match="weights of the warm start b, now c") as refused:
        _check_record(experiment, file, {"weights": "c"}, scored)
    assert refused.value.field == "resume"
    _check_record(replace(experiment, resume="inexact"), file, {"weights": "c"}, scored)
    assert json.loads(file.read_text()) == {"weights": "c"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_interrupted_warm_start_is_not_used(cache, tmp_path, number):
    words = [*MADE, *IMITATE, *RUN, "warm_start.epochs=100000", f"warm_start.seed={number}"]
    started = run_command(cache, tmp_path, *words, wait=False)
    (part,) = wait_until(lambda: list((cache / "warm_starts").glob("*.part")), "the warm start has begun")
    unfinished = part.with_suffix(".unfinished")
    wait_until((unfinished / warm_start.PLAYED).exists, "training has begun")
    started.send_signal(number)
    out, _ = started.communicate(timeout=DEADLINE)
    assert started.returncode == 128 + number
    assert "no step is saved yet" in out
    assert not part.exists() and not part.with_suffix("").exists()
    assert not (find_run_dir(tmp_path) / "warm_start.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("lora", ["null", "{r: 4, target_modules: [q_proj]}"], ids=["all-weights", "lora"])
def test_interrupted_warm_start_continues_to_the_same_weights(cache, monkeypatch, lora):
    """It is interrupted in the second of three epochs, and its newest checkpoint is damaged."""
    from aem_exp.training import imitation

    monkeypatch.setenv("AEM_CACHE", str(cache))
    monkeypatch.setattr(imitation, "SAVE_SECONDS", 0.0)
    words = [*MADE, *IMITATE, "warm_start.epochs=3", f"warm_start.lora={lora}"]
    experiment = load([*words, "warm_start.seed=11"])
    world, weights = open_world([]), policy.make_cached(load(MADE), open_world([]))
    folder = warm_start.cache_folder(experiment, world, weights)
    unfinished = folder.with_name(folder.name + ".unfinished")
    whole = warm_start.make_cached(experiment, world, weights, print)
    assert not unfinished.exists() and not whole.facts["interrupted"]
    folder.rename(folder.with_name("whole-" + folder.name))
    last = whole.facts["updates"] * 2 // 3

    class Killed(BaseException): ...

    def kill(self, update, *_):
        if update == last:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(warm_start._Progress, "__call__", kill)
        warm_start.make_cached(experiment, world, weights, print)
    newest = checkpoints.list_complete(unfinished)[0]
    next(newest.glob("*.safetensors")).write_bytes(b"damaged")
    lines = list[str]()
    again = warm_start.make_cached(experiment, world, weights, lines.append)
    assert "warm start: continuing the interrupted one" in lines
    assert again.facts["interrupted"] and again.facts["weights"] == whole.facts["weights"]
    assert again.facts["before"] == whole.facts["before"] and again.facts["after"] == whole.facts["after"]
    assert not unfinished.exists()


@pytest.mark.slow
def test_error_of_a_warm_start_is_that_of_the_run(tmp_path, cache):
    words = [*MADE, *RUN, "warm_start=own_successes", "warm_start.episodes=4"]
    done = run_command(cache, tmp_path, *words)
    assert done.returncode == 1
    assert "0 of 4 episodes succeeded; imitate a scripted player first" in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("aem_exp:")]) == 1


@pytest.mark.slow
def test_one_of_two_ranks_makes_it(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("AEM_CACHE", str(cache))
    done = torchrun(torchrun_warm_start, str(tmp_path), *MADE, *IMITATE, *RUN, "warm_start.seed=7")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("only once; it is cached") == 1
    folders = {(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)}
    assert len(folders) == 1
    assert (Path(folders.pop()) / "model.safetensors").exists()


# A real model.


@pytest.mark.real
def test_smollm2_imitates_the_scripted_player(capsys, monkeypatch):
    """`prepare` makes everything. Two updates change the weights, but are too few to change what the model does."""
    monkeypatch.chdir(ROOT)
    words = ["model=smollm2_135m_q4", "env=household_talk", "env.max_turns=2", "env.response_tokens=40"]
    words += ["warm_start=imitate", "warm_start.episodes=8", "warm_start.batch=8", "warm_start.learning_rate=1e-3"]
    assert prepare.main(words) == 0
    assert "warm    imitate: " in capsys.readouterr().out
    experiment = load(words)
    started = warm_start.cached(experiment, opening.open_world(experiment), policy.locate(experiment.model))
    assert started is not None and started.facts is not None
    assert started.facts["updates"] == 2 and started.facts["rows"] == 16
    assert 2 < started.facts["before"]["response_entropy"] < 5  # nats; 3.6 when this was written
    assert 0 < started.facts["after"]["response_entropy"] < 5
    first, _ = policy.load(experiment.model, policy.locate(experiment.model), 0)
    trained, _ = policy.load(experiment.model, started.weights, 0)
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), trained.parameters(), strict=True))
