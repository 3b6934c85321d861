"""Repositories to repair: an agent with tools in a sandbox, whose patch is graded in another one.

`world` implements the contract of `aem_exp.envs`; `rows` reads data sets, `tools` are the tools of the agent,
`grading` judges a patch, `generated` makes small repositories.
"""

from aem_exp.envs.swe.world import Made, Repositories

__all__ = ["Made", "Repositories"]
