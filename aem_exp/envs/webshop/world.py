"""The WebShop worlds, with the official catalogue and with a generated one: their splits and rewards."""

import json
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any, Final, Literal

import numpy as np

from aem_exp.core import console
from aem_exp.core.errors import ConfigError
from aem_exp.envs import LazyTasks, Task, parsing
from aem_exp.envs.webshop import expert, generated, vocabulary
from aem_exp.envs.webshop.catalogue import Catalogue, Product, load_catalogue
from aem_exp.envs.webshop.env import SEARCH_HINT, WebShopEnv
from aem_exp.envs.webshop.goals import SHUFFLE_SEED, Goal, Goals, NounTagger, draw_prices, load_noun_tagger, score
from aem_exp.envs.webshop.official_files import check_spacy, find_files
from aem_exp.envs.webshop.shop import BUY

RULES_VERSION: Final = 1  # raise when the same task would play differently
TEST_GOALS, DEV_GOALS = 500, 1000  # sizes of the test and dev panels: the first goals in the original's order
VERL_AGENT_WORKERS, VERL_AGENT_VALIDATION = 16, 128  # verl-agent's workers; each shuffles the goals again


class WebShop:
    """The official catalogue and its goals.

    Args:
        data: the folder of the official files; null: $WEBSHOP_DATA, else webshop/ in the cache.
        catalogue: `small`: 1,000 products. `full`: 1.18 million products.
        goals: `synthetic`: built from products and their options. `human`: 12,087 that people wrote, for the full catalogue.
        split: `original`: in one order, goals 0-499 are test, 500-1499 dev, and the rest train. `verl_agent`: each worker
            shuffles the goals again, so that most validation goals are also training goals; only to compare with published
            numbers.
        nouns: `spacy`: the original's tagger, which needs en_core_web_sm. `words`: an approximation without it.
        tags: responses must be `<think>..</think><action>..</action>`; otherwise the whole response is the action.
        reward: paid on a purchase, see `pays`.
        pays: `success`: the reward is paid if the purchase meets the goal exactly. `score`: in proportion to the score.
        seed: decides the price bounds of goals, and the draws of verl_agent's workers.
    """

    splits = ("train", "dev", "test")
    panels: dict[str, int] = {"test": TEST_GOALS, "dev": DEV_GOALS}  # noqa: RUF012  (replaced, never mutated)

    def __init__(
        self,
        data: str | None = None,
        catalogue: Literal["small", "full"] = "small",
        goals: Literal["synthetic", "human"] = "synthetic",
        split: Literal["original", "verl_agent"] = "original",
        nouns: Literal["spacy", "words"] = "spacy",
        tags: bool = True,
        reward: float = 10.0,
        pays: Literal["success", "score"] = "success",
        seed: int = 0,
    ):
        if nouns == "spacy":
            check_spacy()
        self.files = find_files(data, catalogue, goals)
        self.split, self.nouns, self.tags, self.reward, self.pays, self.seed = split, nouns, tags, reward, pays, seed
        self.catalogue = _load_catalogue(self.files)
        self._goals = lru_cache(VERL_AGENT_WORKERS + VERL_AGENT_VALIDATION)(partial(Goals, self.catalogue))
        self.prices = lru_cache(VERL_AGENT_WORKERS + VERL_AGENT_VALIDATION)(
            partial(draw_prices, self.catalogue)
        )  # seed -> the price of each product
        settings = [
            RULES_VERSION,
            self.catalogue.fingerprint,
            goals,
            split,
            nouns,
            tags,
            reward,
            pays,
            seed,
            self.panels,
        ]
        self.fingerprint = f"webshop-{sha256(json.dumps(settings).encode()).hexdigest()[:12]}"

    def tasks(self, split: str) -> Sequence[Task]:
        if split not in self.splits:
            raise ConfigError("split", split, choices=self.splits)
        positions = self._goal_positions(split)
        return LazyTasks(len(positions), lambda index: self._task(split, *positions[index]))

    def env(self) -> WebShopEnv:
        return WebShopEnv(self)

    def score_purchase(self, product: Product, price: float, chosen: list[str], goal: Goal, wanted: Product) -> float:
        return score(product, price, chosen, goal, wanted, self._nouns)

    @cached_property
    def _nouns(self) -> NounTagger:
        return load_noun_tagger(self.nouns)

    def expert(self, env: WebShopEnv, random: Random, noise: float = 0.0, shyness: float = 0.0) -> str:
        """The response of the scripted expert.

        With probability `noise` it clicks a random element. With probability `shyness` it buys before it has chosen the options
        of the goal.
        """
        action = expert.next_action(env.shop, env.goal)
        if random.random() < noise:
            action = random.choice([one for one in env.actions if one != SEARCH_HINT] or [action])
        elif action in (f"click[{value}]" for value in expert.parse_options(env.goal).values()):
            action = f"click[{BUY.lower()}]" if random.random() < shyness else action
        return self._format_response(action)

    def oracle(self, env: WebShopEnv) -> str:
        """The response of an expert that knows the product of the goal."""
        return self._format_response(expert.oracle_action(env.shop, self.catalogue))

    @classmethod
    def prepare(cls, say: Callable[[str], None], **make: Any) -> None:
        """Build the catalogue and its index. This takes a while for a million products."""
        if make.get("nouns", "spacy") == "spacy":
            check_spacy()
        files = find_files(make.get("data"), make.get("catalogue", "small"), make.get("goals", "synthetic"))
        say("build   the catalogue, unless it is in the cache")
        with console.progress_bar("indexing products") as report_progress:
            _load_catalogue(files, report_progress)

    def _format_response(self, action: str) -> str:
        return parsing.write_response(action, self.tags)

    def _goal_positions(self, split: str) -> Sequence[tuple[int, int, int]]:
        """For each goal of a split: the seed of prices, the seed of the order, and the position in the order."""
        total = len(self._goals(self.seed, SHUFFLE_SEED))
        if total <= self.panels["test"] + self.panels["dev"]:
            raise self._too_few_goals(total)
        if self.split == "original":
            test, dev = self.panels["test"], self.panels["dev"]
            ranges = {"test": range(test), "dev": range(test, test + dev), "train": range(test + dev, total)}
            return _GoalPositions([(self.seed, SHUFFLE_SEED)], ranges[split])
        if split == "train":
            return _GoalPositions(
                [(self.seed + worker, self.seed + worker) for worker in range(VERL_AGENT_WORKERS)],
                range(TEST_GOALS, total),
            )
        first = self.seed + 1000  # verl-agent's validation seed; it draws again at each validation
        draws = np.random.RandomState(first)
        panels = [draws.choice(range(TEST_GOALS), VERL_AGENT_VALIDATION, replace=False) for _ in ("dev", "test")]
        positions = panels[0 if split == "dev" else 1]
        return [(first + worker, first + worker, int(position)) for worker, position in enumerate(positions)]

    def _too_few_goals(self, goals: int) -> ConfigError:
        remedy = f"has {goals} goals, too few for panels of {self.panels}"
        return ConfigError("env.make.data", str(self.files[0].parent), remedy)

    def _task(self, split: str, seed: int, shuffle: int, position: int) -> Task:
        goal: Goal = self._goals(seed, shuffle)[position]
        product = self.catalogue.find(goal.asin)
        assert product is not None
        name = f"{split}-{position}" if self.split == "original" else f"{split}-{position}-worker-{shuffle}"
        return Task(name, kind=product.category, payload={**goal._asdict(), "seed": seed})


class _GoalPositions(Sequence[tuple[int, int, int]]):
    """Every position of a range, for each order (seed of prices, seed of the order)."""

    def __init__(self, orders: Sequence[tuple[int, int]], places: range):
        self._orders, self._range = orders, places

    def __len__(self) -> int:
        return len(self._orders) * len(self._range)

    def __getitem__(self, index: Any) -> Any:
        order, position = divmod(index, len(self._range))
        return (*self._orders[order], self._range[position])


class Generated(WebShop):
    """A shop of generated products in the official format. It needs no download.

    Args:
        products: number of products.
        seed: decides the products, and the price bounds of goals.
        panels: number of goals in the test and dev panels.
    """

    def __init__(
        self,
        products: int = 1000,
        tags: bool = True,
        reward: float = 10.0,
        pays: Literal["success", "score"] = "success",
        seed: int = 0,
        panels: dict[str, int] | None = None,
    ):
        if not generated.MIN_PRODUCTS <= products <= generated.MAX_PRODUCTS:
            raise ConfigError(
                "env.make.products", products, f"choose {generated.MIN_PRODUCTS} to {generated.MAX_PRODUCTS}"
            )
        data = generated.generate_catalogue(products, seed)
        self.panels = {"test": 128, "dev": 128} | (panels or {})
        for name, size in self.panels.items():
            if name not in ("dev", "test") or size < 1:
                raise ConfigError(
                    f"env.make.panels.{name}", size, "the panels are dev and test, with at least 1 goal each"
                )
        super().__init__(str(data), nouns="words", tags=tags, reward=reward, pays=pays, seed=seed)

    @classmethod
    def prepare(cls, say: Callable[[str], None], **make: Any) -> None:
        cls(**make)

    def _too_few_goals(self, goals: int) -> ConfigError:
        remedy = f"too large: {len(self.catalogue)} products give {goals} goals, and some must be left for training"
        return ConfigError("env.make.panels", self.panels, remedy)

    def words(self) -> tuple[str, ...]:
        """Everything that a policy reads or writes in this world: words, and fixed phrases that may be one token each."""
        return vocabulary.words(self.catalogue)


@lru_cache(4)
def _load_catalogue(
    files: tuple[Path, Path, Path | None], report_progress: Callable[[int, int], None] = lambda *_: None
) -> Catalogue:
    return load_catalogue(*files, report_progress)
