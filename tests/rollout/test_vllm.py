"""Sampling from servers over real HTTP: exact tokens, failures of servers, independent episodes, and training."""

import gzip
import inspect
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from support import delayed_world, torchrun_served, toy
from support.completions_server import CompletionsServer
from support.runs import DEADLINE, SMALL_RUN, BackgroundCall, read_metrics, torchrun, wait_until

from aem_exp import config, policy
from aem_exp.cluster import rendezvous
from aem_exp.config import ConfigError
from aem_exp.core.errors import RunError
from aem_exp.envs import opening
from aem_exp.envs.executor import SerialExecutor
from aem_exp.envs.workers import WorkerPool
from aem_exp.rollout.chat import Chat
from aem_exp.rollout.clock import Clock
from aem_exp.rollout.play import Rollout
from aem_exp.rollout.sampling import vllm_client, weight_sync
from aem_exp.rollout.sampling.agreement import Agreement
from aem_exp.rollout.sampling.base import IndependentSampler, SamplingParams
from aem_exp.rollout.sampling.local import LocalSampler
from aem_exp.rollout.sampling.vllm import ServerSampler, seed_from_key
from aem_exp.rollout.sampling.vllm_client import Servers
from aem_exp.rollout.types import Ending
from aem_exp.run.execution import run

HISTORIES = ["full", "window"]
KEY = "k-123"
SECONDS = 300.0  # longer than any request here takes on a busy machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("toy")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    """Keep the pauses between retries short."""
    monkeypatch.setattr(vllm_client, "FIRST_PAUSE", 0.05)


def saved_policy(folder, history="full"):
    """The folder of the toy policy, and its Chat."""
    _, tokenizer = toy.policy(folder, history)
    return folder / f"policy-{history}-0", Chat(tokenizer)


def write_server_folder(folder, *running, key=KEY):
    """Write the addresses and the key of running servers to a folder."""
    folder.mkdir(exist_ok=True)
    (folder / "urls").write_text("".join(f"{server.url}\n" for server in running))
    if key:
        (folder / "key").write_text(f"{key}\n")
        (folder / "key").chmod(0o600)
    return folder


def make_sampler(servers, chat, rank=0):
    """A sampler for the toy policy on these servers."""
    return ServerSampler(servers, chat.end_ids, SamplingParams(), vocabulary=len(chat.tokenizer), rank=rank)


@pytest.fixture
def served(folder, tmp_path):
    """One server, a sampler that uses it, and the Chat of the policy."""
    saved, chat = saved_policy(folder)
    with CompletionsServer(saved, KEY) as server:
        servers = Servers(write_server_folder(tmp_path / "servers", server), SECONDS)
        yield server, make_sampler(servers, chat), chat
        servers.cancel()


def generate(sampler, chat, key=("k",), budget=5, slot=0):
    """Sample one response in a new session."""
    return sampler.session().generate_one(slot, chat.first_prompt("hello a"), key, budget)


# Exact tokens.


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(0.6), SamplingParams(1.3, 0.8, 5, 0.02)])
def test_tokens_and_log_probs_are_those_of_the_local_sampler(folder, served, sampling):
    """With equal seeds, the server returns what the policy samples locally, over two turns."""
    server, sampler, chat = served
    sampler.sampling = sampling
    local = LocalSampler(server.model, chat.end_ids, sampling)
    prompts = [chat.first_prompt(f"hello {word}") for word in toy.WORDS]
    keys, budgets = [("k", n) for n in range(12)], [n % 5 + 1 for n in range(12)]
    session = sampler.session()
    theirs = session.generate(range(12), prompts, keys, budgets)
    follow = [chat.next_prompt("go", sample.ids[-1]) for sample in theirs]
    theirs += session.generate(range(12), follow, [(*key, 1) for key in keys], budgets)
    ours_session = local.session()
    ours = ours_session.generate(range(12), prompts, [(seed_from_key(key),) for key in keys], budgets)
    ours += ours_session.generate(range(12), follow, [(seed_from_key((*key, 1)),) for key in keys], budgets)
    assert [s.ids for s in theirs] == [s.ids for s in ours]
    assert [p for s in theirs for p in s.logps] == pytest.approx([p for s in ours for p in s.logps], abs=1e-4)
    assert not any(s.entropies for s in theirs)
    assert {request["temperature"] for request in server.asked} == {sampling.temperature}


@pytest.mark.slow
def test_seed_depends_on_the_key_only(served):
    server, sampler, chat = served
    same = [generate(sampler, chat, ("a", 1)).ids for _ in range(2)]
    assert same[0] == same[1]
    assert len({tuple(generate(sampler, chat, ("a", n)).ids) for n in range(8)}) > 3
    seeds = [request["seed"] for request in server.asked]
    assert len(set(seeds)) == 8 and all(0 <= s < 2**63 for s in seeds)


def _append_tokens(answer):
    answer["choices"][0]["token_ids"] += [5] * 9
    answer["choices"][0]["logprobs"]["token_logprobs"] += [-1.0] * 9
    return answer


def _change_choice(**changes):
    return lambda answer: answer | {"choices": [answer["choices"][0] | changes]}


@pytest.mark.parametrize(
    ("twist", "fact"),
    [
        (_append_tokens, "1 to 5"),
        (_change_choice(token_ids=None), "return_token_ids"),
        (_change_choice(token_ids=[]), "0 tokens"),
        (_change_choice(token_ids="a"), "return_token_ids"),
        (_change_choice(logprobs=None), "return_token_ids"),
        (_change_choice(prompt_token_ids=[1]), "prompt_token_ids"),
        (_change_choice(finish_reason="abort"), "finish_reason .*'abort'"),
        (_change_choice(finish_reason="\x1b[31m" + "x" * 999), r"finish_reason .*'.x1b.31mx{1,40}[^x]"),
        (lambda answer: {"choices": []}, "return_token_ids"),
        (lambda answer: {"choices": ["a"]}, "return_token_ids"),
        (lambda answer: [answer], "JSON object"),
    ],
    ids=[
        *("too many tokens", "no token ids", "empty", "token ids are text", "no log-probs", "other prompt", "aborted"),
        *("control characters", "no choice", "choice is text", "no object"),
    ],
)
def test_invalid_answer_ends_the_run(served, twist, fact):
    server, sampler, chat = served
    server.twist = twist
    with pytest.raises(RunError, match=fact) as caught:
        generate(sampler, chat)
    assert caught.value.kind == "config"


@pytest.mark.parametrize(
    "token", ["a", -5, 10**9, 10**400, True, 1.0, None, [1], "last + 1"], ids=lambda token: str(token)[:9]
)
def test_token_id_outside_the_vocabulary_ends_the_run(served, token):
    server, sampler, chat = served
    token = sampler.vocabulary if token == "last + 1" else token
    server.twist = _change_choice(token_ids=[token], logprobs={"token_logprobs": [-1.0]})
    with pytest.raises(RunError, match=rf"token id .*from 0 to {sampler.vocabulary - 1}") as caught:
        generate(sampler, chat)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "logp", [float("nan"), float("inf"), -float("inf"), 0.01, 7, -(10**400), True, False, None, "-1"]
)
def test_impossible_log_prob_ends_the_run(served, logp):
    server, sampler, chat = served
    server.twist = _change_choice(token_ids=[0], logprobs={"token_logprobs": [logp]})
    with pytest.raises(RunError, match=r"log-prob .*from -10000 to 0") as caught:
        generate(sampler, chat)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("logp", [0, -3, 1e-4, -9999.0])
def test_log_prob_may_be_rounded_or_zero_probability(served, logp):
    server, sampler, chat = served
    server.twist = _change_choice(token_ids=[0], logprobs={"token_logprobs": [logp]})
    assert generate(sampler, chat).logps == [logp]


def send_head(out, **headers):
    out.send_response(200)
    for name, value in headers.items():
        out.send_header(name.replace("_", "-"), value)
    out.end_headers()


@pytest.mark.slow
def test_time_limit_holds_for_an_answer_that_arrives_byte_by_byte(served):
    """Each byte arrives in time, but the whole answer does not."""
    server, sampler, chat = served
    over = threading.Event()

    def trickle(out):
        send_head(out, Content_Length="10000")
        while not over.wait(0.1):
            out.wfile.write(b" ")

    server.raw = trickle
    call = BackgroundCall(generate, replace_servers(sampler, Servers(sampler.servers.folder, 2.0)), chat)
    try:
        with pytest.raises(RunError, match="within 2 s"):
            call.end(60)
    finally:
        over.set()


def test_answer_above_the_size_limit_ends_the_run(served):
    server, sampler, chat = served
    sent = []

    def pour(out):
        send_head(out, Connection="close")
        while len(sent) < 400:
            out.wfile.write(bytes(1 << 20))
            sent.append(1)

    server.raw = pour
    with pytest.raises(RunError, match=r"1,0\d\d,\d\d\d bytes"):
        generate(sampler, chat)
    assert len(sent) < 100


@pytest.mark.slow
def test_compressed_answer_is_refused_without_decompression(served):
    server, sampler, chat = served
    accepted = []

    def bomb(out):
        accepted.append(out.headers["Accept-Encoding"])
        body = gzip.compress(bytes(100 << 20))
        send_head(out, Content_Encoding="gzip", Content_Length=str(len(body)))
        out.wfile.write(body)

    server.raw = bomb
    with pytest.raises(RunError, match="'gzip'"):
        generate(sampler, chat)
    assert accepted == ["identity"]


def test_deeply_nested_json_is_a_run_error(served):
    server, sampler, chat = served

    def nest(out):
        send_head(out, Content_Length="500000")
        out.wfile.write(b"[" * 500_000)

    server.raw = nest
    with pytest.raises(RunError, match="JSON object"):
        generate(sampler, chat)


def test_server_messages_are_sanitized(served):
    server, sampler, chat = served
    message = "\x1b[31mred\x1b[0m\x07 \x1b]0;title\x07\u202e\x9b5m\nnext"

    def refuse(out):
        out.send_response(400)
        out.end_headers()
        out.wfile.write(body.encode())

    server.raw = refuse
    for body in (json.dumps({"error": {"message": message}}), message, '{"error":' * 99_999, f"{KEY[:3]}\x07{KEY[3:]}"):
        with pytest.raises(RunError, match=r"\b400\b") as caught:
            generate(sampler, chat)
        sentence = str(caught.value)
        assert sentence.isprintable() and KEY not in sentence and len(sentence) < 500
        assert "red" in sentence or message not in body


# Servers that are slow, fail, restart or belong to somebody else.


@pytest.mark.slow
def test_temporary_failure_is_retried_with_the_same_request(served):
    server, sampler, chat = served
    expected = generate(sampler, chat)
    server.fails = [500, 429, 503]
    assert generate(sampler, chat) == expected
    assert len(server.asked) == 5 and len({json.dumps(request) for request in server.asked}) == 1


@pytest.mark.parametrize(("status", "fact"), [(400, r"\b400 .the engine is not well"), (404, r"\b404\b")])
def test_refused_request_ends_the_run_without_a_retry(served, status, fact):
    server, sampler, chat = served
    server.fails = [status]
    with pytest.raises(RunError, match=fact):
        generate(sampler, chat)
    assert len(server.asked) == 1


def test_wrong_key_names_the_key_file_but_not_the_key(served):
    server, sampler, chat = served
    server.key = "another"
    with pytest.raises(RunError, match=rf"\b401\b.*{sampler.servers.folder / 'key'}") as caught:
        generate(sampler, chat)
    assert KEY not in str(caught.value)


@pytest.mark.slow
def test_failing_server_and_slow_server_end_the_run_at_the_time_limit(served):
    server, sampler, chat = served
    sampler = replace_servers(sampler, Servers(sampler.servers.folder, 3.0))
    server.fails = [500] * 999
    with pytest.raises(RunError, match=r"launch.server_seconds.*\b500 .the engine is not well") as caught:
        generate(sampler, chat)
    assert caught.value.kind == "node"
    server.fails, server.seconds = [], SECONDS
    with pytest.raises(RunError, match="within 3 s"):
        generate(sampler, chat)


def replace_servers(sampler, servers):
    return ServerSampler(servers, sampler.end_ids, sampler.sampling, vocabulary=sampler.vocabulary)


@pytest.mark.slow
def test_restarted_server_is_awaited_and_gets_the_newest_weights(folder, tmp_path, caplog):
    saved, chat = saved_policy(folder)
    other = folder / "policy-full-1"
    toy.policy(folder, "full", seed=1)
    with CompletionsServer(saved, KEY) as first:
        sampler = make_sampler(Servers(write_server_folder(tmp_path / "s", first), SECONDS), chat)
        before = generate(sampler, chat)
        sampler.servers.load(other)
        newest = generate(sampler, chat)
        assert first.reloads == [other.name] and newest != before
    waiting = BackgroundCall(generate, sampler, chat)
    time.sleep(0.5)
    assert waiting.busy
    with CompletionsServer(saved, KEY, port=first.port) as again:
        with caplog.at_level(logging.INFO):
            assert waiting.end() == newest and again.reloads == [other.name]
        assert f"{again.url} answers again" in caplog.text
        assert generate(sampler, chat) == newest and len(again.reloads) == 1
    with CompletionsServer(saved, KEY) as moved:
        (tmp_path / "s" / "urls").write_text(moved.url)
        assert generate(sampler, chat) == newest and moved.reloads == [other.name]
    sampler.servers.cancel()


@pytest.mark.slow
def test_request_is_repeated_and_weights_reloaded_after_a_quick_restart(folder, tmp_path):
    """The restart takes less time than the pause between two attempts."""
    saved, chat = saved_policy(folder)
    toy.policy(folder, "full", seed=1)
    with CompletionsServer(saved, KEY) as first:
        sampler = make_sampler(Servers(write_server_folder(tmp_path / "s", first), SECONDS), chat)
        sampler.servers.load(folder / "policy-full-1")
        newest = generate(sampler, chat)
        first.seconds = SECONDS
        waiting = BackgroundCall(generate, sampler, chat)
        wait_until(lambda: len(first.asked) == 2, "the second request")
    with CompletionsServer(saved, KEY, port=first.port) as again:
        assert waiting.end() == newest and len(again.reloads) == 1
        sampler.servers.cancel()


@pytest.mark.slow
def test_server_that_does_not_answer_causes_one_warning(folder, tmp_path, caplog):
    """Several callers retry at the same time."""
    saved, chat = saved_policy(folder)
    with CompletionsServer(saved, KEY) as first:
        sampler = make_sampler(Servers(write_server_folder(tmp_path / "s", first), SECONDS), chat)
    waiting = [BackgroundCall(generate, sampler, chat, ("k", n)) for n in range(3)]
    wait_until(lambda: caplog.messages, "the warning")
    time.sleep(0.5)  # time for more retries
    assert all(call.busy for call in waiting)
    with CompletionsServer(saved, KEY, port=first.port):
        assert all(call.end().ids for call in waiting)
    (warning,) = caplog.messages
    assert first.url in warning and "300 s" in warning
    sampler.servers.cancel()


@pytest.mark.slow
def test_run_ends_when_a_server_of_its_job_has_ended(folder, tmp_path):
    saved, chat = saved_policy(folder)
    with CompletionsServer(saved, KEY) as first:
        sampler = make_sampler(Servers(write_server_folder(tmp_path / "s", first), SECONDS), chat)
    waiting = BackgroundCall(generate, sampler, chat)
    time.sleep(0.3)
    assert waiting.busy
    rendezvous.write_ended(tmp_path / "s", "1", "the server on node7 has ended with code 9")
    with pytest.raises(RunError, match=f"the server on node7 has ended with code 9; .*{first.url}") as stopped:
        waiting.end(60)
    assert stopped.value.kind == "node"
    with pytest.raises(RunError, match="node7 has ended with code 9"):
        rendezvous.wait_for_servers(tmp_path / "s", 2, SECONDS)
    sampler.servers.cancel()


@pytest.mark.parametrize(("name", "found"), [("10.1.2.3", True), ("8.8.8.8", False), ("0.0.0.0", False)])
def test_servers_listen_on_private_addresses_only(monkeypatch, name, found):
    monkeypatch.setenv("SLURMD_NODENAME", name)
    if found:
        assert rendezvous.private_address(None) == name
    else:
        with pytest.raises(ConfigError, match=rf"private .*{name}") as refused:
            rendezvous.private_address(None)
        assert refused.value.field == "interface"
    assert rendezvous.private_address("lo") == "127.0.0.1"


@pytest.mark.slow
def test_restarted_server_has_lost_streamed_weights(folder, tmp_path):
    saved, chat = saved_policy(folder)
    with CompletionsServer(saved, KEY) as server:
        sampler = make_sampler(Servers(write_server_folder(tmp_path / "s", server), SECONDS), chat)
        sampler.servers.mark_updated(None)
        generate(sampler, chat)
    waiting = BackgroundCall(generate, sampler, chat)
    time.sleep(0.4)
    with (
        CompletionsServer(server.model, KEY, server.port),
        pytest.raises(RunError, match=r"launch\.server_weights=nccl") as lost,
    ):
        waiting.end()
    assert lost.value.kind == "node"
    sampler.servers.cancel()


@pytest.mark.slow
def test_episode_keeps_its_server_and_moves_when_the_server_does_not_answer(folder, tmp_path):
    saved, chat = saved_policy(folder)
    with CompletionsServer(saved, KEY) as one, CompletionsServer(saved, KEY) as two:
        servers = Servers(write_server_folder(tmp_path / "s", one, two), SECONDS)
        sampler = make_sampler(servers, chat)
        for turn in range(3):
            for slot in range(4):
                generate(sampler, chat, (slot, turn), slot=slot)
        assert [len(one.asked), len(two.asked)] == [6, 6]
        assert {request["seed"] for request in one.asked} == {seed_from_key((s, t)) for s in (0, 2) for t in range(3)}
        other_rank = make_sampler(servers, chat, rank=1)
        generate(other_rank, chat, ("rank",))
        assert len(two.asked) == 7
        one.__exit__()
        assert generate(sampler, chat, (0, 9)) == generate(sampler, chat, (0, 9), slot=1)
        assert len(two.asked) == 9
        servers.cancel()


def test_proxy_variables_of_the_environment_are_ignored(served, monkeypatch):
    _, sampler, chat = served
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    assert generate(replace_servers(sampler, Servers(sampler.servers.folder, SECONDS)), chat).ids


@pytest.mark.parametrize(
    ("spoil", "fact"),
    [
        (lambda f: (f / "key").chmod(0o640), "s/key: .*read .*600"),
        (lambda f: (f / "key").write_text("\n"), "s/key: .*printable"),
        (lambda f: (f / "urls").unlink(), "s: .*urls.*No such file"),
        (lambda f: (f / "urls").write_text(""), "s/urls: .*address"),
        (lambda f: (f / "urls").write_text("10.0.0.7:80"), r"s/urls: .*address.*http://10\.0\.0\.7:41234"),
        (lambda f: (f / "urls").write_text("http://me:pw@10.0.0.7:80"), "s/urls: .*credentials"),
        (lambda f: ((f / "urls").write_text("http://10.0.0.7:80"), (f / "key").unlink()), "s: .*key"),
    ],
    ids=["readable key", "empty key", "no urls", "empty urls", "no url", "credentials", "no key"],
)
def test_invalid_server_folder_is_a_config_error(tmp_path, spoil, fact):
    folder = valid_server_folder(tmp_path / "s")
    assert rendezvous.read_urls(folder) == (["http://10.0.0.7:41234"], KEY)
    spoil(folder)
    with pytest.raises(ConfigError, match=fact) as caught:
        rendezvous.read_urls(folder)
    assert caught.value.field == "launch.servers"
    sentence = str(caught.value)
    assert "\n" not in sentence and "pw" not in sentence and KEY not in sentence


@pytest.mark.parametrize("name", ["", "urls", "key"])
@pytest.mark.parametrize("mode", [0o666, 0o777, 0o660])
def test_server_folder_that_others_can_write_is_refused(tmp_path, name, mode):
    folder = valid_server_folder(tmp_path / "s")
    (folder / name).chmod(mode | 0o700 if not name else mode)
    with pytest.raises(ConfigError) as caught:
        rendezvous.read_urls(folder)
    assert (caught.value.field, str(caught.value.value)) == ("launch.servers", str(folder / name))
    assert f"chmod -R go-w {folder}" in caught.value.remedy and "\n" not in str(caught.value)
    subprocess.run(["chmod", "-R", "go-w", folder], check=True)
    if name != "key":
        assert rendezvous.read_urls(folder)[1] == KEY


@pytest.mark.parametrize("name", ["", "urls", "key"])
def test_server_folder_of_another_user_is_refused(tmp_path, name, monkeypatch):
    folder = valid_server_folder(tmp_path / "s")
    if os.geteuid() == 0:
        os.chown(folder / name, 12345, -1)
    else:
        owner = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(ConfigError, match=r"user \d+") as refused:
        rendezvous.read_urls(folder)
    assert refused.value.field == "launch.servers"
    assert rendezvous.reread_urls(folder, ["http://10.0.0.7:1"]) == ["http://10.0.0.7:1"]


@pytest.mark.parametrize("name", ["urls", "key"])
@pytest.mark.parametrize("kind", ["fifo", "folder", "large", "not text"])
def test_server_file_that_is_no_small_text_file_is_refused(tmp_path, name, kind):
    folder = valid_server_folder(tmp_path / "s")
    file = folder / name
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file, 0o600)
    elif kind == "folder":
        file.mkdir(0o700)
    else:
        file.write_bytes(b"x" * 100_000 if kind == "large" else b"\xff\xfe")
        file.chmod(0o600)
    with pytest.raises(ConfigError) as refused:
        rendezvous.read_urls(folder)
    assert refused.value.field == "launch.servers" and name in str(refused.value)


def test_server_files_of_a_job_are_private_with_any_umask(tmp_path):
    before = os.umask(0o002)
    try:
        folder = rendezvous.job_folder(tmp_path)
        key = rendezvous.ensure_key(folder)
        rendezvous.write_private(folder / f"{rendezvous.NODE_PREFIX}0", "http://10.0.0.7:41234\n")
        rendezvous.wait_for_servers(folder, 1, SECONDS)
    finally:
        os.umask(before)
    assert rendezvous.read_urls(folder) == (["http://10.0.0.7:41234"], key) and rendezvous.ensure_key(folder) == key


def valid_server_folder(folder):
    """A server folder whose files have safe permissions."""
    folder.mkdir(0o700)
    for name, text in (("urls", "http://10.0.0.7:41234\n"), ("key", KEY)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o600)
    return folder


# Episodes that run independently.


class IndependentLocalSampler:
    """The local sampler behind the interface of independent samplers: one conversation at a time, in any order."""

    def __init__(self, sampler):
        self.sampler, self.lock = sampler, threading.Lock()

    def session(self):
        sessions = {}

        def generate_one(slot, prompt, key, budget):
            with self.lock:
                session = sessions.setdefault(slot, self.sampler.session())
                return session.generate([slot], [prompt], [key], [budget])[0]

        return SimpleNamespace(generate_one=generate_one)

    def cancel(self): ...


def without_floats(trajectories):
    """The trajectories without the sampler's floating-point numbers, whose last digits depend on the batch."""
    return [
        asdict(
            replace(
                t,
                responses=[
                    replace(r, entropy=None, sample=replace(r.sample, logps=[], entropies=[])) for r in t.responses
                ],
            )
        )
        for t in trajectories
    ]


@pytest.mark.slow
@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("at_once", [0, 5])
def test_episode_is_the_same_in_lockstep_and_independently(folder, history, at_once):
    model, tokenizer = toy.policy(folder, history)
    chat = Chat(tokenizer)
    local = LocalSampler(model.eval(), chat.end_ids, SamplingParams())
    world = toy.ChatterWorld(breaks=True)
    episodes = [*toy.draw(0), *toy.draw(1)]
    independent = IndependentLocalSampler(local)
    assert isinstance(independent, IndependentSampler) and not isinstance(local, IndependentSampler)
    played = [
        Rollout(SerialExecutor(world), toy.env(history), chat, at_once).play(episodes, sampler)
        for sampler in (local, independent)
    ]
    assert without_floats(played[0]) == without_floats(played[1])
    assert {Ending.CRASHED, "over"} <= {t.ended for t in played[0]}


@pytest.mark.slow
def test_environments_work_while_other_episodes_generate(folder, tmp_path):
    """Environments run in worker processes, several per process; the clock separates the time without generation."""
    saved, chat = saved_policy(folder)
    episodes = [replace(e, task=delayed_world.DelayedWorld().tasks("train")[n]) for n, e in enumerate(toy.draw(0)[:8])]
    seconds = 0.05
    with CompletionsServer(saved, KEY) as server:
        server.seconds = seconds
        servers = Servers(write_server_folder(tmp_path / "s", server), SECONDS)
        sampler = make_sampler(servers, chat)
        workers = WorkerPool(
            {"_target_": "support.delayed_world.DelayedWorld", "low": seconds, "high": seconds}, 4, SECONDS
        )
        try:
            workers.reset(
                {slot: episodes[slot].task for slot in range(4)}
            )  # start the processes before the measurement
            rollout = Rollout(workers, toy.env("full"), chat)
            start = time.perf_counter()
            played = rollout.play(episodes, sampler)
            wall = time.perf_counter() - start
        finally:
            workers.close()
            servers.cancel()
    spent = rollout.clock.read()
    assert [(t.task, t.member, t.ended, len(t.responses)) for t in played] == [
        (e.task, e.member, "over", 4) for e in episodes
    ]
    assert server.most_at_once > 1
    assert spent["environment"] > 0 and spent["generation"] > 0
    assert spent["environment"] + spent["generation"] < wall


def test_clock_counts_each_moment_once_and_prefers_generation(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 7.0, 15.0, 31.0])
    monkeypatch.setattr("aem_exp.rollout.clock.time", SimpleNamespace(perf_counter=lambda: next(now)))
    clock = Clock(first="generation")
    environment, generation, another = (clock(name) for name in ("environment", "generation", "generation"))
    for section in (environment, generation, another):
        section.__enter__()
    for section in (generation, another, environment):
        section.__exit__(None, None, None)
    assert clock.read() == {"environment": 1 + 16, "generation": 2 + 4 + 8}
    assert clock.read() == {}


@pytest.mark.parametrize("at_once", [0, 3])
def test_ctrl_c_cancels_all_waiting_requests(served, at_once):
    server, sampler, chat = served
    server.seconds = SECONDS

    def interrupt():
        wait_until(lambda: len(server.asked) == (at_once or 16), "the requests")
        os.kill(os.getpid(), signal.SIGINT)

    interrupter = BackgroundCall(interrupt)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        Rollout(SerialExecutor(toy.ChatterWorld()), toy.env("full"), chat, at_once).play(toy.draw(0), sampler)
    assert time.monotonic() - start < SECONDS
    interrupter.end()
    with pytest.raises(CancelledError):
        generate(sampler, chat)
    assert len(server.asked) == (at_once or 16)


@pytest.mark.slow
def test_refused_request_ends_the_rollout(served):
    server, sampler, chat = served
    server.seconds, server.fails = 0.2, [400]
    with pytest.raises(RunError, match="400"):
        Rollout(SerialExecutor(toy.ChatterWorld()), toy.env("full"), chat).play(toy.draw(0), sampler)
    time.sleep(0.5)
    assert len(server.asked) <= 16, "no episode starts a second turn"


# Training.


def policy_with_adapter(folder):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(toy.policy(folder)[0], lora)


@pytest.mark.slow
@pytest.mark.parametrize(("history", "adapter"), [("full", False), ("window", False), ("full", True)])
def test_trainer_learns_from_servers_that_receive_its_weights(folder, tmp_path, history, adapter):
    """The trainer measures entropies and old log-probs; the server's log-probs are used only in the correction."""
    saved, chat = saved_policy(folder, history)
    more = {"model": policy_with_adapter(folder)} if adapter else {}
    rows = []
    with CompletionsServer(saved, KEY) as server:
        servers = Servers(write_server_folder(tmp_path / "s", server), SECONDS)
        trainer = toy.trainer(
            folder,
            toy.experiment(history, steps=3, mini_batch=8),
            lam=1.0,
            make_sampler=lambda trainer: make_sampler(servers, chat),
            trust_sampler=False,
            publish=toy.checked_publisher(servers, chat.tokenizer),
            **more,
        )
        trainer.aem_callback.report = lambda step, row: rows.append(row)
        build_updates, seen = trainer.build_updates, []

        def recording(credit, step):
            measured, updates = build_updates(credit, step)
            seen.extend(batch for update in updates for batch in update)
            return measured, updates

        trainer.build_updates = recording
        trainer.train()
        servers.cancel()
    assert len(rows) == 3 and len(server.reloads) == 4, "the test update, and the weights of three steps"
    assert [path.name for path in (servers.folder / "weights").iterdir()] == [server.reloads[-1]]
    for row in rows:
        assert row["train/response_entropy"] > 0 and row["aem/alpha_q95"] > 1
        assert row["train/tokens_generated"] == row["train/tokens_trained"]
        assert row["train/sampler_gap"] < 1e-4, "the server samples from the newest weights"
        assert row["train/agreement_mean"] <= row["train/agreement_max"] < 1e-4
        assert 0 <= row["time/idle_share"] < 1 and row["time/weights"] > 0
    assert all("old_per_token_logps" in batch and "importance_sampling_ratio" in batch for batch in seen)
    assert all(abs(batch["importance_sampling_ratio"][batch["tool_mask"].bool()] - 1).max() < 1e-3 for batch in seen)


@pytest.mark.slow
def test_fsdp_ranks_sample_their_own_episodes_independently(folder, tmp_path):
    """Both ranks gather the sharded weights, the first publishes them, and each samples only its own episodes."""
    saved, _ = saved_policy(folder)
    with CompletionsServer(saved, KEY) as server:
        where = write_server_folder(tmp_path / "s", server)
        done = torchrun(torchrun_served, str(folder), str(where))
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(server.reloads) == 3, "the test update, and the weights of two steps"
        seeds = {request["seed"] for request in server.asked}
    first_seeds = {seed_from_key((*episode.key, 0)) for step in range(2) for episode in toy.draw(step)}
    assert first_seeds <= seeds and len(seeds) == len(server.asked), "every episode is played once"
    rows = json.loads((where / "rows.json").read_text())
    assert len(rows) == 2 and all(row["train/sampler_gap"] < 1e-4 and row["train/grad_norm"] > 0 for row in rows)


def test_streamed_weights_are_sent_to_every_server(folder, tmp_path, monkeypatch):
    """Without NCCL and GPUs: a stub of TRL's client records what it receives."""
    (tmp_path / "urls").write_text("http://127.0.0.1:1\nhttp://127.0.0.1:2")
    servers = Servers(tmp_path, 1.0)

    class Client:
        def __init__(self):
            self.received, self.cache_resets = {}, 0

        def update_named_params(self, metadata, named):
            self.received = {name: weight.clone() for name, weight in named}
            assert [name for name, _, _ in metadata] == list(self.received)

        def reset_prefix_cache(self):
            self.cache_resets += 1

    clients = [Client(), Client()]
    publish = weight_sync.NCCLPublisher(servers)
    publish._connect = lambda url, device: clients[servers.urls.index(url)]
    trainer = toy.trainer(folder, toy.experiment("full"), publish=publish)
    compared = []
    monkeypatch.setattr(servers, "check_all", lambda: compared.append(servers.weights.agreement))
    agreement = Agreement(5, 9)
    publish(trainer, agreement)
    assert compared == [agreement]
    for client in clients:
        assert client.cache_resets == 1
        assert all(torch.equal(client.received[name], p) for name, p in trainer.model.named_parameters())
    assert servers.weights.streamed and servers.weights.folder is None
    servers.cancel()


def test_trl_client_creates_its_session_before_its_first_request():
    """`NCCLPublisher` sets the API key on this session. The client needs vLLM, so only the source of TRL is checked."""
    from trl.generation.vllm_client import VLLMClient

    source = inspect.getsource(VLLMClient.__init__)
    assert 0 < source.index("self.session = ") < source.index("self.check_server(") < source.index("/v1/models")


@pytest.mark.slow
def test_server_with_old_weights_ends_the_run(folder, tmp_path):
    _, chat = saved_policy(folder)
    toy.policy(folder, "full", seed=1)
    with CompletionsServer(folder / "policy-full-1", KEY) as server:
        servers = Servers(write_server_folder(tmp_path / "s", server), SECONDS)
        trainer = toy.trainer(
            folder,
            toy.experiment("full", steps=1),
            make_sampler=lambda trainer: make_sampler(servers, chat),
            trust_sampler=False,
            publish=lambda trainer: {},
        )
        with pytest.raises(RunError, match=r"log-probs .* nats "):
            trainer.train()
        servers.cancel()


@pytest.mark.slow
def test_run_with_servers_from_the_command_line(cache, tmp_path, monkeypatch):
    """The servers generate in evaluations and in training; no file of the run contains the key."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "off")
    monkeypatch.setenv("AEM_CACHE", str(cache))
    overrides = [*SMALL_RUN, "trainer.steps=2", "evaluation.tasks=4", "evaluation.every=0", "launch.sampler=served"]
    key, folder = "secret-7f3a", tmp_path / "servers"
    overrides += [f"launch.servers={folder}", "launch.server_seconds=60"]
    experiment = config.load([*overrides, f"outputs={tmp_path / 'out'}"])
    with CompletionsServer(policy.make_cached(experiment, opening.open_world(experiment)), key) as server:
        write_server_folder(folder, server, key=key)
        run_dir = run(experiment)
        names = ["0-1", "0-2", "2-3", "4-4"]
        assert server.reloads == names, "the test update, the first weights, and after each step of two updates"
        with FileLock(folder / "lock"), pytest.raises(ConfigError) as refused:
            run(config.load([*overrides, "seed=1", f"outputs={tmp_path / 'out'}"]))
        assert (refused.value.field, str(refused.value.value)) == ("launch.servers", str(folder))
    rows = [row for row in read_metrics(run_dir) if "train/loss" in row]
    assert [row["train/sampler_gap"] < 1e-3 for row in rows] == [True, True]
    assert (run_dir / "result.json").exists()
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert len(files) > 10 and not any(key.encode() in file.read_bytes() for file in files)


@pytest.mark.slow
def test_server_of_a_job_records_its_end_for_the_run(cache, tmp_path, monkeypatch):
    """A process that waits for the server then stops waiting (`rendezvous.wait_for_servers`)."""
    monkeypatch.setenv("AEM_CACHE", str(cache))
    site = tmp_path / "site"
    site.mkdir()
    (site / "site.yaml").write_text("interface: lo")
    (site / "vllm_server.sh").write_text("exit 3")
    heads = "model.make.heads=2"  # of 32: vLLM on a CPU serves no smaller ones
    overrides = [*SMALL_RUN, heads, "launch.sampler=served", "launch.servers=/nowhere", "launch.server_seconds=300"]
    experiment = config.load([*overrides, f"outputs={tmp_path}"])
    run_dir = config.run_dir(experiment)
    run_dir.mkdir()
    (run_dir / "experiment.json").write_text(json.dumps(config.to_dict(experiment)))
    command, env = [sys.executable, "-m", "aem_exp.serve", str(run_dir)], os.environ | {"AEM_SITE": str(site)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 1 and "code 3" in done.stderr and "Traceback" not in done.stderr
    with pytest.raises(RunError, match="code 3"):
        rendezvous.wait_for_servers(rendezvous.job_folder(run_dir), 1, SECONDS)


def test_run_without_a_server_is_refused_before_any_work(tmp_path, capsys, monkeypatch):
    from aem_exp.__main__ import main

    folder = tmp_path / "servers"
    folder.mkdir(mode=0o700)
    (folder / "urls").write_text(f"http://127.0.0.1:{rendezvous.find_free_port('127.0.0.1')}\n")
    words = [*SMALL_RUN, "launch.sampler=served", f"launch.servers={folder}", f"outputs={tmp_path / 'out'}"]
    monkeypatch.setattr(sys, "argv", ["aem-exp", *words])
    assert main() == 2
    shown = capsys.readouterr()
    assert "no server answers at http://127.0.0.1:" in shown.err and "python -m aem_exp.serve" in shown.err
    assert not [*(tmp_path / "out").glob("*")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "change", "fact"),
    [
        (
            ["env.context_tokens=2000"],
            {},
            "accepts at most 1,000 tokens, but this run needs 2,000 (env.context_tokens)",
        ),
        ([], {}, "serves another model, policy-full-0 instead of tiny"),
        (
            ["model.lora={r: 4}", "launch.server_weights=adapter"],
            {"root": "/elsewhere"},
            "was started without LoRA adapters",
        ),
        ([], {"key": "other"}, "returned status 401"),
    ],
    ids=["context", "model", "adapter", "key"],
)
def test_unsuitable_server_is_refused_before_any_work(
    folder, tmp_path, cache, capsys, monkeypatch, words, change, fact
):
    from aem_exp.__main__ import main

    monkeypatch.setenv("AEM_CACHE", str(cache))
    saved, _ = saved_policy(folder)
    experiment = config.load(SMALL_RUN)
    policy.make_cached(experiment, opening.open_world(experiment))
    with CompletionsServer(saved, KEY) as server:
        server.longest = 1000
        servers = write_server_folder(tmp_path / "s", server)
        for name, value in change.items():
            setattr(server, name, value)
        served = ["launch.sampler=served", f"launch.servers={servers}", f"outputs={tmp_path / 'out'}"]
        monkeypatch.setattr(sys, "argv", ["aem-exp", *SMALL_RUN, *served, *words])
        assert main() == 2
        assert fact in capsys.readouterr().err
        assert not server.asked and not server.reloads
    assert not [*(tmp_path / "out").glob("*")]


@pytest.mark.slow
def test_server_that_cannot_load_the_weights_ends_the_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_client, "LOAD_SECONDS", 1.0)
    saved, _ = saved_policy(folder)
    with CompletionsServer(saved, KEY) as server:
        server.rpc = lambda asked: (500, {"error": "a shape of another model"})
        servers = Servers(write_server_folder(tmp_path / "s", server), SECONDS)
        with pytest.raises(
            RunError, match=r"could not load the weights for .*a shape of another model.*; look at its output"
        ):
            servers.load(saved)
        servers.cancel()


@pytest.mark.slow
def test_server_with_a_short_context_ends_the_run_before_the_first_step(folder, tmp_path):
    saved, chat = saved_policy(folder)
    with CompletionsServer(saved, KEY) as server:
        servers = Servers(write_server_folder(tmp_path / "s", server), SECONDS)
        servers.weights.context, server.longest = 120, 100
        trainer = toy.trainer(folder, toy.experiment("full"), publish=toy.checked_publisher(servers, chat.tokenizer))
        with pytest.raises(RunError, match="accepts at most 100 tokens, fewer than"):
            trainer.source.publish(trainer)
        assert not server.asked and not server.reloads
        servers.cancel()
