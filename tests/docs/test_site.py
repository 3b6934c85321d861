"""The documentation site builds without a warning, and the build changes no source."""

from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]


def entries(nav):
    """The pages of a navigation tree, in order."""
    for item in nav:
        value = next(iter(item.values())) if isinstance(item, dict) else item
        yield from entries(value) if isinstance(value, list) else [value]


def test_every_page_is_in_the_navigation_and_in_the_site(site):
    pages = list(entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(pages) == sorted(str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md"))
    for page in pages:
        path = Path(page)
        built = path.parent / "index.html" if path.stem == "index" else path.with_suffix("") / "index.html"
        assert (site / built).is_file(), page


def test_the_build_writes_nothing_into_the_sources(site):
    assert not (ROOT / "site").exists()
