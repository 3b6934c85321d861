"""Finds, makes, loads and saves the policy: any causal language model in Hugging Face format, with or without a LoRA
adapter.

Nothing is downloaded here.
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

from aem_exp.config import ConfigError, Experiment, Launch, Model, instantiate, targets
from aem_exp.core import disk, extras
from aem_exp.envs import World

log = logging.getLogger("aem_exp")
LIBRARIES = ("torch", "transformers")  # to make a policy
# Files of a model's folder.
LOADED_SUFFIXES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")


def locate(model: Model) -> str:
    """Folder of the weights: `model.path` itself, or its snapshot in the local hub cache.

    With `trust_remote_code`, only where its code is the one that was reviewed.
    """
    folder = _find_folder(model)
    if (Path(folder) / "adapter_config.json").exists():
        remedy = "is an adapter (adapter_config.json), whose weights lie elsewhere; merge it into them (merge_and_unload of peft)"
        raise ConfigError("model.path", model.path, remedy)
    if model.trust_remote_code:
        _check_no_foreign_code(Path(folder))
        digest = sha256()
        for file in sorted(Path(folder).rglob("*.py")):
            digest.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
        if digest.hexdigest() != model.code_sha256:
            remedy = f"the code in {folder} hashes to {digest.hexdigest()}; review it, then set that"
            raise ConfigError("model.code_sha256", model.code_sha256, remedy)
    return folder


def _check_no_foreign_code(folder: Path) -> None:
    """Refuse a model that names code of another folder, `auto_map: {...: "other/folder--file.Class"}`: no hash covers that."""
    for file in sorted(folder.glob("*.json")):
        try:
            names = list(_auto_map_names(json.loads(file.read_text(encoding="utf-8"))))
        except (ValueError, RecursionError) as error:
            raise ConfigError("model.path", str(folder), f"{file.name} is damaged: {error}") from error
        for name in names:
            if "--" in name:
                remedy = (
                    f"auto_map in {file.name} names code of another folder ({name}), which code_sha256 does not cover"
                )
                raise ConfigError("model.trust_remote_code", True, f"{remedy}; copy that code into {folder}, review it")


def _auto_map_names(data: Any, inside: bool = False) -> Iterator[str]:
    """All strings that are nested under a key `auto_map`."""
    if isinstance(data, str) and inside:
        yield data
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield from _auto_map_names(value, inside or key == "auto_map")


def _find_folder(model: Model) -> str:
    path = model.path or ""
    if (Path(path) / "config.json").is_file():
        return _require_safetensors(path, path, "")
    if Path(path).is_absolute() or path.startswith(".") or path.count("/") != 1:
        raise ConfigError(
            "model.path", path, "a folder with config.json, or a hub id such as Qwen/Qwen2.5-1.5B-Instruct"
        )
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
        raise ConfigError("model.path", path, f"{folder} holds no *.safetensors{remedy}")
    return folder


def make_cached(experiment: Experiment, world: World) -> str:
    """The folder of a policy that is made here: once, and cached by everything that decides it."""
    recipe: dict[str, Any] = {"make": experiment.model.make, "env": asdict(experiment.env), "world": world.fingerprint}
    maker = targets.module_location(str(recipe["make"]["_target_"]).rpartition(".")[0])
    recipe["code"] = sha256(maker.read_bytes()).hexdigest() if maker and maker.is_file() else ""
    digest = sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:12]
    cache = disk.cache_dir()
    folder = cache / f"{experiment.model.name}-{digest}"
    disk.check_writable(cache, "AEM_CACHE")
    with FileLock(cache / f"{folder.name}.lock"):
        if not folder.exists():
            extras.require_training("model.make", recipe["make"]["_target_"], "making this policy", LIBRARIES)
            log.info("making the policy %s (once; cached in %s)", experiment.model.name, folder)
            with tempfile.TemporaryDirectory(dir=cache) as part:
                make = instantiate(recipe["make"], partial=True)
                make(world=world, env=experiment.env, folder=Path(part) / "model")
                os.replace(Path(part) / "model", folder)
    return str(folder)


def fingerprint(folder: str | Path) -> str:
    """Hash of all that is loaded from a model's folder. The hub's cache names its files by their hash; those are not read."""
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
    """What a folder of weights may be called: its path, and last its hub id where it is one of the hub's cache."""
    path = Path(folder).resolve()
    repo = path.parent.parent.name
    hub = [repo.removeprefix("models--").replace("--", "/")] if path.parent.name == "snapshots" else []
    return [folder, str(path), *hub]


def select_device(launch: Launch) -> Any:
    """The torch device of `launch`: a GPU, or the CPU.

    Raises:
        ConfigError: a GPU is wanted and there is none: training on the CPU could take weeks.
    """
    import torch

    if not launch.gpus_per_node:
        return torch.device("cpu")
    if not torch.accelerator.is_available():
        remedy = "this machine has no GPU that torch can use; choose launch=local"
        raise ConfigError("launch.gpus_per_node", launch.gpus_per_node, remedy)
    return torch.accelerator.current_accelerator()


def load_tokenizer(model: Model, folder: str) -> Any:
    """The tokenizer of a model."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **_loading_options(model))
    except (OSError, ValueError) as error:
        raise _unreadable_error(folder, "tokenizer", error) from error
    if tokenizer.chat_template is None:
        raise ConfigError("model.path", model.path, "a model whose tokenizer has a chat template: prompts are messages")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def vocabulary_size(model: Model, folder: str) -> int:
    """How many tokens a model has, those included that its tokenizer does not name."""
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(folder, **_loading_options(model)).get_text_config().vocab_size)


def _unreadable_error(folder: str, what: str, error: Exception) -> ConfigError:
    why = f"its {what} cannot be read ({' '.join(str(error).split())[:200]}); fetch or copy the folder again"
    return ConfigError("model.path", folder, why)


def _loading_options(model: Model) -> dict[str, bool]:
    return {"trust_remote_code": model.trust_remote_code, "local_files_only": True}


def load(model: Model, folder: str, seed: int) -> tuple[Any, Any]:
    """The model, on the CPU and ready for training, and its tokenizer.

    Raises:
        ConfigError: the folder does not hold every tensor of the model, or holds others.
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
        torch.manual_seed(seed)  # the adapter starts at random
    return _add_adapter(policy, model.lora), tokenizer


def _check_complete(policy: Any, folder: str, report: Mapping[str, Any]) -> None:
    """Refuse weights that are not all of the model's: transformers would go on with random numbers in their place.

    A tensor that is tied to another need not be there, and a buffer is none of the weights.
    """
    not_required = {*policy.all_tied_weights_keys, *(name for name, _ in policy.named_buffers())}
    other_shape = sorted(name for name, *_ in report["mismatched_keys"])
    for what, names in (
        ("lack", sorted({*report["missing_keys"]} - not_required)),
        ("have another shape for", other_shape),
        ("hold what the model of config.json has no place for:", sorted(report["unexpected_keys"])),
    ):
        if names:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more tensors" if len(names) > 3 else "")
            raise ConfigError("model.path", folder, f"its weights {what} {shown}; fetch or copy them again")


def _add_adapter(policy: Any, lora: dict[str, Any] | None) -> Any:
    if not lora:
        return policy
    from peft import LoraConfig, get_peft_model

    return get_peft_model(policy, LoraConfig(task_type="CAUSAL_LM", **lora))


def max_positions(shape: dict[str, Any]) -> tuple[int, bool]:
    """Tokens in a row that the model of a config.json has positions for (0: it does not say), and whether they are scaled."""
    rope = shape.get("rope_parameters") or shape.get("rope_scaling") or {}
    kind, most = rope.get("rope_type", rope.get("type", "default")), shape.get("max_position_embeddings", 0)
    if kind == "yarn":
        most = rope.get("original_max_position_embeddings", most)
    return int(most * rope.get("factor", 1.0) if kind in ("yarn", "linear", "dynamic") else most), kind != "default"


def build_from_config(shape: dict[str, Any], dtype: str, attention: str | None, lora: dict[str, Any]) -> Any:
    """The model that a config.json describes, as `load` would make it, except that its weights are random.

    Raises:
        ConfigError: transformers knows no such model.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind = shape["model_type"]
    try:
        config = CONFIG_MAPPING[kind].from_dict(shape)
        options = {"attn_implementation": attention} if attention else {}
        policy = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), **options)
    except (KeyError, ValueError, TypeError) as error:
        why = f"transformers makes no causal language model of model_type={kind} in its config.json"
        raise ConfigError("model.path", kind, f"{why}: {' '.join(str(error).split())[:200]}") from error
    return _add_adapter(policy, lora)


def save(policy: Any, tokenizer: Any, folder: Path) -> None:
    """Write `folder` in Hugging Face format; with LoRA the merged weights, and the adapter beside them in `adapter/`."""
    if hasattr(policy, "merge_and_unload"):
        policy.save_pretrained(folder / "adapter")
        policy = policy.merge_and_unload()
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
