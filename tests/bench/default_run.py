"""The default run with empty caches, for several seeds: success before and after, wall time and peak memory.

    .venv/bin/python tests/bench/default_run.py 0 1 2

The first seed also creates the tiny policy, as the first run of a new user does. Ratios compare with 3 minutes and 1.5 GB.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT_SECONDS, LIMIT_BYTES = 180, 1.5e9


def main(seeds: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "AEM_OUTPUTS": f"{folder}/outputs", "AEM_CACHE": f"{folder}/cache"}
        for seed in seeds:
            start = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "aem_exp", f"seed={seed}"], env=env, check=True, stdout=subprocess.DEVNULL
            )
            seconds = time.perf_counter() - start
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            (result,) = [json.loads(p.read_text()) for p in Path(folder).glob(f"outputs/*-s{seed}-*/result.json")]
            scores = "   ".join(f"{name} {result[name]['success']:.3f}" for name in ("before", "after", "final"))
            print(f"seed {seed}   {scores}   {seconds:5.0f} s ({seconds / LIMIT_SECONDS:.2f} of 3 min)", end="   ")
            print(f"{peak / 1e9:.2f} GB ({peak / LIMIT_BYTES:.2f} of 1.5 GB)", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["0"])
