"""Finds the official files and says how to download them; checks that the original's tagger is installed."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from aem_exp.core import disk
from aem_exp.core.errors import MissingResource
from aem_exp.core.extras import install_command

CATALOGUE_FILES: Final = {
    "small": ("items_shuffle_1000.json", "items_ins_v2_1000.json"),
    "full": ("items_shuffle.json", "items_ins_v2.json"),
}
HUMAN_GOALS_FILE: Final = "items_human_ins.json"
DRIVE_IDS: Final = {  # Google Drive ids, from the original's setup.sh
    "items_shuffle_1000.json": "1EgHdxQ_YxqIQlvvq5iKlCrkEKR6-j0Ib",
    "items_ins_v2_1000.json": "1IduG0xl544V_A_jv3tHXC0kyFi7PnyBu",
    "items_shuffle.json": "1A2whVgOO0euk5O13n2iYDM0bQRkkRduB",
    "items_ins_v2.json": "1s2j6NgHljiZzQNL3veZaAiyW_qDEgBNi",
    "items_human_ins.json": "14Kb5SPBk_jfdLZ_CDBNitW98QLDlKR5O",
}


def check_spacy() -> None:
    """Raise MissingResource if spaCy or its model is missing."""
    if missing := [name for name in ("spacy", "en_core_web_sm") if find_spec(name) is None]:
        remedy = (
            f"needs {' and '.join(missing)}: {install_command('webshop')} && python -m spacy download en_core_web_sm; "
        )
        raise MissingResource(
            "env.make.nouns", "spacy", remedy + "or set env.make.nouns=words: scores are then approximate"
        )


def find_files(data: str | None, catalogue: str, goals: str) -> tuple[Path, Path, Path | None]:
    """The files of the products, the attributes and, for human goals, the instructions that people wrote."""
    configured = data or os.environ.get("WEBSHOP_DATA")
    root = Path(configured or disk.cache_dir() / "webshop").expanduser().absolute()
    names = [*CATALOGUE_FILES[catalogue], *([HUMAN_GOALS_FILE] if goals == "human" else [])]
    if missing := [name for name in names if not (root / name).is_file()]:
        fetch = " && ".join(f"gdown {DRIVE_IDS[name]} -O {root / name}" for name in missing)
        remedy = "" if configured else f"$WEBSHOP_DATA is not set, and {root} "
        remedy += f"has no {', '.join(missing)}; run: pip install gdown && mkdir -p {root} && {fetch}"
        field = "WEBSHOP_DATA" if configured and not data else "env.make.data"
        raise MissingResource(field, str(root) if configured else None, remedy)
    return root / names[0], root / names[1], root / HUMAN_GOALS_FILE if goals == "human" else None
