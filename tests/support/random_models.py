"""Models of real shapes with random weights, and the tokenizer of the household world: folders that need no network."""

from pathlib import Path
from typing import Any

from aem_exp import config, policy, tiny
from aem_exp.envs.opening import open_world

SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
QWEN2 = {"model_type": "qwen2", "vocab_size": 151936, "tie_word_embeddings": True, "max_position_embeddings": 32768}
SHAPES: dict[str, dict[str, Any]] = {
    "135 M (SmolLM2)": SMOLLM2,
    "0.5 B (Qwen2.5)": {
        **QWEN2,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
    },
    "1.5 B (Qwen2.5)": {
        **QWEN2,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
}


def make_tokenizer() -> Any:
    """The tokenizer that a tiny policy of the default environment has."""
    experiment = config.load(["env=household"])
    return tiny.make_tokenizer(open_world(experiment).words(), experiment.env)


def save_model(shape: dict[str, Any], folder: Path, dtype: str = "float32") -> Path:
    """Write a folder with random weights, config.json and tokenizer."""
    tokenizer = make_tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    policy.build_from_config(shape | ends, dtype, "sdpa", {}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
