"""Scripted WebShop experts: an expert that knows only the pages it has seen, and an oracle that knows the goal's product."""

import re
from typing import TYPE_CHECKING, Final

from aem_exp.envs.webshop.analyzer import analyze

if TYPE_CHECKING:
    from aem_exp.envs.webshop.catalogue import Catalogue
    from aem_exp.envs.webshop.shop import Shop

MAX_VISITS: Final = 4  # the expert visits at most this many products before it buys one without the wanted options
_PRICE: Final = re.compile(r",? and price lower than ([\d.]+) dollars")
_OPENING: Final = re.compile(r"^(find me|i need|i am looking for|i want|show me)( an?)?\s+", re.IGNORECASE)


def parse_options(text: str) -> dict[str, str]:
    """The options that an instruction names: `with color: red, and size: large`."""
    _, separator, rest = _PRICE.sub("", text).rpartition(" with ")
    pairs = [part.split(": ", 1) for part in rest.split(", and ")] if separator else []
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def next_action(shop: "Shop", text: str) -> str:
    """The expert's action on this page. It knows the instruction and the pages that it has seen."""
    page, options = shop.page, parse_options(text)
    query = _OPENING.sub("", _PRICE.sub("", text).rpartition(" with ")[0] or _PRICE.sub("", text))
    if "search" in page.clickable:
        return f"search[{query}]"
    if "buy now" in page.clickable:
        missing = [value for value in options.values() if value not in shop.options.values()]
        available = [value for value in missing if value in page.clickable]
        if available:
            return f"click[{available[0]}]"
        if missing and len(shop.visited) < MAX_VISITS:
            return "click[< prev]"
        return "click[buy now]"
    if "next >" not in page.clickable:  # a subpage of a product
        return "click[< prev]"
    max_price = float(match[1]) if (match := _PRICE.search(text)) else float("inf")
    titles = [
        (asin.lower(), title, price) for asin, title, price in _read_results(shop) if asin.lower() not in shop.visited
    ]
    affordable = [(asin, title) for asin, title, price in titles if price <= max_price] or [
        (a, t) for a, t, _ in titles
    ]
    if not affordable:
        return "click[next >]" if _read_results(shop) and shop.number < MAX_VISITS else "click[back to search]"
    terms = set(analyze(query))
    best = max(affordable, key=lambda pair: len(terms & set(analyze(pair[1]))))
    return f"click[{best[0]}]"


def _read_results(shop: "Shop") -> list[tuple[str, str, float]]:
    """Asin, title and lowest price of the products on a page of results."""
    links = [text for text in shop.page.clickable if not text.startswith(("back to", "<", "next"))]
    texts = shop.page.texts
    places = {text.lower(): i for i, text in enumerate(texts)}
    results = [
        (texts[places[link]], texts[places[link] + 1], texts[places[link] + 2]) for link in links if link in places
    ]
    return [(asin, title, float(re.sub(r"[^\d.]", "", price.split(" to ")[0]) or 0)) for asin, title, price in results]


def oracle_action(shop: "Shop", catalogue: "Catalogue") -> str:
    """The oracle's action on this page. It knows the goal's product."""
    page, asin = shop.page, shop.goal.asin.lower()
    product = catalogue.find(shop.goal.asin)
    assert product is not None
    if "search" in page.clickable:
        return f"search[{product.title}]"
    if shop.product is not None:
        if shop.product.asin.lower() != asin or "buy now" not in page.clickable:
            return "click[< prev]"
        values = shop.goal.options.values() if isinstance(shop.goal.options, dict) else shop.goal.options
        missing = [value for value in values if value in page.clickable and value not in shop.options.values()]
        return f"click[{missing[0]}]" if missing else "click[buy now]"
    return f"click[{asin}]" if asin in page.clickable else "click[next >]"
