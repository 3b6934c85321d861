"""Recorded (golden) texts of the tests; `tests/test_identity.py` has the command that records them again."""

import os

from support import TESTS

GOLDEN = TESTS / "golden"


RECORD = os.environ.get("AEM_RECORD") == "1"


def check_golden(name, text):
    """Compare a text with its golden file; with `AEM_RECORD=1`, write the file first."""
    if RECORD:
        (GOLDEN / name).parent.mkdir(parents=True, exist_ok=True)
        (GOLDEN / name).write_text(text)
    assert text == (GOLDEN / name).read_text()
