"""Repositories to repair: an agent with tools in a sandbox, whose patch is graded in another one.

`world` and `env` implement the contract of `aem_exp.envs`; `tools` are the tools of the agent, `grading` judges a patch, `rows`
reads data sets. `generated` makes small repositories of the `bugs`; `expert` solves them, `vocabulary` is for small policies.
"""

from aem_exp.envs.swe.world import Made, Repositories

__all__ = ["Made", "Repositories"]
