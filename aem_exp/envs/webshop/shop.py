"""The shop: its pages, their clickable elements, and the purchase. Its texts are those of the original's text mode."""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Final

from aem_exp.envs.webshop.catalogue import Catalogue, Product
from aem_exp.envs.webshop.goals import Goal

MAX_RESULTS, RESULTS_PER_PAGE = 50, 10  # products found by a search, and on one page
SEPARATOR: Final = " [SEP] "
BUY, NEXT, PREVIOUS, BACK = "Buy Now", "Next >", "< Prev", "Back to Search"
SUBPAGES: Final = ("Description", "Features", "Reviews")
_ACTION: Final = re.compile(r"(.+)\[(.+)\]")


class ShopPage:
    """A page: its texts in order, and its clickable elements."""

    def __init__(
        self, texts: Sequence[str], buttons: Sequence[str], links: Sequence[str] = (), options: Sequence[str] = ()
    ):
        self.texts = [visible for text in texts if (visible := visible_text(text)) is not None]
        self.clickable = list(dict.fromkeys([*(text.lower() for text in (*buttons, *links)), *options]))

    @property
    def text(self) -> str:
        """The page as the original's text mode prints it."""
        return SEPARATOR.join(self.texts)


def visible_text(text: str) -> str | None:
    """A text as the original reads it from its HTML; None if it is empty or an empty line."""
    if not text:
        return None
    if not text.strip(" \n\t\f\r"):
        return None if "\n" in text else ""
    return text.strip()


class Shop:
    """The state of one episode: the current page, and the score of the purchase."""

    def __init__(self, products: Catalogue, goal: Goal, prices: Any, score_purchase: Callable[..., float]):
        self.products, self.goal, self._prices, self._score_purchase = products, goal, prices, score_purchase
        self.results: list[Product] = []
        self.visited: list[str] = []  # asins, in lower case
        self.number = 1  # number of the current page of results
        self.product: Product | None = None
        self.options: dict[str, str] = {}
        self.score: float | None = None
        self.page = self._start_page()

    def execute(self, action: str) -> bool:
        """Carry out `search[..]` or `click[..]`. Returns whether the page has this action."""
        match = _ACTION.match(action)
        name, argument = match.groups() if match else (action, "")
        argument = argument.lower()
        if name == "search" and argument:
            self._search(argument)
            return True
        if name == "click" and argument in self.page.clickable:
            if argument != "search":  # this button has no effect without a query
                self._click(argument)
            return True
        return False

    def _click(self, name: str) -> None:
        if name == BUY.lower():
            self._buy()
        elif name == BACK.lower():
            self.results, self.number, self.product, self.options = [], 1, None, {}
            self.page = self._start_page()
        elif name in (NEXT.lower(), PREVIOUS.lower()) and self.product is None:
            self._show_results(self.number + (1 if name == NEXT.lower() else -1))
        elif name == PREVIOUS.lower():
            self._show_item() if self._in_subpage else self._show_results(self.number)
        elif name in (subpage.lower() for subpage in SUBPAGES):
            self._show_subpage(next(subpage for subpage in SUBPAGES if subpage.lower() == name))
        else:
            self._choose(name)

    def _search(self, query: str) -> None:
        self.results = self.products.search(query, MAX_RESULTS)
        self._show_results(1)

    def _show_results(self, number: int) -> None:
        self.number, self.product, self.options = number, None, {}
        results = self.results[(number - 1) * RESULTS_PER_PAGE : number * RESULTS_PER_PAGE]
        buttons = [*([PREVIOUS] if number > 1 else []), NEXT]
        texts = ["Instruction:", self.goal.text, BACK, f"Page {number} (Total results: {len(self.results)})", *buttons]
        for product in results:
            texts += [product.asin, product.title, product.price]
        self.page = ShopPage(texts, [BACK, *buttons], [product.asin for product in results])

    def _choose(self, link: str) -> None:
        """Choose a product of the results, or an option of the current product."""
        if self.product is None:
            self.product = self.products.find(link.upper())
            self.visited.append(link)
        else:
            names = [name for name, values in self.product.options.items() if link in values]
            self.options |= {names[-1]: link}  # the last one, if several options have this value
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
        bullets = [f" {bullet}" for bullet in self.product.bullets]
        content = {"Description": [self.product.description], "Features": bullets}.get(name, [])
        self.page = ShopPage(["Instruction:", self.goal.text, BACK, PREVIOUS, *content], [BACK, PREVIOUS])

    def _buy(self) -> None:
        assert self.product is not None
        wanted = self.products.find(self.goal.asin)
        price = float(self._prices[self.products.number(self.product.asin)])
        self.score = self._score_purchase(self.product, price, list(self.options.values()), self.goal, wanted)
        self.page = _thank_you_page(self.product.asin, self.options, self.score)

    def _start_page(self) -> ShopPage:
        return ShopPage(["WebShop", "Instruction: ", self.goal.text, "Search"], ["Search"])


def _thank_you_page(asin: str, options: dict[str, str], score: float) -> ShopPage:
    """The last page, with the original's hidden fields and misspelling."""
    chosen = json.dumps(options, sort_keys=True)
    for sign in "<>&'":
        chosen = chosen.replace(sign, f"\\u{ord(sign):04x}")
    texts = [
        *(
            "Thank you for shopping with us!",
            "Your code: ",
            "None",
            " (Paste it in your MTurk interface.)",
            "Purchased",
        ),
        *("asin", asin, "options", chosen, "attrs", "None", "category", "None", "query", "None"),
        *("product category", "None"),
        *(
            "Target",
            "asin",
            "options",
            "attrs",
            "price upper",
            "instuction text",
            "category",
            "product category",
            "query",
        ),
        *("Goal ", "None", "Reward", "Your score (min 0.0, max 1.0)", str(score), "Reward Details ", "None"),
    ]
    return ShopPage(texts, [])
