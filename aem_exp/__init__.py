"""Declarative experiments in multi-turn agentic reinforcement learning, with Adaptive Entropy Modulation.

From an experiment to a verdict, package by package; each imports those above it, and its `__init__` says what it holds:

    core         errors, typed values, files, the terminal and the command line
    stats        what an evaluation counts, intervals and power: pure numbers
    aem          the paper: entropies -> coefficients -> modulated advantages (pure)
    schedules    schedules of its strength lambda; the learning rate follows TRL (`training.lr_schedule`)
    advantages   credit assignment of the baselines: GRPO, Dr. GRPO, RLOO, REINFORCE++, GiGPO (pure)
    rundir       what a run leaves on disk: metrics, episodes, checkpoints, attempts, the lock
    sandboxes    where commands of a policy run: bubblewrap, Apptainer, Docker
    config       a command line -> one frozen `Experiment`, whose hash names the run dir
    cluster      SLURM, the processes of a job, signals, addresses of servers
    envs         the contract of environments, the worlds, and the processes that step them
    rollout      policy and environments -> trajectories of exact tokens; `sampling`: who generates
    policy       load, save and locate a causal language model; `tiny` makes a small one
    provenance   what a run was executed with: code, packages, weights, machine
    training     trajectories -> updates: credit, modulation, and TRL's trainer and losses
    tracking     sends metrics to MLflow, which can be rebuilt from run dirs; `training.step_metrics` computes them
    evaluate     a policy, scored on held-out tasks beside other agents
    jobs         does it fit, is it prepared, send it
    run          one experiment on this machine, to a result; where a resumed run begins
    sweep        many experiments that answer one question; studies with Optuna
    report       what a sweep came to: verdicts, tables, figures

A *step* is one rollout batch: schedules, evaluations, saves and x-axes count steps. An *update* is one optimizer step.

Commands: `python -m aem_exp` runs one experiment; `python -m aem_exp.{sweep,status,report,evaluate,proxy,prepare,tracking,ui}`.
"""

from typing import Final

__version__ = "0.1.0"

# The revision of the method: raise it when the same experiment would train differently, though its signature is the same.
# Runs of different revisions are not pooled or compared unless that is asked for. What each one changed is said here.
#   0: runs that record none.
#   1: equal values have no advantage (statistics in float64), nor has a trajectory that is alone in its group; a step whose
#      loss is zero has no update; schedules of a continued run span the steps that it adds.
METHOD: Final = 1
