"""BFCL multi-turn: reading calls without evaluating them, the rules of a conversation, and verdicts equal to the benchmark's."""

import copy
from random import Random

import pytest
from filelock import FileLock

from aem_exp.config import instantiate, load
from aem_exp.core.errors import ConfigError, MissingResource
from aem_exp.envs.bfcl import Bfcl
from aem_exp.envs.bfcl.calls import Call, parse_calls
from aem_exp.envs.bfcl.wheel import WHEEL, fetch_wheel, find_wheel


@pytest.fixture(scope="module")
def folder(common):
    """A folder with the benchmark's wheel, fetched with pip."""
    made = common / "cache" / "bfcl"
    with FileLock(common / "bfcl.lock"):
        fetch_wheel(str(made), lambda line: None)
    return str(made)


@pytest.fixture(scope="module")
def world(folder):
    return Bfcl(data=folder)


@pytest.mark.parametrize(
    ("response", "calls"),
    [
        ("[ls()]", [Call("ls", (), {})]),
        ("cd(folder='a'), ls(a=True)", [Call("cd", (), {"folder": "a"}), Call("ls", (), {"a": True})]),
        ("<think>[rm()]</think>\n```python\n[api.add(1, b=-2.5)]\n```", [Call("add", (1,), {"b": -2.5})]),
        ("[f(x=[1, {'a': None}])]", [Call("f", (), {"x": [1, {"a": None}]})]),
        ("[]", []),
        ("", None),
        ("I cannot do that.", None),
        ("[f(x=g())]", None),
        ("[f(x=y)]", None),
        ("[f(**{'x': 1})]", None),
        ("[f]", None),
        ("[lambda: 1]", None),
        ("[__import__('os').system('true')]", [Call("system", ("true",), {})]),  # no function of any task has this name
        ("[f(x=__import__('os').system('true'))]", None),
        ("[" + "f(" * 500 + ")" * 500 + "]", None),
        ("[f(x=" + "-" * 15_000 + "1)]", None),
        ("[f(x=" + "9" * 15_000 + ")]", None),  # Python converts no number of so many digits
        ("[f()]" + " " * 50_000 + "[", None),
        ("[f(\0)]", None),
    ],
)
def test_calls_are_read_and_never_evaluated(response, calls):
    assert parse_calls(response) == calls


def converse(world, task, responses=None):
    """Play a conversation with the correct responses, or the given ones."""
    env = world.env()
    turns = [env.reset(task)]
    while not turns[-1].done:
        turns.append(env.step(world.oracle(env) if responses is None else responses.pop(0)))
    return env, turns


def test_the_variants_of_a_conversation_are_in_the_same_split(world):
    numbers = {split: {task.payload["number"] for task in world.tasks(split)} for split in world.splits}
    assert [len(world.tasks(split)) for split in world.splits] == [600, 100, 100]
    assert not numbers["train"] & (numbers["dev"] | numbers["test"]) and not numbers["dev"] & numbers["test"]


def test_correct_calls_succeed_and_silence_fails_in_every_task(world):
    for task in [*world.tasks("dev"), *world.tasks("test")]:
        _env, turns = converse(world, task)
        assert (turns[-1].metrics["won"], turns[-1].metrics["score"]) == (1.0, 1.0)
        assert sum(turn.reward for turn in turns) == 1.0
        _, turns = converse(world, task, ["I cannot do that."] * 20)
        assert turns[-1].metrics["won"] == 0.0


@pytest.mark.slow
def test_verdicts_are_those_of_the_benchmark(world):
    """On conversations with lost, doubled, foreign and reordered calls."""
    from bfcl_eval.eval_checker.multi_turn_eval.multi_turn_checker import multi_turn_checker

    random, verdicts = Random(0), []
    for number, task in enumerate(world.tasks("train")[::4]):
        row, correct = world.find_row(task)
        changed = copy.deepcopy(correct)
        chosen = random.choice([calls for calls in changed if calls])
        if number % 4 == 0:
            chosen.pop(random.randrange(len(chosen)))
        elif number % 4 == 1:
            chosen.append(random.choice(chosen))
        elif number % 4 == 2:
            chosen.insert(
                0, random.choice(["ls()", "get_current_speed()", "add(a=1, b=2)", "get_stock_info(symbol='AAPL')"])
            )
        else:
            random.shuffle(chosen)
        steps = [[[call] for call in calls] for calls in changed]
        expected = multi_turn_checker(steps, correct, copy.deepcopy(row), "multi_turn", f"aem{number}")
        responses = [text for calls in changed for text in [*(f"[{call}]" for call in calls), "Done."]]
        _, turns = converse(world, task, responses)
        verdicts.append(expected["valid"])
        assert bool(turns[-1].metrics["won"]) == expected["valid"], task.id
    assert 0.2 < sum(verdicts) / len(verdicts) < 0.9


def test_a_held_back_function_is_described_when_it_is_needed(world):
    task = next(task for task in world.tasks("train") if task.kind == "miss_func")
    row, _ = world.find_row(task)
    ((turn, names),) = row["missed_function"].items()
    env = world.env()
    env.reset(task)
    assert all(f'"name": "{name}"' not in env.goal for name in names)
    for _ in range(100):
        answer = env.step(world.oracle(env))
        if env._user_turn == int(turn):
            break
    assert all(f'"name": "{name}"' in answer.observation for name in names)


def test_too_many_steps_end_the_conversation(world):
    _, turns = converse(world, world.tasks("dev")[0], ["[no_such_function()]"] * 30)
    assert len(turns) == 22
    assert turns[-1].terminated and not turns[-1].metrics["won"]
    assert turns[1].observation == "Error during execution: name 'no_such_function' is not defined"
    assert not turns[1].metrics["admissible"]


def test_scores_can_be_paid(folder):
    world = Bfcl(["base"], folder, pays="score", reward=10.0)
    task = next(task for task in world.tasks("dev") if len(world.find_row(task)[1]) > 2)
    env = world.env()
    env.reset(task)
    first = env.step(world.oracle(env)), env.step("Done.")
    assert [turn.reward for turn in first] == [0.0, 10.0 / len(world.find_row(task)[1])]
    while not (turn := env.step("Done.")).done:
        assert turn.reward == 0
    assert turn.metrics["score"] == pytest.approx(1 / len(world.find_row(task)[1])) and not turn.metrics["won"]


def test_malformed_calls_are_invalid_and_sentences_are_not(world):
    env = world.env()
    env.reset(world.tasks("dev")[0])
    assert not env.step("[ls(").valid
    assert env.step("I cannot do that.").valid


@pytest.mark.parametrize(
    ("changes", "field"), [({"categories": ["easy"]}, "categories"), ({"categories": []}, "categories")]
)
def test_wrong_settings_are_refused(changes, field):
    with pytest.raises(ConfigError) as caught:
        instantiate(load(["env=bfcl"]).env.make | changes)
    assert caught.value.field == f"env.make.{field}"


def test_a_missing_wheel_and_another_file_are_refused(tmp_path):
    with pytest.raises(MissingResource, match=r"aem_exp\.prepare"):
        find_wheel(str(tmp_path))
    (tmp_path / WHEEL).write_bytes(b"not the wheel")
    with pytest.raises(ConfigError, match="not the published file"):
        Bfcl(data=str(tmp_path))


def test_a_failed_download_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(MissingResource, match="pip cannot fetch it"):
        fetch_wheel(str(tmp_path / "data"), lambda line: None)
