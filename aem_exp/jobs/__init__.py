"""Checks before a run, submission of jobs, and the status of many runs.

`preflight` opens and checks the world; `world_check` and `function_check` try user-defined code. `sizes` computes the sizes of
a step, `memory` the bytes of each process (`memory_trace` measures passes on fake tensors), `plan` prints both, and `fit`
refuses experiments that do not fit into a GPU or onto the disk, `ram` those that do not fit into a CPU machine. `dispatch`
submits jobs or runs local processes. `serve` runs on nodes of a job beside the trainer. `status_table` and `labels`
show many runs. The package imports everything up to `training`.
"""
