"""The scripted expert: it solves every kind of task and uses only what the observations of the episode have shown."""

from random import Random

from aem_exp.envs.household.env import HouseholdEnv
from aem_exp.envs.household.rules import APPLIANCE, LAMP, STATE_AFTER, Errand, kind_of


def expert_action(env: HouseholdEnv, errand: Errand, random: Random) -> str:
    """The next action towards this errand."""
    if env.held_object is None:
        for place in (place for place in env.contents if place in env.seen):  # the order of `seen` depends on hashes
            for thing in env.contents[place]:
                if kind_of(thing) == errand.object and not env.is_done(thing, place, errand):
                    return _approach(env, place) or f"take {thing} from {place}"
        return _explore(env, errand, random)
    if kind_of(env.held_object) != errand.object:  # picked up by mistake
        place = env.location or random.choice(list(env.contents))
        return _approach(env, place) or f"move {env.held_object} to {place}"
    if errand.kind == "look_at_obj_in_light":
        lamps = [place for place in env.seen if LAMP in env.contents[place]]
        return (_approach(env, lamps[0]) or f"use {LAMP}") if lamps else _explore(env, errand, random)
    if errand.verb and STATE_AFTER[errand.verb] not in env.state.get(env.held_object, ()):
        place = _choose_place(env, APPLIANCE[errand.verb], random)
        return f"{errand.verb} {env.held_object} with {place}" if env.location == place else f"go to {place}"
    place = _choose_place(env, errand.target, random)
    return _approach(env, place) or f"move {env.held_object} to {place}"


def _choose_place(env: HouseholdEnv, kind: str, random: Random) -> str:
    places = [place for place in env.contents if kind_of(place) == kind]
    return env.location if env.location in places else random.choice(places)


def _approach(env: HouseholdEnv, place: str) -> str | None:
    """The next action to reach and open a receptacle; None if the agent is already at the open receptacle."""
    if env.location != place:
        return f"go to {place}"
    return f"open {place}" if place in env.closed_places else None


def _explore(env: HouseholdEnv, errand: Errand, random: Random) -> str:
    """Open the current receptacle, else go to an unseen one. The target comes last: the wanted object is never there."""
    unseen = [place for place in env.contents if place not in env.seen]
    if env.location in unseen:
        return f"open {env.location}"
    elsewhere = [place for place in unseen if kind_of(place) != errand.target]
    return f"go to {random.choice(elsewhere or unseen or list(env.contents))}"
