"""Command `python -m aem_exp.proxy RUN_DIR|MODEL`: measures how well AEM's coefficient approximates relative surprisal S - H(s).

AEM uses the mean token entropy of a response as a proxy of its relative surprisal: its surprisal S minus H(s), the mean surprisal
at its state. This command samples several responses at the same state, and estimates H(s) from the token entropies of the other
samples.

A state is one turn of one episode; all turns of an episode are equally likely. The paper reports 64 states. Its number of samples
is not known to us. Nor do we know whether its alpha compares the samples of a state, as here, or a whole rollout group, as with
`--groups` (see `groups`).
"""

import argparse
import json
import math
import shlex
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aem_exp import config
from aem_exp.config import ConfigError
from aem_exp.core import cli, disk
from aem_exp.core.disk import nonfinite_to_none
from aem_exp.core.errors import RunError
from aem_exp.envs.panel import Panel
from aem_exp.evaluate import request
from aem_exp.evaluate.evaluation import EvaluationSetup, env_rules, hash_identity, lock_folder
from aem_exp.evaluate.panels import list_episodes
from aem_exp.evaluate.request import BEFORE_WARM_START, POLICY, UNTRAINED
from aem_exp.evaluate.states import STATES, SampledState, pick_state, read_states, sample_at_states
from aem_exp.proxy import tables
from aem_exp.proxy.groups import (
    count_groups,
    play_groups,
    read_groups,
    replaced_coefficients,
    summarise_groups,
    write_groups,
)
from aem_exp.rundir import RESULT

if TYPE_CHECKING:
    from aem_exp.evaluate.agents import Agent
    from aem_exp.evaluate.display import ProgressLine
    from aem_exp.rollout.play import Rollout
    from aem_exp.rollout.sampling.base import Sampler

POLICIES = (POLICY, UNTRAINED, BEFORE_WARM_START)
SAMPLES, FIGURE = "samples.jsonl", "proxy.png"
LAM = 1.0  # lambda of the paper

ABOUT = """\
Sample several responses of a policy at states of its episodes. Compare 1 - alpha of each response (AEM's coefficient; the samples
of a state are one group) with its relative surprisal S - H(s): the correlation r over all responses, and how many states and
responses agree in sign. For a run, the policy at the start of training is measured too, and also before a warm start. A repeated
command continues where it stopped, or shows the result.

With --groups, the states are those of rollout groups on training tasks, and alpha is the coefficient of a sample in its group.
The correlation is then split within and between states.

  python -m aem_exp.proxy outputs/household-tiny-grpo-aem-s0-0123456789ab
  python -m aem_exp.proxy RUN_DIR --groups
  python -m aem_exp.proxy Qwen/Qwen2.5-1.5B-Instruct model=qwen2_5_1_5b env=alfworld --samples 8
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command; return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    command = shlex.join(["python", "-m", "aem_exp.proxy", *argv])
    return cli.run_cli(lambda: _run_command(_parse_arguments(argv)), lambda: f"to continue: {command}")


def _parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = request.build_parser("python -m aem_exp.proxy", ABOUT)
    parser.add_argument("--panel", default="dev", help="panel of tasks whose episodes give the states (default: dev)")
    parser.add_argument("--states", type=int, default=64, help="number of states (default: 64, as in the paper)")
    parser.add_argument("--samples", type=int, default=16, help="number of responses at each state (default: 16)")
    parser.add_argument("--only", action="append", choices=POLICIES, help="measure only this policy")
    parser.add_argument("--groups", action="store_true", help="sample at states of rollout groups on training tasks")
    parser.set_defaults(tasks=None, repeats=1, temperature=1.0)
    arguments = request.parse_target_arguments(parser, argv, ("states", "at_once"))
    if arguments.samples < 2:
        remedy = "must be at least 2: each response is compared with the others"
        raise ConfigError("--samples", arguments.samples, remedy)
    return arguments


def _run_command(arguments: argparse.Namespace) -> int:
    from aem_exp.core import console

    console.silence_libraries()
    is_run = request.is_run_dir(arguments.target)
    cli.add_user_modules(arguments.config_dir, [arguments.target] if is_run else [], arguments.trust)
    arguments.only = arguments.only or [POLICY, *(_initial_policies(arguments) if is_run else [])]
    from aem_exp.evaluate.display import ProgressLine

    with ProgressLine() as line:
        setup, agents, _ = request.prepare_evaluation(arguments, evaluation_limits=not arguments.groups)
        if (sampler := setup.experiment.launch.sampler) != "local":
            raise ConfigError("launch.sampler", sampler, "must be local: servers do not report token entropies")
        if arguments.groups:
            setup = replace(setup, temperature=setup.experiment.trainer.temperature)
        asked = (arguments.states, arguments.samples, arguments.groups)
        evaluated = {agent.name: evaluate_proxy(setup, agent, *asked, line) for agent in agents}
    results = {name: result for name, (_, result) in evaluated.items()}
    if arguments.json:
        print(json.dumps(results, indent=1))
    else:
        table = tables.format_groups if arguments.groups else tables.format_states
        print(table(results), "", *(folder / FIGURE for folder, _ in evaluated.values()), sep="\n")
    return 0


def _initial_policies(arguments: argparse.Namespace) -> list[str]:
    """The names of the policies at the start of a run: before and after its warm start, if it has one."""
    warm_start = config.read(arguments.target, arguments.trust).warm_start.method
    return [UNTRAINED, *([BEFORE_WARM_START] if warm_start else [])]


def evaluate_proxy(
    setup: EvaluationSetup, agent: "Agent", states: int, samples: int, groups: bool, line: "ProgressLine"
) -> tuple[Path, dict[str, Any]]:
    """Sample what is missing; return the folder of the agent's samples, and the content of its `result.json`."""
    experiment = setup.experiment
    drawn = [experiment.seed, experiment.trainer.group_size, count_groups(states)]
    identity = {
        "env": env_rules(experiment),
        "world": setup.world.fingerprint,
        **({"groups": drawn} if groups else {"panel": [setup.panel.name, setup.panel.hash]}),
        "asked": [states, samples, setup.temperature],
        "mean_surprisal": "token entropies of the other samples",
        **agent.identity(),
        **({"bf16": True} if experiment.trainer.bf16 else {}),
    }
    name = "groups" if groups else setup.panel.name
    folder = setup.out / "proxy" / f"{name}-{states}x{samples}-{hash_identity(identity)}-{agent.name}"
    if not (folder / RESULT).exists():
        disk.check_writable(folder, "outputs")
        with lock_folder(folder, line):
            if not (folder / RESULT).exists():
                _sample_states(setup, agent, states, samples, groups, folder, line)
                _write_result(folder, samples, groups, identity)
    return folder, disk.read_json(folder / RESULT)


def _sample_states(
    setup: EvaluationSetup,
    agent: "Agent",
    states: int,
    samples: int,
    groups: bool,
    folder: Path,
    line: "ProgressLine",
) -> None:
    """Choose the states, unless they are on disk, then sample at the remaining ones."""
    from aem_exp.envs.workers import make_executor
    from aem_exp.evaluate import agents
    from aem_exp.rollout.play import Rollout
    from aem_exp.rollout.sampling.local import LocalSampler

    env, launch, panel = setup.experiment.env, setup.experiment.launch, setup.panel
    line.show_stage(f"{agent.name}: loading weights")
    with (
        closing(make_executor(setup.world, env.make, launch)) as executor,
        agents.open_sampler(agent, setup.experiment, setup.temperature) as (sampler, chat),
    ):
        if not (folder / STATES).exists():
            rollout = Rollout(executor, env, chat, setup.at_once)
            if groups:
                line.show_stage(f"{agent.name}: playing {count_groups(states)} groups of training tasks")
                chosen, played = play_groups(setup.experiment, setup.world, states, rollout, sampler)
                write_groups(folder, played)
            else:
                line.show_stage(f"{agent.name}: playing {states} episodes")
                chosen = _play_panel(panel, states, rollout, sampler)
            disk.write_atomically(folder / STATES, json.dumps([asdict(state) for state in chosen]))
        chosen = read_states(folder)
        together = max(1, setup.at_once // samples)
        done = len(_read_samples(folder, together, len(chosen)))
        line.start_count(f"{agent.name}: {samples} responses at each state", len(chosen), "states")
        assert isinstance(sampler, LocalSampler)
        sampler.share_prompts = True
        for start in range(done, len(chosen), together):
            sampled = sample_responses(chosen[start : start + together], samples, sampler)
            with (folder / SAMPLES).open("a") as file:
                file.writelines(json.dumps(state) + "\n" for state in sampled)
            line.show_count(min(start + together, len(chosen)))


def _play_panel(panel: Panel, states: int, rollout: "Rollout", sampler: "Sampler") -> list[SampledState]:
    """Play episodes of a panel, and choose one state of each.

    Raises:
        RunError: no episode could be played.
    """
    wanted = sorted(list_episodes(panel, -(-states // len(panel.tasks))), key=lambda episode: episode.member)
    played = rollout.play(wanted[:states], sampler)
    if chosen := [state for t in played for state in pick_state(t, rollout.env)]:
        return chosen
    raise RunError(f"no episode of the panel {panel.name} could be played", "env")


def sample_responses(states: Sequence[SampledState], samples: int, sampler: "Sampler") -> list[dict[str, Any]]:
    """Sample at each state.

    Returns:
        For each state its turn, and lists over the samples: `entropy` (mean token entropy, nats), `surprisal` (summed over the
        response, nats) and `tokens` (number of tokens).
    """
    groups = sample_at_states(states, samples, sampler)
    return [
        {
            "turn": state.turn,
            "entropy": [sum(s.entropies) / len(s.entropies) for s in group],
            "surprisal": [-math.fsum(s.logps) for s in group],
            "tokens": [len(s.ids) for s in group],
        }
        for state, group in zip(states, groups, strict=True)
    ]


def _read_samples(folder: Path, together: int, states: int) -> list[dict[str, Any]]:
    """Read the samples on disk; an incomplete last batch of `together` states, left by a killed process, is removed.

    Its states are sampled in the same batch again, because the last digits of an entropy depend on the rest of the batch.
    """
    sampled = disk.read_json_lines(folder / SAMPLES, "entropy", "surprisal")
    if len(sampled) < states:
        sampled = sampled[: len(sampled) // together * together]
    disk.write_atomically(folder / SAMPLES, "".join(json.dumps(state) + "\n" for state in sampled))
    return sampled


def _write_result(folder: Path, samples: int, groups: bool, identity: dict[str, Any]) -> None:
    """Compute the statistics, draw the figure, and write `result.json`."""
    import torch

    from aem_exp import aem
    from aem_exp.core import plots
    from aem_exp.training import diagnostics

    sampled = disk.read_json_lines(folder / SAMPLES, "entropy", "surprisal")
    entropy_R, surprisal_R, tokens_R = (
        torch.tensor([v for s in sampled for v in s[key]]) for key in ("entropy", "surprisal", "tokens")
    )
    state_R = torch.arange(len(sampled)).repeat_interleave(samples)
    relative_R = diagnostics.relative_surprisal(surprisal_R, entropy_R * tokens_R, state_R)
    if groups:
        played = read_groups(folder)
        validity = summarise_groups(sampled, played, tables.GATES, LAM)
        ungated_R = torch.tensor(replaced_coefficients(sampled, played, tables.GATES["ungated"], LAM))
    else:
        alphas = {name: aem.coefficients(entropy_R, state_R, LAM, gate) for name, gate in tables.GATES.items()}
        validity = {name: diagnostics.proxy_validity(alpha_R, relative_R, state_R) for name, alpha_R in alphas.items()}
        ungated_R = alphas["ungated"]
    plots.draw_scatter((1 - ungated_R).tolist(), relative_R.tolist(), folder / FIGURE)
    result = {"samples": samples, "turns": [s["turn"] for s in sampled], **validity, "identity": identity}
    disk.write_atomically(folder / RESULT, json.dumps(nonfinite_to_none(result), indent=1, allow_nan=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
