"""ALFWorld: the engine gives the texts of TextWorld's own class, generated games can be won, official files are read."""

import json
import sys
import tempfile
from collections import Counter
from importlib.util import find_spec
from random import Random

import pytest
from support.alfworld_files import write_game, write_official_files
from support.runs import skip_or_fail

from aem_exp.config import load
from aem_exp.core.errors import ConfigError, MissingResource
from aem_exp.core.extras import install_command
from aem_exp.envs.alfworld import expert, facts, games, grammar, library, official_games
from aem_exp.envs.alfworld import world as alfworld
from aem_exp.envs.alfworld.engine import NOTHING, Engine
from aem_exp.envs.alfworld.env import MAX_COMMAND_CHARACTERS
from aem_exp.envs.alfworld.world import AlfWorld, Generated

KINDS = list(games.KINDS)
SMALL, FULL = (11, 8), (28, 45)


@pytest.fixture(autouse=True)
def installed(request):
    if "installed" not in request.node.name and not all(map(find_spec, library.PACKAGES)):
        skip_or_fail(install_command("alfworld"))


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    """Use no data of this machine."""
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    monkeypatch.setenv("AEM_CACHE", str(tmp_path / "cache"))


def stock(game, folder, monkeypatch):
    """TextWorld's own environment, as ALFWorld starts it."""
    monkeypatch.setenv("ALFWORLD_DATA", str(folder))  # its import creates this folder
    monkeypatch.setattr(sys, "argv", list(sys.argv))  # it changes sys.argv
    import textworld
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler, AlfredInfos

    file = folder / "game.tw-pddl"
    file.write_text(json.dumps(game))
    infos = textworld.EnvInfos(won=True, admissible_commands=True, extras=["gamefile"])
    return textworld.start(str(file), infos, wrappers=[AlfredDemangler, AlfredInfos])


def random_command(state, random):
    """A random command: often not a move to another place, sometimes nonsense."""
    if random.random() < 0.1:
        return random.choice(["xyzzy", "", " look ", "go to moon 1", "take mug 1 from"])
    staying = [one for one in state.commands if not one.startswith("go to")]
    return random.choice(staying if random.random() < 0.6 else state.commands)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "size", "turns"), [*((kind, SMALL, 40) for kind in KINDS), (KINDS[3], FULL, 25)])
def test_the_engine_plays_as_textworlds_own_class(kind, size, turns, tmp_path, monkeypatch):
    game, _ = games.generate_game(kind, f"stock-{turns}", *size)
    reference, engine, random = stock(game, tmp_path, monkeypatch), Engine(), Random(kind)
    other_engine = Engine()  # shares the translated game, and plays other commands
    expected = reference.reset()
    state = engine.start(game)
    other = other_engine.start(game)
    for turn in range(turns):
        assert (state.text, list(state.commands), state.won) == (
            expected["feedback"],
            expected["admissible_commands"],
            expected["won"],
        )
        in_walkthrough = turn < len(game["walkthrough"]) // 2
        command = game["walkthrough"][turn] if in_walkthrough else random_command(state, random)
        expected = reference.step(command)[0]
        state, other = engine.step(command), other_engine.step(random_command(other, random))
    engine.close()
    other_engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_walkthrough_and_the_expert_win_each_kind(kind):
    sizes = [*((seed, SMALL) for seed in range(4)), (0, FULL)]
    for seed, size in sizes:
        engine, random = Engine(), Random(seed)
        game, errand = games.generate_game(kind, f"won-{seed}", *size)
        state = engine.start(game)
        for command in game["walkthrough"]:
            assert not state.won and command in state.commands
            state = engine.step(command)
        assert state.won
        state = engine.start(game)
        observations = [state.text]
        places = [c.removeprefix("go to ") for c in state.commands if c.startswith("go to")]
        assert len(places) == size[0]
        while not state.won:
            assert len(observations) <= 50
            memory = expert.EpisodeMemory(observations, places)
            state = engine.step(expert.next_command(memory, state.commands, errand, random))
            observations.append(state.text)
        engine.close()


def test_a_game_depends_only_on_its_seed():
    made = [games.generate_game(KINDS[1], seed, *SMALL) for seed in ("a", "a", "b")]
    assert made[0] == made[1] != made[2]
    world = Generated(receptacles=6, objects=4, sizes={"train": 60, "dev": 30, "test": 30})
    problems = [world.game(task)["pddl_problem"] for split in world.splits for task in world.tasks(split)]
    assert len(set(problems)) == 120
    kinds = Counter(task.kind for task in world.tasks("train"))
    assert set(kinds) == set(KINDS)


@pytest.mark.slow
def test_display_names_equal_alfworlds(tmp_path, monkeypatch):
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    from alfworld.agents.utils.misc import Demangler
    from textworld.generator.game import EntityInfo

    started = Engine()
    started.start(games.generate_game(KINDS[2], "names", *FULL)[0])
    ids = list(started.game.entities)
    reference = Demangler(game_infos={one: EntityInfo(one, "") for one in ids})
    assert facts.display_names(ids) == {one: reference.demangle_alfred_name(one) for one in ids}


@pytest.mark.slow
def test_old_games_keep_their_own_verbs():
    """Games before 0.4.0 use `put` instead of `move`. The verb comes from the game."""
    game, errand = games.generate_game(KINDS[0], "old", *SMALL)
    old = game["grammar"].replace('"move {o} to {r}"', '"put {o} in/on {r}"').replace("You move the", "You put the")
    assert old.count("put {o} in/on {r}") == 2
    started = Engine()
    state = started.start(game | {"grammar": old})
    assert started.matches_grammar("put mug 1 in/on desk 1") and not started.matches_grammar("move mug 1 to desk 1")
    observations, places, random = [state.text], [c[6:] for c in state.commands if c.startswith("go to ")], Random(0)
    while not state.won:
        memory = expert.EpisodeMemory(observations, places)
        state = started.step(expert.next_command(memory, state.commands, errand, random))
        observations.append(state.text)
        assert len(observations) < 40
    prints = [grammar.fingerprint(game["pddl_domain"], text) for text in (game["grammar"], old)]
    other = games.generate_game(KINDS[0], "another errand", *SMALL)[0]
    assert prints[0] == grammar.fingerprint(other["pddl_domain"], other["grammar"]) != prints[1]


# Isolation.


def test_global_state_of_the_process_does_not_change(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    argv, stdout = list(sys.argv), sys.stdout
    world = Generated(tags=True)
    env = world.env()
    assert not list(tmp_path.iterdir())  # the engine is loaded when it is needed
    env.reset(world.tasks("dev")[0])
    env.step("<think></think><action>look</action>")
    assert (sys.argv, sys.stdout) == (argv, stdout)
    assert not list(tmp_path.iterdir())
    env.close()


@pytest.mark.parametrize(
    "expression",
    ["__import__('os').getpid()", "r.name.__class__", "().__class__", "r.name + 1", "f(r)", "'"],
)
def test_a_game_cannot_evaluate_python(expression):
    game, _ = games.generate_game(KINDS[0], "evil", *SMALL)
    evil = game["grammar"].replace("You arrive at {r.name}.", f"You arrive at {{{expression}}}.")
    assert evil != game["grammar"]
    with pytest.raises(Exception, match=r"the game's grammar contains|FailedParse|expecting"):
        Engine().start(game | {"grammar": evil})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pddl_problem": None}, "pddl_domain, grammar and pddl_problem"),
        ({"pddl_problem": "(define (problem x)"}, "Fast Downward"),
        (
            {
                "pddl_problem": "(define (problem x) (:domain alfred) (:objects a - agent a - agent) (:init) (:goal (and)))"
            },
            "Fast Downward",
        ),
        ({"grammar": "grammar :: nonsense"}, "nonsense"),
    ],
)
def test_a_malformed_game_is_an_error_and_the_next_one_plays(changes, message):
    game, _ = games.generate_game(KINDS[0], "malformed", *SMALL)
    engine = Engine()
    with pytest.raises(Exception, match=message):
        engine.start(game | changes)
    assert engine.start(game).commands
    assert engine.step("xyzzy").text == NOTHING
    engine.close()


def test_an_engine_that_is_not_installed_names_its_extra(monkeypatch):
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingResource, match=r"alfworld, textworld, fast_downward: pip install .*\[alfworld\]'"):
        Generated()


def test_a_too_new_python_is_refused_even_if_not_installed(monkeypatch):
    class Version(tuple):
        major, minor = 3, 13

    monkeypatch.setattr(library.sys, "version_info", Version((3, 13, 0)))
    with pytest.raises(MissingResource, match=r"3\.11 .*3\.12.* 3\.13"):
        Generated()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"kinds": ["pick"]}, "env.make.kinds"),
        ({"kinds": []}, "env.make.kinds"),
        ({"receptacles": 3}, "env.make.receptacles"),
        ({"receptacles": 99}, "env.make.receptacles"),
        ({"objects": 1}, "env.make.objects"),
        ({"sizes": {"valid": 3}}, "env.make.sizes.valid"),
    ],
)
def test_settings_without_a_possible_game_are_refused(changes, field):
    with pytest.raises(ConfigError) as caught:
        Generated(**changes)
    assert caught.value.field == field


# The official files.


def test_panels_are_those_of_the_papers_and_dev_is_held_out(tmp_path, monkeypatch):
    monkeypatch.setenv("ALFWORLD_DATA", str(write_official_files(tmp_path / "data")))
    monkeypatch.setattr(alfworld, "HELD_OUT", 7)
    world = AlfWorld(games=None)
    ids = {split: [task.id for task in world.tasks(split)] for split in world.splits}
    assert {split: len(found) for split, found in ids.items()} == {
        "train": 17,
        "dev": 7,
        "test_seen": 6,
        "test_unseen": 6,
    }
    assert len({one for found in ids.values() for one in found}) == 36
    assert all(one.startswith("train/") for one in (*ids["train"], *ids["dev"]))
    again = AlfWorld(games=None)
    assert [task.id for task in again.tasks("dev")] == ids["dev"]
    with pytest.raises(ConfigError) as caught:
        world.tasks("test")
    assert caught.value.choices == ["train", "dev", "test_seen", "test_unseen"]

    verl_agent = AlfWorld(games=None, split="verl_agent")
    assert {task.id for task in verl_agent.tasks("train")} == {*ids["train"], *ids["dev"]}
    drawn = verl_agent.tasks("dev")
    assert len(drawn) == len({task.id for task in drawn}) == 128
    assert {task.payload["file"] for task in drawn} == set(ids["test_seen"])
    assert verl_agent.fingerprint != world.fingerprint
    assert any("env.make.split=verl_agent" in note for note in config_notes("alfworld_1_5b_verl_agent"))


def config_notes(name):
    from aem_exp.config import notes

    return notes(load([f"+experiment={name}"]))


def test_games_are_indexed_once_and_a_changed_game_is_refused(tmp_path, monkeypatch):
    data = write_official_files(tmp_path / "data", {"train": 4, "valid_seen": 2, "valid_unseen": 2})
    world = AlfWorld(str(data), games=None)
    with monkeypatch.context() as blind:
        blind.setattr(official_games, "_read_all", lambda *_: pytest.fail("indexed again"))
        assert AlfWorld(str(data), games=None).fingerprint == world.fingerprint
    env, task = world.env(), world.tasks("test_seen")[0]
    assert env.reset(task).observation.endswith(env.goal)
    file = data / "json_2.1.1" / task.payload["file"] / "game.tw-pddl"
    file.write_text(file.read_text().replace("You arrive at", "You are at"))
    with pytest.raises(ValueError, match=rf"{file} .*aem_exp\.prepare"):
        env.reset(task)
    write_game(data, "valid_seen", KINDS[0], 99)  # a new folder: the games are indexed again
    assert len(AlfWorld(str(data), games=None).tasks("test_seen")) == 3


def test_games_that_are_unzipped_later_are_found(tmp_path):
    games = {"train": 4, "valid_seen": 2, "valid_unseen": 2}
    data = write_official_files(tmp_path / "data", games)
    file = next(data.glob("json_2.1.1/train/*/*/game.tw-pddl"))
    whole = file.read_bytes()
    file.unlink()
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"train has 3 .* 4"):
            AlfWorld(str(data), games=games)
    file.write_bytes(whole)
    assert len(AlfWorld(str(data), games=games).tasks("train")) == 2  # two are held out


def test_games_that_alfworld_cannot_play_are_left_out(tmp_path):
    data = write_official_files(tmp_path, {"train": 4, "valid_seen": 2, "valid_unseen": 2})
    write_game(data, "valid_seen", KINDS[0], 50, solvable=False)
    sliced = write_game(data, "valid_seen", KINDS[0], 51)
    sliced.rename(sliced.with_name("trial_AppleSliced"))
    (write_game(data, "valid_seen", KINDS[0], 52) / "game.tw-pddl").unlink()
    assert len(AlfWorld(str(data), games=None).tasks("test_seen")) == 2


def write_broken_files(defect, folder):
    """A data set with a defect."""
    games = {"train": 4, "valid_seen": 2, "valid_unseen": 2}
    if defect == "missing":
        return folder
    data = write_official_files(folder, games)
    files = list(data.rglob("game.tw-pddl"))
    if defect == "half unzipped":
        (data / "json_2.1.1" / "valid_seen").rename(data / "json_2.1.1" / "valid_see")
    for file in files:
        if defect == "one archive":
            file.unlink()
        if defect == "old":
            file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "solvable"}))
    if defect == "cut off":
        files[0].write_text(files[0].read_text()[:1000])
    if defect == "no object":
        files[0].write_text("[]")
    if defect == "deep":
        files[0].write_text("[" * 100_000)
    return data


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        ("missing", r"json_2\.1\.1/.* python -m aem_exp\.prepare .*json_2\.1\.1_json\.zip and .*tw-pddl\.zip"),
        ("one archive", r"game\.tw-pddl: json_2\.1\.2_tw-pddl\.zip"),
        ("old", r"can be played: .*version 0\.4\.0"),
        ("half unzipped", r"has no json_2\.1\.1/valid_seen"),
        ("cut off", r"game\.tw-pddl .*JSONDecodeError"),
        ("no object", r"game\.tw-pddl .*AttributeError"),
        ("deep", r"game\.tw-pddl .*RecursionError"),
        ("few", r"has 4 .* 3553.*env\.make\.games=null"),
    ],
)
def test_broken_data_is_refused_in_one_line(defect, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as caught:
        AlfWorld(str(write_broken_files(defect, tmp_path / "data")))
    assert caught.value.field == "env.make.data"
    assert "\n" not in str(caught.value)


def test_responses_are_parsed_as_in_verl_agent(tmp_path):
    world = Generated(kinds=[KINDS[0]], tags=True)
    env = world.env()
    first = env.reset(world.tasks("dev")[0])
    assert "help" not in first.actions
    turn = env.step(f"<think>hm</think><action> {first.actions[0].upper()} </action><action>look</action>")
    assert turn.valid and turn.metrics["format_valid"] == turn.metrics["admissible"] == 1
    for response, form, admissible in [
        ("<action>look</action>", 0, 1),  # no thinking
        ("<think></think>look", 0, 0),
        ("<think></think><action>fly</action>", 1, 0),
        ("<think>想</think><action>look</action>", 0, 1),
    ]:
        turn = env.step(response)
        assert (turn.metrics["format_valid"], turn.metrics["admissible"]) == (form, admissible)
        assert turn.valid == bool(form)
    env.close()


def test_success_is_paid_once():
    world = Generated(kinds=[KINDS[0]], tags=False, reward=10.0)
    env, task = world.env(), world.tasks("dev")[0]
    env.reset(task)
    turns = []
    while not turns or not turns[-1].done:
        turns.append(env.step(world.oracle(env)))
    assert [turn.reward for turn in turns] == [0.0] * (len(turns) - 1) + [10.0]
    assert env.step("look").reward == 0
    env.close()


@pytest.mark.slow
def test_the_reference_prompt_fits_its_budget():
    """In the largest room, task, two past turns, observation and commands fit into the context, at 3 characters per token."""
    rules = load(["+experiment=alfworld_1_5b"]).env
    engine = Engine()
    state = engine.start(games.generate_game(KINDS[0], "longest", *FULL)[0])
    pair = rules.prompt["pair"].format(n=49, observation=state.text, action="x" * MAX_COMMAND_CHARACTERS)
    words = {"task": "put a clean x in y", "observation": state.text, "actions": ", ".join(state.commands), "step": 48}
    text = rules.prompt["window"].format(**words, turn=49, history=f"{pair}\n{pair}", length=2)
    assert len(text) / 3 < rules.context_tokens - rules.response_tokens
