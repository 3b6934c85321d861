"""Converts WebShop's official files once into a cached folder, which all processes of a machine memory-map.

Prices, options and field names are normalised as in the original. Files are read in pieces, so that a million products need
little memory.
"""

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from decimal import Decimal, InvalidOperation
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, TextIO

import numpy as np

from aem_exp.core import disk
from aem_exp.core.errors import ConfigError
from aem_exp.envs.webshop import search

log = logging.getLogger("aem_exp")
BUILD_VERSION: Final = 1  # raise when the same files would give another catalogue
DEFAULT_PRICE: Final = 100.0  # in dollars, for a product without a price
PIECE: Final = 1 << 20  # characters read at a time
CACHED_PRODUCTS: Final = 4096  # products in the cache of a process
LARGEST: Final = 1 << 26  # longest element of a file, in characters
MAX_GOALS_PER_PRODUCT: Final = 100_000  # each combination of options is a goal


@dataclass(frozen=True)
class Product:
    """One product, as WebShop normalises it."""

    asin: str
    title: str
    description: str
    bullets: list[str]
    price: str
    """The price as pages show it."""
    prices: list[float]
    """One price in dollars, or the two ends of a range."""
    options: dict[str, list[str]]
    attributes: list[str]
    category: str
    query: str
    product_category: str
    asked: list[dict[str, Any]]
    """The instructions of the product's goals (see `goals`)."""


class Catalogue:
    """All products, by their number in the order of the file, and a search over them."""

    def __init__(self, folder: Path):
        summary = json.loads((folder / "about.json").read_text())
        self.fingerprint, self.name = summary["fingerprint"], summary["name"]
        self._rows = np.memmap(folder / "rows.bin", mode="r") if summary["products"] else b""
        self._starts, self._asins, self._by_asin, self.products_with_instructions, self.prices = (
            np.load(folder / f"{name}.npy", mmap_mode="r")
            for name in ("starts", "asins", "by_asin", "instructed", "prices")
        )
        self.index = search.Index(folder)
        self.product = lru_cache(CACHED_PRODUCTS)(self._read_product)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def number(self, asin: str) -> int | None:
        """The number of the product with this asin; None if there is none."""
        position = int(np.searchsorted(self._asins, asin.encode(), sorter=self._by_asin))
        number = int(self._by_asin[position]) if position < len(self) else -1
        return number if number >= 0 and self._asins[number] == asin.encode() else None

    def find(self, asin: str) -> Product | None:
        """The product with this asin; None if there is none."""
        return None if (number := self.number(asin)) is None else self.product(number)

    def search(self, query: str, count: int) -> list[Product]:
        return [self.product(number) for number in self.index.search(query, count)]

    def _read_product(self, number: int) -> Product:
        return Product(**json.loads(bytes(self._rows[self._starts[number] : self._starts[number + 1]])))


def load_catalogue(
    products: Path, attributes: Path, human: Path | None, report_progress: Callable[[int, int], None] = lambda *_: None
) -> Catalogue:
    """The catalogue of the official files. It is built if the cache does not have it.

    Args:
        products: items_shuffle*.json.
        attributes: items_ins_v2*.json.
        human: items_human_ins.json, if the goals are those that people wrote.

    Raises:
        ConfigError: a file is malformed.
    """
    files = [file for file in (products, attributes, human) if file]
    stamp = [[BUILD_VERSION, str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    folder = disk.cache_dir() / f"webshop-{hashlib.sha256(json.dumps(stamp).encode()).hexdigest()[:12]}"
    with disk.create_folder_once(folder) as empty:
        if empty:
            log.info("building the catalogue of %s (once; cached in %s)", products, folder)
            _build(empty, products, attributes, human, report_progress)
    return Catalogue(folder)


def _build(
    folder: Path, products: Path, attributes: Path, human: Path | None, report_progress: Callable[[int, int], None]
) -> None:
    # entries stay JSON text, which needs a tenth of the memory
    entries = {asin: json.dumps(value) for asin, value in _read_elements(attributes, dict)}
    instructions = dict(_read_elements(human, dict)) if human else None
    starts, asins, with_instructions, prices, seen = [0], list[str](), [], [], set[str]()
    with (folder / "rows.bin").open("wb") as rows:
        for number, (_, raw) in enumerate(_read_elements(products, list)):
            product = _parse_product(raw, entries, instructions, f"{products}: product {number}")
            if product is None or product.asin in seen:
                continue
            seen.add(product.asin)
            rows.write(json.dumps(asdict(product)).encode())
            starts.append(rows.tell())
            with_instructions += [len(asins)] if product.asked else []
            prices.append([*product.prices, *([float("nan")] * (2 - len(product.prices)))])
            asins.append(product.asin)
    if not asins:
        raise ConfigError("env.make.data", str(products), "contains no product")
    np.save(folder / "starts.npy", np.array(starts))
    np.save(folder / "asins.npy", names := np.array([asin.encode() for asin in asins]))
    np.save(folder / "by_asin.npy", np.argsort(names, kind="stable"))
    np.save(folder / "instructed.npy", np.array(with_instructions, dtype=np.int64))
    np.save(folder / "prices.npy", np.array(prices, dtype=np.float64))
    search.build_index(folder, _read_search_texts(folder, starts), asins, report_progress)
    digests = [_digest(file) for file in (products, attributes, human) if file]
    summary = {"name": products.name, "products": len(asins), "fingerprint": digests}
    (folder / "about.json").write_text(json.dumps(summary))


def _digest(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _read_search_texts(folder: Path, starts: Sequence[int]) -> Iterator[str]:
    """The searchable text of each product."""
    with (folder / "rows.bin").open("rb") as rows:
        for start, end in pairwise(starts):
            yield search_text(Product(**json.loads(rows.read(end - start))))


def search_text(product: Product) -> str:
    options = ", and ".join(f"{name}: {', '.join(values)}" for name, values in product.options.items())
    first = product.bullets[0] if product.bullets else ""
    return " ".join([product.title, product.description, first, options]).lower()


# One product.


def _parse_product(raw: Any, entries: Mapping[str, str], human: Mapping[str, Any] | None, where: str) -> Product | None:
    """A product of the file; None if the original ignores it."""
    try:
        asin = raw["asin"]
        if asin == "nan" or len(asin) > 10:
            return None
        if asin != asin.upper():
            raise ValueError(f"asin {asin!r} has lower-case letters")
        entry = json.loads(entries.get(asin, "{}"))
        bullets = raw["small_description"]
        prices = _parse_prices(raw.get("pricing"))
        options, instructions = _parse_options(raw["customization_options"]), _parse_instructions(entry, human, asin)
        if human is None and instructions and math.prod(map(len, options.values())) > MAX_GOALS_PER_PRODUCT:
            raise ValueError(f"the combinations of its options give more than {MAX_GOALS_PER_PRODUCT:,} goals")
        asin.encode()  # raises now if there are surrogates
        return Product(
            asin=asin,
            title=_to_text(raw["name"]),
            description=_to_text(raw["full_description"]),
            bullets=[_to_text(one) for one in bullets] if isinstance(bullets, list) else [_to_text(bullets)],
            price=f"${prices[0]}" if len(prices) == 1 else f"${prices[0]} to ${prices[1]}",
            prices=prices,
            options=options,
            attributes=[str(one) for one in entry.get("attributes", ["DUMMY_ATTR"])],
            category=_to_text(raw["category"]),
            query=_to_text(raw["query"]).lower().strip(),
            product_category=_to_text(raw["product_category"]),
            asked=instructions,
        )
    except (KeyError, TypeError, ValueError, AttributeError, InvalidOperation) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(
            "env.make.data", str(Path(where.partition(":")[0]).parent), f"{where} is malformed ({reason})"
        ) from error


def _to_text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


def _require_text(value: Any) -> str:
    """An instruction or an attribute of one.

    Raises:
        TypeError: it is not a text.
    """
    if not isinstance(value, str):
        raise TypeError(f"an instruction or its attribute is {value!r}, not a text")
    return value


def _parse_prices(text: str | None) -> list[float]:
    if not text:
        return [DEFAULT_PRICE]
    return [float(Decimal(re.sub(r"[^\d.]", "", part))) for part in text.split("$")[1:]][:2] or [DEFAULT_PRICE]


def _parse_options(raw: Any) -> dict[str, list[str]]:
    """Option -> its values, normalised as in the original."""
    return {
        name.lower(): [content["value"].strip().replace("/", " | ").lower() for content in contents]
        for name, contents in (raw or {}).items()
        if contents is not None
    }


def _parse_instructions(entry: Mapping[str, Any], human: Mapping[str, Any] | None, asin: str) -> list[dict[str, Any]]:
    """The instructions of a product's goals: those that people wrote, or the synthetic one."""
    if human is None:
        text = entry.get("instruction")
        if text is None:
            return []
        return [
            {
                "text": _require_text(text),
                "attributes": list(map(_require_text, entry["instruction_attributes"])),
                "options": None,
            }
        ]
    written = [one for one in human.get(asin, []) if list(map(_require_text, one["instruction_attributes"]))]
    keys = {"attributes": "instruction_attributes", "options": "instruction_options"}
    return [{"text": one["instruction"].strip(".")} | {name: one[key] for name, key in keys.items()} for one in written]


# Reading JSON piece by piece.


def _read_elements(file: Path, kind: type) -> Iterator[tuple[str, Any]]:
    """The elements (key, value) of a JSON file that contains one list or one object. The key is "" in a list.

    Args:
        kind: `list` or `dict`.

    Raises:
        ConfigError: the file contains something else, or is incomplete.
    """
    try:
        with file.open(encoding="utf-8") as text:
            yield from _parse_elements(text, kind)
    except (OSError, ValueError, RecursionError) as error:
        remedy = f"{file.name} cannot be read ({error}); it may be incomplete: download it again"
        raise ConfigError("env.make.data", str(file.parent), remedy) from error


def _parse_elements(text: TextIO, kind: type) -> Iterator[tuple[str, Any]]:
    stream = _JsonStream(text)
    opening, closing = ("[", "]") if kind is list else ("{", "}")
    stream.skip(" \t\r\n\ufeff")
    if stream.peek() != opening:
        raise ValueError(f"it does not begin with {opening}")
    stream.position += 1
    stream.skip(" \t\r\n")
    while stream.peek() not in ("", closing):
        key = ""
        if kind is dict:
            key = stream.read_value()
            if not isinstance(key, str):
                raise ValueError(f"{key!r} is not a key")
            stream.skip(" \t\r\n:")
        yield key, stream.read_value()
        stream.skip(" \t\r\n,")
    if not stream.peek():
        raise ValueError(f"it does not end with {closing}")


class _JsonStream:
    """A JSON text that is read piece by piece; only the current piece is in memory."""

    def __init__(self, text: TextIO):
        self._text, self._decoder = text, json.JSONDecoder()
        self._buffer, self.position, self._has_more = "", 0, True

    def peek(self) -> str:
        """The current character; "" at the end of the text that was read."""
        return self._buffer[self.position : self.position + 1]

    def skip(self, characters: str) -> None:
        """Move to the next character that is not one of these. Reads further pieces if necessary."""
        while True:
            while self.position < len(self._buffer) and self._buffer[self.position] in characters:
                self.position += 1
            if self.position < len(self._buffer) or not self._has_more:
                return
            self._buffer, self.position = self._text.read(PIECE), 0
            self._has_more = bool(self._buffer)

    def read_value(self) -> Any:
        """Decode the value at the current position and move behind it."""
        while True:
            with suppress(ValueError):
                value, end = self._decoder.raw_decode(self._buffer, self.position)
                if end < len(self._buffer) or not self._has_more:  # a number may continue in the next piece
                    self.position = end
                    return value
            if len(self._buffer) - self.position > LARGEST:
                raise ValueError(f"an element has more than {LARGEST:,} characters")
            # double the buffer each time: an incomplete value is decoded again from its start
            piece = self._text.read(max(PIECE, len(self._buffer) - self.position))
            if not piece:
                self._has_more = False
                value, self.position = self._decoder.raw_decode(self._buffer, self.position)
                return value
            self._buffer, self.position = self._buffer[self.position :] + piece, 0
