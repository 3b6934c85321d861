"""Before a job and beside it: whether an experiment fits, whether it is prepared, sending it, and how far many of them are.

`preflight` opens the world and tries what is a user's own (`dry_run`); `fit` computes sizes and memory, which
`memory_trace` measures; `dispatch` sends jobs; `serve` and `lend` are what nodes of a job run beside the trainer;
`status_table` and `labels` show many runs. It imports everything up to `training`.
"""
