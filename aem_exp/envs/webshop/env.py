"""The environment of WebShop: one goal per episode, with search and click actions."""

import re
from typing import TYPE_CHECKING, Final

from aem_exp.envs import Task, Turn, parsing
from aem_exp.envs.webshop.goals import Goal
from aem_exp.envs.webshop.shop import SEPARATOR, Shop, visible_text

if TYPE_CHECKING:
    from aem_exp.envs.webshop.world import WebShop

MAX_ACTION_CHARACTERS: Final = 400  # longest action
SEARCH_HINT: Final = "search[<your query>]"  # the search action in the list that a policy sees


class WebShopEnv:
    """Plays one goal at a time."""

    def __init__(self, world: "WebShop"):
        self._world = world
        self.goal = ""

    def parse(self, response: str) -> str:
        return self._parse_action(response)[0]

    def reset(self, task: Task) -> Turn:
        self.task = task
        goal = Goal(**{name: task.payload[name] for name in Goal._fields})
        world = self._world
        self.shop = Shop(world.catalogue, goal, world.prices(task.payload["seed"]), world.score_purchase)
        self.goal = goal.text
        return self._turn(metrics={"won": 0.0, "score": 0.0})

    def step(self, response: str) -> Turn:
        action, valid = self._parse_action(response)
        is_over = self.shop.score is not None
        admissible = not is_over and self.shop.execute(action)
        score = self.shop.score or 0.0
        won = score == 1
        metrics = {"won": float(won), "score": score, "format_valid": float(valid), "admissible": float(admissible)}
        reward = 0.0 if is_over else self._world.reward * (score if self._world.pays == "score" else won)
        return self._turn(reward, valid, metrics)

    def close(self) -> None:
        pass

    @property
    def actions(self) -> tuple[str, ...]:
        """The admissible actions that a policy sees."""
        page = self.shop.page
        return (*([SEARCH_HINT] if "search" in page.clickable else []), *(f"click[{name}]" for name in page.clickable))

    def _parse_action(self, response: str) -> tuple[str, bool]:
        if self._world.tags:
            return parsing.parse_tagged(response, MAX_ACTION_CHARACTERS, tail=20)
        action, short = parsing.parse_bare(response, MAX_ACTION_CHARACTERS)
        action = re.sub(r"\s*([\[\]])\s*", r"\1", action)  # a word-level tokenizer puts spaces here
        return action, short and re.fullmatch(r"(search|click)\[.+\]", action) is not None

    def _turn(self, reward: float = 0.0, valid: bool = True, metrics: dict[str, float] | None = None) -> Turn:
        is_over = self.shop.score is not None
        return Turn(self._describe_page(), reward, is_over, valid=valid, actions=self.actions, metrics=metrics or {})

    def _describe_page(self) -> str:
        """The page in verl-agent's format, without the instruction, which prompts contain anyway."""
        texts = self.shop.page.texts
        instruction = visible_text(self.goal) or ""
        rest = texts[texts.index(instruction) + 1 :] if instruction in texts else texts
        return SEPARATOR.join(f"'{text}'" for text in rest)
