"""Turns trajectories into updates of the policy. Besides `rollout.sampling.weight_sync`, only this package imports TRL.

Start with `trainer`: read from top to bottom, it follows one training step. A step passes through these modules:

1. `dynamic_sampling`: which groups it trains on
2. `credit`: one advantage per response
3. `scoring` and `logprobs`: old log-probs, token entropies and surprisals
4. `modulation`: the coefficients of AEM (`aem`) and of its variants, with `controls` and `entropy_estimators`
5. `token_selection`: tokens that the loss treats differently (Clip-Cov, KL-Cov, tokens of high entropy)
6. `updates`: which rows share an update, and the loss weights of its micro-batches
7. `packing`: the tensors of a micro-batch

`build` creates the trainer of an experiment, and `arguments` creates TRL's settings. `step_counter` counts steps, `lr_schedule`
follows them, and `callback` does the work at their end. `step_metrics` and `diagnostics` compute the metrics, `step_size` and
`fixed_states` measure how far a step moves the policy, and `size_match` gives an update the size of another one. `fsdp` handles
sharded weights.
"""
