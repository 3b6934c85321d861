"""The household: ALFWorld's text style and its six kinds of task, in pure Python.

A room has a few receptacles with objects in them, and an episode asks for one task ("put a clean mug in cabinet"). `rules`
contains the things and the wording, `env` the environment, `expert` the scripted expert, `layouts` draws rooms, and `world`
makes tasks of them. `talk`, `talk_env` and `talk_expert` contain a second world of the same things, in which the player says one
sentence before each action.

Two parts of ALFWorld are left out: any object goes into any receptacle, and nothing can be sliced.
"""

from aem_exp.envs.household.env import HouseholdEnv
from aem_exp.envs.household.talk import HouseholdTalk
from aem_exp.envs.household.world import Household

__all__ = ["Household", "HouseholdEnv", "HouseholdTalk"]
