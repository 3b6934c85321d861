"""Generates a product catalogue in WebShop's official format from a number of products and a seed."""

import hashlib
import json
from pathlib import Path
from random import Random
from typing import Any, Final

from aem_exp.core import disk

RULES_VERSION: Final = 1  # raise when the same number and seed would give another catalogue
MIN_PRODUCTS, MAX_PRODUCTS = 100, 2_000_000
BRANDS: Final = (
    "Alder Birch Cedar Dune Ember Fjord Grove Haven Iris Juniper Kestrel Lumen Maple Nimbus Onyx Pine".split()
)
COLOURS: Final = "black white red blue green grey".split()
SIZES: Final = "small medium large x-large".split()
KINDS: Final[
    dict[str, tuple[str, str, str, dict[str, list[str]]]]
] = {  # thing -> category, its levels, attributes, options
    "running shoes": (
        "fashion",
        "Shoes/Athletic",
        "rubber sole, lace up, memory foam",
        {"color": COLOURS, "size": ["7", "8", "9"]},
    ),
    "rain jacket": (
        "fashion",
        "Clothing/Outerwear",
        "machine wash, long sleeve, loose fit",
        {"color": COLOURS, "size": SIZES},
    ),
    "cotton shirt": (
        "fashion",
        "Clothing/Shirts",
        "short sleeve, machine wash, slim fit",
        {"color": COLOURS, "size": SIZES},
    ),
    "desk lamp": ("garden", "Lighting/Lamps", "easy assemble, long lasting, usb port", {"color": COLOURS}),
    "bath towel": ("garden", "Home/Bath", "machine wash, quick drying, super soft", {"color": COLOURS}),
    "floor rug": (
        "garden",
        "Home/Rugs",
        "non slip, easy clean, super soft",
        {"color": COLOURS, "size": ["2x3", "4x6", "6x9"]},
    ),
    "phone case": ("electronics", "Phones/Cases", "wireless charging, easy install, non slip", {"color": COLOURS}),
    "wireless headphones": (
        "electronics",
        "Audio/Headphones",
        "noise cancelling, long lasting, usb port",
        {"color": COLOURS},
    ),
    "power cable": (
        "electronics",
        "Computers/Cables",
        "high speed, gold plated, heavy duty",
        {"length": ["3 ft", "6 ft", "10 ft"]},
    ),
    "face cream": (
        "beauty",
        "Skin Care/Creams",
        "cruelty free, fragrance free, dry skin",
        {"size": ["30 ml", "50 ml"]},
    ),
    "hair shampoo": (
        "beauty",
        "Hair Care/Shampoo",
        "sulfate free, cruelty free, coconut oil",
        {"scent": ["lemon", "rose", "mint"]},
    ),
    "green tea": (
        "grocery",
        "Beverages/Tea",
        "caffeine free, usda organic, gift basket",
        {"size": ["20 bags", "50 bags"]},
    ),
    "trail mix": (
        "grocery",
        "Snacks/Nuts",
        "gluten free, low sodium, resealable bag",
        {"flavor": ["salted", "honey", "spicy"]},
    ),
}
ADJECTIVES: Final = "classic modern premium everyday compact family travel".split()


def generate_catalogue(products: int, seed: int) -> Path:
    """The folder of a catalogue. It is generated if the cache does not have it."""
    folder = (
        disk.cache_dir()
        / f"shop-{hashlib.sha256(json.dumps([RULES_VERSION, products, seed]).encode()).hexdigest()[:12]}"
    )
    with disk.create_folder_once(folder) as empty:
        if empty:
            _write(empty, products, seed)
    return folder


def _write(folder: Path, products: int, seed: int) -> None:
    """Write the two files one product at a time, because a million products need much memory."""
    random, used = Random(f"{RULES_VERSION} {seed}"), set[str]()
    with (
        (folder / "items_shuffle_1000.json").open("w") as items,
        (folder / "items_ins_v2_1000.json").open("w") as attributes,
    ):
        for number in range(products):
            product, entry = _generate_product(random, used)
            items.write(("[" if number == 0 else ",\n") + json.dumps(product))
            attributes.write(("{" if number == 0 else ",\n") + f"{json.dumps(product['asin'])}: {json.dumps(entry)}")
        items.write("]")
        attributes.write("}")


def _generate_product(random: Random, used: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    thing = random.choice(list(KINDS))
    category, path, attributes, choices = KINDS[thing]
    chosen_attributes = random.sample(attributes.split(", "), 2)
    brand, adjective = random.choice(BRANDS), random.choice(ADJECTIVES)
    asin = _generate_asin(random, used)
    title = (
        f"{brand} {adjective} {thing}, {chosen_attributes[0]}, {chosen_attributes[1]}"
        if random.random() < 0.8
        else f"{brand} {thing} {chosen_attributes[0]}"
    )
    options = {
        name: [
            {"value": value, "image": None} for value in sorted(random.sample(values, random.randint(2, len(values))))
        ]
        for name, values in choices.items()
    }
    low = random.randint(5, 90) + random.choice((0.0, 0.5, 0.99))
    pricing = f"${low:.2f}" if random.random() < 0.8 else f"${low:.2f} to ${low + random.randint(2, 20):.2f}"
    product = {
        "asin": asin,
        "name": title,
        "full_description": f"This {adjective} {thing} by {brand} is {chosen_attributes[0]} and {chosen_attributes[1]}.",
        "small_description": [f"{chosen_attributes[0]} {thing}", f"made by {brand}", f"for {adjective} use"],
        "pricing": pricing,
        "customization_options": options,
        "category": category,
        "query": thing,
        "product_category": " \u203a ".join([*path.split("/"), thing.title()]),
        "images": ["none"],
    }
    entry = {
        "attributes": chosen_attributes,
        "instruction": f"Find me {chosen_attributes[0]}, {chosen_attributes[1]} {thing}",
        "instruction_attributes": chosen_attributes,
    }
    return product, entry


def _generate_asin(random: Random, used: set[str]) -> str:
    while True:
        asin = "B0" + "".join(random.choices("0123456789ABCDEFGHJKLMNPQRSTVWXYZ", k=8))
        if asin not in used:
            used.add(asin)
            return asin
