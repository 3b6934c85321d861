"""Every link within the repository leads somewhere; links to other hosts are well formed, and nothing is fetched."""

import re
from urllib.parse import unquote, urlsplit

import pytest
from support.markdown import PAGES, anchors, links, name_of


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    wrong = []
    for link in links(page):
        parts = urlsplit(link)
        if parts.scheme == "mailto":
            continue
        if parts.scheme:
            if parts.scheme != "https" or not re.fullmatch(r"[\w-]+(\.[\w-]+)+", parts.netloc):
                wrong.append(link)
            continue
        target = page.parent / unquote(parts.path) if parts.path else page
        if not target.exists() or (parts.fragment and target.suffix == ".md" and parts.fragment not in anchors(target)):
            wrong.append(link)
    assert wrong == []
