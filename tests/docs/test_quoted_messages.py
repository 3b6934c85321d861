"""Every message that docs/troubleshooting.md quotes is one that the code prints."""

import ast
import re

from support import ROOT

PLACEHOLDER = "…"
NOT_OURS = {"pip install", "en_core_web_sm", "tracking=", "RUNNING"}  # what first columns quote besides messages


def test_every_quoted_message_is_in_the_code() -> None:
    printed = " ".join(_texts_of_the_code())
    absent = [quoted for quoted in _quoted_messages() if not all(part in printed for part in _fixed_parts(quoted))]
    assert not absent, f"troubleshooting.md quotes messages that the code no longer prints: {absent}"


def _quoted_messages() -> list[str]:
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    first_cells = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| ")]
    messages = [quoted for cell in first_cells for quoted in re.findall(r"`([^`]+)`", cell) if quoted not in NOT_OURS]
    assert len(messages) > 50
    return messages


def _fixed_parts(message: str) -> list[str]:
    """The parts of a message between placeholders."""
    return [part for part in re.split(rf"{PLACEHOLDER}|\bN\b", message) if len(part.strip()) > 3]


def _texts_of_the_code() -> list[str]:
    """Every string of the package; the replacement fields of format strings become placeholders."""
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in sorted((ROOT / "aem_exp").rglob("*.py"))]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    plain = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    formatted = [
        "".join(part.value if isinstance(part, ast.Constant) else PLACEHOLDER for part in node.values)
        for node in nodes
        if isinstance(node, ast.JoinedStr)
    ]
    return plain + formatted
