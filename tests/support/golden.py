"""Recorded texts that tests compare with, and the command that records them again (see `tests/test_identity.py`)."""

import os

from support import TESTS

GOLDEN = TESTS / "golden"


RECORD = os.environ.get("AEM_RECORD") == "1"


def check_golden(name, text):
    """Compare a text with its recorded version; `AEM_RECORD=1` records it."""
    if RECORD:
        (GOLDEN / name).parent.mkdir(parents=True, exist_ok=True)
        (GOLDEN / name).write_text(text)
    assert text == (GOLDEN / name).read_text()
