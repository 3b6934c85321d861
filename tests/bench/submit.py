"""How long 100 cells take from the command to the queue, against Hydra's own submitit launcher, on a real SLURM here.

Both are given the same config groups and the same grid. The launcher then stays until the last job has ended; ours returns.

.venv/bin/pip install --no-deps hydra-submitit-launcher
.venv/bin/python tests/bench/submit.py
"""

import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from support.slurm_cluster import Cluster, missing  # noqa: E402

GRID = ["modulation=none,aem,token,linear", "seed=range(25)"]
CELLS = 100
APP = """
import hydra

@hydra.main(config_path="{conf}", config_name="config", version_base=None)
def main(config):
    raise SystemExit("a job of the bench began")

main()
"""


def queued(cluster: Cluster) -> int:
    return len(cluster.run("squeue", "--array", "--noheader").splitlines())


def measure(cluster: Cluster, command: list[str], env: dict[str, str], folder: Path) -> tuple[float, float]:
    """Seconds until all cells are in the queue, and until the command returns (inf: it was still there)."""
    begin = time.perf_counter()
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
    while queued(cluster) < CELLS:
        if process.poll() or time.perf_counter() - begin > 120:
            sys.exit(f"the cells did not come into the queue: {(folder / 'log').read_text()[-2000:]}")
        time.sleep(0.05)
    there = time.perf_counter() - begin
    try:
        process.wait(timeout=20)
        back = time.perf_counter() - begin
    except subprocess.TimeoutExpired:
        back = float("inf")
        process.kill()
    cluster.run("scancel", "--me")
    while queued(cluster):
        time.sleep(0.2)
    return there, back


def main(rounds: int = 3) -> None:
    if why := missing():
        sys.exit(why)
    if find_spec("hydra_plugins.hydra_submitit_launcher") is None:
        sys.exit("pip install --no-deps hydra-submitit-launcher: what this is measured against")
    with tempfile.TemporaryDirectory() as place:
        cluster = Cluster.start(Path(place) / "c")
        try:
            cluster.scontrol("update", "nodename=ALL", "state=drain", "reason=bench")  # jobs wait: it is the way there
            times: dict[str, list[tuple[float, float]]] = {"aem_exp": [], "launcher": []}
            for number in range(rounds):
                for name, told in times.items():
                    folder = Path(place) / f"{name}{number}"
                    folder.mkdir()
                    (folder / "site.yaml").write_text("{}")
                    (folder / "app.py").write_text(APP.format(conf=ROOT / "conf"))
                    env = cluster.env | {"AEM_OUTPUTS": str(folder / "out"), "AEM_SITE": str(folder)}
                    ours = ["-m", "aem_exp", "-m", *GRID, "launch=slurm_cpu", "--submit"]
                    theirs = ["app.py", "-m", *GRID, "hydra/launcher=submitit_slurm"]
                    command = [sys.executable, *(ours if name == "aem_exp" else theirs)]
                    told.append(measure(cluster, command, env, folder))
        finally:
            cluster.stop()
    (one, back), (other, never) = (
        [statistics.median(column) for column in zip(*told, strict=True)] for told in times.values()
    )
    print(f"{CELLS} cells              in the queue     prompt is back")
    print(f"aem_exp               {one:8.2f} s      {back:8.2f} s")
    print(f"submitit launcher     {other:8.2f} s      {never:8.2f} s   (inf: it stays until its last job has ended)")
    print(f"ratio               {other / one:.1f} x")


if __name__ == "__main__":
    main()
