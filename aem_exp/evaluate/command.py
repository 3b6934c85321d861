"""`python -m aem_exp.evaluate RUN_DIR|MODEL`: success on held-out tasks of a policy, the untrained policy, a random agent, and
the scripted agent and oracle of the env.

An interrupted evaluation resumes if the command is repeated.
"""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence

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
Score a policy on held-out tasks. Each task is played the same number of times. For comparison, the same tasks are played by
the untrained policy, by a random agent, and by two programs of the environment, if it has them: a scripted player, which sees
only the observations, and an oracle, which knows the solution. Repeat the command to resume an interrupted evaluation, or to
show its results again.

  python -m aem_exp.evaluate outputs/household-tiny-grpo-aem-s0-0123456789ab
  python -m aem_exp.evaluate RUN_DIR --panel dev --repeats 8 env.max_turns=16
  python -m aem_exp.evaluate Qwen/Qwen2.5-1.5B-Instruct model=qwen2_5_1_5b env=household env.response_tokens=64
  python -m aem_exp.evaluate env=babyai             # without a policy: random actions, and the programs of the environment
  python -m aem_exp.evaluate env=swe --audit        # which forged episodes does the grader believe?
  python -m aem_exp.evaluate RUN_DIR launch.sampler=served launch.servers=FOLDER launch.workers=16   # with running vLLM servers
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    again = shlex.join(["python", "-m", "aem_exp.evaluate", *argv])
    return cli.run_cli(lambda: _run_command(_parse_arguments(argv)), lambda: f"to continue: {again}")


def _parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = build_parser("python -m aem_exp.evaluate", ABOUT)
    parser.add_argument(
        "--panel", help="panel of held-out tasks (default: evaluation.final of the config, usually test)"
    )
    parser.add_argument("--repeats", type=int, default=4, help="episodes per task (default: 4)")
    parser.add_argument(
        "--temperature", type=float, help="sampling temperature (default: evaluation.temperature of the config)"
    )
    parser.add_argument("--tasks", type=int, help="use only the first N tasks of the panel")
    parser.add_argument(
        "--audit",
        action="store_true",
        help="audit the grader of an env (env=NAME instead of RUN_DIR|MODEL): which forged episodes does it believe?",
    )
    parser.add_argument("--only", action="append", choices=AGENTS, help="evaluate only this agent (may be repeated)")
    if "--audit" in argv:
        return _parse_audit(parser, argv)
    arguments = parse_target_arguments(parser, argv, ("repeats", "tasks", "at_once"), env_alone=True)
    if arguments.temperature is not None and not 0 < arguments.temperature < math.inf:
        remedy = "must be above 0; with greedy decoding, all repeats of a task would be equal"
        raise ConfigError("--temperature", arguments.temperature, remedy)
    if arguments.target is None:
        _refuse_unused(parser, arguments, ("temperature", "trust"), "has no effect without a run directory or a model")
    return arguments


def _refuse_unused(parser: cli.Parser, arguments: argparse.Namespace, names: Sequence[str], remedy: str) -> None:
    for name in names:
        if (value := getattr(arguments, name)) != parser.get_default(name):
            raise ConfigError(f"--{name.replace('_', '-')}", value, remedy)


def _parse_audit(parser: cli.Parser, argv: list[str]) -> argparse.Namespace:
    """The arguments of an audit, which needs no policy."""
    arguments = parser.parse_intermixed_args(argv)
    words = [word for word in (arguments.target, *arguments.overrides) if word]
    for word in words:
        if "=" not in word:
            raise ConfigError(
                "--audit", word, "audits the grader of an env: give env=NAME and other settings KEY=VALUE"
            )
    unused = ("repeats", "temperature", "only", "at_once", "trust")
    _refuse_unused(parser, arguments, unused, "has no effect with --audit")
    if arguments.tasks is not None and arguments.tasks < 1:
        raise ConfigError("--tasks", arguments.tasks, "must be a whole number of at least 1")
    arguments.overrides = words
    return arguments


def _run_command(arguments: argparse.Namespace) -> int:
    from aem_exp.core import console

    console.silence_libraries()
    is_run = not arguments.audit and is_run_dir(arguments.target)
    cli.add_user_modules(arguments.config_dir, [arguments.target] if is_run else [], arguments.trust)
    from aem_exp.evaluate.display import ProgressLine, print_results
    from aem_exp.evaluate.grader_audit import audit_grader
    from aem_exp.rollout.sampling.served_weights import WrongWeights

    with ProgressLine() as line:
        if arguments.audit:
            return audit_grader(arguments, line)
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
    episodes = "1 episode" if setup.repeats == 1 else f"{setup.repeats} episodes"
    tasks = f"{len(setup.panel.tasks)} tasks x {episodes}"
    tasks += f", temperature {setup.temperature:g}" if arguments.target else ""
    title = f"success on the panel {setup.panel.name} ({setup.panel.hash}) of {setup.experiment.env.name}: {tasks}"
    facts = [("result", str(folder / RESULT)) for folder, _ in evaluated.values()][:1]
    print_results(title, results, left_out, [*facts, ("next", _suggest_next_command(arguments, setup))])
    return 0


def _suggest_next_command(arguments: argparse.Namespace, setup: EvaluationSetup) -> str:
    """Return the command that a user most likely needs next."""
    own = ["--config-dir", arguments.config_dir] if arguments.config_dir else []
    target = [arguments.target] if arguments.target else []
    if setup.repeats == 1:
        same = ["--panel", arguments.panel] if arguments.panel else []
        same += ["--tasks", str(arguments.tasks)] if arguments.tasks is not None else []
        return shlex.join(
            [*("python", "-m", "aem_exp.evaluate"), *target, *arguments.overrides, *same, *own, "--repeats", "4"]
        )
    if arguments.target is None:
        return shlex.join(["python", "-m", "aem_exp", *arguments.overrides, *own, "plan=true"])
    if is_run_dir(arguments.target):
        steps = 2 * setup.experiment.trainer.steps
        return shlex.join(["python", "-m", "aem_exp", f"from={arguments.target}", f"trainer.steps={steps}", *own])
    return shlex.join(["python", "-m", "aem_exp", *arguments.overrides, *model_path_overrides(arguments.target), *own])
