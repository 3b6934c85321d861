"""TRL's trainer on a tiny random model, with three groups of two episodes of several turns.

Under torchrun with two processes, each holds three rows, so that the second group lies on both. `torchrun_trl FOLDER OUT`:
the trainer of `FOLDER/aem_grpo.py` makes one batch, and each process writes its advantages and mask to OUT.
"""

import sys
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  (environment first)
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed
from trl import GRPOConfig, GRPOTrainer

VOCABULARY = 12
EPISODES = [  # completion, mask of the policy's own tokens, reward
    ([3, 4, 8, 5, 6, 7], [1, 1, 0, 1, 1, 1], 1.0),
    ([5, 9, 4, 4], [1, 0, 1, 1], 0.0),
    ([6, 3, 8, 3, 8, 10], [1, 1, 0, 1, 0, 1], 0.5),
    ([10, 11], [1, 1], 0.25),
    ([4, 4, 9, 3], [1, 1, 0, 1], 0.0),
    ([7, 8, 6], [1, 0, 1], 1.0),
]
RESPONSES = [  # the response of each token, by hand
    [0, 0, -1, 1, 1, 1],
    [2, -1, 3, 3, -1, -1],
    [4, 4, -1, 5, -1, 6],
    [7, 7, -1, -1, -1, -1],
    [8, 8, -1, 9, -1, -1],
    [10, -1, 11, -1, -1, -1],
]
GROUPS = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]  # the group of each response


def make_trainer(kind: type[GRPOTrainer], folder: Path, processes: int = 1) -> GRPOTrainer:
    """A trainer of this kind, whose model has the same random weights each time."""
    set_seed(0)
    vocabulary = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="0", eos_token="1")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "head_dim": 16, "initializer_range": 0.5}
    config = Qwen3Config(vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=1, bos_token_id=None, **sizes)
    args = GRPOConfig(
        output_dir=str(folder),
        max_steps=2,
        per_device_train_batch_size=len(EPISODES) // processes,
        num_generations=2,
        max_completion_length=8,
        learning_rate=1e-2,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )

    def play(prompts: list[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        first = trainer.accelerator.process_index * len(prompts)
        completions, masks, rewards = map(list, zip(*EPISODES[first : first + len(prompts)], strict=True))
        prompt_ids = [[2]] * len(prompts)
        fields = {"prompt_ids": prompt_ids, "completion_ids": completions, "env_mask": masks, "score": rewards}
        return fields | {"logprobs": None}

    def reward(prompts: list[Any], score: list[float], **_: Any) -> list[float]:
        return score

    data = Dataset.from_dict({"prompt": ["2"] * len(EPISODES)})
    model = Qwen3ForCausalLM(config)
    return kind(model, reward, args, data, processing_class=tokenizer, rollout_func=play)


def main(folder: str, out: str) -> None:
    sys.path.insert(0, folder)
    from aem_grpo import AEMGRPOTrainer

    AEMGRPOTrainer.gate = 0.0
    trainer = make_trainer(AEMGRPOTrainer, Path(out) / "trainer", processes=2)
    trainer.model.train()
    batch = trainer._generate_and_score_completions([{"prompt": "2"} for _ in range(len(EPISODES) // 2)])
    kept = {name: batch[name].tolist() for name in ("advantages", "completion_mask", "tool_mask")}
    torch.save(kept, Path(out) / f"{trainer.accelerator.process_index}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
