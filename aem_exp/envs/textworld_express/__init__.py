"""TextWorldExpress: eight fast text games (Jansen and Côté, EACL 2023 demonstrations, arXiv 2208.01174), from its own package.

`world` implements the contract of `aem_exp.envs`, and `scripted` is the scripted player.
"""

from aem_exp.envs.textworld_express.world import TextWorldExpress

__all__ = ["TextWorldExpress"]
