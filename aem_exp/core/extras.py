"""Optional dependencies: finds missing modules, and builds the pip command that installs them."""

import json
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlparse

from aem_exp.core.errors import MissingResource

PACKAGE = "aem-exp"
TRAINING_EXTRA: Final = "train"
TRAINING_MODULES: Final = (  # modules of the extra; planning and reading work without them
    *("torch", "transformers", "trl", "accelerate", "datasets", "peft", "safetensors"),
    *("mlflow", "submitit", "httpx", "psutil"),
)
# Packages that vLLM requires, although it is used without them here.
TORCH_COMPANIONS: Final = ("torchvision", "torchaudio", "torchcodec")


def require_training(field: str, value: Any, purpose: str, modules: Sequence[str] = TRAINING_MODULES) -> None:
    """Refuse an action that needs modules of the extra `train` if one of them is not installed.

    Args:
        field, value: field and value of the error.
        purpose: the action, as the subject of a sentence.
        modules: the modules that it needs.

    Raises:
        MissingResource: for example `launch=local: a run needs torch: pip install 'aem-exp[train]'`.
    """
    if missing := first_missing(modules):
        raise MissingResource(field, value, f"{purpose} needs {missing}: {install_command(TRAINING_EXTRA)}")
    if "transformers" in modules and not _loads_torchvision():
        problem = "torchvision was built for another torch, and transformers cannot be imported beside it"
        raise MissingResource(field, value, f"{problem}; run: pip uninstall -y {' '.join(TORCH_COMPANIONS)}")


def _loads_torchvision() -> bool:
    """Whether torchvision loads, or is not installed. transformers imports it if it is installed; nothing else uses it."""
    if find_spec("torchvision") is None:
        return True
    try:
        import_module("torchvision")
    except (RuntimeError, OSError):  # its operators do not match torch
        return False
    return True


def first_missing(modules: Sequence[str] = TRAINING_MODULES) -> str | None:
    """The first of these modules that is not installed; None if all are installed."""
    return next((name for name in modules if find_spec(name) is None), None)


def explain_missing(error: BaseException) -> str | None:
    """A sentence for an import error of a module of the extra `train`; None for any other error."""
    name = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if name not in TRAINING_MODULES or first_missing([name]) is None:
        return None
    return f"this needs {name}: {install_command(TRAINING_EXTRA)}"


def install_command(extra: str) -> str:
    """The pip command that adds an extra, to the checkout if the package was installed from one, else from the index."""
    try:
        told = distribution(PACKAGE).read_text("direct_url.json")
    except PackageNotFoundError:
        told = None
    origin = json.loads(told) if told else {}
    if "dir_info" not in origin:  # installed from an index or a file
        return f"pip install '{PACKAGE}[{extra}]'"
    place = Path(unquote(urlparse(origin["url"]).path))
    where = "." if place == Path.cwd() else str(place)
    return f"pip install {'-e ' if origin['dir_info'].get('editable') else ''}'{where}[{extra}]'"
