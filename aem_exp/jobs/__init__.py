"""Before a job and beside it: whether an experiment fits, whether it is prepared, sending it, and how far many of them are.

`preflight` opens the world and tries what is a user's own (`dry_run`); `sizes` is the arithmetic of a step and its
processes, `memory` the bytes that they take (`memory_trace` rehearses the passes), `plan` prints both, `fit` refuses what does
not fit; `dispatch` sends jobs; `serve` and `lend` are what nodes of a job run beside the trainer;
`status_table` and `labels` show many runs. It imports everything up to `training`.
"""
