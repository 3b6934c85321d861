"""The world of `household_talk`: a response is a sentence and an action, and two arguments set the entropy of these two parts."""

import re
from collections.abc import Sequence
from dataclasses import replace
from random import Random
from typing import Final

from aem_exp.core.errors import ConfigError
from aem_exp.envs import Task
from aem_exp.envs.household.layouts import digest
from aem_exp.envs.household.rules import OBJECTS, SURFACES, Errand, kind_of
from aem_exp.envs.household.talk_env import START, STATUSES, TalkEnv
from aem_exp.envs.household.talk_expert import PHRASINGS, SENTENCE, STAGES, SYNONYMS, list_sentences, reasonable_actions
from aem_exp.envs.household.world import Household

TALK_VERSION: Final = 1  # raise when the same task would play differently; changes the fingerprint
PHRASES: Final = (  # of observations and actions; each word of a sentence is one token
    *("You are at the", "and see a", "and see nothing.", "You hold a", "You hold nothing.", ". Places:", "Places:"),
    *(", a", ", and a", "go to", "put a", "', '", "', 'go to"),
)
WORDS: Final = ("the", "a", "in", "to", "from", "take", "move", "'", ",", ".", ":")
TAGS: Final = ("<action>", "</action>")


class HouseholdTalk(Household):
    """Rooms of surfaces, in which one object must be found and placed. Names have no numbers.

    A response is a sentence and an action: `Okay, I see that ... <action>go to desk</action>`. Two arguments set the entropy
    of the scripted player, each of one part. They change neither the length of prompts and responses nor the number of turns.

    Args:
        phrasings: number of equally likely ways to say the same thought: 1, 2, 4, 8 or 16. They have no effect on the episode.
        choices: number of unseen receptacles to which the agent can go while it looks for the object. The object is equally
            likely in each of them. 1: one action is reasonable in every state.
        thought_required: a response without a sentence is invalid; otherwise the action alone is enough.
        receptacles: number of receptacles in a room.
        objects: number of movable objects in a room.
        receptacle_types: types of receptacles in rooms, only surfaces; null: all.
        object_types: types of objects in rooms; null: all.
        reward: paid once, on success.
        sizes: tasks per split.
        panel_seed: draws other tasks for the panels of held-out tasks.
    """

    def __init__(
        self,
        phrasings: int = 1,
        choices: int = 1,
        thought_required: bool = False,
        receptacles: int = 5,
        objects: int = 3,
        receptacle_types: Sequence[str] | None = None,
        object_types: Sequence[str] | None = None,
        reward: float = 1.0,
        sizes: dict[str, int] | None = None,
        panel_seed: int = 0,
    ) -> None:
        for kind in receptacle_types or ():
            if kind not in SURFACES:
                raise ConfigError("env.make.receptacle_types", kind, choices=list(SURFACES))
        super().__init__(
            kinds=["pick_and_place"],
            receptacles=receptacles,
            openable=0,
            copies=1,
            objects=objects,
            receptacle_types=receptacle_types or SURFACES,
            object_types=object_types or OBJECTS,
            reward=reward,
            sizes=sizes,
            panel_seed=panel_seed,
        )
        if phrasings not in PHRASINGS:
            raise ConfigError("env.make.phrasings", phrasings, choices=[str(number) for number in PHRASINGS])
        if objects > len(self.object_types):
            raise ConfigError(
                "env.make.objects", objects, remedy=f"choose 1 to {len(self.object_types)}, one of each type"
            )
        if not 1 <= choices < receptacles:
            raise ConfigError("env.make.choices", choices, remedy=f"choose 1 to {receptacles - 1}")
        self.phrasings, self.choices, self.thought_required = phrasings, choices, thought_required
        rules = [TALK_VERSION, self.fingerprint, phrasings, choices, thought_required]
        self.fingerprint = f"household-talk-{TALK_VERSION}-{digest(rules).hex()[:12]}"

    def env(self) -> TalkEnv:
        return TalkEnv(self.choices, self.thought_required, self.reward)

    def words(self) -> tuple[str, ...]:
        """Everything that a policy reads or writes in this world: words, and fixed phrases that may be one token each."""
        sentences = " ".join([SENTENCE, *(part for stage in STAGES.values() for part in stage)])
        spoken = [word for word in re.findall(r"{?\w+}?", sentences) if word.isalpha()]
        synonyms = [word for pair in SYNONYMS for word in pair]
        names = [*self.receptacle_types, *self.object_types, START, *STATUSES]
        statuses = [
            f"{place} {status}{sign}" for place in self.receptacle_types for status in STATUSES for sign in ",."
        ]
        return (*PHRASES, *WORDS, *names, *statuses, *spoken, *synonyms, *TAGS)

    def responses(self, env: TalkEnv) -> dict[str, float]:
        """The distribution of the scripted player in the current state: response -> probability."""
        sentences, actions = list_sentences(env, self.phrasings), reasonable_actions(env)
        share = 1 / (len(sentences) * len(actions))
        return {_join(sentence, action): share for sentence in sentences for action in actions}

    def expert(self, env: TalkEnv, random: Random, noise: float = 0.0, shyness: float = 0.0) -> str:  # type: ignore[override]
        """The response of the scripted player.

        With probability `noise` its action is random, and may be a mistake. With probability `shyness` it goes elsewhere instead
        of taking the wanted object. Its sentence is true in any case. The sequence of actions does not depend on `phrasings`.
        """
        sentence = _pick(list_sentences(env, self.phrasings), random)
        action = _pick(reasonable_actions(env), random)
        if random.random() < noise:
            action = _pick([*env.admissible_actions], random)
        elif action.startswith("take") and random.random() < shyness:
            action = _pick([go for place, go in env.go_actions.items() if place != env.location], random)
        return _join(sentence, action)

    def _draw_task(self, split: str, index: int) -> Task:
        """Add the order in which receptacles become free. Layouts and orders do not depend on `phrasings` and `choices`."""
        task = super()._draw_task(split, index)
        order = [place for place in task.payload["layout"] if place != task.payload["target"]]
        Random(f"order-{split}-{index}").shuffle(order)
        return replace(task, payload={**task.payload, "order": order})

    def _draw_layout(self, errand: Errand, random: Random) -> dict[str, list[str]]:
        """A layout with at most one thing of each type; names have no numbers."""
        layout = super()._draw_layout(errand, random)
        kinds = {place: [kind_of(thing) for thing in things] for place, things in layout.items()}
        things = [thing for inside in kinds.values() for thing in inside]
        return {kind_of(place): inside for place, inside in kinds.items()} if len(set(things)) == len(things) else {}


def _pick(items: Sequence[str], random: Random) -> str:
    """An item with equal probability, by one random number for any number of items."""
    return items[int(random.random() * len(items))]


def _join(sentence: str, action: str) -> str:
    return f"{sentence} <action>{action}</action>"
