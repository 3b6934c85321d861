"""The laws of the trainer. The letters are those of docs/architecture.md.

(a) full history: loss and gradients equal those of TRL's unmodified trainer
(b) window: one-turn episodes satisfy (a); longer episodes match an independent reference loss
(c) lambda = 0 is bitwise equal to no modulation
(d) the gradient of an update depends on neither padding, micro-batches nor ranks
(e) each generated token is counted as trained, filtered or crashed
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from support import torchrun_training, toy
from support.runs import torchrun

from aem_exp import advantages
from aem_exp.core.errors import RunError
from aem_exp.envs.executor import SerialExecutor
from aem_exp.rollout.play import Rollout
from aem_exp.rollout.sampling.base import SamplingParams
from aem_exp.rollout.types import Episode
from aem_exp.training import logprobs
from aem_exp.training.arguments import max_episode_tokens
from aem_exp.training.modulation import ModulationVariant
from aem_exp.training.token_selection import TokenRules

LOSSES = {
    "grpo": ({"loss_type": "grpo"}, partial(advantages.group_normalised, eps=1e-4), {"scale_rewards": "group"}),
    "rloo": ({"loss_type": "bnpo"}, advantages.leave_one_out, {"scale_rewards": "none", "reward_weights": [4 / 3]}),
    "dr_grpo": ({"loss_type": "dr_grpo"}, advantages.group_centred, {"scale_rewards": "none"}),
    "dapo": (
        {"loss_type": "dapo", "epsilon_high": 0.28},
        partial(advantages.group_normalised, eps=1e-4),
        {"scale_rewards": "group"},
    ),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
        partial(advantages.group_normalised, eps=1e-4),
        {"scale_rewards": "group"},
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("toy")


def one_turn(step, number=0):
    """Episodes of the toy tasks with one turn."""
    tasks = [t for t in toy.ChatterWorld().tasks("train") if t.seed % 4 == 0]
    return [Episode(task, d, m, (d, m)) for d, task in enumerate(tasks) for m in range(4)]


def gradients(trainer, update):
    """Loss and gradients of one update."""
    trainer.current_gradient_accumulation_steps = 1
    trainer.aem_callback.metrics["time/update"] = 0.0
    trainer.model.zero_grad()
    loss = trainer.training_step(trainer.model, update)
    return loss, {name: p.grad.clone() for name, p in trainer.model.named_parameters()}


def first_step(trainer):
    return trainer.build_updates(trainer.assign_credit(trainer.play(0).kept), 0)


def assert_close(ours, theirs, atol=1e-6):
    """Compare (loss, gradients by name)."""
    torch.testing.assert_close(ours[0], theirs[0], atol=atol, rtol=0)
    for name, grad in theirs[1].items():
        torch.testing.assert_close(ours[1][name], grad, atol=atol, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def plain_trl(folder, run, credit, changes):
    """Loss and gradients of an unmodified GRPOTrainer on the same trajectories."""
    from datasets import Dataset
    from trl import GRPOTrainer

    from aem_exp.training.arguments import build_grpo_config

    model, tokenizer = toy.policy(folder, run.env.history)
    rows = credit.rows

    def replay(prompts, trainer):
        return {
            "prompt_ids": [row.prompt for row in rows],
            "completion_ids": [row.completion for row in rows],
            "env_mask": [row.mask for row in rows],
            "logprobs": None,
            "ret": [credit.kept[row.trajectory].ret for row in rows],
        }

    def returned(prompts, ret, **_):
        return ret

    args = build_grpo_config(run, folder / "plain")
    for name, value in {
        "per_device_train_batch_size": len(rows),
        "generation_batch_size": len(rows),
        **changes,
    }.items():
        setattr(args, name, value)
    data = Dataset.from_dict({"prompt": ["x"] * len(rows)})
    trainer = GRPOTrainer(model, returned, args, data, processing_class=tokenizer, rollout_func=replay)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    loss = trainer.training_step(trainer.model, [{"prompt": "x"} for _ in rows], None)
    return loss, {name: p.grad.clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_a_full_history_equals_plain_trl(folder, name, beta):
    settings, estimator, changes = LOSSES[name]
    run = toy.experiment("full", **settings, beta=beta)
    trainer = toy.trainer(folder, run, estimator=estimator)
    credit, (update,) = first_step(trainer)
    assert_close(gradients(trainer, update), plain_trl(folder, run, credit, changes))


@pytest.mark.slow
def test_a_tokens_of_highest_entropy_are_those_of_plain_trl(folder):
    """With one micro-batch. TRL divides by the number of all tokens, ours by that of the chosen tokens."""
    settings, estimator, changes = LOSSES["dapo"]
    run = toy.experiment("full", **settings)
    trainer = toy.trainer(folder, run, estimator=estimator, token_rules=TokenRules(top_entropy=0.2))
    credit, (update,) = first_step(trainer)
    loss, grads = plain_trl(folder, run, credit, changes | {"top_entropy_quantile": 0.2})
    factor = 1 / trainer.aem_callback.metrics["tokens/trained_share"]
    assert factor == pytest.approx(5, rel=0.05)
    ours = gradients(trainer, update)
    assert_close(ours, (loss * factor, {name: grad * factor for name, grad in grads.items()}), atol=5e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_b_one_turn_windows_equal_plain_trl(folder, name):
    settings, estimator, changes = LOSSES[name]
    run = toy.experiment("window", **settings)
    trainer = toy.trainer(folder, run, estimator=estimator, draw=one_turn)
    credit, (update,) = first_step(trainer)
    assert {len(t.responses) for t in credit.kept} == {1}
    # TRL's dr_grpo divides by the token budget of a row, ours by the budget of the whole episode.
    assert_close(
        gradients(trainer, update),
        plain_trl(folder, run, credit, {**changes, "max_completion_length": max_episode_tokens(run)}),
    )


def reference_loss(model, credit, alpha_R, old, kind, low, high, length):
    """The loss of one update over all rows, computed row by row and token by token from the formulas of the papers."""
    rows_sum, tokens, terms = 0.0, 0, []
    r = 0
    for n, row in enumerate(credit.rows):
        ids = torch.tensor([row.prompt + row.completion])
        logp = model(input_ids=ids).logits.log_softmax(-1)[0]
        row_terms = []
        for t, own in enumerate(row.mask):
            if not own:
                r += t > 0 and row.mask[t - 1]  # the previous token ended a response
                continue
            at = len(row.prompt) + t
            ratio = torch.exp(logp[at - 1, ids[0, at]] - old[n][t])
            advantage = credit.advantage_R[r] * alpha_R[r]
            row_terms.append(-torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage))
        r += row.mask[-1]
        rows_sum = rows_sum + torch.stack(row_terms).mean()
        tokens += len(row_terms)
        terms += row_terms
    total = torch.stack(terms).sum()
    return {
        "grpo": rows_sum / len(credit.rows),
        "dapo": total / tokens,
        "bnpo": total / tokens,
        "dr_grpo": total / (len(credit.kept) * length),
    }[kind]


@pytest.mark.slow
@pytest.mark.parametrize("history", ["window", "full"])
@pytest.mark.parametrize("kind", ["grpo", "dapo", "bnpo", "dr_grpo"])
def test_b_loss_equals_an_independent_reference(folder, history, kind):
    """With modulation, invalid turns, and a policy that differs from the old policy, so that ratios are clipped."""
    run = toy.experiment(history, loss_type=kind, epsilon=0.1, epsilon_high=0.15, num_iterations=2)
    trainer = toy.trainer(folder, run, lam=1.0, penalty=0.3, device_rows=5)
    credit, updates = first_step(trainer)
    assert credit.alpha_R.std() > 0.05
    torch.manual_seed(1)
    with torch.no_grad():
        for p in trainer.model.parameters():
            p.add_(torch.randn_like(p) * 0.02)
    ours = gradients(trainer, updates[0])
    trainer.model.zero_grad()
    old = [torch.tensor(row.logps) for row in credit.rows]
    loss = reference_loss(trainer.model, credit, credit.alpha_R, old, kind, 0.1, 0.15, max_episode_tokens(run))
    loss.backward()
    assert_close(ours, (loss.detach(), {name: p.grad for name, p in trainer.model.named_parameters()}), atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("history", ["full", "window"])
def test_c_lambda_zero_is_bitwise_equal_to_no_modulation(folder, history):
    weights = []
    for lam in (None, 0.0, 1.0):
        trainer = toy.trainer(folder, toy.experiment(history, mini_batch=8), lam=lam)
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.slow
def test_raising_and_lowering_split_the_advantages_of_the_step(folder):
    advantages_NT = {}
    for keep in ("all", "raising", "lowering"):
        trainer = toy.trainer(folder, toy.experiment("full"), lam=1.0, variant=ModulationVariant(keep=keep))
        _, ((batch,),) = first_step(trainer)
        advantages_NT[keep] = batch["advantages"] * batch["tool_mask"]
    for keep in ("raising", "lowering"):
        trained = advantages_NT[keep] != 0
        assert trained.any()
        assert torch.equal(advantages_NT[keep][trained], advantages_NT["all"][trained])
    assert torch.equal(advantages_NT["raising"] + advantages_NT["lowering"], advantages_NT["all"])


ALL_LOSS_TERMS = {"beta": 0.05, "entropy_coef": 0.01, "mini_batch": 7}


@pytest.mark.slow
@pytest.mark.parametrize("history", ["full", "window"])
@pytest.mark.parametrize("kind", ["dapo", "bnpo"])
def test_masks_change_only_the_denominator_of_a_token_mean(folder, history, kind):
    """Without a KL term or entropy bonus, a scaled mask has the gradients of coefficient 0; a mask divides by fewer tokens."""
    run = toy.experiment(history, loss_type=kind, max_grad_norm=0.0)
    results, shares = {}, {}
    for keep_by in ("zero", "mask_scaled", "mask"):
        variant = ModulationVariant(keep="raising", keep_by=keep_by)
        trainer = toy.trainer(folder, run, variant=variant, lam=1.0, device_rows=5)
        credit, (update,) = first_step(trainer)
        shares[keep_by] = credit.in_loss_K.float().mean().item()
        results[keep_by] = gradients(trainer, update)
    assert shares["zero"] == 1 > shares["mask"] == shares["mask_scaled"] > 0
    assert_close(results["mask_scaled"], results["zero"])
    loss, grads = results["mask"]
    assert_close((loss * shares["mask"], {k: g * shares["mask"] for k, g in grads.items()}), results["zero"])


@pytest.mark.slow
@pytest.mark.parametrize("keep_by", ["mask", "mask_scaled"])
def test_masked_tokens_have_no_gradient_in_any_term(folder, keep_by):
    """KL term and entropy bonus act on the trained tokens only, whatever the split into micro-batches."""
    run = toy.experiment("window", beta=0.05, entropy_coef=0.01)
    variant = ModulationVariant(keep="raising", keep_by=keep_by)
    whole, split = (toy.trainer(folder, run, variant=variant, lam=1.0, device_rows=n) for n in (0, 3))
    (credit, (one,)), (_, (many,)) = first_step(whole), first_step(split)
    assert len(many) > len(one) == 1
    assert int(one[0]["tool_mask"].sum()) == int(credit.in_loss_K.sum()) < len(credit.in_loss_K)
    assert_close(gradients(split, many), gradients(whole, one))


@pytest.mark.slow
@pytest.mark.parametrize("history", ["full", "window"])
@pytest.mark.parametrize("kind", ["grpo", "dapo", "bnpo", "dr_grpo", "cispo"])
def test_d_micro_batches_and_padding_change_nothing(folder, history, kind):
    results = []
    for device_rows in (0, 1, 3):
        trainer = toy.trainer(
            folder, toy.experiment(history, loss_type=kind, **ALL_LOSS_TERMS), lam=1.0, device_rows=device_rows
        )
        _, updates = first_step(trainer)
        assert len(updates) >= 2
        results.append(gradients(trainer, updates[1]))
    assert_close(results[1], results[0])
    assert_close(results[2], results[0])


@pytest.fixture(scope="module")
def one_process(folder):
    """The final weights of training in one process, for each kind."""
    kinds = (*torchrun_training.KINDS, torchrun_training.MATCHED)
    return {kind: torchrun_training.weights(kind, folder) for kind in kinds}


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["replicated", "sharded"])
def test_d_ranks_change_nothing(folder, one_process, weights):
    """Two gloo processes end with the weights, the entropy drift and the sizes of the steps of one process.

    Each process has a share of the episodes and of each update. It has all weights, or a shard of each.
    """
    done = torchrun(torchrun_training, str(folder), *(["sharded"] if weights == "sharded" else []))
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in one_process if weights == "replicated" else torchrun_training.KINDS:
        two = torch.load(folder / f"{kind}-2.pt", weights_only=True)
        assert two.keys() == one_process[kind].keys()
        assert len(two["drift"]) == (1 if kind == torchrun_training.MATCHED else 2)
        assert two["sizes"][:5].min() > 0
        for name, weight in one_process[kind].items():
            torch.testing.assert_close(
                two[name], weight, atol=2e-6, rtol=1e-5, msg=lambda m, at=f"{kind} {name}": f"{at}: {m}"
            )


@pytest.mark.slow
@pytest.mark.parametrize("history", ["full", "window"])
def test_e_each_generated_token_is_counted(folder, history):
    run = toy.experiment(history, steps=3)
    seen = []
    rollout = Rollout(SerialExecutor(toy.ChatterWorld(breaks=True)), run.env, toy.Chat(toy.policy(folder, history)[1]))
    trainer = toy.trainer(folder, run, lam=1.0, rollout=rollout)
    trainer.aem_callback.report = lambda step, metrics: seen.append(metrics)
    trainer.train()
    assert len(seen) == 3
    for m in seen:
        assert m["train/tokens_generated"] == m["train/tokens_trained"] + m["train/tokens_crashed"]
    assert any(m["train/tokens_crashed"] > 0 for m in seen)


@pytest.mark.slow
def test_learning_rate_follows_steps(folder):
    run = toy.experiment("window", steps=3, mini_batch=4, lr_scheduler_type="linear", learning_rate=3e-3)
    seen = []
    trainer = toy.trainer(folder, run)
    trainer.aem_callback.report = lambda step, metrics: seen.append(metrics)
    trainer.train()
    assert [m["train/updates"] > 1 for m in seen] == [True] * 3
    assert [m["train/learning_rate"] for m in seen] == pytest.approx([3e-3, 2e-3, 1e-3])


@pytest.mark.slow
def test_sampler_with_other_weights_ends_the_run(folder):
    trainer = toy.trainer(folder, toy.experiment("full"))
    play = trainer.play

    def change_weights_after_play(step):
        played = play(step)
        with torch.no_grad():
            next(trainer.model.parameters()).mul_(1.5)
        return played

    trainer.play = change_weights_after_play
    with pytest.raises(RuntimeError, match=r"log-probs .* nats .*0\.001"):
        trainer.train()


@pytest.mark.slow
@pytest.mark.parametrize("trusted", [True, False])
def test_wrong_entropies_of_a_sampler_end_the_run(folder, trusted):
    """Its log-probs are correct."""
    trainer = toy.trainer(folder, toy.experiment("full"), lam=1.0, trust_sampler=trusted)
    play = trainer.play

    def double_entropies(step):
        played = play(step)
        for trajectory in played[0]:
            for response in trajectory.responses:
                response.sample.entropies[:] = [2 * entropy for entropy in response.sample.entropies]
        return played

    trainer.play = double_entropies
    with pytest.raises((RuntimeError, RunError), match=r"entropies .* nats "):
        trainer.train()


@pytest.mark.slow
def test_scored_log_probs_and_entropies_equal_sampled_ones(folder):
    """The scoring pass replaces the sampler's measurements with bf16 or vLLM."""
    batches = []
    for trusted in (True, False):
        trainer = toy.trainer(folder, toy.experiment("full", mini_batch=8), lam=1.0, trust_sampler=trusted)
        credit, updates = first_step(trainer)
        batches.append(
            (credit.entropy_R, credit.alpha_R, updates[0][0]["old_per_token_logps"] * updates[0][0]["tool_mask"])
        )
    for ours, theirs in zip(*batches, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


@pytest.mark.slow
def test_score_norm_is_the_norm_of_the_gradient_of_log_p(folder):
    trainer = toy.trainer(folder, toy.experiment("window", temperature=0.7))
    trainer.sampler.sampling = SamplingParams(temperature=0.7)
    _, (update,) = first_step(trainer)
    (batch,) = update
    norm_NT = logprobs.compute_score_norms(trainer, batch)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    logits = trainer.model(input_ids=ids, attention_mask=mask).logits.detach().requires_grad_()
    for row, token in ((0, 0), (3, 1)):
        position = batch["prompt_ids"].shape[1] + token
        logp = (logits[row, position - 1] / 0.7).log_softmax(-1)[ids[row, position]]
        (grad,) = torch.autograd.grad(logp, logits)
        torch.testing.assert_close(norm_NT[row, token], grad.norm() * 0.7, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_lora_trains_only_the_adapter(folder):
    from peft import LoraConfig, get_peft_model

    run = toy.experiment("full", beta=0.05)
    model, _ = toy.policy(folder)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    trainer = toy.trainer(folder, run, lam=1.0, model=adapted)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed
    assert all("lora_" in n for n in changed)


# Steps whose loss is zero.


class EqualReturnsEnv(toy.Chatter):
    """All trajectories of a group get the same return."""

    def _turn(self, text, reward=0.0, *rest):
        return super()._turn(text, 0.1, *rest)


class EqualReturnsWorld(toy.ChatterWorld):
    def env(self):
        return EqualReturnsEnv()


class SwitchableWorld(toy.ChatterWorld):
    """All returns of a group are equal while `equal_returns` is set."""

    equal_returns = False

    def env(self):
        return EqualReturnsEnv() if self.equal_returns else super().env()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"drop_equal": True}, {"drop_equal": True, "rounds": 2, "groups": 4}], ids=str)
def test_step_without_advantages_changes_no_weight(folder, changes):
    """The third of four steps has no advantages. Neither Adam's momentum nor weight decay may change the weights."""
    run = toy.experiment("full", steps=4, weight_decay=0.1, mini_batch=8, optim="adamw_torch")
    world, seen = SwitchableWorld(), []
    rollout = Rollout(SerialExecutor(world), run.env, toy.Chat(toy.policy(folder)[1]))
    trainer = toy.trainer(folder, run, lam=1.0, rollout=rollout, **changes)

    def report(step, metrics):
        weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        moments = [state["step"].item() for state in trainer.optimizer.state.values()]
        seen.append((metrics, weights, moments))
        rollout.executor.envs.clear()
        world.equal_returns = step == 2

    trainer.aem_callback.report = report
    trainer.train()
    _, (_, weights_2, moments_2), (metrics_3, weights_3, moments_3), (metrics_4, weights_4, _) = seen
    assert torch.equal(weights_2, weights_3) and moments_2 == moments_3
    assert not torch.equal(weights_3, weights_4)
    assert not any(metrics_3[f"train/{name}"] for name in ("updates", "useful_share", "tokens_trained", "rows"))
    assert metrics_3["train/tokens_filtered"] == metrics_3["train/tokens_generated"] > 0
    assert metrics_4["train/updates"] > 0 and metrics_4["train/useful_share"] > 0
    assert trainer.time.step == 4
    assert trainer.time.updates == sum(metrics["train/updates"] for metrics, *_ in seen)


@pytest.mark.slow
@pytest.mark.parametrize("term", [{"beta": 0.05}, {"entropy_coef": 0.01}], ids=str)
def test_step_without_advantages_trains_with_other_loss_terms(folder, term):
    run = toy.experiment("full", steps=1, **term)
    seen = []
    trainer = toy.trainer(
        folder, run, rollout=Rollout(SerialExecutor(EqualReturnsWorld()), run.env, toy.Chat(toy.policy(folder)[1]))
    )
    trainer.aem_callback.report = lambda step, metrics: seen.append(metrics)
    trainer.train()
    assert seen[0]["train/updates"] == seen[0]["train/useful_share"] == 1


@pytest.mark.slow
def test_step_without_advantages_trains_with_the_bonus_of_a_modulation(folder):
    run = toy.experiment("full", steps=1)
    seen = []
    rollout = Rollout(SerialExecutor(EqualReturnsWorld()), run.env, toy.Chat(toy.policy(folder)[1]))
    trainer = toy.trainer(
        folder, run, lam=1.0, variant=ModulationVariant(scope="batch", bonus=0.05, centred=True), rollout=rollout
    )
    trainer.aem_callback.report = lambda step, metrics: seen.append(metrics)
    trainer.train()
    assert seen[0]["train/updates"] == 1


@pytest.mark.slow
def test_step_with_only_masked_trajectories_has_no_update(folder):
    """All of them reach the maximum number of turns."""
    run = toy.experiment("full", steps=1)
    run = replace(run, env=replace(run.env, max_turns=1))
    seen = []
    long = [
        Episode(task, d, m, (d, m)) for d, task in enumerate(toy.ChatterWorld().tasks("train")[1:4]) for m in range(4)
    ]
    trainer = toy.trainer(folder, run, lam=1.0, mask_truncated=True, draw=lambda step, number=0: long)
    trainer.aem_callback.report = lambda step, metrics: seen.append(metrics)
    trainer.train()
    assert seen[0]["train/updates"] == seen[0]["train/useful_share"] == 0
    assert seen[0]["train/tokens_filtered"] == seen[0]["train/tokens_generated"]


@pytest.mark.slow
@pytest.mark.parametrize("history", ["full", "window"])
@pytest.mark.parametrize("kind", ["grpo", "dr_grpo"])
def test_count_masked_enlarges_the_denominator_of_the_loss(folder, history, kind):
    """Loss and gradients are scaled; nothing else changes."""
    run = toy.experiment(history, loss_type=kind)
    run = replace(run, env=replace(run.env, max_turns=3))  # a quarter of the tasks need four turns
    results = []
    for count_masked in (False, True):
        trainer = toy.trainer(folder, run, mask_truncated=True, count_masked=count_masked, device_rows=3)
        credit, (update,) = first_step(trainer)
        results.append(gradients(trainer, update))
    assert len(credit.filtered) == 4
    trained, masked = len(credit.kept), len(credit.filtered)
    if (history, kind) == ("window", "grpo"):
        trained, masked = len(credit.rows), sum(len(t.responses) for t in credit.filtered)
    factor = trained / (trained + masked)
    (loss, grads), counted = results
    assert_close(counted, (loss * factor, {name: grad * factor for name, grad in grads.items()}))
