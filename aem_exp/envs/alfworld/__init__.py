"""ALFWorld: household tasks in TextWorld, from the official games or from generated ones.

`world` implements the contract of `aem_exp.envs`; `trl_engine` is the PDDL engine, `games` generates games,
`player` is the scripted expert.
"""

from aem_exp.envs.alfworld.world import AlfWorld, Generated

__all__ = ["AlfWorld", "Generated"]
