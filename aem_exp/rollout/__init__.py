"""Plays a policy in environments and returns trajectories with the exact token ids; no text is tokenised twice.

`types` and `rows` define the data, `play` runs the loop, `chat` renders prompts, `threads` maps work over threads, and `sampling`
has one sampler per module (this process, TRL's engine, servers). The package imports `core`, `config`, `cluster` and `envs`.
"""
