"""Supervised training of a policy on the responses in given rows, with TRL's `SFTTrainer`."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from aem_exp.rollout.rows import Row
from aem_exp.rundir import checkpoints

WARMUP_SHARE = 0.1  # of the updates
SAVE_SECONDS = 300.0  # between two checkpoints
IGNORED = -100  # label of a token that is not trained


@dataclass(frozen=True)
class ImitationSettings:
    """How the rows are trained on."""

    epochs: int
    """passes over the rows"""
    batch: int
    """rows per update"""
    learning_rate: float
    """peak learning rate"""
    device_rows: int
    """maximum number of rows per micro-batch; 0: no limit"""
    device_tokens: int
    """maximum number of tokens per micro-batch, with padding; 0: no limit"""
    seed: int
    """seeds the order of the rows"""
    use_cpu: bool
    bf16: bool
    """autocast to bfloat16"""
    gradient_checkpointing: bool


ReportUpdate = Callable[[int, int, float, float], None]  # update, all updates, loss, remaining seconds


def train_on_rows(
    model: Any, tokenizer: Any, rows: Sequence[Row], settings: ImitationSettings, folder: Path, report: ReportUpdate
) -> int:
    """Maximise the likelihood of the responses, end tokens included, and of no other tokens; return the number of updates.

    The loss of an update is the mean over its trained tokens.

    Args:
        model: a causal LM, or a PEFT model around it; it is trained in place.
        folder: receives a checkpoint every `SAVE_SECONDS`. The training continues from the newest intact one that it contains.
    """
    micro = micro_batch_rows(rows, settings)
    config = SFTConfig(
        output_dir=str(folder),
        seed=settings.seed,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=settings.batch // micro,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=WARMUP_SHARE,
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=1.0,
        train_sampling_strategy="group_by_length",
        use_cpu=settings.use_cpu,
        bf16=settings.bf16,
        gradient_checkpointing=settings.gradient_checkpointing,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",  # the callback decides
        save_total_limit=2,
        report_to=[],
        disable_tqdm=True,
    )
    start = next((path for path in checkpoints.list_complete(folder) if not checkpoints.describe_damage(path)), None)
    callback = _Callback(report)
    trainer = SFTTrainer(
        model, config, train_dataset=build_dataset(rows), processing_class=tokenizer, callbacks=[callback]
    )
    trainer.remove_callback(_printer_class())
    trainer.train(resume_from_checkpoint=str(start) if start else None)
    return int(trainer.state.global_step)


def micro_batch_rows(rows: Sequence[Row], settings: ImitationSettings) -> int:
    """The largest divisor of `batch` whose rows fit into a micro-batch, even if all have the length of the longest row."""
    longest = max(len(row.prompt) + len(row.completion) for row in rows)
    limit = settings.device_tokens // longest if settings.device_tokens else settings.batch
    limit = min(limit, settings.device_rows or limit)
    return max(size for size in range(1, settings.batch + 1) if settings.batch % size == 0 and size <= max(1, limit))


def build_dataset(rows: Sequence[Row]) -> Dataset:
    """The tokens and labels of each row. Only the tokens of responses have a label."""
    labels = [
        [IGNORED] * len(row.prompt)
        + [token if own else IGNORED for token, own in zip(row.completion, row.mask, strict=True)]
        for row in rows
    ]
    return Dataset.from_dict({"input_ids": [[*row.prompt, *row.completion] for row in rows], "labels": labels})


def _printer_class() -> Any:
    """The callback that prints each log to the terminal."""
    from transformers import PrinterCallback

    return PrinterCallback


class _Callback(TrainerCallback):
    """Reports the loss of each update, and saves checkpoints."""

    def __init__(self, report: ReportUpdate) -> None:
        self.report, self.first, self.begun, self.saved = report, 0, 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.first, self.begun = state.global_step, time.monotonic()
        self.saved = self.begun

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if time.monotonic() - self.saved >= SAVE_SECONDS:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step, self.saved = state.global_step, time.monotonic()
        checkpoints.mark_complete(Path(args.output_dir) / f"checkpoint-{step}", step, step, ranks=1)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            pace = (time.monotonic() - self.begun) / (state.global_step - self.first)
            self.report(state.global_step, state.max_steps, logs["loss"], pace * (state.max_steps - state.global_step))
