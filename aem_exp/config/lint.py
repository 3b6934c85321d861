"""Notes on an experiment: what is allowed and yet has no effect, or another than its name says."""

from collections.abc import Iterator
from typing import Final

from aem_exp.config.prompts import TEMPLATE_FIELDS, template_fields
from aem_exp.config.rules import rows_per_update
from aem_exp.config.schema import Experiment

CONSTANT_SCHEDULE: Final = "aem_exp.schedules.Constant"


def notes(e: Experiment) -> list[str]:
    """What is allowed and yet does nothing, or not what its name says."""
    parts = (_update_notes, _modulation_notes, _row_notes, _prompt_notes, _choice_notes)
    return [note for part in parts for note in part(e)]


def _update_notes(e: Experiment) -> Iterator[str]:
    t = e.trainer
    fits = e.env.history == "full" and round(t.tasks_per_step * t.group_size / rows_per_update(e)) == 1
    if t.num_iterations == 1 and (t.mini_batch == "all" or fits):
        clips = ", ".join(
            f"trainer.{key}" for key in ("epsilon", "epsilon_high", "delta") if getattr(t, key) is not None
        )
        yield f"one update per step (trainer.mini_batch={t.mini_batch}): the ratio is 1, so {clips} never act"
    if t.importance_sampling_level == "sequence" and t.loss_type in ("bnpo", "dr_grpo", "dapo", "cispo"):
        yield f"trainer.loss_type={t.loss_type} weights a sequence ratio by length; GSPO's own loss_type is grpo"
    if e.parent_steps and (anew := _progress_schedules(e)):
        span = f"steps {e.parent_steps + 1} to {t.steps}"
        yield f"{' and '.join(anew)}: a new schedule over {span}, the steps of this run; not the parent's"


def _modulation_notes(e: Experiment) -> Iterator[str]:
    if e.modulation.lam is not None and e.modulation.gate == 0:
        yield "modulation.gate=0: groups whose entropies differ by noise alone are modulated too"
    if e.modulation.lam is not None and not any(v for k, v in e.modulation.lam.items() if k != "_target_"):
        yield f"modulation={e.modulation.name} with lambda 0: this is the baseline alone, under another name"


def _row_notes(e: Experiment) -> Iterator[str]:
    if e.trainer.mask_truncated_completions:
        yield "trainer.mask_truncated_completions=true: where failures run out of turns, only wins are trained"
    if e.env.history == "full" and e.env.max_turns * e.env.response_tokens > e.env.context_tokens:
        yield (f"env.context_tokens={e.env.context_tokens}: too few for env.max_turns={e.env.max_turns} full responses")
    if 0 < e.launch.device_tokens < e.env.context_tokens:
        yield (f"launch.device_tokens={e.launch.device_tokens}: longer rows are trained one by one, whatever they need")


def _prompt_notes(e: Experiment) -> Iterator[str]:
    for name in TEMPLATE_FIELDS[e.env.history]:
        needed = {"observation"} if name != "pair" else {"observation", "action"}
        if not needed & template_fields(e.env.prompt[name]):
            yield f"env.prompt.{name} has no {{observation}}: the policy is not shown what it stands before"
    if e.env.history == "window" and e.env.window and "history" not in template_fields(e.env.prompt["window"]):
        yield f"env.prompt.window has no {{history}}: env.window={e.env.window} shows nothing"


def _choice_notes(e: Experiment) -> Iterator[str]:
    if e.model.path and not e.model.lora and e.trainer.learning_rate > 1e-4:
        yield (
            f"trainer.learning_rate={e.trainer.learning_rate:g} is for a tiny policy; for weights that are loaded, 1e-6 or so"
        )
    if e.env.history == "window" and e.env.window == 0:
        yield "env.window=0: the policy is shown nothing of the past turns"
    if e.env.make.get("split") == "verl_agent":
        yield ("env.make.split=verl_agent: for comparing with its published numbers alone; dev is drawn as it draws it")
    if e.env.make.get("nouns") == "words":
        yield "env.make.nouns=words: which product is of the right kind is approximate, and so are rewards"
    if e.launch.sampler == "served" and not e.launch.workers:
        yield ("launch.workers=0: environments are stepped one after another, while servers generate; see idle_share")
    if e.evaluation.every == 0:
        yield "evaluation.every=0: the dev panel is not read while training"


def _progress_schedules(e: Experiment) -> list[str]:
    """What follows the progress of a run."""
    lam, shape = e.modulation.lam or {}, e.trainer.lr_scheduler_type
    fields = {"modulation.lam": lam.get("_target_", CONSTANT_SCHEDULE), "trainer.lr_scheduler_type": shape}
    return [f"{field}={value}" for field, value in fields.items() if value not in (CONSTANT_SCHEDULE, "constant")]
