"""What several test files share: paths, runs, worlds, servers, and a SLURM cluster."""

from pathlib import Path

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
