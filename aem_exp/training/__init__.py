"""Trajectories become updates of the policy. TRL is spoken here, and nowhere above.

`credit` compares the responses of a group and keeps what each was given; `modulation` varies the coefficients of the paper;
`batch` makes micro-batches; `trainer` puts both before the loss of TRL; `arguments` makes its settings, `callback` keeps time;
`diagnostics` are pure numbers for the log; `fsdp` is what sharded weights need.
"""
