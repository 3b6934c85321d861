"""BFCL multi-turn: tool use from the Berkeley Function Calling Leaderboard (Patil et al., ICML 2025), offline.

`world` implements the contract of `aem_exp.envs`, `calls` reads function calls from responses, and `wheel` fetches and reads
the benchmark's own package.
"""

from aem_exp.envs.bfcl.world import Bfcl

__all__ = ["Bfcl"]
