"""The household: ALFWorld's text style and its six kinds of task, in pure Python.

A room has a few receptacles with objects in them; an episode asks for one task ("put a clean mug in cabinet"). `rules` has the
things and the wording, `env` the environment, `expert` the scripted expert, `layouts` draws rooms, `world` makes tasks of them.

Left out of ALFWorld: what fits where (any object goes into any receptacle) and slicing.
"""

from aem_exp.envs.household.env import HouseholdEnv
from aem_exp.envs.household.world import Household

__all__ = ["Household", "HouseholdEnv"]
