"""Policy and environments go in, trajectories of exact tokens come out; nothing is tokenised twice.

`types` and `rows` hold what is played; `play` is the loop; `chat` renders prompts; `threads` maps work over threads; `sampling`
holds one sampler per module (this process, TRL's engine, servers). It imports `core`, `config`, `cluster` and `envs`.
"""
