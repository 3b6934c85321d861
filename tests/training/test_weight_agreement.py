"""The check that servers use the weights that they receive: the probe before the first step, and each later push."""

import math

import pytest
import torch
from support import toy
from support.completions_server import CompletionsServer

from aem_exp.core.errors import RunError
from aem_exp.rollout.sampling import agreement
from aem_exp.rollout.sampling.agreement import EXACT_GAP, Agreement, WeightsDiffer
from aem_exp.rollout.sampling.base import SamplingParams
from aem_exp.rollout.sampling.vllm import ServerSampler
from aem_exp.rollout.sampling.vllm_client import Servers
from aem_exp.rollout.sampling.weight_sync import FilePublisher
from aem_exp.training.weight_agreement import CheckedPublisher, add_noise, group_tensors

SECONDS = 300.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("toy")


@pytest.fixture
def server(folder):
    toy.policy(folder)
    with CompletionsServer(folder / "policy-full-0") as running:
        yield running


@pytest.fixture
def servers(server, tmp_path):
    """The client of the server."""
    (tmp_path / "urls").write_text(f"{server.url}\n")
    client = Servers(tmp_path, SECONDS)
    yield client
    client.cancel()


def make_trainer(folder, **changes):
    """A trainer of the toy policy and its tokenizer."""
    model, tokenizer = toy.policy(folder)
    return toy.trainer(folder, toy.experiment("full", steps=2), **{"model": model} | changes), tokenizer


def weights(trainer):
    """Copies of all weights."""
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def test_probe_accepts_a_server_that_uses_all_updates(folder, server, servers):
    trainer, tokenizer = make_trainer(folder)
    before = weights(trainer)
    publish = toy.checked_publisher(servers, tokenizer)
    metrics = publish(trainer)
    assert server.reloads == ["0-1", "0-2"] and server.compared == 2, "the test update, then the true weights"
    assert 0 <= metrics["train/agreement_mean"] <= metrics["train/agreement_max"] < 1e-4
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]), "the trainer has exactly its old weights"
        if name in (loaded := dict(server.model.named_parameters())):
            assert torch.equal(loaded[name], before[name])
    publish(trainer)
    assert server.reloads == ["0-1", "0-2", "0-3"], "there is only one probe"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stale", "group"),
    [
        ("lm_head", "head, tied to the embedding"),
        ("self_attn.[qkvo]_proj", "attention"),
        ("mlp", "MLP"),
        (r"norm", "norms"),
    ],
)
def test_probe_names_the_tensors_that_a_server_keeps(folder, server, servers, stale, group):
    """The true weights are equal to the old ones, so only the test update can show this."""
    server.stale = stale
    trainer, tokenizer = make_trainer(folder)
    before = weights(trainer)
    with pytest.raises(WeightsDiffer, match=f"it keeps old weights of the {group} ") as caught:
        toy.checked_publisher(servers, tokenizer)(trainer)
    others = {"head", "attention", "MLP", "norms", "embedding"} - {group.split(",")[0]}
    kept = str(caught.value).partition("old weights of the ")[2].replace(group, "")
    assert not [other for other in others if other in kept]
    assert server.url in str(caught.value) and caught.value.kind == "config"
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainer.model.named_parameters())


@pytest.mark.slow
def test_probe_of_a_server_with_other_weights(folder, server, servers):
    """It ignores all updates."""
    toy.policy(folder, "full", seed=1)
    server.model = CompletionsServer(folder / "policy-full-1").model
    server.stale = "."
    trainer, tokenizer = make_trainer(folder)
    with pytest.raises(WeightsDiffer, match="it ignores the updates, or it was started with other weights"):
        toy.checked_publisher(servers, tokenizer)(trainer)


@pytest.mark.parametrize(("noise", "fact"), [(0.004, "another data type"), (0.3, "other weights")])
def test_server_in_another_data_type_is_refused_in_float32(folder, server, servers, noise, fact, monkeypatch):
    """Its log-probs differ by about as much for any weights."""
    exact = agreement.measure_gap
    monkeypatch.setattr(agreement, "measure_gap", lambda expected, reported: exact(expected + noise, reported))
    trainer, tokenizer = make_trainer(folder)
    with pytest.raises(WeightsDiffer, match=fact) as caught:
        toy.checked_publisher(servers, tokenizer)(trainer)
    assert f"limit: {EXACT_GAP:.2g}" in str(caught.value)


def test_first_gap_is_the_reference_in_other_data_types(folder, server, servers, monkeypatch):
    trainer, tokenizer = make_trainer(folder)
    exact = agreement.measure_gap
    gap = 0.02
    monkeypatch.setattr(agreement, "measure_gap", lambda expected, reported: exact(expected + gap, reported))
    publish = toy.checked_publisher(servers, tokenizer, exact=False)
    assert publish(trainer)["train/agreement_mean"] == pytest.approx(0.02, rel=0.01)
    gap = 0.09
    publish(trainer)
    gap = 0.11
    with pytest.raises(WeightsDiffer, match=r"by 0\.11 nats on average \(limit: 0\.1\)"):
        publish(trainer)


@pytest.mark.slow
def test_stale_head_is_found_in_bfloat16_too(folder, server, servers):
    server.stale = "lm_head"
    trainer, tokenizer = make_trainer(folder)
    with pytest.raises(WeightsDiffer, match="head, tied to the embedding"):
        toy.checked_publisher(servers, tokenizer, exact=False)(trainer)


def test_restarted_server_is_compared_before_it_generates(folder, server, servers):
    """A server that is back loads the newest weights; if it then has others, no response of it is used."""
    trainer, tokenizer = make_trainer(folder)
    toy.checked_publisher(servers, tokenizer)(trainer)
    server.stale = "mlp"
    with torch.no_grad():
        server.model.model.layers[0].mlp.up_proj.weight.add_(0.5)
    servers._up_to_date.clear()  # as after a lost connection
    sampler = ServerSampler(servers, [0], SamplingParams(), vocabulary=len(tokenizer))
    with pytest.raises(WeightsDiffer):
        sampler.session().generate_one(0, [5, 6], ("k",), 3)
    assert not server.asked


@pytest.mark.parametrize("fault", [KeyboardInterrupt, RunError("the server is gone", "node")])
def test_interrupted_probe_restores_the_weights(folder, server, servers, fault):
    """After an interrupt, the server gets the true weights too; a server that does not answer gets nothing."""
    trainer, tokenizer = make_trainer(folder)
    before = weights(trainer)

    class Interrupted(FilePublisher):
        def __call__(self, trainer, agreement):
            super().__call__(trainer, agreement)
            if self._pushes == 1:
                raise fault

    with pytest.raises(fault if isinstance(fault, type) else RunError):
        toy.checked_publisher(servers, tokenizer, publisher=Interrupted)(trainer)
    assert all(torch.equal(parameter, before[name]) for name, parameter in trainer.model.named_parameters())
    assert len(server.reloads) == (2 if fault is KeyboardInterrupt else 1)
    loaded = dict(server.model.named_parameters())
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(loaded[name], before[name]) == (fault is KeyboardInterrupt)


def test_groups_cover_everything_that_is_trained(folder):
    from peft import LoraConfig, get_peft_model

    model, tokenizer = toy.policy(folder)
    prompts = Agreement(len(tokenizer), 100).prompts
    trainer, _ = make_trainer(folder)
    groups = group_tensors(trainer, prompts)
    assert set(groups) == {"head, tied to the embedding", "embedding", "attention", "MLP", "norms"}
    covered = {name for tensors in groups.values() for name in tensors}
    assert covered == {name for name, _ in trainer.model.named_parameters()}
    head = groups["head, tied to the embedding"]["model.embed_tokens.weight"]
    assert 0 < len(head) <= min(map(min, prompts)) < len(tokenizer)
    adapter = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    trainer, _ = make_trainer(folder, model=adapter)
    assert set(group_tensors(trainer, prompts)) == {"LoRA adapter of the attention", "LoRA adapter of the MLP"}


def test_noise_is_the_same_everywhere_and_is_removed_exactly(folder):
    model, _ = toy.policy(folder)
    other, _ = toy.policy(folder)
    with torch.no_grad():
        model.model.norm.weight.zero_()
        other.model.norm.weight.zero_()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with add_noise(model, dict(model.named_parameters())), add_noise(other, dict(other.named_parameters())):
        for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q) and not torch.equal(p, before[name]), name
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_prompts_fit_into_the_context_and_leave_the_first_half_of_the_vocabulary():
    prompts = agreement.draw_prompts(50, 12)
    assert prompts == agreement.draw_prompts(50, 12) and {len(ids) for ids in prompts} == {11}
    assert all(25 <= token < 50 for ids in prompts for token in ids)
    assert max(map(len, agreement.draw_prompts(50, 4096))) > 128, "longer than a block of vLLM's prefix cache"


@pytest.mark.parametrize("reported", [[{}], [{0: -1.0, 9: -2.0}]])
def test_missing_and_impossible_tokens_are_refused(reported):
    with pytest.raises(RunError, match="no log-probs, or token ids outside"):
        agreement.measure_gap(torch.zeros(1, 9), reported)


def test_a_gap_that_is_not_a_number_is_refused():
    checked = Agreement(9, 9)
    checked.expect(torch.zeros(len(checked.prompts), 9))
    checked.limit = 1.0
    with pytest.raises(WeightsDiffer):
        checked.compare("server", [{0: math.nan}] * len(checked.prompts))


def test_publisher_without_any_comparison_is_an_error(folder):
    trainer, tokenizer = make_trainer(folder)
    publish = CheckedPublisher(lambda trainer, agreement: None, Agreement(len(tokenizer), 100), exact=True)
    with pytest.raises(RunError, match="no server has loaded the weights"):
        publish(trainer)
