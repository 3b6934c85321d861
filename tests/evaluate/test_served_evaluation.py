"""Evaluation with vLLM servers: the same episodes as with a local sampler, and never with other weights."""

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
SERVER_SECONDS = 8  # for a server that never comes back; longer than one of its answers takes on a busy machine
SMALL = [
    *SCORED_RUN,
    "trainer.learning_rate=0.01",
    "evaluation.tasks=8",
]  # a high learning rate, so that two steps change the responses
PROGRESS = ("policy", "untrained", "random")  # progress lines begin with the agent
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
def short_pause(monkeypatch):
    monkeypatch.setattr(vllm_client, "FIRST_PAUSE", 0.05)


@pytest.fixture
def servers_folder(tmp_path):
    """The folder with the URLs and the key of the servers."""
    folder = tmp_path / "servers"
    folder.mkdir()
    (folder / "key").write_text(KEY)
    (folder / "key").chmod(0o600)
    return folder


@pytest.fixture
def server(untrained, servers_folder):
    with CompletionsServer(untrained, KEY) as started:
        (servers_folder / "urls").write_text(started.url)
        yield started


def words(target, servers_folder, outputs, *more, seconds=300):
    served = ["launch.sampler=served", f"launch.servers={servers_folder}", f"launch.server_seconds={seconds}"]
    return [str(target), *served, f"outputs={outputs}", *map(str, [*PANEL, *more])]


def run_evaluate(capsys, arguments, code=0):
    """Run the command; return its JSON output, or its error if `code` is not 0."""
    capsys.readouterr()
    exit_code = evaluate.main([*arguments, "--json"])
    out, err = capsys.readouterr()
    assert exit_code == code, err
    if code:
        lines = [line for line in err.splitlines() if line and not line.startswith((*PROGRESS, "Loading weights"))]
        (error,) = [line for line in lines if line.startswith(("aem_exp: ", "stopped"))]
        assert all("http://" in line for line in lines if line != error), lines  # warnings about a server
        assert KEY not in err and not out
        return error
    return json.loads(out)


def response_texts(outputs, agent):
    """Return the texts of an agent's responses, one list per episode."""
    (file,) = outputs.rglob(f"*-{agent}/episodes.parquet")
    return [[turn["text"] for turn in episode] for episode in pd.read_parquet(file).responses]


class SeededSampler(LocalSampler):
    """Draws tokens with the seed of a request, as the test server does."""

    def session(self):
        session = LocalSession(self)
        generate = session.generate
        session.generate = lambda slots, prompts, keys, budgets: generate(
            slots, prompts, [(seed_from_key(key),) for key in keys], budgets
        )
        return session


@pytest.mark.slow
def test_served_evaluation_equals_a_local_one(trained, server, servers_folder, capsys, tmp_path, monkeypatch):
    loads = []
    load = policy.load
    monkeypatch.setattr(policy, "load", lambda *args: loads.append(args) or load(*args))
    served = run_evaluate(capsys, words(trained, servers_folder, tmp_path / "served"))["rows"]
    assert len(loads) == 2, "once for each model, to compare the server with it"
    assert server.compared == 2 and not (servers_folder / "weights").exists()
    assert server.reloads == ["model", policy.Path(served["untrained"]["weights"]).name]
    assert server.most_at_once > 1
    monkeypatch.setattr(agents, "LocalSampler", SeededSampler)
    local = run_evaluate(capsys, [str(trained), f"outputs={tmp_path / 'local'}", *PANEL])["rows"]
    assert set(served) == set(local) == {"policy", "untrained", "random", "scripted"}
    for name, row in local.items():
        other = served[name]
        if name in ("policy", "untrained"):
            assert response_texts(tmp_path / "served", name) == response_texts(tmp_path / "local", name)
            assert other.pop("identity") == row.pop("identity") | {"sampler": "served"}
            assert other.pop("response_entropy") is None and row.pop("response_entropy") is not None
        assert other == row
    assert response_texts(tmp_path / "served", "policy") != response_texts(tmp_path / "served", "untrained")


@pytest.mark.slow
def test_results_are_shown_again_without_servers(trained, server, servers_folder, capsys, tmp_path):
    arguments = words(trained, servers_folder, tmp_path, *MODELS)
    rows = run_evaluate(capsys, arguments)
    requests, reloads = len(server.asked), len(server.reloads)
    (servers_folder / "urls").unlink()
    assert run_evaluate(capsys, arguments) == rows
    assert (len(server.asked), len(server.reloads)) == (requests, reloads)


@pytest.mark.slow
def test_evaluation_resumes_after_a_server_has_ended(trained, untrained, server, servers_folder, capsys, tmp_path):
    whole = run_evaluate(capsys, words(trained, servers_folder, tmp_path / "whole", "--only", "policy"))
    broken = words(
        trained, servers_folder, tmp_path / "broken", "--only", "policy", "--at-once", 4, seconds=SERVER_SECONDS
    )
    server.ends_at = len(server.asked) * 7 // 4  # during the second evaluation, after some episodes have ended
    error = run_evaluate(capsys, broken, code=1)
    assert server.url in error and "launch.server_seconds" in error
    rows = sum(len(pd.read_parquet(file)) for file in (tmp_path / "broken").rglob("episodes/*.parquet"))
    assert 4 <= rows < 12
    with CompletionsServer(untrained, KEY) as again:
        (servers_folder / "urls").write_text(again.url)
        assert run_evaluate(capsys, broken) == whole
        firsts = {request["seed"] for request in again.asked}
        keys = [
            ("panel", "dev[:6]", task.id, k, 0)
            for task in opening.open_world(config.read(trained)).tasks("dev")[:6]
            for k in (0, 1)
        ]
        assert len(firsts & {seed_from_key(key) for key in keys}) == 12 - rows, (
            "finished episodes must not be played again"
        )
        assert again.reloads == ["model"]
    assert response_texts(tmp_path / "broken", "policy") == response_texts(tmp_path / "whole", "policy")


@pytest.mark.slow
def test_restarted_server_loads_the_weights_first(trained, untrained, server, servers_folder, capsys, tmp_path):
    whole = run_evaluate(capsys, words(trained, servers_folder, tmp_path / "whole", "--only", "policy"))
    server.ends_at = len(server.asked) + 8

    def restart():
        assert server.ended.wait(DEADLINE)
        return CompletionsServer(untrained, KEY, server.port).__enter__()

    restarting = BackgroundCall(restart)
    assert run_evaluate(capsys, words(trained, servers_folder, tmp_path / "again", "--only", "policy")) == whole
    later = restarting.end()
    assert later.reloads == ["model"] and later.asked
    later.__exit__()


@pytest.mark.slow
def test_parallel_episodes_are_limited_and_do_not_wait_for_slow_ones(trained, server, servers_folder, capsys, tmp_path):
    server.seconds = 0.02
    run_evaluate(capsys, words(trained, servers_folder, tmp_path, "--only", "policy", "--at-once", 3))
    assert server.most_at_once == 3
    started, slow = [], threading.Event()

    def work(thread, item):
        started.append(item)
        if item == 0:
            assert slow.wait(DEADLINE)
        if item == 7:
            slow.set()  # all other items started while item 0 was in progress
        return thread, item

    assert [item for _, item in threads.map_ordered(range(8), 2, work, lambda: None)] == [*range(8)]
    assert started[-1] == 7


def test_progress_counts_independent_episodes():
    line, shown = ProgressLine(), []
    line.start_agent("policy", 2, 8, max_turns=4)
    for slot, turn in ((0, 1), (1, 1), (0, 2), (0, 1)):  # at last, slot 0 has a new episode
        line.slot_turn(slot, turn)
        shown.append(line.bar.tasks[-1].completed)
    assert shown == [2.25, 2.5, 2.75, 3.5]


# The weights of a server.


@pytest.mark.slow
def test_server_that_loads_no_weights_plays_only_its_own(trained, servers_folder, capsys, tmp_path):
    """Such as `vllm serve RUN_DIR/model` without development mode."""
    with CompletionsServer(trained / "model", KEY) as server:
        (servers_folder / "urls").write_text(server.url)
        server.develops = False
        found = run_evaluate(capsys, words(trained, servers_folder, tmp_path / "a"))
        assert set(found["rows"]) == {"policy", "random", "scripted"} and not server.reloads
        assert "VLLM_SERVER_DEV_MODE=1" in found["left_out"]["untrained"]
        error = run_evaluate(capsys, words(trained, servers_folder, tmp_path / "a", "--only", "untrained"), code=1)
        assert str(trained / "model") in error and "VLLM_SERVER_DEV_MODE=1" in error
        (tmp_path / "link").symlink_to(trained / "model")
        server.root = f"{tmp_path / 'link'}/"
        assert run_evaluate(capsys, words(trained, servers_folder, tmp_path / "b", "--only", "policy"))["rows"] == {
            "policy": found["rows"]["policy"]
        }
        server.root, asked = "Qwen/Qwen3-32B", len(server.asked)
        error = run_evaluate(capsys, words(trained, servers_folder, tmp_path / "c"), code=1)
        assert "Qwen/Qwen3-32B" in error and "VLLM_SERVER_DEV_MODE=1" in error
        assert len(server.asked) == asked, "nothing may be played"


@pytest.mark.slow
def test_hub_model_is_matched_by_its_name(trained, servers_folder, server, capsys, tmp_path):
    snapshot = tmp_path / "models--someone--tiny" / "snapshots" / "abc123"
    shutil.copytree(trained / "model", snapshot)
    assert policy.weight_names(str(snapshot))[-1] == "someone/tiny"
    assert policy.weight_names(str(trained / "model"))[1:] == [str(trained / "model")]
    arguments = words(snapshot, servers_folder, tmp_path / "out", "--only", "policy")
    server.root = "someone/tiny"
    run_evaluate(capsys, arguments)
    assert server.reloads == ["abc123"], "a server that can load weights loads them: its own may have changed"
    with CompletionsServer(trained / "model", KEY) as plain:
        (servers_folder / "urls").write_text(plain.url)
        plain.develops, plain.root = False, "someone/tiny"
        assert evaluate.main(words(snapshot, servers_folder, tmp_path / "again", "--only", "policy")) == 0
        assert "revision" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("break_server", "facts"),
    [
        (lambda s: setattr(s, "longest", 100), [" 100 ", "env.context_tokens="]),
        (lambda s: setattr(s, "key", "another"), ["401"]),
        (lambda s: setattr(s, "rpc", lambda asked: (500, {"error": "no such shape"})), ["no such shape"]),
        (lambda s: setattr(s, "rpc", lambda asked: (400, {"error": "no such method"})), ["400", "no such method"]),
    ],
    ids=["short context", "wrong key", "failed load", "no load"],
)
def test_unusable_server_is_an_error_before_anything_is_played(
    trained, server, servers_folder, capsys, tmp_path, break_server, facts
):
    break_server(server)
    error = run_evaluate(capsys, words(trained, servers_folder, tmp_path), code=1)
    assert all(fact in error for fact in facts) and not server.asked, error


@pytest.mark.slow
def test_locked_servers_are_an_error(trained, server, servers_folder, capsys, tmp_path):
    with FileLock(servers_folder / "lock"):
        assert f"launch.servers={servers_folder.parent}" in run_evaluate(
            capsys, words(trained, servers_folder, tmp_path), code=2
        )
    assert not server.reloads
    run_evaluate(capsys, words(trained, servers_folder, tmp_path, "--only", "policy"))
    with FileLock(servers_folder / "lock", timeout=0):
        pass


# Launch settings of an evaluation.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "error"),
    [
        (["launch.sampler=served"], "launch.servers=null: "),
        (["launch.servers=/s"], "launch.servers=/s: "),
        (["launch.sampler=served", "launch.servers=/nowhere"], "launch.servers=/nowhere: "),
        (["launch.sampler=engine"], "launch.sampler=engine: choose from local, served"),
        (["launch.sampler=serve"], "launch.sampler=serve: did you mean served?"),
        (["launch.worker=3"], "did you mean workers?"),
        (["launch.server_nodes=2"], "launch.server_nodes=2: "),
        (["launch.where=slurm"], "launch.where=slurm: "),
        (["launch.trainer.fsdp=true"], "launch.trainer.fsdp=true: "),
        (["launch.gpus_per_node=8"], "launch.gpus_per_node=8: "),
        (["launch.sampler=served", "launch.servers=/s", "model.dtype=bfloat16"], "model.dtype=bfloat16: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_launch_settings_that_an_evaluation_cannot_use(trained, capsys, tmp_path, more, error):
    assert error in run_evaluate(
        capsys, [str(trained), f"outputs={tmp_path}", *PANEL, "--only", "policy", *more], code=2
    )


def test_launch_settings_of_training_are_reduced(trained):
    """An evaluation drops the cluster settings. The servers of the training job have ended, so others must be named."""
    from aem_exp.evaluate.request import evaluation_launch

    training = config.to_dict(config.load(["+experiment=swebench_32b"]))["launch"]
    with pytest.raises(config.ConfigError) as error:
        evaluation_launch(training, [])
    assert (error.value.field, error.value.value) == ("launch.servers", None)
    served = evaluation_launch(training | {"servers": "/s"}, ["launch.servers=/s"])
    assert served == {
        **{key: training[key] for key in ("name", "threads", "sampler", "server_seconds", "workers", "worker_prefix")},
        "env_seconds": 900,
        "gpus_per_node": 1,
        "servers": "/s",
    }
    local = evaluation_launch(training | {"sampler": "local"}, ["launch.sampler=local"])
    assert "server_seconds" not in local and local["workers"] == 8


@pytest.mark.slow
def test_interrupted_part_keeps_its_finished_episodes(trained, server, servers_folder, capsys, tmp_path, monkeypatch):
    """After Ctrl-C in the middle of a part, its first episodes are not played again."""
    from aem_exp.rollout.play import Rollout

    stream = Rollout.stream

    def interrupted(self, episodes, sampler):
        played = stream(self, episodes, sampler)
        yield from islice(played, 5)
        signal.raise_signal(signal.SIGINT)
        yield from played

    arguments = words(trained, servers_folder, tmp_path, "--only", "policy")
    with monkeypatch.context() as patch:
        patch.setattr(Rollout, "stream", interrupted)
        assert "python -m aem_exp.evaluate" in run_evaluate(capsys, arguments, code=130)
    (part,) = tmp_path.rglob("episodes/*.parquet")
    assert [*pd.read_parquet(part).draw] == [0, 0, 1, 1, 2]
    assert run_evaluate(capsys, arguments)["rows"]["policy"]["episodes"] == 12
    (whole,) = tmp_path.rglob("episodes.parquet")
    assert [*pd.read_parquet(whole).draw] == [task for task in range(6) for _ in (0, 1)]


@pytest.mark.slow
def test_server_that_keeps_a_tied_head_is_an_error_before_anything_is_played(
    trained, server, servers_folder, capsys, tmp_path
):
    server.stale = "lm_head"
    error = run_evaluate(capsys, words(trained, servers_folder, tmp_path, "--only", "policy"), code=1)
    assert server.url in error and "it has other weights" in error and not server.asked


@pytest.mark.slow
def test_large_model_is_not_compared(trained, server, servers_folder, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(agents, "MEMORY_FACTOR", 10**12)
    assert evaluate.main(words(trained, servers_folder, tmp_path, "--only", "policy")) == 0
    assert "the servers are not compared" in capsys.readouterr().err and server.asked and not server.compared
