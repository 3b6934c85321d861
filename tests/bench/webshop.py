"""WebShop: steps a second on a thousand products; with --products 1180000 also the full size: build, memory, search.

.venv/bin/python tests/bench/webshop.py
.venv/bin/python tests/bench/webshop.py --products 1180000
"""

import argparse
import resource
import time
from pathlib import Path
from random import Random

import numpy as np

from aem_exp.envs.webshop import generated
from aem_exp.envs.webshop.catalogue import Catalogue
from aem_exp.envs.webshop.world import Generated, _load_catalogue


def steps(seconds: float = 4.0) -> float:
    """Steps a second of a shopper who searches, looks around and buys at random."""
    world, random = Generated(products=1000, tags=False), Random(0)
    env, tasks, count, start = world.env(), world.tasks("train"), 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        turn = env.reset(task := tasks[random.randrange(len(tasks))])
        for _ in range(15):
            query = f"search[{' '.join(random.choices(task.payload['text'].split(), k=4))}]"
            turn = env.step(query if len(turn.actions) <= 2 else random.choice(turn.actions))
            count += 1
            if turn.done:
                break
    return count / (time.perf_counter() - start)


def memory() -> str:
    _, resident, shared, *_ = (
        int(n) * resource.getpagesize() / 1e9 for n in Path("/proc/self/statm").read_text().split()
    )
    return f"{resident - shared:.2f} GB of its own, {shared:.2f} GB mapped"


def searches(catalogue: Catalogue, count: int = 300) -> None:
    random = Random(1)
    queries = []
    for _ in range(count):
        words = catalogue.product(random.randrange(len(catalogue))).title.replace(",", "").split()
        queries.append(" ".join(random.sample(words, min(len(words), random.randint(2, 8)))))
    for query in queries[:20]:
        catalogue.search(query, 50)
    taken = []
    for query in queries:
        start = time.perf_counter()
        catalogue.search(query, 50)
        taken.append(1000 * (time.perf_counter() - start))
    print(
        f"search  p50 {np.percentile(taken, 50):.1f} ms, p95 {np.percentile(taken, 95):.1f} ms, of {len(catalogue):,} products"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--products", type=int, default=1000)
    asked = parser.parse_args()
    if asked.products == 1000:
        print(f"steps   {steps():,.0f} a second")
        searches(Generated(products=1000).catalogue)
        return
    start = time.perf_counter()
    folder = generated.generate_catalogue(asked.products, 0)
    print(f"made    {asked.products:,} products in {time.perf_counter() - start:.0f} s", flush=True)
    start = time.perf_counter()
    files = folder / "items_shuffle_1000.json", folder / "items_ins_v2_1000.json", None
    catalogue = _load_catalogue(files)
    print(
        f"built   in {time.perf_counter() - start:.0f} s; peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.1f} GB"
    )
    print(f"memory  {memory()}")
    searches(catalogue)
    print(f"memory  {memory()} after searching")


if __name__ == "__main__":
    main()
