"""WebShop: shopping in a web shop of real products, as its original text environment plays, without its server, HTML and Java.

Decided here: pages, what can be clicked, what an episode pays, and which goals are for training. Known differences from the
original (princeton-nlp/WebShop at 64fa2a5, observation mode text):

- goals are drawn from a seed (see `webshop_goals`); the original's differ from process to process.
- `search[<r>]`, `<a>`, `<c>`, `<q>`: back doors of the original that list products at random or by hidden fields; here they are
  words like others.
- a query that contains the name of one of the original's routes (search_results, item_page, ...) confuses its browser, not ours.
- characters that Unicode got after version 9, and zero-width joiners between words, are indexed as their neighbours are.
- `nouns: words` takes all words of a title for nouns, where the original asks spaCy: r_type is then approximate.
- a product without title, description or price field is refused when the catalogue is built; the original crashes.

Played beside the original (its search by Anserini 0.14.3, the same tagger) on six catalogues of 1,000 products, half of them
made to trip over: all goals equal, and so were 25,000 pages and lists of what can be clicked, and 700 rewards.
"""

import json
import os
import re
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any, Final, Literal

import numpy as np

from aem_exp.core import console, disk
from aem_exp.core.errors import ConfigError, MissingResource
from aem_exp.core.extras import install_command
from aem_exp.envs import LazyTasks, Task, Turn, parsing
from aem_exp.envs.webshop import generated, player
from aem_exp.envs.webshop.catalogue import Catalogue, Product, load_catalogue
from aem_exp.envs.webshop.goals import SHUFFLE_SEED, Goal, Goals, NounTagger, draw_prices, load_noun_tagger, score

RULES_VERSION: Final = 1  # raise when the same task would play differently
MAX_RESULTS, RESULTS_PER_PAGE = 50, 10  # products found by a search, and on one page
MAX_ACTION_CHARACTERS: Final = 400  # characters of an action that are read
SEPARATOR: Final = " [SEP] "
BUY, NEXT, PREVIOUS, BACK = "Buy Now", "Next >", "< Prev", "Back to Search"
SUBPAGES: Final = ("Description", "Features", "Reviews")
SEARCH_HINT: Final = "search[<your query>]"  # how a policy is told that it can search
TEST_GOALS, DEV_GOALS = 500, 1000  # goals of the test and the dev panel: the first ones, in the original's order
VERL_AGENT_WORKERS, VERL_AGENT_VALIDATION = 16, 128  # verl-agent's, each of which shuffles the goals anew
CATALOGUE_FILES: Final = {
    "small": ("items_shuffle_1000.json", "items_ins_v2_1000.json"),
    "full": ("items_shuffle.json", "items_ins_v2.json"),
}
HUMAN_GOALS_FILE: Final = "items_human_ins.json"
DRIVE_IDS: Final = {  # where the original's setup.sh finds them
    "items_shuffle_1000.json": "1EgHdxQ_YxqIQlvvq5iKlCrkEKR6-j0Ib",
    "items_ins_v2_1000.json": "1IduG0xl544V_A_jv3tHXC0kyFi7PnyBu",
    "items_shuffle.json": "1A2whVgOO0euk5O13n2iYDM0bQRkkRduB",
    "items_ins_v2.json": "1s2j6NgHljiZzQNL3veZaAiyW_qDEgBNi",
    "items_human_ins.json": "14Kb5SPBk_jfdLZ_CDBNitW98QLDlKR5O",
}
_ACTION: Final = re.compile(r"(.+)\[(.+)\]")


class ShopPage:
    """What a shopper sees: texts in their order, and what can be clicked."""

    def __init__(
        self, texts: Sequence[str], buttons: Sequence[str], links: Sequence[str] = (), options: Sequence[str] = ()
    ):
        self.texts = [shown for text in texts if (shown := _visible_text(text)) is not None]
        self.clickable = list(dict.fromkeys([*(text.lower() for text in (*buttons, *links)), *options]))

    @property
    def text(self) -> str:
        """The page as the original's text mode prints it."""
        return SEPARATOR.join(self.texts)


def _visible_text(text: str) -> str | None:
    """A text as a reader of the original's HTML finds it; None where there is nothing, or an empty line."""
    if not text:
        return None
    if not text.strip(" \n\t\f\r"):
        return None if "\n" in text else ""
    return text.strip()


class Shop:
    """One shopper's way through the shop: pages, one after another, and a score for what is bought."""

    def __init__(self, products: Catalogue, goal: Goal, prices: Any, judge: Callable[..., float]):
        self.products, self.goal, self._prices, self._score_purchase = products, goal, prices, judge
        self.results: list[Product] = []
        self.visited: list[str] = []  # asins, in small letters
        self.number = 1  # of the page of results
        self.product: Product | None = None
        self.options: dict[str, str] = {}
        self.score: float | None = None
        self.page = self._start_page()

    def execute(self, action: str) -> bool:
        """Carry out `search[..]` or `click[..]`; whether it is something that one can do here."""
        found = _ACTION.match(action)
        name, argument = found.groups() if found else (action, "")
        argument = argument.lower()
        if name == "search" and argument:
            self._search(argument)
            return True
        if name == "click" and argument in self.page.clickable:
            if argument != "search":  # this one is there, and does nothing
                self._click(argument)
            return True
        return False

    def _click(self, what: str) -> None:
        if what == BUY.lower():
            self._buy()
        elif what == BACK.lower():
            self.results, self.number, self.product, self.options = [], 1, None, {}
            self.page = self._start_page()
        elif what in (NEXT.lower(), PREVIOUS.lower()) and self.product is None:
            self._show_results(self.number + (1 if what == NEXT.lower() else -1))
        elif what == PREVIOUS.lower():
            self._show_item() if self._in_subpage else self._show_results(self.number)
        elif what in (name.lower() for name in SUBPAGES):
            self._show_subpage(next(name for name in SUBPAGES if name.lower() == what))
        else:
            self._choose(what)

    def _search(self, query: str) -> None:
        self.results = self.products.search(query, MAX_RESULTS)
        self._show_results(1)

    def _show_results(self, number: int) -> None:
        self.number, self.product, self.options = number, None, {}
        listed = self.results[(number - 1) * RESULTS_PER_PAGE : number * RESULTS_PER_PAGE]
        around = [*([PREVIOUS] if number > 1 else []), NEXT]
        texts = ["Instruction:", self.goal.text, BACK, f"Page {number} (Total results: {len(self.results)})", *around]
        for product in listed:
            texts += [product.asin, product.title, product.price]
        self.page = ShopPage(texts, [BACK, *around], [product.asin for product in listed])

    def _choose(self, what: str) -> None:
        """A product of the results, or an option of the product."""
        if self.product is None:
            self.product = self.products.find(what.upper())
            self.visited.append(what)
        else:
            names = [name for name, values in self.product.options.items() if what in values]
            self.options |= {names[-1]: what}  # of several options with this value, the last
        self._show_item()

    def _show_item(self) -> None:
        assert self.product is not None
        self._in_subpage = False
        product = self.product
        texts = ["Instruction:", self.goal.text, BACK, PREVIOUS]
        for name, values in product.options.items():
            texts += [name, *values]
        texts += [product.title, f"Price: {product.price}", "Rating: N.A.", *SUBPAGES, BUY]
        values = [value for each in product.options.values() for value in each]
        self.page = ShopPage(texts, [BACK, PREVIOUS, *SUBPAGES, BUY], options=values)

    def _show_subpage(self, name: str) -> None:
        assert self.product is not None
        self._in_subpage = True
        told = {"Description": [self.product.description], "Features": [f" {one}" for one in self.product.bullets]}
        self.page = ShopPage(["Instruction:", self.goal.text, BACK, PREVIOUS, *told.get(name, [])], [BACK, PREVIOUS])

    def _buy(self) -> None:
        assert self.product is not None
        wanted = self.products.find(self.goal.asin)
        price = float(self._prices[self.products.number(self.product.asin)])
        self.score = self._score_purchase(self.product, price, list(self.options.values()), self.goal, wanted)
        self.page = _thank_you_page(self.product.asin, self.options, self.score)

    def _start_page(self) -> ShopPage:
        return ShopPage(["WebShop", "Instruction: ", self.goal.text, "Search"], ["Search"])


def _thank_you_page(asin: str, options: dict[str, str], score: float) -> ShopPage:
    """The last page, hidden fields and misspelling included."""
    chosen = json.dumps(options, sort_keys=True)
    for sign in "<>&'":
        chosen = chosen.replace(sign, f"\\u{ord(sign):04x}")
    texts = [
        "Thank you for shopping with us!",
        "Your code: ",
        "None",
        " (Paste it in your MTurk interface.)",
        "Purchased",
    ]
    texts += [
        "asin",
        asin,
        "options",
        chosen,
        "attrs",
        "None",
        "category",
        "None",
        "query",
        "None",
        "product category",
        "None",
    ]
    texts += [
        "Target",
        "asin",
        "options",
        "attrs",
        "price upper",
        "instuction text",
        "category",
        "product category",
        "query",
    ]
    texts += ["Goal ", "None", "Reward", "Your score (min 0.0, max 1.0)", str(score), "Reward Details ", "None"]
    return ShopPage(texts, [])


class WebShopEnv:
    """One goal at a time."""

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
        bought = self.shop.score is not None
        admissible = not bought and self.shop.execute(action)
        score = self.shop.score or 0.0
        won = score == 1
        metrics = {"won": float(won), "score": score, "format_valid": float(valid), "admissible": float(admissible)}
        paid = 0.0 if bought else self._world.reward * (score if self._world.pays == "score" else won)
        return self._turn(paid, valid, metrics)

    def close(self) -> None:
        pass

    @property
    def actions(self) -> tuple[str, ...]:
        """What a policy is told that it can do."""
        page = self.shop.page
        return (*([SEARCH_HINT] if "search" in page.clickable else []), *(f"click[{name}]" for name in page.clickable))

    def _parse_action(self, response: str) -> tuple[str, bool]:
        if self._world.tags:
            return parsing.parse_tagged(response, MAX_ACTION_CHARACTERS, tail=20)
        action, short = parsing.parse_bare(response, MAX_ACTION_CHARACTERS)
        action = re.sub(r"\s*([\[\]])\s*", r"\1", action)  # words that a tokenizer parted
        return action, short and re.fullmatch(r"(search|click)\[.+\]", action) is not None

    def _turn(self, reward: float = 0.0, valid: bool = True, metrics: dict[str, float] | None = None) -> Turn:
        over = self.shop.score is not None
        return Turn(self._describe_page(), reward, over, valid=valid, actions=self.actions, metrics=metrics or {})

    def _describe_page(self) -> str:
        """The page without the instruction, which prompts say anyway; as verl-agent shows it."""
        texts = self.shop.page.texts
        shown = _visible_text(self.goal) or ""
        rest = texts[texts.index(shown) + 1 :] if shown in texts else texts
        return SEPARATOR.join(f"'{text}'" for text in rest)


class WebShop:
    """The official catalogue and its goals.

    Args:
        data: the folder of the official files; null: $WEBSHOP_DATA, else webshop/ in the cache.
        catalogue: small: 1,000 products | full: 1.18 million.
        goals: synthetic: made of products and their options | human: 12,087 that people wrote, on the full catalogue.
        split: original: test 0-499, dev 500-1499, train the rest of one order | verl_agent: each of its workers shuffles anew,
            so that its validation is largely on training goals; for the sake of published numbers alone.
        nouns: spacy: needs en_core_web_sm | words: an approximation, see above.
        tags: responses are `<think>..</think><action>..</action>`; otherwise the whole response is the action.
        reward: paid on buying, where `pays` says: success: exactly what was asked | score: in proportion to the score.
        seed: of the bounds of prices in goals, and of what verl_agent's workers draw.
    """

    splits = ("train", "dev", "test")
    panels: dict[str, int] = {"test": TEST_GOALS, "dev": DEV_GOALS}  # noqa: RUF012  (replaced, never changed)

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
            _check_spacy()
        self.files = _find_files(data, catalogue, goals)
        self.split, self.nouns, self.tags, self.reward, self.pays, self.seed = split, nouns, tags, reward, pays, seed
        self.catalogue = _load_catalogue(self.files)
        self._goals = lru_cache(VERL_AGENT_WORKERS + VERL_AGENT_VALIDATION)(partial(Goals, self.catalogue))
        self.prices = lru_cache(VERL_AGENT_WORKERS + VERL_AGENT_VALIDATION)(
            partial(draw_prices, self.catalogue)
        )  # seed -> the price of each product
        how = [RULES_VERSION, self.catalogue.fingerprint, goals, split, nouns, tags, reward, pays, seed, self.panels]
        self.fingerprint = f"webshop-{sha256(json.dumps(how).encode()).hexdigest()[:12]}"

    def tasks(self, split: str) -> Sequence[Task]:
        if split not in self.splits:
            raise ConfigError("split", split, choices=self.splits)
        places = self._goal_positions(split)
        return LazyTasks(len(places), lambda index: self._task(split, *places[index]))

    def env(self) -> WebShopEnv:
        return WebShopEnv(self)

    def score_purchase(self, product: Product, price: float, chosen: list[str], goal: Goal, wanted: Product) -> float:
        return score(product, price, chosen, goal, wanted, self._nouns)

    @cached_property
    def _nouns(self) -> NounTagger:
        return load_noun_tagger(self.nouns)

    def expert(self, env: WebShopEnv, random: Random, noise: float = 0.0, shyness: float = 0.0) -> str:
        """The response of a player who reads pages: with probability `noise` it clicks anything; and with probability `shyness`
        it buys before it has chosen the options that were asked for."""
        action = player.next_action(env.shop, env.goal)
        if random.random() < noise:
            action = random.choice([one for one in env.actions if one != SEARCH_HINT] or [action])
        elif action in (f"click[{value}]" for value in player.parse_options(env.goal).values()):
            action = f"click[{BUY.lower()}]" if random.random() < shyness else action
        return self._format_response(action)

    def oracle(self, env: WebShopEnv) -> str:
        """The response of a player who knows which product the goal was made of."""
        return self._format_response(player.oracle_action(env.shop, self.catalogue))

    @classmethod
    def prepare(cls, say: Callable[[str], None], **make: Any) -> None:
        """Build the catalogue, with its index; a million products take a while."""
        if make.get("nouns", "spacy") == "spacy":
            _check_spacy()
        files = _find_files(make.get("data"), make.get("catalogue", "small"), make.get("goals", "synthetic"))
        say("build   the catalogue, where it is not built yet")
        with console.progress_bar("indexing products") as tell:
            _load_catalogue(files, tell)

    def _format_response(self, action: str) -> str:
        return f"<think></think><action>{action}</action>" if self.tags else action

    def _goal_positions(self, split: str) -> Sequence[tuple[int, int, int]]:
        """Seed of prices, seed of the order, and place in it, of each goal of a split."""
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
        first = self.seed + 1000  # its seed of validation, from which it draws at each validation anew
        draws = np.random.RandomState(first)
        drawn = [draws.choice(range(TEST_GOALS), VERL_AGENT_VALIDATION, replace=False) for _ in ("dev", "test")]
        chosen = drawn[0 if split == "dev" else 1]
        return [(first + worker, first + worker, int(place)) for worker, place in enumerate(chosen)]

    def _too_few_goals(self, goals: int) -> ConfigError:
        remedy = f"has {goals} goals, too few for panels of {self.panels}"
        return ConfigError("env.make.data", str(self.files[0].parent), remedy)

    def _task(self, split: str, seed: int, shuffle: int, place: int) -> Task:
        goal: Goal = self._goals(seed, shuffle)[place]
        product = self.catalogue.find(goal.asin)
        assert product is not None
        name = f"{split}-{place}" if self.split == "original" else f"{split}-{place}-worker-{shuffle}"
        return Task(name, kind=product.category, payload={**goal._asdict(), "seed": seed})


class _GoalPositions(Sequence[tuple[int, int, int]]):
    """Every place of a range, for each of some orders."""

    def __init__(self, orders: Sequence[tuple[int, int]], places: range):
        self._orders, self._range = orders, places

    def __len__(self) -> int:
        return len(self._orders) * len(self._range)

    def __getitem__(self, index: Any) -> Any:
        order, place = divmod(index, len(self._range))
        return (*self._orders[order], self._range[place])


class Generated(WebShop):
    """A shop of products that are made here, in the official format; nothing is downloaded.

    Args:
        products: how many.
        panels: goals of the test and dev panels.
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
                raise ConfigError(f"env.make.panels.{name}", size, "give dev and test at least 1 each")
        super().__init__(str(data), nouns="words", tags=tags, reward=reward, pays=pays, seed=seed)

    @classmethod
    def prepare(cls, say: Callable[[str], None], **make: Any) -> None:
        cls(**make)

    def _too_few_goals(self, goals: int) -> ConfigError:
        remedy = f"must leave goals to train on: of {len(self.catalogue)} products there are {goals}"
        return ConfigError("env.make.panels", self.panels, remedy)

    def words(self) -> tuple[str, ...]:
        """Everything a policy of this world reads or writes: words, and fixed wordings that may be one token."""
        return generated.words(self.catalogue)


def _check_spacy() -> None:
    if missing := [name for name in ("spacy", "en_core_web_sm") if find_spec(name) is None]:
        remedy = (
            f"needs {' and '.join(missing)}: {install_command('webshop')} && python -m spacy download en_core_web_sm; "
        )
        raise MissingResource(
            "env.make.nouns", "spacy", remedy + "or say env.make.nouns=words: scores are then approximate"
        )


def _find_files(data: str | None, catalogue: str, goals: str) -> tuple[Path, Path, Path | None]:
    """The official files that are asked for."""
    asked = data or os.environ.get("WEBSHOP_DATA")
    root = Path(asked or disk.cache_dir() / "webshop").expanduser().absolute()
    names = [*CATALOGUE_FILES[catalogue], *([HUMAN_GOALS_FILE] if goals == "human" else [])]
    if missing := [name for name in names if not (root / name).is_file()]:
        fetch = " && ".join(f"gdown {DRIVE_IDS[name]} -O {root / name}" for name in missing)
        remedy = "" if asked else f"and $WEBSHOP_DATA is not set either; {root} "
        remedy += f"has no {', '.join(missing)}: pip install gdown && mkdir -p {root} && {fetch}"
        field = "WEBSHOP_DATA" if asked and not data else "env.make.data"
        raise MissingResource(field, str(root) if asked else None, remedy)
    return root / names[0], root / names[1], root / HUMAN_GOALS_FILE if goals == "human" else None


@lru_cache(4)
def _load_catalogue(
    files: tuple[Path, Path, Path | None], tell: Callable[[int, int], None] = lambda *_: None
) -> Catalogue:
    return load_catalogue(*files, tell)
