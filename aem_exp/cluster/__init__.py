"""SLURM jobs and the processes of one job.

`slurm` submits and requeues jobs and reads their states. `distributed` gives the rank and world size of this process.
`signals` turns SIGTERM and Ctrl-C into a request to save and stop. `rendezvous` stores the addresses of a job's servers.
`run_state` reads the state of a run. `node_memory` finds the memory that a process may use. The package imports `core`,
`rundir` and `config`.
"""
