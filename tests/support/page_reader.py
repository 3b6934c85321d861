"""Follows a page of the documentation: writes its files and runs its commands."""

import os
import subprocess
import sys
from pathlib import Path

from support import ROOT
from support.markdown import read_blocks

DEADLINE = 3600  # seconds for all commands of a page


def write_files(page: str, folder: Path) -> None:
    """Write every file that `docs/PAGE` shows."""
    for block in read_blocks(ROOT / "docs" / page):
        if block.file:
            (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.file).write_text(block.text)


def make_script(page: str, outputs: Path) -> str:
    """A bash script that writes the files and runs the commands of `docs/PAGE` in order. It stops at the first error.

    The output of the Nth block of commands (from 0) goes to `outputs/N.txt`.
    """
    lines, commands = ["set -euo pipefail"], 0
    for block in read_blocks(ROOT / "docs" / page):
        if block.file:
            parent = Path(block.file).parent
            lines += [f"mkdir -p '{parent}'", f"cat > '{block.file}' <<'END_OF_FILE'", block.text + "END_OF_FILE"]
        elif block.language == "bash":
            lines += [f"exec > '{outputs}/{commands}.txt'", block.text]
            commands += 1
    return "\n".join(lines)


def follow(page: str, folder: Path, outputs: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `make_script` in `folder`, with this Python as `python`; `variables` are environment variables."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "COLUMNS": "120", **variables, "PATH": path}
    environment.pop("AEM_OUTPUTS", None)
    command = ["bash", "-c", make_script(page, outputs)]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=DEADLINE, check=False
    )
