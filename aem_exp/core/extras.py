"""The pip command that installs an optional dependency, for the way in which this package itself was installed."""

import json
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlparse

PACKAGE = "aem-exp"


def install_command(extra: str) -> str:
    """The command that adds an extra: to a checkout where the package comes from one, else to the package of the index."""
    try:
        told = distribution(PACKAGE).read_text("direct_url.json")
    except PackageNotFoundError:
        told = None
    origin = json.loads(told) if told else {}
    if "dir_info" not in origin:  # from an index, or a file
        return f"pip install '{PACKAGE}[{extra}]'"
    place = Path(unquote(urlparse(origin["url"]).path))
    where = "." if place == Path.cwd() else str(place)
    return f"pip install {'-e ' if origin['dir_info'].get('editable') else ''}'{where}[{extra}]'"
