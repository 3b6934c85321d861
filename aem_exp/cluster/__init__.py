"""Processes and jobs: SLURM through submitit, the ranks of one job, signals, and where servers can be reached.

`slurm` submits, requeues and asks for the state of jobs; `distributed` knows the ranks of this job; `signals` turns SIGTERM and
Ctrl-C into a request to save; `rendezvous` tells where the servers of a job are; `run_state` says where a run stands. It imports
`core`, `rundir` and `config`.
"""
