"""What vLLM needs on a machine without GPUs: a supported head size, some options, and the head of a tied model in each file.

On a CPU, vLLM copies a head that is tied to the embedding when it starts. It updates this copy only if the file of new weights
has `lm_head.weight`: measured with vLLM 0.31, a changed embedding leaves a gap of 0.5 nats without it, and of 1e-5 nats with it.
"""

import json
from pathlib import Path
from typing import Any, Final

from aem_exp.core.errors import ConfigError

# Widths of attention heads for which vLLM has CPU code.
HEAD_SIZES: Final = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
ENGINE_OPTIONS: Final[dict[str, Any]] = {
    "enforce_eager": True,  # a compiled model is not faster on a CPU, and starts minutes later
    "enable_chunked_prefill": False,  # with it, a request with a seed ends the engine
}
# Of an engine in the trainer's process: threads are not bound to cores, and the cache of contexts has 2 GB.
ENGINE_VARIABLES: Final = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "2"}


def check_head_size(folder: str | Path) -> None:
    """Refuse a model whose attention heads vLLM cannot compute on a CPU.

    Raises:
        ConfigError: the head size has no CPU code.
    """
    shape = _read_shape(Path(folder))
    size = shape.get("head_dim") or shape.get("hidden_size", 0) // shape.get("num_attention_heads", 1)
    if size not in HEAD_SIZES:
        sizes = ", ".join(map(str, HEAD_SIZES))
        problem = f"has attention heads of size {size}, and vLLM on a CPU accepts only {sizes}"
        raise ConfigError("model.path", str(folder), f"{problem}; use launch.sampler=local, or a server with a GPU")


def is_tied(folder: str | Path) -> bool:
    """Whether a model shares the weights of its embedding and its LM head."""
    return bool(_read_shape(Path(folder)).get("tie_word_embeddings", False))


def write_weights_with_head(folder: Path, target: Path) -> None:
    """Write the weights of a tied model to an existing folder, with a copy of the embedding as `lm_head.weight`.

    Raises:
        ConfigError: no tensor or several tensors have the name of an embedding.
    """
    from safetensors.torch import load_file, save_file

    weights = {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}
    names = [name for name in weights if name.endswith(("embed_tokens.weight", "wte.weight", "embed_in.weight"))]
    if len(names) != 1:
        problem = f"its tied embedding cannot be found among its {len(weights)} tensors"
        raise ConfigError("model.path", "tie_word_embeddings", f"{problem}; use launch.sampler=local")
    weights["lm_head.weight"] = weights[names[0]].clone()
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})


def _read_shape(folder: Path) -> dict[str, Any]:
    shape: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return shape
