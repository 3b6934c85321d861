"""Servers that generate, over real HTTP: exact tokens, whatever becomes of a server, and episodes that wait for nobody."""

import gzip
import inspect
import json
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
from aem_exp.rollout.sampling.base import IndependentSampler, SamplingParams
from aem_exp.rollout.sampling.local import LocalSampler
from aem_exp.rollout.sampling.vllm import ServerSampler, seed_from_key
from aem_exp.rollout.sampling.vllm_client import Servers
from aem_exp.rollout.sampling.weight_sync import FilePublisher
from aem_exp.rollout.types import Ending
from aem_exp.run.execution import run

HISTORIES = ["full", "window"]
KEY = "k-123"
SECONDS = 300.0  # more than anything here takes on a busy machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("toy")


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """Pauses between attempts are as short as the tests."""
    monkeypatch.setattr(vllm_client, "FIRST_PAUSE", 0.05)


def policy_of(folder, history="full"):
    """The toy's policy on disk, and how its conversations are rendered."""
    _, tokenizer = toy.policy(folder, history)
    return folder / f"policy-{history}-0", Chat(tokenizer)


def place(where, *served, key=KEY):
    """The folder that says where servers are."""
    where.mkdir(exist_ok=True)
    (where / "urls").write_text("".join(f"{server.url}\n" for server in served))
    if key:
        (where / "key").write_text(f"{key}\n")
        (where / "key").chmod(0o600)
    return where


def sampler_of(known, chat, rank=0):
    """What asks these servers, in the toy's words."""
    return ServerSampler(known, chat.end_ids, SamplingParams(), vocabulary=len(chat.tokenizer), rank=rank)


@pytest.fixture
def served(folder, tmp_path):
    """One server, and a sampler that asks it."""
    saved, chat = policy_of(folder)
    with CompletionsServer(saved, KEY) as server:
        known = Servers(place(tmp_path / "servers", server), SECONDS)
        yield server, sampler_of(known, chat), chat
        known.cancel()


def ask(sampler, chat, key=("k",), budget=5, slot=0):
    return sampler.session().ask(slot, chat.first_prompt("hello a"), key, budget)


# Exact tokens.


@pytest.mark.parametrize("sampling", [SamplingParams(), SamplingParams(0.6), SamplingParams(1.3, 0.8, 5, 0.02)])
def test_tokens_and_log_probs_are_those_of_the_local_sampler(folder, served, sampling):
    """The same seeds, the same distribution: what is sent and what comes back is what the policy itself would say."""
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


def test_seeds_follow_from_the_key_alone(served):
    server, sampler, chat = served
    same = [ask(sampler, chat, ("a", 1)).ids for _ in range(2)]
    assert same[0] == same[1]
    assert len({tuple(ask(sampler, chat, ("a", n)).ids) for n in range(8)}) > 3
    seeds = [request["seed"] for request in server.asked]
    assert len(set(seeds)) == 8 and all(0 <= s < 2**63 for s in seeds)


def _more(answer):
    answer["choices"][0]["token_ids"] += [5] * 9
    answer["choices"][0]["logprobs"]["token_logprobs"] += [-1.0] * 9
    return answer


def _choice(**changes):
    return lambda answer: answer | {"choices": [answer["choices"][0] | changes]}


@pytest.mark.parametrize(
    ("twist", "said"),
    [
        (_more, "tokens, and 1 to 5 were asked for"),
        (_choice(token_ids=None), "no token ids"),
        (_choice(token_ids=[]), "has 0 tokens"),
        (_choice(token_ids="a"), "no token ids"),
        (_choice(logprobs=None), "no log-probs"),
        (_choice(prompt_token_ids=[1]), "another prompt"),
        (_choice(finish_reason="abort"), "ended by 'abort'"),
        (_choice(finish_reason="\x1b[31m" + "x" * 999), r"ended by '.x1b.31mx{1,40}, and not"),
        (lambda answer: {"choices": []}, "no token ids"),
        (lambda answer: {"choices": ["a"]}, "no token ids"),
        (lambda answer: [answer], "no JSON object"),
    ],
    ids=[
        *("long", "no ids", "empty", "text", "no log-probs", "other prompt", "aborted", "shouted", "no choice"),
        *("a text for a choice", "no object"),
    ],
)
def test_an_answer_that_is_not_exact_ends_the_run(served, twist, said):
    server, sampler, chat = served
    server.twist = twist
    with pytest.raises(RunError, match=said):
        ask(sampler, chat)


@pytest.mark.parametrize(
    "one", ["a", -5, 10**9, 10**400, True, 1.0, None, [1], "last + 1"], ids=lambda one: str(one)[:9]
)
def test_a_token_that_the_policy_does_not_have_ends_the_run(served, one):
    server, sampler, chat = served
    one = sampler.vocabulary if one == "last + 1" else one
    server.twist = _choice(token_ids=[one], logprobs={"token_logprobs": [-1.0]})
    with pytest.raises(RunError, match=r"has the token id .*: it must be a whole number from 0 to") as caught:
        ask(sampler, chat)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "one", [float("nan"), float("inf"), -float("inf"), 0.01, 7, -(10**400), True, False, None, "-1"]
)
def test_a_log_prob_that_no_token_can_have_ends_the_run(served, one):
    server, sampler, chat = served
    server.twist = _choice(token_ids=[0], logprobs={"token_logprobs": [one]})
    with pytest.raises(RunError, match=r"has the log-prob .*: it must be a number from -10000 to 0") as caught:
        ask(sampler, chat)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("one", [0, -3, 1e-4, -9999.0])
def test_a_log_prob_may_be_rounded(served, one):
    server, sampler, chat = served
    server.twist = _choice(token_ids=[0], logprobs={"token_logprobs": [one]})
    assert ask(sampler, chat).logps == [one]


def head(out, **more):
    out.send_response(200)
    for name, value in more.items():
        out.send_header(name.replace("_", "-"), value)
    out.end_headers()


def test_an_answer_that_comes_byte_by_byte_is_late(served):
    """Each byte comes in time; all of them do not."""
    server, sampler, chat = served
    over = threading.Event()

    def trickle(out):
        head(out, Content_Length="10000")
        while not over.wait(0.1):
            out.wfile.write(b" ")

    server.raw = trickle
    asking = BackgroundCall(ask, replace_servers(sampler, Servers(sampler.servers.folder, 2.0)), chat)
    try:
        with pytest.raises(RunError, match="gave no answer within 2 s"):
            asking.end(60)
    finally:
        over.set()


def test_an_answer_without_end_is_cut(served):
    server, sampler, chat = served
    sent = []

    def pour(out):
        head(out, Connection="close")
        while len(sent) < 400:
            out.wfile.write(bytes(1 << 20))
            sent.append(1)

    server.raw = pour
    with pytest.raises(RunError, match=r"answers with more than the 1,0\d\d,\d\d\d bytes that its answer may have"):
        ask(sampler, chat)
    assert len(sent) < 100


def test_an_answer_that_is_packed_is_not_unpacked(served):
    server, sampler, chat = served
    asked = []

    def bomb(out):
        asked.append(out.headers["Accept-Encoding"])
        body = gzip.compress(bytes(100 << 20))
        head(out, Content_Encoding="gzip", Content_Length=str(len(body)))
        out.wfile.write(body)

    server.raw = bomb
    with pytest.raises(RunError, match="in the encoding 'gzip', which nobody asked for"):
        ask(sampler, chat)
    assert asked == ["identity"]


def test_an_answer_nested_without_end_is_one_sentence(served):
    server, sampler, chat = served

    def nest(out):
        head(out, Content_Length="500000")
        out.wfile.write(b"[" * 500_000)

    server.raw = nest
    with pytest.raises(RunError, match="no JSON object"):
        ask(sampler, chat)


def test_words_of_a_server_reach_a_terminal_as_plain_text(served):
    server, sampler, chat = served
    words = "\x1b[31mred\x1b[0m\x07 \x1b]0;title\x07\u202e\x9b5m\nnext"

    def refuse(out):
        out.send_response(400)
        out.end_headers()
        out.wfile.write(said.encode())

    server.raw = refuse
    for said in (json.dumps({"error": {"message": words}}), words, '{"error":' * 99_999, f"{KEY[:3]}\x07{KEY[3:]}"):
        with pytest.raises(RunError, match="answers 400") as caught:
            ask(sampler, chat)
        sentence = str(caught.value)
        assert sentence.isprintable() and KEY not in sentence and len(sentence) < 500
        assert "red" in sentence or words not in said


# Servers that are slow, sick, away or somebody else's.


def test_what_may_pass_is_asked_again_and_comes_out_the_same(served):
    server, sampler, chat = served
    well = ask(sampler, chat)
    server.fails = [500, 429, 503]
    assert ask(sampler, chat) == well
    assert len(server.asked) == 5 and len({json.dumps(request) for request in server.asked}) == 1


@pytest.mark.parametrize(("status", "said"), [(400, "answers 400 .the engine is not well"), (404, "answers 404")])
def test_what_a_server_refuses_ends_the_run_at_once(served, status, said):
    server, sampler, chat = served
    server.fails = [status]
    with pytest.raises(RunError, match=said):
        ask(sampler, chat)
    assert len(server.asked) == 1


def test_a_wrong_key_is_one_sentence_without_the_key(served):
    server, sampler, chat = served
    server.key = "another"
    with pytest.raises(RunError) as caught:
        ask(sampler, chat)
    assert "answers 401" in str(caught.value) and "/key its key?" in str(caught.value)
    assert KEY not in str(caught.value)


def test_a_sick_server_and_a_slow_one_end_the_run_when_the_limit_is_reached(served):
    server, sampler, chat = served
    known = Servers(sampler.servers.folder, 3.0)
    sampler = replace_servers(sampler, known)
    server.fails = [500] * 999
    with pytest.raises(RunError, match=r"no server has answered for .* s .*the last: .*500 .the engine is not well"):
        ask(sampler, chat)
    server.fails, server.seconds = [], SECONDS
    with pytest.raises(RunError, match="gave no answer within 3 s"):
        ask(sampler, chat)


def replace_servers(sampler, known):
    return ServerSampler(known, sampler.end_ids, sampler.sampling, vocabulary=sampler.vocabulary)


def test_a_server_that_is_started_anew_is_waited_for_and_gets_the_newest_weights(folder, tmp_path):
    saved, chat = policy_of(folder)
    other = folder / "policy-full-1"
    toy.policy(folder, "full", seed=1)
    with CompletionsServer(saved, KEY) as first:
        sampler = sampler_of(Servers(place(tmp_path / "s", first), SECONDS), chat)
        before = ask(sampler, chat)
        sampler.servers.load(other)
        newest = ask(sampler, chat)
        assert first.reloads == [other.name] and newest != before
    waiting = BackgroundCall(ask, sampler, chat)
    time.sleep(0.5)
    assert waiting.busy
    with CompletionsServer(saved, KEY, port=first.port) as again:
        assert waiting.end() == newest and again.reloads == [other.name]
        assert ask(sampler, chat) == newest and len(again.reloads) == 1
    with CompletionsServer(saved, KEY) as moved:
        (tmp_path / "s" / "urls").write_text(moved.url)
        assert ask(sampler, chat) == newest and moved.reloads == [other.name]
    sampler.servers.cancel()


def test_a_server_that_dies_over_an_answer_is_asked_again_when_it_is_back(folder, tmp_path):
    """Even if it was away for less than the pause between two attempts."""
    saved, chat = policy_of(folder)
    toy.policy(folder, "full", seed=1)
    with CompletionsServer(saved, KEY) as first:
        sampler = sampler_of(Servers(place(tmp_path / "s", first), SECONDS), chat)
        sampler.servers.load(folder / "policy-full-1")
        newest = ask(sampler, chat)
        first.seconds = SECONDS
        waiting = BackgroundCall(ask, sampler, chat)
        wait_until(lambda: len(first.asked) == 2, "the second request")
    with CompletionsServer(saved, KEY, port=first.port) as again:
        assert waiting.end() == newest and len(again.reloads) == 1
        sampler.servers.cancel()


def test_a_server_that_is_away_is_told_once_at_once(folder, tmp_path, caplog):
    """By several who ask it, again and again."""
    saved, chat = policy_of(folder)
    with CompletionsServer(saved, KEY) as first:
        sampler = sampler_of(Servers(place(tmp_path / "s", first), SECONDS), chat)
    waiting = [BackgroundCall(ask, sampler, chat, ("k", n)) for n in range(3)]
    told = f"{first.url} cannot be reached, asking again for up to 300 s"
    wait_until(lambda: told in caplog.messages, "the word")
    time.sleep(0.5)  # meanwhile they ask again
    assert all(one.busy for one in waiting)
    with CompletionsServer(saved, KEY, port=first.port):
        assert all(one.end().ids for one in waiting)
    assert caplog.messages == [told]
    sampler.servers.cancel()


def test_a_server_of_this_job_that_has_ended_for_good_is_not_waited_for(folder, tmp_path):
    saved, chat = policy_of(folder)
    with CompletionsServer(saved, KEY) as first:
        sampler = sampler_of(Servers(place(tmp_path / "s", first), SECONDS), chat)
    waiting = BackgroundCall(ask, sampler, chat)
    time.sleep(0.3)
    assert waiting.busy
    rendezvous.write_ended(tmp_path / "s", "1", "the server on node7 has ended with code 9")
    with pytest.raises(
        RunError, match=r"the server on node7 has ended with code 9; http.* cannot be reached"
    ) as stopped:
        waiting.end(60)
    assert stopped.value.kind == "node"
    with pytest.raises(RunError, match="node7 has ended with code 9; what it says is in the job's log"):
        rendezvous.wait_for_servers(tmp_path / "s", 2, SECONDS)
    sampler.servers.cancel()


@pytest.mark.parametrize(("name", "found"), [("10.1.2.3", True), ("8.8.8.8", False), ("0.0.0.0", False)])
def test_a_node_serves_on_a_private_address_alone(monkeypatch, name, found):
    monkeypatch.setenv("SLURMD_NODENAME", name)
    if found:
        assert rendezvous.private_address(None) == name
    else:
        with pytest.raises(ConfigError, match="must be one of the private network"):
            rendezvous.private_address(None)
    assert rendezvous.private_address("lo") == "127.0.0.1"


def test_weights_that_were_streamed_are_lost_with_their_server(folder, tmp_path):
    saved, chat = policy_of(folder)
    with CompletionsServer(saved, KEY) as server:
        sampler = sampler_of(Servers(place(tmp_path / "s", server), SECONDS), chat)
        sampler.servers.mark_updated(None)
        ask(sampler, chat)
    waiting = BackgroundCall(ask, sampler, chat)
    time.sleep(0.4)
    with (
        CompletionsServer(server.model, KEY, server.port),
        pytest.raises(RunError, match="was started anew and has lost the weights"),
    ):
        waiting.end()
    sampler.servers.cancel()


def test_an_episode_keeps_its_server_and_goes_to_another_when_that_is_away(folder, tmp_path):
    saved, chat = policy_of(folder)
    with CompletionsServer(saved, KEY) as one, CompletionsServer(saved, KEY) as two:
        known = Servers(place(tmp_path / "s", one, two), SECONDS)
        sampler = sampler_of(known, chat)
        for turn in range(3):
            for slot in range(4):
                ask(sampler, chat, (slot, turn), slot=slot)
        assert [len(one.asked), len(two.asked)] == [6, 6]
        assert {request["seed"] for request in one.asked} == {seed_from_key((s, t)) for s in (0, 2) for t in range(3)}
        other_rank = sampler_of(known, chat, rank=1)
        ask(other_rank, chat, ("rank",))
        assert len(two.asked) == 7
        one.__exit__()
        assert ask(sampler, chat, (0, 9)) == ask(sampler, chat, (0, 9), slot=1)
        assert len(two.asked) == 9
        known.cancel()


def test_a_proxy_of_the_environment_has_no_part(served, monkeypatch):
    _, sampler, chat = served
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    assert ask(replace_servers(sampler, Servers(sampler.servers.folder, SECONDS)), chat).ids


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: (f / "key").chmod(0o640), "can be read by others"),
        (lambda f: (f / "key").write_text("\n"), "must hold a key"),
        (lambda f: (f / "urls").unlink(), "No such file"),
        (lambda f: (f / "urls").write_text(""), "names no server"),
        (lambda f: (f / "urls").write_text("10.0.0.7:80"), "no address"),
        (lambda f: (f / "urls").write_text("http://me:pw@10.0.0.7:80"), "holds credentials"),
        (lambda f: ((f / "urls").write_text("http://10.0.0.7:80"), (f / "key").unlink()), "must have a file key"),
    ],
    ids=["key for all", "no key in it", "no urls", "empty", "no url", "credentials", "no key"],
)
def test_a_folder_that_does_not_do_is_one_sentence(tmp_path, spoil, said):
    where = tmp_path / "s"
    where.mkdir()
    (where / "urls").write_text("http://10.0.0.7:41234\n")
    (where / "key").write_text(KEY)
    (where / "key").chmod(0o600)
    assert rendezvous.read_urls(where) == (["http://10.0.0.7:41234"], KEY)
    spoil(where)
    with pytest.raises(ConfigError) as caught:
        rendezvous.read_urls(where)
    sentence = str(caught.value)
    assert said in sentence and "\n" not in sentence and "pw" not in sentence and KEY not in sentence


@pytest.mark.parametrize("name", ["", "urls", "key"])
@pytest.mark.parametrize(("mode", "said"), [(0o666, "by anybody"), (0o777, "by anybody"), (0o660, "by its group")])
def test_what_others_can_write_says_nothing_of_servers(tmp_path, name, mode, said):
    where = written(tmp_path / "s")
    (where / name).chmod(mode | 0o700 if not name else mode)
    with pytest.raises(ConfigError, match=f"can be written {said}, .*: chmod -R go-w {where} .nobody else") as caught:
        rendezvous.read_urls(where)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"launch.servers={where / name}: ")
    subprocess.run(["chmod", "-R", "go-w", where], check=True)
    if name != "key":
        assert rendezvous.read_urls(where)[1] == KEY


@pytest.mark.parametrize("name", ["", "urls", "key"])
def test_what_somebody_else_has_written_says_nothing_of_servers(tmp_path, name, monkeypatch):
    where = written(tmp_path / "s")
    if os.geteuid() == 0:
        os.chown(where / name, 12345, -1)
    else:
        owner = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(
        ConfigError, match=r"belongs to user \d+, and must be yours or root's: make a folder of your own"
    ):
        rendezvous.read_urls(where)
    assert rendezvous.reread_urls(where, ["http://10.0.0.7:1"]) == ["http://10.0.0.7:1"]


@pytest.mark.parametrize("name", ["urls", "key"])
@pytest.mark.parametrize("odd", ["fifo", "folder", "large", "not text"])
def test_what_is_no_small_text_file_says_nothing_of_servers(tmp_path, name, odd):
    where = written(tmp_path / "s")
    file = where / name
    file.unlink()
    if odd == "fifo":
        os.mkfifo(file, 0o600)
    elif odd == "folder":
        file.mkdir(0o700)
    else:
        file.write_bytes(b"x" * 100_000 if odd == "large" else b"\xff\xfe")
        file.chmod(0o600)
    with pytest.raises(ConfigError, match=r"must be a file|must be plain text|Is a directory"):
        rendezvous.read_urls(where)


def test_what_a_job_writes_down_is_its_owners_alone_whatever_the_umask(tmp_path):
    before = os.umask(0o002)
    try:
        where = rendezvous.job_folder(tmp_path)
        key = rendezvous.ensure_key(where)
        rendezvous.write_private(where / f"{rendezvous.NODE_PREFIX}0", "http://10.0.0.7:41234\n")
        rendezvous.wait_for_servers(where, 1, SECONDS)
    finally:
        os.umask(before)
    assert rendezvous.read_urls(where) == (["http://10.0.0.7:41234"], key) and rendezvous.ensure_key(where) == key


def written(where):
    where.mkdir(0o700)
    for name, text in (("urls", "http://10.0.0.7:41234\n"), ("key", KEY)):
        (where / name).write_text(text)
        (where / name).chmod(0o600)
    return where


# Episodes that wait for nobody.


class Apart:
    """The local sampler, asked one conversation at a time, in whatever order."""

    def __init__(self, sampler):
        self.sampler, self.lock, self.over = sampler, threading.Lock(), False

    def session(self):
        sessions = {}

        def ask(slot, prompt, key, budget):
            with self.lock:
                session = sessions.setdefault(slot, self.sampler.session())
                return session.generate([slot], [prompt], [key], [budget])[0]

        one = Apart(self.sampler)
        one.ask, one.lock = ask, self.lock
        return one

    def cancel(self):
        self.over = True


def told(trajectories):
    """All of them but floating-point numbers of the sampler, whose last digits depend on the batch."""
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


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("at_once", [0, 5])
def test_by_itself_or_in_step_an_episode_is_the_same(folder, history, at_once):
    model, tokenizer = toy.policy(folder, history)
    chat = Chat(tokenizer)
    local = LocalSampler(model.eval(), chat.end_ids, SamplingParams())
    world = toy.ChatterWorld(breaks=True)
    episodes = [*toy.draw(0), *toy.draw(1)]
    assert isinstance(Apart(local), IndependentSampler) and not isinstance(local, IndependentSampler)
    played = [
        Rollout(SerialExecutor(world), toy.env(history), chat, at_once).play(episodes, sampler)
        for sampler in (local, Apart(local))
    ]
    assert told(played[0]) == told(played[1])
    assert {Ending.CRASHED, "over"} <= {t.ended for t in played[0]}


def test_environments_work_while_others_generate(folder, tmp_path):
    """In worker processes, several to a process; and the seconds in which nothing is generated are told."""
    saved, chat = policy_of(folder)
    episodes = [replace(e, task=delayed_world.DelayedWorld().tasks("train")[n]) for n, e in enumerate(toy.draw(0)[:8])]
    seconds = 0.05
    with CompletionsServer(saved, KEY) as server:
        server.seconds = seconds
        known = Servers(place(tmp_path / "s", server), SECONDS)
        sampler = sampler_of(known, chat)
        stage = WorkerPool(
            {"_target_": "support.delayed_world.DelayedWorld", "low": seconds, "high": seconds}, 4, SECONDS
        )
        try:
            stage.reset({slot: episodes[slot].task for slot in range(4)})  # processes start
            rollout = Rollout(stage, toy.env("full"), chat)
            start = time.perf_counter()
            played = rollout.play(episodes, sampler)
            wall = time.perf_counter() - start
        finally:
            stage.close()
            known.cancel()
    spent = rollout.clock.read()
    assert [(t.task, t.member, t.ended, len(t.responses)) for t in played] == [
        (e.task, e.member, "over", 4) for e in episodes
    ]
    assert server.most_at_once > 1
    assert spent["environment"] > 0 and spent["generation"] > 0
    assert spent["environment"] + spent["generation"] < wall


def test_a_moment_counts_once_and_for_generation_first(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 7.0, 15.0, 31.0])
    monkeypatch.setattr("aem_exp.rollout.clock.time", SimpleNamespace(perf_counter=lambda: next(now)))
    clock = Clock(first="generation")
    environment, generation, another = (clock(name) for name in ("environment", "generation", "generation"))
    for moment in (environment, generation, another):
        moment.__enter__()
    for moment in (generation, another, environment):
        moment.__exit__(None, None, None)
    assert clock.read() == {"environment": 1 + 16, "generation": 2 + 4 + 8}
    assert clock.read() == {}


@pytest.mark.parametrize("at_once", [0, 3])
def test_ctrl_c_ends_all_who_wait_for_a_slow_answer(served, at_once):
    server, sampler, chat = served
    server.seconds = SECONDS

    def interrupt():
        wait_until(lambda: len(server.asked) == (at_once or 16), "the requests")
        os.kill(os.getpid(), signal.SIGINT)

    interrupting = BackgroundCall(interrupt)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        Rollout(SerialExecutor(toy.ChatterWorld()), toy.env("full"), chat, at_once).play(toy.draw(0), sampler)
    assert time.monotonic() - start < SECONDS
    interrupting.end()
    with pytest.raises(CancelledError):
        ask(sampler, chat)
    assert len(server.asked) == (at_once or 16)


def test_a_refusal_ends_the_play(served):
    server, sampler, chat = served
    server.seconds, server.fails = 0.2, [400]
    with pytest.raises(RunError, match="400"):
        Rollout(SerialExecutor(toy.ChatterWorld()), toy.env("full"), chat).play(toy.draw(0), sampler)
    time.sleep(0.5)
    assert len(server.asked) <= 16, "nobody goes on to a second turn"


# Training.


def adapted(folder):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    how = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(toy.policy(folder)[0], how)


@pytest.mark.parametrize(("history", "adapter"), [("full", False), ("window", False), ("full", True)])
def test_a_trainer_learns_from_servers_that_follow_its_weights(folder, tmp_path, history, adapter):
    """Nothing that the server says is trusted: entropies and old log-probs are measured, its own enter the correction alone."""
    saved, chat = policy_of(folder, history)
    more = {"model": adapted(folder)} if adapter else {}
    rows = []
    with CompletionsServer(saved, KEY) as server:
        known = Servers(place(tmp_path / "s", server), SECONDS)
        trainer = toy.trainer(
            folder,
            toy.experiment(history, steps=3, mini_batch=8),
            lam=1.0,
            make_sampler=lambda trainer: sampler_of(known, chat),
            trust_sampler=False,
            publish=FilePublisher(known),
            **more,
        )
        trainer.aem_callback.report = lambda step, row: rows.append(row)
        build_updates, seen = trainer.build_updates, []

        def watched(credit, step):
            measured, updates = build_updates(credit, step)
            seen.extend(batch for update in updates for batch in update)
            return measured, updates

        trainer.build_updates = watched
        trainer.train()
        known.cancel()
    assert len(rows) == 3 and len(server.reloads) == 3
    assert [path.name for path in (known.folder / "weights").iterdir()] == [server.reloads[-1]]
    for row in rows:
        assert row["train/response_entropy"] > 0 and row["aem/alpha_q95"] > 1
        assert row["train/tokens_generated"] == row["train/tokens_trained"]
        assert row["train/sampler_gap"] < 1e-4, "it samples from the newest weights"
        assert 0 <= row["time/idle_share"] < 1 and row["time/weights"] > 0
    assert all("old_per_token_logps" in batch and "importance_sampling_ratio" in batch for batch in seen)
    assert all(abs(batch["importance_sampling_ratio"][batch["tool_mask"].bool()] - 1).max() < 1e-3 for batch in seen)


def test_two_processes_in_pieces_ask_for_their_own_episodes(folder, tmp_path):
    """FSDP2: weights are gathered by both and published by the first; each asks for its own episodes, without the other."""
    saved, _ = policy_of(folder)
    with CompletionsServer(saved, KEY) as server:
        where = place(tmp_path / "s", server)
        done = torchrun(torchrun_served, str(folder), str(where))
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(server.reloads) == 2
        asked = {request["seed"] for request in server.asked}
    firsts = {seed_from_key((*episode.key, 0)) for step in range(2) for episode in toy.draw(step)}
    assert firsts <= asked and len(asked) == len(server.asked), "every episode once"
    rows = json.loads((where / "rows.json").read_text())
    assert len(rows) == 2 and all(row["train/sampler_gap"] < 1e-4 and row["train/grad_norm"] > 0 for row in rows)


def test_streamed_weights_go_to_every_server(folder, tmp_path):
    """NCCL is not to be had here; what TRL's client would be told is."""
    (tmp_path / "urls").write_text("http://127.0.0.1:1\nhttp://127.0.0.1:2")
    known = Servers(tmp_path, 1.0)

    class Client:
        def __init__(self):
            self.got, self.forgot = {}, 0

        def update_named_params(self, metadata, named):
            self.got = {name: weight.clone() for name, weight in named}
            assert [name for name, _, _ in metadata] == list(self.got)

        def reset_prefix_cache(self):
            self.forgot += 1

    clients = [Client(), Client()]
    publish = weight_sync.NCCLPublisher(known)
    publish._connect = lambda url, device: clients[known.urls.index(url)]
    trainer = toy.trainer(folder, toy.experiment("full"), publish=publish)
    publish(trainer)
    for client in clients:
        assert client.forgot == 1
        assert all(torch.equal(client.got[name], p) for name, p in trainer.model.named_parameters())
    assert known.streamed and known.weights is None
    known.cancel()


def test_a_client_of_trls_shows_our_key():
    """It cannot be made without vLLM; the order in which it is made is what the key counts on."""
    from trl.generation.vllm_client import VLLMClient

    source = inspect.getsource(VLLMClient.__init__)
    assert 0 < source.index("self.session = ") < source.index("self.check_server(") < source.index("/v1/models")


def test_servers_of_old_weights_are_noticed(folder, tmp_path):
    _, chat = policy_of(folder)
    toy.policy(folder, "full", seed=1)
    with CompletionsServer(folder / "policy-full-1", KEY) as server:
        known = Servers(place(tmp_path / "s", server), SECONDS)
        trainer = toy.trainer(
            folder,
            toy.experiment("full", steps=1),
            make_sampler=lambda trainer: sampler_of(known, chat),
            trust_sampler=False,
            publish=lambda trainer: None,
        )
        with pytest.raises(RunError, match="does not sample from these weights"):
            trainer.train()
        known.cancel()


def test_a_run_from_the_command_line_is_served(cache, tmp_path, monkeypatch):
    """Panels and training alike; the key is nowhere in what the run leaves."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "off")
    monkeypatch.setenv("AEM_CACHE", str(cache))
    words = [*SMALL_RUN, "trainer.steps=2", "evaluation.tasks=4", "evaluation.every=0", "launch.sampler=served"]
    key, where = "secret-7f3a", tmp_path / "servers"
    words += [f"launch.servers={where}", "launch.server_seconds=60"]
    experiment = config.load([*words, f"outputs={tmp_path / 'out'}"])
    with CompletionsServer(policy.make_cached(experiment, opening.open_world(experiment)), key) as server:
        place(where, server, key=key)
        ended = run(experiment)
        assert server.reloads == ["0", "2", "4"], "before the first step, and after each, of two updates"
        with FileLock(where / "lock"), pytest.raises(ConfigError, match="another run uses these servers"):
            run(config.load([*words, "seed=1", f"outputs={tmp_path / 'out'}"]))
    rows = [row for row in read_metrics(ended) if "train/loss" in row]
    assert [row["train/sampler_gap"] < 1e-3 for row in rows] == [True, True]
    assert (ended / "result.json").exists()
    left = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert len(left) > 10 and not any(key.encode() in file.read_bytes() for file in left)


def test_a_jobs_server_that_ends_is_written_down_for_the_run(cache, tmp_path, monkeypatch):
    """Who waits for it then does so no more; see `rendezvous.gather`."""
    monkeypatch.setenv("AEM_CACHE", str(cache))
    site = tmp_path / "site"
    site.mkdir()
    (site / "site.yaml").write_text("interface: lo")
    (site / "vllm_server.sh").write_text("exit 3")
    words = [*SMALL_RUN, "launch.sampler=served", "launch.servers=/nowhere", "launch.server_seconds=300"]
    experiment = config.load([*words, f"outputs={tmp_path}"])
    run_dir = config.run_dir(experiment)
    run_dir.mkdir()
    (run_dir / "experiment.json").write_text(json.dumps(config.to_dict(experiment)))
    command, env = [sys.executable, "-m", "aem_exp.serve", str(run_dir)], os.environ | {"AEM_SITE": str(site)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 1 and "has ended with code 3" in done.stderr and "Traceback" not in done.stderr
    with pytest.raises(RunError, match=r"the server on .* has ended with code 3; what it says is in the job's log"):
        rendezvous.wait_for_servers(rendezvous.job_folder(run_dir), 1, SECONDS)
