"""The documentation site builds without a warning, and its generated pages are current."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support import ROOT
from support.markdown import code_spans


def entries(nav):
    """The pages of a navigation tree, in order."""
    for item in nav:
        value = next(iter(item.values())) if isinstance(item, dict) else item
        yield from entries(value) if isinstance(value, list) else [value]


@pytest.mark.slow
def test_every_page_is_in_the_navigation_and_in_the_site(site):
    pages = list(entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert sorted(pages) == sorted(str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md"))
    for page in pages:
        path = Path(page)
        built = path.parent / "index.html" if path.stem == "index" else path.with_suffix("") / "index.html"
        assert (site / built).is_file(), page


@pytest.mark.slow
def test_the_generated_pages_are_current(tmp_path):
    subprocess.run([sys.executable, "-B", "docs/generate", str(tmp_path)], cwd=ROOT, check=True)
    for page in sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.md")):
        # word by word: versions of Python break the lines of a help page at different places
        stale = (ROOT / "docs" / page).read_text().split() != (tmp_path / page).read_text().split()
        assert not stale, f"docs/{page} is not current: run `python docs/generate`, and commit what it writes"


def test_every_variable_that_is_read_is_documented():
    code = "\n".join(path.read_text() for path in (ROOT / "aem_exp").rglob("*.py"))
    names = set(re.findall(r"environ(?:\.get\(|\[)\"((?:AEM|\w+_DATA|MLFLOW)\w*)\"", code))
    page = (ROOT / "docs/configuration.md").read_text()
    assert [name for name in sorted(names) if f"| `{name}` |" not in page] == []


def test_the_architecture_page_names_what_there_is():
    page = ROOT / "docs/architecture.md"
    spans = code_spans(page)
    packages = {path.stem for path in (ROOT / "aem_exp").iterdir() if path.is_dir() or path.suffix == ".py"}
    assert packages - {"__init__", "__pycache__", "py", "_bundled"} - set(spans) == set()
    files = [span for span in spans if re.fullmatch(r"[\w/]+/[\w.]*", span) or re.fullmatch(r"\S+\.py", span)]
    missing = [file for file in files if not ((ROOT / file).exists() or (ROOT / "aem_exp" / file).exists())]
    assert len(files) > 30 and set(missing) <= {"__init__.py"}
