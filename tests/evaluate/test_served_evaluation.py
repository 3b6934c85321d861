"""A policy on a panel, played by servers: the same episodes as here, and never those of other weights."""

import json
import shutil
import signal
import threading
from itertools import islice

import pandas as pd
import pytest
from filelock import FileLock
from support.completions_server import CompletionsServer
from support.runs import DEADLINE, SCORED_RUN, BackgroundCall

from aem_exp import config, policy
from aem_exp.envs import opening
from aem_exp.evaluate import agents
from aem_exp.evaluate import command as evaluate
from aem_exp.evaluate.display import ProgressLine
from aem_exp.rollout import threads
from aem_exp.rollout.sampling import vllm_client
from aem_exp.rollout.sampling.local import LocalSampler, LocalSession
from aem_exp.rollout.sampling.vllm import seed_from_key

KEY = "k-7f3a"
PATIENCE = 8  # seconds, where a server never comes back: more than one of its answers takes on a busy machine
SMALL = [
    *SCORED_RUN,
    "trainer.learning_rate=0.01",
    "evaluation.tasks=8",
]  # so that two steps can be seen in what is said
PROGRESS = ("policy", "untrained", "random")  # what is at work, in a line
AGAIN = "asking again for up to"  # what is said at once of a server that does not answer
MODELS = ["--only", "policy", "--only", "untrained"]
PANEL = ["--panel", "dev", "--tasks", "6", "--repeats", "2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    from aem_exp.run.execution import run

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AEM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield run(config.load([*SMALL, f"outputs={tmp_path_factory.mktemp('runs')}"]))


@pytest.fixture(scope="module")
def untrained(trained):
    experiment = config.read(trained)
    return policy.make_cached(experiment, opening.open_world(experiment))


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(vllm_client, "FIRST_PAUSE", 0.05)


@pytest.fixture
def where(tmp_path):
    """The folder that says where servers are."""
    folder = tmp_path / "servers"
    folder.mkdir()
    (folder / "key").write_text(KEY)
    (folder / "key").chmod(0o600)
    return folder


@pytest.fixture
def server(untrained, where):
    with CompletionsServer(untrained, KEY) as started:
        (where / "urls").write_text(started.url)
        yield started


def words(target, where, outputs, *more, seconds=300):
    served = ["launch.sampler=served", f"launch.servers={where}", f"launch.server_seconds={seconds}"]
    return [str(target), *served, f"outputs={outputs}", *map(str, [*PANEL, *more])]


def ask(capsys, asked, code=0):
    """What the door finds, or the sentence that it says."""
    capsys.readouterr()
    got = evaluate.main([*asked, "--json"])
    out, err = capsys.readouterr()
    assert got == code, err
    if code:
        lines = [line for line in err.splitlines() if line and not line.startswith(PROGRESS)]
        (sentence,) = [line for line in lines if AGAIN not in line]
        assert KEY not in err and not out
        return sentence
    return json.loads(out)


def said(outputs, player):
    """What a player said, episode by episode."""
    (file,) = outputs.rglob(f"*-{player}/episodes.parquet")
    return [[turn["text"] for turn in episode] for episode in pd.read_parquet(file).responses]


class Seeded(LocalSampler):
    """Draws as the small server does, from the seed that a request has."""

    def session(self):
        session = LocalSession(self)
        generate = session.generate
        session.generate = lambda slots, prompts, keys, budgets: generate(
            slots, prompts, [(seed_from_key(key),) for key in keys], budgets
        )
        return session


def test_servers_play_what_would_be_played_here_and_each_row_by_its_weights(
    trained, server, where, capsys, tmp_path, monkeypatch
):
    loads = []
    load = policy.load
    monkeypatch.setattr(policy, "load", lambda *args: loads.append(args) or load(*args))
    served = ask(capsys, words(trained, where, tmp_path / "served"))["rows"]
    assert not loads, "no weights are loaded here"
    assert server.reloads == ["model", policy.Path(served["untrained"]["weights"]).name]
    assert server.most_at_once > 1
    monkeypatch.setattr(agents, "LocalSampler", Seeded)
    local = ask(capsys, [str(trained), f"outputs={tmp_path / 'local'}", *PANEL])["rows"]
    assert set(served) == set(local) == {"policy", "untrained", "random", "scripted"}
    for name, row in local.items():
        other = served[name]
        if name in ("policy", "untrained"):
            assert said(tmp_path / "served", name) == said(tmp_path / "local", name)
            assert other.pop("identity") == row.pop("identity") | {"sampler": "served"}
            assert other.pop("response_entropy") is None and row.pop("response_entropy") is not None
        assert other == row
    assert said(tmp_path / "served", "policy") != said(tmp_path / "served", "untrained")


def test_asked_again_it_shows_what_is_there_without_servers(trained, server, where, capsys, tmp_path):
    asked = words(trained, where, tmp_path, *MODELS)
    rows = ask(capsys, asked)
    asked_of, reloads = len(server.asked), len(server.reloads)
    (where / "urls").unlink()
    assert ask(capsys, asked) == rows
    assert (len(server.asked), len(server.reloads)) == (asked_of, reloads)


def test_where_a_server_ends_it_says_so_and_goes_on_when_asked_again(
    trained, untrained, server, where, capsys, tmp_path
):
    whole = ask(capsys, words(trained, where, tmp_path / "whole", "--only", "policy"))
    broken = words(trained, where, tmp_path / "broken", "--only", "policy", "--at-once", 4, seconds=PATIENCE)
    server.ends_at = len(server.asked) * 7 // 4  # in the midst of the second evaluation, by when some have ended
    told = ask(capsys, broken, code=1)
    assert "no server has answered" in told and "cannot be reached" in told
    rows = sum(len(pd.read_parquet(file)) for file in (tmp_path / "broken").rglob("episodes/*.parquet"))
    assert 4 <= rows < 12
    with CompletionsServer(untrained, KEY) as again:
        (where / "urls").write_text(again.url)
        assert ask(capsys, broken) == whole
        firsts = {request["seed"] for request in again.asked}
        keys = [
            ("panel", "dev[:6]", task.id, k, 0)
            for task in opening.open_world(config.read(trained)).tasks("dev")[:6]
            for k in (0, 1)
        ]
        assert len(firsts & {seed_from_key(key) for key in keys}) == 12 - rows, "what was played is not played again"
        assert again.reloads == ["model"]
    assert said(tmp_path / "broken", "policy") == said(tmp_path / "whole", "policy")


def test_a_server_that_is_started_anew_meanwhile_reads_the_weights_first(
    trained, untrained, server, where, capsys, tmp_path
):
    whole = ask(capsys, words(trained, where, tmp_path / "whole", "--only", "policy"))
    server.ends_at = len(server.asked) + 8

    def restart():
        assert server.ended.wait(DEADLINE)
        return CompletionsServer(untrained, KEY, server.port).__enter__()

    restarting = BackgroundCall(restart)
    assert ask(capsys, words(trained, where, tmp_path / "again", "--only", "policy")) == whole
    later = restarting.end()
    assert later.reloads == ["model"] and later.asked
    later.__exit__()


def test_so_many_are_played_at_once_and_none_waits_for_a_part_to_end(trained, server, where, capsys, tmp_path):
    server.seconds = 0.02
    ask(capsys, words(trained, where, tmp_path, "--only", "policy", "--at-once", 3))
    assert server.most_at_once == 3
    begun, slow = [], threading.Event()

    def do(hand, piece):
        begun.append(piece)
        if piece == 0:
            assert slow.wait(DEADLINE)
        if piece == 7:
            slow.set()  # all others were begun while the first was at work
        return hand, piece

    assert [piece for _, piece in threads.map_ordered(range(8), 2, do, lambda: None)] == [*range(8)] and begun[-1] == 7


def test_a_line_counts_episodes_that_play_each_by_itself():
    line, shown = ProgressLine(), []
    line._refresh = shown.append
    line.start_agent("policy", 2, 8, max_turns=4)
    for slot, turn in ((0, 1), (1, 1), (0, 2), (0, 1)):  # in slot 0 another has begun
        line.slot_turn(slot, turn)
    assert shown[1:] == [2.25, 2.5, 2.75, 3.5]


# What a server holds.


def test_a_server_that_reads_no_weights_plays_what_it_was_started_with_and_nothing_else(
    trained, where, capsys, tmp_path
):
    """As `vllm serve RUN_DIR/model` is, without development mode."""
    with CompletionsServer(trained / "model", KEY) as server:
        (where / "urls").write_text(server.url)
        server.develops = False
        found = ask(capsys, words(trained, where, tmp_path / "a"))
        assert set(found["rows"]) == {"policy", "random", "scripted"} and not server.reloads
        assert "reads no other weights" in found["left_out"]["untrained"]
        assert "VLLM_SERVER_DEV_MODE=1" in found["left_out"]["untrained"]
        told = ask(capsys, words(trained, where, tmp_path / "a", "--only", "untrained"), code=1)
        assert f"has {trained / 'model'}, and reads no other weights" in told
        (tmp_path / "link").symlink_to(trained / "model")
        server.root = f"{tmp_path / 'link'}/"
        assert ask(capsys, words(trained, where, tmp_path / "b", "--only", "policy"))["rows"] == {
            "policy": found["rows"]["policy"]
        }
        server.root, asked = "Qwen/Qwen3-32B", len(server.asked)
        told = ask(capsys, words(trained, where, tmp_path / "c"), code=1)
        assert "has Qwen/Qwen3-32B, and reads no other weights" in told
        assert len(server.asked) == asked, "nothing is played"


def test_a_hub_model_goes_by_its_name_and_whoever_reads_weights_reads_it(trained, where, server, capsys, tmp_path):
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / "abc123"
    shutil.copytree(trained / "model", snapshot)
    assert policy.weight_names(str(snapshot))[-1] == "someone/tiny"
    assert policy.weight_names(str(trained / "model"))[1:] == [str(trained / "model")]
    asked = words(snapshot, where, tmp_path / "out", "--only", "policy")
    server.root = "someone/tiny"
    ask(capsys, asked)
    assert server.reloads == ["abc123"], "it may have been trained with"
    with CompletionsServer(trained / "model", KEY) as plain:
        (where / "urls").write_text(plain.url)
        plain.develops, plain.root = False, "someone/tiny"
        assert evaluate.main(words(snapshot, where, tmp_path / "again", "--only", "policy")) == 0
        assert "and not which revision" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda s, where: setattr(s, "longest", 100), "takes 100 tokens at most, and env.context_tokens="),
        (lambda s, where: setattr(s, "key", "another"), "answers 401 (Unauthorized); is"),
        (lambda s, where: setattr(s, "rpc", lambda asked: (500, {"error": "no such shape"})), "no such shape"),
        (lambda s, where: setattr(s, "rpc", lambda asked: (400, {"error": "no such method"})), "does not read"),
    ],
    ids=["short", "key", "broken", "refused"],
)
def test_what_a_server_cannot_do_is_one_sentence_before_anything_is_played(
    trained, server, where, capsys, tmp_path, spoil, told
):
    spoil(server, where)
    sentence = ask(capsys, words(trained, where, tmp_path), code=1)
    assert told in sentence and not server.asked


def test_servers_of_a_run_are_not_taken_from_it(trained, server, where, capsys, tmp_path):
    with FileLock(where / "lock"):
        assert "another run uses these servers" in ask(capsys, words(trained, where, tmp_path), code=2)
    assert not server.reloads
    ask(capsys, words(trained, where, tmp_path, "--only", "policy"))
    with FileLock(where / "lock", timeout=0):
        pass


# The launch of an evaluation.


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["launch.sampler=served"], "launch.servers=null: the folder of servers that are up, or launch.sampler=local"),
        (["launch.servers=/s"], "launch.servers=/s: has no effect without launch.sampler=served"),
        (["launch.sampler=served", "launch.servers=/nowhere"], "must be a folder with urls"),
        (["launch.sampler=engine"], "is the trainer's"),
        (["launch.sampler=serve"], "did you mean served?"),
        (["launch.worker=3"], "did you mean workers?"),
        (["launch.server_nodes=2"], "launch.server_nodes=2: decides nothing here"),
        (["launch.where=slurm"], "launch.where=slurm: decides nothing here"),
        (["launch.trainer.fsdp=true"], "launch.trainer.fsdp=true: decides nothing here"),
        (["launch.gpus_per_node=8"], "must be at most 1"),
        (["launch.sampler=served", "launch.servers=/s", "model.dtype=bfloat16"], "as they were started"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_not_to_be_had_here_is_refused_by_name(trained, capsys, tmp_path, more, told):
    assert told in ask(capsys, [str(trained), f"outputs={tmp_path}", *PANEL, "--only", "policy", *more], code=2)


def test_what_training_took_of_a_cluster_is_left_behind(trained):
    """And servers of its job are gone, which has to be said."""
    from aem_exp.evaluate.request import _launch

    took = config.to_dict(config.load(["+experiment=swebench_32b"]))["launch"]
    with pytest.raises(config.ConfigError, match="servers that are up"):
        _launch(took, [])
    ours = _launch(took | {"servers": "/s"}, ["launch.servers=/s"])
    assert ours == {
        **{key: took[key] for key in ("name", "threads", "sampler", "server_seconds", "workers", "workers_at")},
        "env_seconds": 900,
        "gpus_per_node": 1,
        "servers": "/s",
    }
    local = _launch(took | {"sampler": "local"}, ["launch.sampler=local"])
    assert "server_seconds" not in local and local["workers"] == 8


def test_what_was_played_stays_whatever_became_of_the_others(trained, server, where, capsys, tmp_path, monkeypatch):
    """Ctrl-C in the midst of a part: its first episodes are not played again."""
    from aem_exp.rollout.play import Rollout

    stream = Rollout.stream

    def interrupted(self, episodes, sampler):
        played = stream(self, episodes, sampler)
        yield from islice(played, 5)
        signal.raise_signal(signal.SIGINT)
        yield from played

    asked = words(trained, where, tmp_path, "--only", "policy")
    with monkeypatch.context() as patch:
        patch.setattr(Rollout, "stream", interrupted)
        assert "to go on: python -m aem_exp.evaluate" in ask(capsys, asked, code=130)
    (part,) = tmp_path.rglob("episodes/*.parquet")
    assert [*pd.read_parquet(part).draw] == [0, 0, 1, 1, 2]
    assert ask(capsys, asked)["rows"]["policy"]["episodes"] == 12
    (whole,) = tmp_path.rglob("episodes.parquet")
    assert [*pd.read_parquet(whole).draw] == [task for task in range(6) for _ in (0, 1)]
