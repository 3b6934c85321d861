"""Declarative experiments in multi-turn agentic reinforcement learning, with Adaptive Entropy Modulation.

The packages, from the lowest layer to the highest. A package imports only packages above it in this list; its `__init__`
describes its content.

    core         errors, typed values, files, the terminal and the command line
    stats        statistics of evaluations, intervals, power analysis (pure)
    aem          the method of the paper: entropies -> coefficients -> modulated advantages (pure)
    schedules    schedules of the strength lambda; that of the learning rate is in `training.lr_schedule`
    advantages   credit assignment of the baselines: GRPO, Dr. GRPO, RLOO, REINFORCE++, GiGPO (pure)
    rundir       the files of a run: metrics, episodes, checkpoints, attempts, the lock
    sandboxes    isolated execution of commands of a policy: bubblewrap, Apptainer, Docker
    config       command line -> one frozen `Experiment`, whose hash names the run dir
    cluster      SLURM, the processes of a job, signals, addresses of servers
    envs         the contract of environments, the environments, and the processes that step them
    rollout      policy and environments -> trajectories of exact tokens; `sampling` generates responses
    policy       load, save and locate a causal language model; `tiny` makes a small one, `wheel_weights` fetches one
    provenance   the record of what a run was executed with: code, packages, weights, machine
    training     trajectories -> updates: credit, modulation, and TRL's trainer and losses
    warm_start   supervised training before the first step, such as on the `demonstrations` of a scripted player
    tracking     sends metrics to MLflow, which can be rebuilt from run dirs
    evaluate     scores a policy, or another agent, on held-out tasks
    jobs         checks memory and prepared files, and submits runs
    run          runs one experiment on this machine, from its start or a checkpoint to its result
    sweep        many experiments that answer one question; hyperparameter studies with Optuna
    report       the result of a sweep: verdicts, tables, figures
    proxy        compares token entropy with relative surprisal; `branch` compares modulations by one update each

A *step* is one rollout batch: schedules, evaluations, saves and x-axes count steps. An *update* is one optimizer step.

Commands: `python -m aem_exp` runs one experiment; `python -m aem_exp.{sweep,status,report,evaluate,proxy,branch,...}`.
"""

from typing import Final

__version__ = "0.1.0"

# The revision of the method. Increase it when an experiment with the same signature would train differently.
# Runs of different revisions are neither pooled nor compared unless the user asks for it. The changes of each revision:
#   0: runs that record no revision.
#   1: equal values have no advantage (statistics in float64), and neither has a trajectory that is alone in its group; a step
#      with a loss of zero has no update; schedules of a continued run span the steps that it adds.
METHOD: Final = 1
