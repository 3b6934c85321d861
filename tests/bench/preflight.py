"""What `plan=true` says of memory against what training holds, for small models.

    python tests/bench/preflight.py

On a CPU, all tensors that torch is asked for are counted; on a GPU, where there is one, its allocator's peak is read. The
last lines are two processes with the weights in pieces (FSDP2 over gloo), phase by phase.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))

import conftest  # noqa: E402, F401  (environment first)
import torch  # noqa: E402
from support import peak_memory, peak_memory_fsdp  # noqa: E402


def show(name: str, held: float, said: float) -> None:
    print(f"{name:<50}{held / 1e6:>10.1f} MB{said / 1e6:>10.1f} MB{said / held - 1:>+9.1%}", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'setting':<50}{'held':>13}{'said':>13}")
    for cuda in (False, True)[: 1 + torch.cuda.is_available()]:
        for setting in peak_memory.SETTINGS:
            with tempfile.TemporaryDirectory() as folder:
                held, need = peak_memory.measure_peak(replace(setting, cuda=cuda), Path(folder))
            show(f"{setting.name}{', GPU' if cuda else ''}", held, need.total)
    for number in range(len(peak_memory_fsdp.SETTINGS)):
        run = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
        done = subprocess.run(
            [*run, "-m", "support.peak_memory_fsdp", str(number)], check=True, capture_output=True, text=True, cwd=HERE
        )
        for line in done.stdout.splitlines():
            if line.startswith("{"):
                row = json.loads(line)
                show(f"in two pieces, {row['setting']}: {row['phase']}", row["held"], row["said"])


if __name__ == "__main__":
    main()
