"""Notes on an experiment: allowed settings that have no effect, or another effect than their name suggests."""

from collections.abc import Iterator
from typing import Final

from aem_exp.config.prompts import TEMPLATE_FIELDS, template_fields
from aem_exp.config.rules import rows_per_update
from aem_exp.config.schema import Experiment

COMPARING_TURNS: Final = ("step_compared", "peer_valued")  # estimators whose advantages differ within a trajectory
CONSTANT_SCHEDULE: Final = "aem_exp.schedules.Constant"


def notes(e: Experiment) -> list[str]:
    """Notes on allowed settings that have no effect, or a surprising one."""
    parts = (_update_notes, _modulation_notes, _row_notes, _prompt_notes, _choice_notes)
    return [note for part in parts for note in part(e)]


def _update_notes(e: Experiment) -> Iterator[str]:
    t = e.trainer
    fits = e.env.history == "full" and round(t.tasks_per_step * t.group_size / rows_per_update(e)) == 1
    if t.num_iterations == 1 and (t.mini_batch == "all" or fits):
        clips = ", ".join(
            f"trainer.{key}"
            for key in ("epsilon", "epsilon_high", "delta", "kl_cov_coef")
            if getattr(t, key) is not None
        )
        verb = "have" if "," in clips else "has"
        yield f"one update per step (trainer.mini_batch={t.mini_batch}): the ratio is 1, so {clips} {verb} no effect"
    if t.importance_sampling_level == "sequence" and t.loss_type in ("bnpo", "dr_grpo", "dapo", "cispo"):
        yield f"trainer.loss_type={t.loss_type} weights sequence ratios by row length; GSPO uses trainer.loss_type=grpo"
    target = str(e.baseline.advantage.get("_target_", "")).rpartition(".")[2]
    if t.importance_sampling_level == "sequence" and e.env.history == "full" and target in COMPARING_TURNS:
        yield f"{target}: a sequence ratio averages the advantages of the turns in a row; set env.history=window"
    if e.parent_steps and (schedules := _progress_schedules(e)):
        span = f"steps {e.parent_steps + 1} to {t.steps}"
        yield f"{' and '.join(schedules)}: the schedule starts anew over {span} and does not continue the parent's"


def _modulation_notes(e: Experiment) -> Iterator[str]:
    if e.modulation.lam is not None and e.modulation.gate == 0:
        yield "modulation.gate=0: groups whose entropies differ only by noise are also modulated"
    if e.modulation.lam is not None and not any(v for k, v in e.modulation.lam.items() if k != "_target_"):
        yield f"modulation={e.modulation.name} with lambda 0 is the same as the baseline alone (modulation=none)"


def _row_notes(e: Experiment) -> Iterator[str]:
    if e.trainer.mask_truncated_completions:
        yield "trainer.mask_truncated_completions=true: if failed episodes run out of turns, only successes are trained on"
    if e.env.history == "full" and e.env.max_turns * e.env.response_tokens > e.env.context_tokens:
        yield (
            f"env.context_tokens={e.env.context_tokens}: too few for {e.env.max_turns} responses (env.max_turns) of full length"
        )
    if 0 < e.launch.device_tokens < e.env.context_tokens:
        yield (
            f"launch.device_tokens={e.launch.device_tokens}: longer rows are trained one at a time and exceed this limit"
        )


def _prompt_notes(e: Experiment) -> Iterator[str]:
    for name in TEMPLATE_FIELDS[e.env.history]:
        needed = {"observation"} if name != "pair" else {"observation", "action"}
        if not needed & template_fields(e.env.prompt[name]):
            yield f"env.prompt.{name} has no {{observation}}: the policy does not see the current observation"
    if e.env.history == "window" and e.env.window and "history" not in template_fields(e.env.prompt["window"]):
        yield f"env.prompt.window has no {{history}}: env.window={e.env.window} has no effect"


def _choice_notes(e: Experiment) -> Iterator[str]:
    if e.model.path and not e.model.lora and e.trainer.learning_rate > 1e-4:
        yield (
            f"trainer.learning_rate={e.trainer.learning_rate:g} suits a tiny policy; for loaded weights, use about 1e-6"
        )
    if e.model.path and e.model.lora and e.trainer.learning_rate < 1e-5:
        yield f"trainer.learning_rate={e.trainer.learning_rate:g} is low for LoRA; use about 1e-5 to 1e-4"
    if e.env.history == "window" and e.env.window == 0:
        yield "env.window=0: the policy does not see past turns"
    if e.env.make.get("split") == "verl_agent":
        yield (
            "env.make.split=verl_agent: only for comparisons with its published numbers; dev is sampled as in verl-agent"
        )
    if e.env.make.get("nouns") == "words":
        yield "env.make.nouns=words: the matching of product types, and so the rewards, are approximate"
    if e.launch.sampler == "served" and not e.launch.workers:
        yield ("launch.workers=0: environments run one after another while servers generate; see the metric idle_share")
    if e.evaluation.every == 0:
        yield "evaluation.every=0: no evaluation during training"


def _progress_schedules(e: Experiment) -> list[str]:
    """The schedules that depend on the progress of the run."""
    lam, shape = e.modulation.lam or {}, e.trainer.lr_scheduler_type
    fields = {"modulation.lam": lam.get("_target_", CONSTANT_SCHEDULE), "trainer.lr_scheduler_type": shape}
    return [f"{field}={value}" for field, value in fields.items() if value not in (CONSTANT_SCHEDULE, "constant")]
