"""How long a user waits for `--help` and `--cfg job`, against `python -c "import hydra"`. Medians of interleaved runs.

.venv/bin/python tests/bench/startup.py
"""

import statistics
import subprocess
import sys
import time

BASE = [sys.executable, "-c", "import hydra"]
DOORS = {
    "--help": [sys.executable, "-m", "aem_exp", "--help"],
    "--cfg job": [sys.executable, "-m", "aem_exp", "--cfg", "job"],
    "+experiment=alfworld_1_5b --cfg job": [
        sys.executable,
        "-m",
        "aem_exp",
        "+experiment=alfworld_1_5b",
        "--cfg",
        "job",
    ],
}


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def main(rounds: int = 7) -> None:
    for command in (BASE, *DOORS.values()):
        seconds(command)  # warm the disk cache
    times = {name: [] for name in ("import hydra", *DOORS)}
    for _ in range(rounds):
        times["import hydra"].append(seconds(BASE))
        for name, command in DOORS.items():
            times[name].append(seconds(command))
    base = statistics.median(times["import hydra"])
    for name, values in times.items():
        print(f"{name:<40} {statistics.median(values):6.2f} s   {statistics.median(values) / base:5.2f} x import hydra")


if __name__ == "__main__":
    main()
