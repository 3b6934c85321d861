"""ALFWorld: TextWorld's real engine says what its stock class says, games made here can be won, official files are read."""

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
from aem_exp.core.errors import ConfigError
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
    """No data of this machine takes part."""
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    monkeypatch.setenv("AEM_CACHE", str(tmp_path / "cache"))


def stock(game, folder, monkeypatch):
    """The stock environment, as ALFWorld starts it."""
    monkeypatch.setenv("ALFWORLD_DATA", str(folder))  # its import makes this folder
    monkeypatch.setattr(sys, "argv", list(sys.argv))  # which it writes to
    import textworld
    from alfworld.agents.environment.alfred_tw_env import AlfredDemangler, AlfredInfos

    file = folder / "game.tw-pddl"
    file.write_text(json.dumps(game))
    infos = textworld.EnvInfos(won=True, admissible_commands=True, extras=["gamefile"])
    return textworld.start(str(file), infos, wrappers=[AlfredDemangler, AlfredInfos])


def commands(scene, random):
    """Something to do: mostly not walking about, now and then nonsense."""
    if random.random() < 0.1:
        return random.choice(["xyzzy", "", " look ", "go to moon 1", "take mug 1 from"])
    staying = [one for one in scene.commands if not one.startswith("go to")]
    return random.choice(staying if random.random() < 0.6 else scene.commands)


@pytest.mark.parametrize(("kind", "size", "turns"), [*((kind, SMALL, 40) for kind in KINDS), (KINDS[3], FULL, 25)])
def test_it_says_what_the_stock_class_says(kind, size, turns, tmp_path, monkeypatch):
    game, _ = games.generate_game(kind, f"stock-{turns}", *size)
    theirs, ours, random = stock(game, tmp_path, monkeypatch), Engine(), Random(kind)
    engines = ours, Engine()  # the second shares what was translated, and goes its own way
    states = [theirs.reset()]
    scene = ours.start(game)
    other = engines[1].start(game)
    for turn in range(turns):
        said = states[-1]
        assert (scene.text, list(scene.commands), scene.won) == (
            said["feedback"],
            said["admissible_commands"],
            said["won"],
        )
        command = game["walkthrough"][turn] if turn < len(game["walkthrough"]) // 2 else commands(scene, random)
        states.append(theirs.step(command)[0])
        scene, other = ours.step(command), engines[1].step(commands(other, random))
    for each in engines:
        each.close()


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_can_be_won_by_who_knows_and_by_who_looks(kind):
    sizes = [*((seed, SMALL) for seed in range(4)), (0, FULL)]
    for seed, size in sizes:
        engine, random = Engine(), Random(seed)
        game, errand = games.generate_game(kind, f"won-{seed}", *size)
        scene = engine.start(game)
        for command in game["walkthrough"]:
            assert not scene.won and command in scene.commands
            scene = engine.step(command)
        assert scene.won
        scene = engine.start(game)
        heard, places = [scene.text], [c.removeprefix("go to ") for c in scene.commands if c.startswith("go to")]
        assert len(places) == size[0]
        while not scene.won:
            assert len(heard) <= 50
            memory = expert.EpisodeMemory(heard, places)
            scene = engine.step(expert.next_command(memory, scene.commands, errand, random))
            heard.append(scene.text)
        engine.close()


def test_games_follow_from_their_seed_alone():
    made = [games.generate_game(KINDS[1], seed, *SMALL) for seed in ("a", "a", "b")]
    assert made[0] == made[1] != made[2]
    world = Generated(receptacles=6, objects=4, sizes={"train": 60, "dev": 30, "test": 30})
    problems = [world.game(task)["pddl_problem"] for split in world.splits for task in world.tasks(split)]
    assert len(set(problems)) == 120
    kinds = Counter(task.kind for task in world.tasks("train"))
    assert set(kinds) == set(KINDS)


def test_names_are_alfworlds_own(tmp_path, monkeypatch):
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    from alfworld.agents.utils.misc import Demangler
    from textworld.generator.game import EntityInfo

    started = Engine()
    started.start(games.generate_game(KINDS[2], "names", *FULL)[0])
    ids = list(started.game.entities)
    theirs = Demangler(game_infos={one: EntityInfo(one, "") for one in ids})
    assert facts.display_names(ids) == {one: theirs.demangle_alfred_name(one) for one in ids}


def test_old_data_has_its_own_verbs():
    """Before 0.4.0 one put things; the verb is the game's, never ours."""
    game, errand = games.generate_game(KINDS[0], "old", *SMALL)
    old = game["grammar"].replace('"move {o} to {r}"', '"put {o} in/on {r}"').replace("You move the", "You put the")
    assert old.count("put {o} in/on {r}") == 2
    started = Engine()
    scene = started.start(game | {"grammar": old})
    assert started.matches_grammar("put mug 1 in/on desk 1") and not started.matches_grammar("move mug 1 to desk 1")
    heard, places, random = [scene.text], [c[6:] for c in scene.commands if c.startswith("go to ")], Random(0)
    while not scene.won:
        memory = expert.EpisodeMemory(heard, places)
        scene = started.step(expert.next_command(memory, scene.commands, errand, random))
        heard.append(scene.text)
        assert len(heard) < 40
    prints = [grammar.fingerprint(game["pddl_domain"], text) for text in (game["grammar"], old)]
    other = games.generate_game(KINDS[0], "another errand", *SMALL)[0]
    assert prints[0] == grammar.fingerprint(other["pddl_domain"], other["grammar"]) != prints[1]


# Containment.


def test_nothing_of_this_process_changes(tmp_path, monkeypatch):
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
    "asked",
    ["__import__('os').getpid()", "r.name.__class__", "().__class__", "r.name + 1", "f(r)", "'"],
)
def test_what_a_game_asks_python_to_do_is_not_done(asked):
    game, _ = games.generate_game(KINDS[0], "evil", *SMALL)
    evil = game["grammar"].replace("You arrive at {r.name}.", f"You arrive at {{{asked}}}.")
    assert evil != game["grammar"]
    with pytest.raises(Exception, match=r"only names and joined texts|no expression|FailedParse|expecting"):
        Engine().start(game | {"grammar": evil})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pddl_problem": None}, "no text for each of"),
        ({"pddl_problem": "(define (problem x)"}, "Fast Downward refuses the game"),
        (
            {
                "pddl_problem": "(define (problem x) (:domain alfred) (:objects a - agent a - agent) (:init) (:goal (and)))"
            },
            "refuses",
        ),
        ({"grammar": "grammar :: nonsense"}, "nonsense"),
    ],
)
def test_a_malformed_game_is_an_error_and_the_next_one_plays(changes, said):
    game, _ = games.generate_game(KINDS[0], "malformed", *SMALL)
    engine = Engine()
    with pytest.raises(Exception, match=said):
        engine.start(game | changes)
    assert engine.start(game).commands
    assert engine.step("xyzzy").text == NOTHING
    engine.close()


def test_where_the_engine_is_not_installed_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(library.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs alfworld, textworld, fast_downward: pip install .*\[alfworld\]'"):
        Generated()


def test_where_python_is_too_new_it_says_so_installed_or_not(monkeypatch):
    class Version(tuple):
        major, minor = 3, 13

    monkeypatch.setattr(library.sys, "version_info", Version((3, 13, 0)))
    with pytest.raises(ConfigError, match=r"runs on Python 3\.11 and 3\.12, and this is 3\.13"):
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
def test_knobs_that_make_no_game_are_refused(changes, field):
    with pytest.raises(ConfigError) as error:
        Generated(**changes)
    assert error.value.field == field


# The official files.


def test_panels_are_the_papers_and_dev_is_held_out(tmp_path, monkeypatch):
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
    with pytest.raises(ConfigError, match="choose from train, dev, test_seen, test_unseen"):
        world.tasks("test")

    theirs = AlfWorld(games=None, split="verl_agent")
    assert {task.id for task in theirs.tasks("train")} == {*ids["train"], *ids["dev"]}
    drawn = theirs.tasks("dev")
    assert len(drawn) == len({task.id for task in drawn}) == 128
    assert {task.payload["file"] for task in drawn} == set(ids["test_seen"])
    assert theirs.fingerprint != world.fingerprint
    assert any("env.make.split=verl_agent" in note for note in config_notes("alfworld_1_5b_verl_agent"))


def config_notes(name):
    from aem_exp.config import notes

    return notes(load([f"+experiment={name}"]))


def test_files_are_read_once_and_a_changed_game_is_refused(tmp_path, monkeypatch):
    data = write_official_files(tmp_path / "data", {"train": 4, "valid_seen": 2, "valid_unseen": 2})
    world = AlfWorld(str(data), games=None)
    with monkeypatch.context() as blind:
        blind.setattr(official_games, "_read_all", lambda *_: pytest.fail("read again"))
        assert AlfWorld(str(data), games=None).fingerprint == world.fingerprint
    env, task = world.env(), world.tasks("test_seen")[0]
    assert env.reset(task).observation.endswith(env.goal)
    file = data / "json_2.1.1" / task.payload["file"] / "game.tw-pddl"
    file.write_text(file.read_text().replace("You arrive at", "You are at"))
    with pytest.raises(ValueError, match=r"was changed since it was indexed: aem_exp\.prepare indexes anew"):
        env.reset(task)
    write_game(data, "valid_seen", KINDS[0], 99)  # another folder of games: read anew
    assert len(AlfWorld(str(data), games=None).tasks("test_seen")) == 3


def test_what_is_unzipped_later_is_found(tmp_path):
    games = {"train": 4, "valid_seen": 2, "valid_unseen": 2}
    data = write_official_files(tmp_path / "data", games)
    file = next(data.glob("json_2.1.1/train/*/*/game.tw-pddl"))
    whole = file.read_bytes()
    file.unlink()
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"train has 3 games that can be played, and should have 4"):
            AlfWorld(str(data), games=games)
    file.write_bytes(whole)
    assert len(AlfWorld(str(data), games=games).tasks("train")) == 2  # two are held out


def test_what_alfworld_cannot_play_is_left_out(tmp_path):
    data = write_official_files(tmp_path, {"train": 4, "valid_seen": 2, "valid_unseen": 2})
    write_game(data, "valid_seen", KINDS[0], 50, solvable=False)
    sliced = write_game(data, "valid_seen", KINDS[0], 51)
    sliced.rename(sliced.with_name("trial_AppleSliced"))
    (write_game(data, "valid_seen", KINDS[0], 52) / "game.tw-pddl").unlink()
    assert len(AlfWorld(str(data), games=None).tasks("test_seen")) == 2


def broken(how, folder):
    """Data as it lies around after something went wrong."""
    games = {"train": 4, "valid_seen": 2, "valid_unseen": 2}
    if how == "missing":
        return folder
    data = write_official_files(folder, games)
    files = list(data.rglob("game.tw-pddl"))
    if how == "half unzipped":
        (data / "json_2.1.1" / "valid_seen").rename(data / "json_2.1.1" / "valid_see")
    for file in files:
        if how == "one archive":
            file.unlink()
        if how == "old":
            file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "solvable"}))
    if how == "cut off":
        files[0].write_text(files[0].read_text()[:1000])
    if how == "no object":
        files[0].write_text("[]")
    if how == "deep":
        files[0].write_text("[" * 100_000)
    return data


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", r"has no json_2\.1\.1/: python -m aem_exp\.prepare .*json_2\.1\.1_json\.zip and .*tw-pddl\.zip"),
        ("one archive", r"none of its games has a game\.tw-pddl: json_2\.1\.2_tw-pddl\.zip is missing"),
        ("old", r"from before version 0\.4\.0"),
        ("half unzipped", r"has no json_2\.1\.1/valid_seen"),
        ("cut off", r"game\.tw-pddl is no game: JSONDecodeError"),
        ("no object", r"game\.tw-pddl is no game: AttributeError"),
        ("deep", r"game\.tw-pddl is no game: RecursionError"),
        (
            "few",
            r"has 4 games that can be played, and should have 3553: unzip it again .*; or say env\.make\.games=null",
        ),
    ],
)
def test_data_that_is_not_whole_is_one_sentence(how, said, tmp_path):
    with pytest.raises(ConfigError, match=said) as error:
        AlfWorld(str(broken(how, tmp_path / "data")))
    assert "\n" not in str(error.value)


def test_a_response_is_read_as_the_reference_reads_it(tmp_path):
    world = Generated(kinds=[KINDS[0]], tags=True)
    env = world.env()
    first = env.reset(world.tasks("dev")[0])
    assert "help" not in first.actions
    told = env.step(f"<think>hm</think><action> {first.actions[0].upper()} </action><action>look</action>")
    assert told.valid and told.metrics["format_valid"] == told.metrics["admissible"] == 1
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


def test_the_reference_prompt_fits_its_budget():
    """50 turns of the largest room: task, two past turns, observation and commands within 2048 tokens, by 3 characters each."""
    rules = load(["+experiment=alfworld_1_5b"]).env
    engine = Engine()
    scene = engine.start(games.generate_game(KINDS[0], "longest", *FULL)[0])
    pair = rules.prompt["pair"].format(n=49, observation=scene.text, action="x" * MAX_COMMAND_CHARACTERS)
    words = {"task": "put a clean x in y", "observation": scene.text, "actions": ", ".join(scene.commands), "step": 48}
    text = rules.prompt["window"].format(**words, turn=49, history=f"{pair}\n{pair}", length=2)
    assert len(text) / 3 < rules.context_tokens - rules.response_tokens
