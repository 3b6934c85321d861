"""Command `aem-exp prepare`: fetches weights and data and builds small policies on a machine with network access, for jobs
on compute nodes without it.

What is already there is only checked.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aem_exp.core import cli
from aem_exp.core.errors import ConfigError

if TYPE_CHECKING:
    from aem_exp.config import Experiment

ABOUT = """\
Fetch weights and data, make small policies, open worlds: whatever a job needs and could not get on a compute node.

  python -m aem_exp.prepare +experiment=alfworld_1_5b
  python -m aem_exp.prepare household_quick            all cells of a sweep
"""
MODEL_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py"]


def main(argv: list[str] | None = None) -> int:
    """Do what the command line asks; the exit code."""
    return cli.run_cli(
        lambda: _run_command(_parse_arguments(sys.argv[1:] if argv is None else argv)),
        lambda: "asked again, it goes on",
    )


def _parse_arguments(argv: list[str]) -> argparse.Namespace:
    layout = argparse.RawDescriptionHelpFormatter
    parser = cli.Parser("python -m aem_exp.prepare", description=ABOUT, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("words", nargs="*", metavar="SWEEP|KEY=VALUE", help="a sweep, or an experiment's overrides")
    parser.add_argument("--config-dir", help="a folder of your own over conf/")
    return parser.parse_intermixed_args(argv)


def _run_command(arguments: argparse.Namespace) -> int:
    cli.add_user_modules(arguments.config_dir)
    for experiment in _drop_duplicates(_load_experiments(arguments)):
        _prepare_experiment(experiment)
    print("next    the same words after python -m aem_exp (an experiment), or aem_exp.sweep (a sweep)")
    return 0


def _load_experiments(arguments: argparse.Namespace) -> list["Experiment"]:
    from aem_exp import config
    from aem_exp.sweep import question

    if arguments.words and "=" not in arguments.words[0]:
        sweep = question.load(arguments.words[0], arguments.words[1:], arguments.config_dir)
        return [cell.experiment for cell in sweep.cells]
    return [config.load(arguments.words, arguments.config_dir)]


def _drop_duplicates(experiments: Sequence["Experiment"]) -> list["Experiment"]:
    """One of each model and world."""
    return list({repr((e.model, e.env)): e for e in experiments}.values())


def _prepare_experiment(experiment: "Experiment") -> None:
    from aem_exp import config, policy
    from aem_exp.core import console
    from aem_exp.envs import opening

    console.silence_libraries()
    make = config.instantiate(experiment.env.make, partial=True)
    if hasattr(make.func, "prepare"):
        make.func.prepare(lambda line: print(line, flush=True), **make.keywords)
    world = opening.open_world(experiment)
    panels = ("train", experiment.evaluation.panel, experiment.evaluation.final)
    sizes = ", ".join(f"{len(world.tasks(name))} {name}" for name in panels)
    print(f"world   {experiment.env.name}: {sizes} tasks; fingerprint {world.fingerprint}", flush=True)
    if experiment.model.path is None:
        print(f"policy  {experiment.model.name}: {policy.make_cached(experiment, world)}", flush=True)
        return
    try:
        folder = policy.locate(experiment.model)
    except ConfigError:
        _fetch_model(experiment)
        folder = policy.locate(experiment.model)
    print(f"policy  {experiment.model.name}: {folder}", flush=True)


def _fetch_model(experiment: "Experiment") -> None:
    """Fetch the model's files from the hub, at the configured revision; resumable, and checked by its hashes."""
    import os

    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    model = experiment.model
    assert model.path
    if (os.path.sep in model.path and model.path.count("/") != 1) or model.path.startswith((".", "/")):
        raise ConfigError("model.path", model.path, "there is no such folder, and it is no hub id")
    print(f"fetch   {model.path}{f' at {model.revision}' if model.revision else ''}", flush=True)
    os.environ.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)
    try:
        folder = snapshot_download(model.path, revision=model.revision, allow_patterns=MODEL_FILES)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError) as error:
        why = " ".join(str(error).split())[:200]
        raise ConfigError(
            "model.path", model.path, f"the hub does not give it ({why}); is there a network here?"
        ) from error
    if not model.revision:
        print(f"pin     model.revision={os.path.basename(folder)}   (or a later fetch may be of other weights)")


if __name__ == "__main__":
    sys.exit(main())
