"""Command `python -m aem_exp.evaluate RUN_DIR|MODEL`: success of a policy on held-out tasks, beside the untrained policy,
a random agent, and the world's scripted agent and oracle.

An interrupted evaluation resumes when the command is repeated.
"""

import argparse
import json
import math
import shlex
import sys

from aem_exp.config import ConfigError
from aem_exp.core import cli
from aem_exp.evaluate.evaluation import EvaluationSetup, evaluate_agent
from aem_exp.evaluate.request import (
    AGENTS,
    UNTRAINED,
    build_parser,
    is_run_dir,
    model_path_overrides,
    parse_target_arguments,
    prepare_evaluation,
)
from aem_exp.rundir import RESULT

ABOUT = """\
Score a policy on tasks it was not trained on, every task the same number of times, beside the policy that its training
started from, one that acts at random, and those that its world brings along: a scripted player, who knows only what it is
shown, and an oracle, who knows the answer. Asked again it goes on, or shows what is there.

  python -m aem_exp.evaluate outputs/household-tiny-grpo-aem-s0-0123456789ab
  python -m aem_exp.evaluate RUN_DIR --panel dev --repeats 8 env.max_turns=16
  python -m aem_exp.evaluate Qwen/Qwen2.5-1.5B-Instruct model=qwen2_5_1_5b env=household env.response_tokens=64
  python -m aem_exp.evaluate RUN_DIR launch.sampler=served launch.servers=FOLDER launch.workers=16   # by servers that are up
"""


def main(argv: list[str] | None = None) -> int:
    """Do what the command line asks; the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    again = shlex.join(["python", "-m", "aem_exp.evaluate", *argv])
    return cli.run_cli(lambda: _run_command(_parse_arguments(argv)), lambda: f"to go on: {again}")


def _parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = build_parser("python -m aem_exp.evaluate", ABOUT)
    parser.add_argument("--panel", help="held-out tasks (default: what the config calls evaluation.final: test)")
    parser.add_argument("--repeats", type=int, default=4, help="episodes per task (default: 4)")
    parser.add_argument("--temperature", type=float, help="of sampling (default: evaluation.temperature of the config)")
    parser.add_argument("--tasks", type=int, help="only the first N tasks of the panel")
    parser.add_argument("--only", action="append", choices=AGENTS, help="leave the other rows out (may be repeated)")
    arguments = parse_target_arguments(parser, argv, ("repeats", "tasks", "at_once"))
    if arguments.temperature is not None and not 0 < arguments.temperature < math.inf:
        remedy = "must be above 0: greedily, every repeat of a task would be the same episode"
        raise ConfigError("--temperature", arguments.temperature, remedy)
    return arguments


def _run_command(arguments: argparse.Namespace) -> int:
    from aem_exp.core import console

    console.silence_libraries()
    cli.add_user_modules(
        arguments.config_dir, [arguments.target] if is_run_dir(arguments.target) else [], arguments.trust
    )
    from aem_exp.evaluate.display import ProgressLine, print_results
    from aem_exp.rollout.sampling.vllm_client import WrongWeights

    with ProgressLine() as line:
        setup, agents, left_out = prepare_evaluation(arguments)
        evaluated = {}
        for agent in agents:
            try:
                evaluated[agent.name] = evaluate_agent(setup, agent, line)
            except WrongWeights as error:
                if agent.name != UNTRAINED or arguments.only:
                    raise
                left_out[UNTRAINED] = str(error)
    results = {name: result for name, (_, result) in evaluated.items()}
    if arguments.json:
        print(json.dumps({"rows": results, "left_out": left_out}, indent=1, allow_nan=False))
        return 0
    tasks = f"{len(setup.panel.tasks)} tasks x {setup.repeats}, temperature {setup.temperature:g}"
    title = f"success on the panel {setup.panel.name} ({setup.panel.hash}) of {setup.experiment.env.name}: {tasks}"
    facts = [("result", str(folder / RESULT)) for folder, _ in evaluated.values()][:1]
    print_results(title, results, left_out, [*facts, ("next", _suggest_next_command(arguments, setup))])
    return 0


def _suggest_next_command(arguments: argparse.Namespace, setup: EvaluationSetup) -> str:
    """The command that most likely comes next."""
    own = ["--config-dir", arguments.config_dir] if arguments.config_dir else []
    if setup.repeats == 1:
        same = ["--panel", arguments.panel] if arguments.panel else []
        return shlex.join(
            ["python", "-m", "aem_exp.evaluate", arguments.target, *arguments.overrides, *same, *own, "--repeats", "4"]
        )
    if is_run_dir(arguments.target):
        steps = 2 * setup.experiment.trainer.steps
        return shlex.join(["python", "-m", "aem_exp", f"from={arguments.target}", f"trainer.steps={steps}", *own])
    return shlex.join(["python", "-m", "aem_exp", *arguments.overrides, *model_path_overrides(arguments.target), *own])
