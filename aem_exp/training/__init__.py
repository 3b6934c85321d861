"""Trajectories become updates of the policy. TRL is imported here, and below only by `rollout.sampling.weight_sync`.

`trainer` is the seam in front of TRL, to be read from top to bottom; `build` configures it from an experiment, `arguments`
makes TRL's own settings. A step passes through `dynamic_sampling` (which groups it trains on), `credit` (one advantage per
response), `logprobs` (log-probs and entropies), `modulation` (coefficients), `updates` (which rows share an update, and
their weights) and `packing` (their tensors). `step_counter` counts steps, `lr_schedule` follows them, `callback` ends them,
`step_metrics` and `diagnostics` compute what is logged, and `fsdp` is what sharded weights need.
"""
