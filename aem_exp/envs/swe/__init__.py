"""Software engineering: an agent repairs a repository with tools in a sandbox, and its patch is graded in another sandbox.

`world` and `env` implement the contract of `aem_exp.envs`. `tools` are the tools of the agent, `grading` grades a patch, and
`rows` reads data sets. `generated` makes small repositories from the list of `bugs`, `expert` is their scripted expert, and
`vocabulary` is for small policies.
"""

from aem_exp.envs.swe.world import Made, Repositories

__all__ = ["Made", "Repositories"]
