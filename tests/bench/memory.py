"""Peak memory of two steps for 64 and 256 episodes per step, all at once and in portions.

    python tests/bench/memory.py

Each measurement runs in its own process. `device_episodes` limits the episodes that are generated at once, `device_tokens`
the tokens that are trained at once. With both, twice the episodes should need less than twice the memory, apart from the
memory of the libraries.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TASKS = (8, 32)
PORTIONS = ["launch.device_episodes=64", "launch.device_tokens=8192"]
WORDS = "trainer.steps=2 trainer.mini_batch=all evaluation.tasks=8 evaluation.every=0 launch.save_every=0 tracking=off"


def peak_gb(tasks: int, words: list[str]) -> float:
    with tempfile.TemporaryDirectory() as outputs:
        command = [sys.executable, "-m", "aem_exp", *WORDS.split(), f"trainer.tasks_per_step={tasks}", *words]
        env = {**os.environ, "AEM_OUTPUTS": outputs, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=env, check=True, capture_output=True)
        (file,) = Path(outputs).glob("*/metrics.jsonl")
        return json.loads(file.read_text().splitlines()[-1])["memory/peak_gb"]


def main() -> None:
    print(f"{'episodes per step':<18}{'all at once':>14}{'in portions':>14}")
    for tasks in TASKS:
        whole, portions = peak_gb(tasks, []), peak_gb(tasks, PORTIONS)
        print(f"{8 * tasks:<18}{whole:>11.2f} GB{portions:>11.2f} GB   x {whole / portions:.2f}", flush=True)


if __name__ == "__main__":
    main()
