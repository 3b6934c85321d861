"""ALFWorld: household tasks in TextWorld, from the official games or from generated ones.

`world` and `env` implement the contract of `aem_exp.envs`. `games` generates games, `official_games` reads the official ones,
`expert` is the scripted expert, and `vocabulary` is for small policies. `engine` is the PDDL engine; it uses `library`,
`translation`, `facts`, `grammar` and `text_generation`.
"""

from aem_exp.envs.alfworld.world import AlfWorld, Generated

__all__ = ["AlfWorld", "Generated"]
