"""How long 300 cells of 20 distinct choices of groups take to resolve, against one `config.load` per cell.

.venv/bin/python tests/bench/plan.py
"""

import statistics
import time

from aem_exp import config
from aem_exp.sweep import question

GRID = [
    "modulation=aem,none,token,linear,shuffled",
    "baseline=grpo,rloo,dapo,gigpo",
    "trainer.learning_rate=1e-4,3e-4,5e-4",
    "seed=range(5)",
    "trainer.steps=40",
]
ALONE = 20  # cells that are loaded alone; 300 would take a minute


def seconds(act) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def main(rounds: int = 5) -> None:
    cells = question.parse_grid(GRID).cells  # warms caches
    some = cells[:: len(cells) // ALONE]
    together, alone = [], []
    for _ in range(rounds):
        together.append(seconds(lambda: question.parse_grid(GRID)))
        alone.append(seconds(lambda: [config.load(list(cell.overrides)) for cell in some]) / len(some) * len(cells))
    one, other = statistics.median(together), statistics.median(alone)
    print(f"{len(cells)} cells together {one:6.2f} s   (best {min(together):.2f})")
    print(f"{len(cells)} cells alone    {other:6.2f} s   from {len(some)} of them")
    print(f"ratio                {other / one:6.1f} x")


if __name__ == "__main__":
    main()
