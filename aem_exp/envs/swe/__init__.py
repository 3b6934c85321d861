"""Software engineering: an agent repairs a repository with tools in a sandbox, and its patch is graded in another sandbox.

`world` and `env` implement the contract of `aem_exp.envs`. `tools` are the tools of the agent, and `rows` reads data sets.
`patch` turns the agent's changes into a patch. `grade` grades it: `official` by the benchmark's own rule, `audited` by a run of
the tests with `canaries` and without changes of `protected` files. `review` looks for signs of forgery, with `watch_plugin`.
`forgeries` and their `forged_code` audit the graders. `generated` makes small repositories from the list of `bugs`, `expert` is
their scripted expert, and `vocabulary` is for small policies.
"""

from aem_exp.envs.swe.world import Made, Repositories

__all__ = ["Made", "Repositories"]
