"""The vocabulary of a small policy for a generated shop."""

import re
from typing import Final

from aem_exp.core.errors import ConfigError
from aem_exp.envs.webshop.catalogue import Catalogue

MAX_PRODUCTS: Final = 5000  # largest shop for this vocabulary: every asin and price is a token
_BUTTONS: Final = ("buy now", "next >", "< prev", "back to search", "description", "features", "reviews", "search")
_PHRASES: Final = (
    *(
        "' [SEP] '",
        "Find me",
        ", and price lower than",
        "dollars",
        "with",
        "and",
        ":",
        ",",
        "'",
        "search",
        "[",
        "]",
        "to",
    ),
    *("Back to Search", "Next >", "< Prev", "Buy Now", "Description", "Features", "Reviews", "Search", "Rating: N.A."),
    "Price:",
)


def words(catalogue: Catalogue) -> tuple[str, ...]:
    """All words of a shop, and texts that may be one token each: fixed phrases, asins, prices and clicks."""
    if len(catalogue) > MAX_PRODUCTS:
        remedy = f"too many products for a small policy: choose at most {MAX_PRODUCTS}"
        raise ConfigError("env.make.products", len(catalogue), remedy)
    products = [catalogue.product(number) for number in range(len(catalogue))]
    asins_and_prices = [text for product in products for text in (product.asin, product.asin.lower(), product.price)]
    values = {value for product in products for values in product.options.values() for value in values}
    clicks = [f"click[{text}]" for text in (*sorted(values), *(p.asin.lower() for p in products), *_BUTTONS)]
    plain = {word for p in products for word in re.findall(r"\w+", f"{p.title} {p.description} {' '.join(p.bullets)}")}
    plain |= {word.lower() for word in plain} | {name for p in products for name in p.options}
    bounds = [f"{10.0 * i:.2f}" for i in range(1, 100)]
    counts = [f"Page {page} (Total results: {results})" for page in range(1, 6) for results in range(51)]
    return (*_PHRASES, *counts, *clicks, *asins_and_prices, *sorted(values), *bounds, *sorted(plain))
