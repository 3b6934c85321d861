"""Computes WebShop's goals and rewards as the original does.

The original draws goal prices before it seeds its random generator, so its goals differ between processes. Here they depend on a
seed, with the draws in the original's order.
"""

import itertools
import random
import re
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from functools import lru_cache
from typing import Any, Final, Literal, NamedTuple

import numpy as np

from aem_exp.envs.webshop.analyzer import STOP_WORDS
from aem_exp.envs.webshop.catalogue import Catalogue, Product

SHUFFLE_SEED: Final = 233  # the original's seed for the order of goals
PRICE_BOUNDS: Final = [10.0 * i for i in range(1, 100)]  # the price bounds of goals are drawn from these
NO_BOUND: Final = 1_000_000.0
MATCH_THRESHOLD: Final = 85  # two texts with a higher similarity, in per cent, count as equal
NounTagger = Callable[[str], tuple[str, ...]]  # title -> its nouns

# The first of these that occurs in the value of an option replaces the value.
COLOURS: Final = (
    "alabaster apricot aqua ash asphalt azure banana beige black blue blush bordeaux bronze brown burgundy camel camo caramel "
    "champagne charcoal cheetah chestnut chocolate christmas coffee cognac copper coral cranberry cream crystal dark denim "
    "eggplant elephant espresso fuchsia gold granite grape graphite grass gray green grey heather indigo ivory ivy khaki "
    "lavender lemon leopard light lilac lime magenta maroon mauve merlot midnight mint mocha multicolor mushroom mustard "
    "natural navy nude olive orange peach pewter pink plum purple rainbow red rose royal rust sand sapphire seashell silver "
    "skull slate steel stone stonewash sunflower tan taupe teal tiger turquoise violet walnut wheat white wine yellow"
).split()


class Goal(NamedTuple):
    """The goal of an episode. `options` is name -> value for a synthetic goal, and a list of values for a human one."""

    asin: str
    text: str
    attributes: list[str]
    price_upper: float
    options: dict[str, str] | list[str]


class Goals(Sequence[Goal]):
    """All goals of a catalogue in a random order. Their texts are built on access.

    Args:
        seed: decides the price bounds.
        shuffle: decides the order.
    """

    def __init__(self, catalogue: Catalogue, seed: int, shuffle: int = SHUFFLE_SEED):
        self._catalogue = catalogue
        rng = random.Random(seed)
        prices = _draw_prices(catalogue, rng)
        goals: list[tuple[int, int, int, float]] = []  # product, instruction, combination of options, bound
        for number in map(int, catalogue.products_with_instructions):
            product = catalogue.product(number)
            for place, instruction in enumerate(product.asked):
                bound = _draw_price_bound(prices[number], rng)
                combinations = 1 if instruction["options"] is not None else _count_combinations(product)
                goals += [(number, place, combination, bound) for combination in range(combinations)]
        random.Random(shuffle).shuffle(goals)
        self._goals = goals

    def __len__(self) -> int:
        return len(self._goals)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number, place, combination, bound = self._goals[index]
        product = self._catalogue.product(number)
        instruction = product.asked[place]
        price = "" if bound == NO_BOUND else f", and price lower than {bound:.2f} dollars"
        if instruction["options"] is not None:
            return Goal(
                product.asin, instruction["text"] + price, instruction["attributes"], bound, instruction["options"]
            )
        names = sorted(product.options)
        chosen = next(
            itertools.islice(itertools.product(*(product.options[name] for name in names)), combination, None)
        )
        options = dict(zip(names, chosen, strict=True))
        wanted = ", and ".join(f"{name}: {value}" for name, value in options.items())
        text = instruction["text"] + (f" with {wanted}" if wanted else "") + price
        return Goal(product.asin, text, instruction["attributes"], bound, options)


def _count_combinations(product: Product) -> int:
    count = 1
    for values in product.options.values():
        count *= len(values)
    return count


def draw_prices(catalogue: Catalogue, seed: int) -> np.ndarray:
    """The price of each product for a seed. If a product has a price range, the price is drawn from it."""
    return _draw_prices(catalogue, random.Random(seed))


def _draw_prices(catalogue: Catalogue, rng: random.Random) -> np.ndarray:
    prices = np.array(catalogue.prices[:, 0])
    for number in np.flatnonzero(~np.isnan(catalogue.prices[:, 1])):
        prices[number] = rng.uniform(*map(float, catalogue.prices[number]))
    return prices


def _draw_price_bound(price: float, rng: random.Random) -> float:
    """Draw two of the next four multiples of ten above a price, and return the larger one."""
    above = [bound for bound in PRICE_BOUNDS if bound > price][:4]
    return max(rng.sample(above, 2)) if len(above) >= 2 else NO_BOUND


# Reward.


def score(
    product: Product, price: float, chosen: Sequence[str], goal: Goal, wanted: Product, nouns: NounTagger
) -> float:
    """The score of a purchase, from 0 to 1: r_type times the share of the attributes, options and price bound that are met.

    Args:
        product: the bought product.
        price: its price in dollars.
        chosen: values of its chosen options.
        wanted: the product of the goal.
    """
    options = list(goal.options.items()) if isinstance(goal.options, dict) else list(goal.options)
    met = (
        _count_attributes_met(product, goal.attributes)
        + _count_options_met(chosen, options)
        + (price <= goal.price_upper)
    )
    return met / (len(goal.attributes) + len(options) + 1) * _type_factor(product, wanted, nouns)


def _type_factor(bought: Product, wanted: Product, nouns: NounTagger) -> float:
    """The original's r_type: 1 for the same kind of product by query, category or title; less if titles share few nouns."""
    bought_nouns, wanted_nouns = nouns(bought.title), nouns(wanted.title)
    title = len(set(bought_nouns) & set(wanted_nouns)) / len(wanted_nouns) if wanted_nouns else 0.2
    if title == 0:
        return 0.0
    if title < 0.1:
        return 0.1
    shared = _category_levels(bought) & _category_levels(wanted)
    return 1.0 if bought.query == wanted.query or len(shared) >= 2 or title > 0.2 else 0.5


def _category_levels(product: Product) -> set[str]:
    return {level.strip() for level in product.product_category.split("\u203a")}


def _count_attributes_met(product: Product, attributes: Sequence[str]) -> int:
    texts = (product.title.lower(), " ".join(product.bullets).lower(), product.description.lower())
    return sum(
        any(token_set_ratio(own, one) > MATCH_THRESHOLD for own in product.attributes)
        or any(one in text for text in texts)
        for one in attributes
    )


def _count_options_met(chosen: Sequence[str], wanted: Sequence[Any]) -> int:
    """Count the wanted options among the chosen ones.

    A wanted option is a value, or (name, value) in a synthetic goal. The original compares the printed tuple.
    """
    chosen_colours = [_normalize_colour(one) for one in chosen]
    return sum(
        any(token_set_ratio(str(option), str(_normalize_colour(one))) > MATCH_THRESHOLD for option in chosen_colours)
        for one in wanted
    )


def _normalize_colour(option: Any) -> Any:
    return next((colour for colour in COLOURS if colour in option), option)


@lru_cache(1 << 16)
def token_set_ratio(one: str, two: str) -> int:
    """The similarity of two texts in per cent, regardless of order and repetition of words: thefuzz's token_set_ratio."""
    first, second = _token_set(one), _token_set(two)
    if not first or not second:
        return 0
    both = " ".join(sorted(first & second))
    rest = [f"{both} {' '.join(sorted(only))}".strip() for only in (first - second, second - first)]
    return max(_ratio(both, rest[0]), _ratio(both, rest[1]), _ratio(*rest))


def _token_set(text: str) -> frozenset[str]:
    plain = "".join(c for c in text if not "\x80" <= c <= "\xff")
    return frozenset(re.sub(r"\W", " ", plain).lower().split())


def _ratio(one: str, two: str) -> int:
    if one == two:
        return 100
    return round(100 * SequenceMatcher(None, one, two).ratio()) if one and two else 0


# The nouns of a title, which decide the kind of a product.


def load_noun_tagger(kind: Literal["spacy", "words"]) -> NounTagger:
    """A function that finds the nouns of a title.

    `spacy`: as in the original, the nouns and proper nouns by en_core_web_sm. `words`: an approximation, all words except stop
    words.
    """
    if kind == "words":
        return _content_words
    import spacy

    parse = spacy.load("en_core_web_sm")

    @lru_cache(1 << 16)
    def nouns(title: str) -> tuple[str, ...]:
        return tuple(token.text.lower() for token in parse(title) if token.pos_ in ("NOUN", "PROPN"))

    return nouns


@lru_cache(1 << 16)
def _content_words(title: str) -> tuple[str, ...]:
    return tuple(word for word in re.findall(r"[^\W\d_]{2,}", title.lower()) if word not in STOP_WORDS)
