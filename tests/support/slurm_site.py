"""A user of a SLURM cluster: a folder with their module, the outputs, and the site settings."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from aem_exp.cluster import run_state
from support import TESTS
from support.runs import SMALL_RUN

SLOW_RUN = [*SMALL_RUN, "launch=slurm_cpu", "launch.save_every=2", "tracking=off"]
SLOW_RUN += ["env.make._target_=slow_household.SlowHousehold"]


class SlurmSite:
    """The folder of a user with their module, the outputs, and the site settings."""

    def __init__(self, cluster, cache, folder, **site):
        self.cluster, self.folder, self.outputs = cluster, folder, folder / "out"
        folder.mkdir(exist_ok=True)
        shutil.copy(TESTS / "support" / "slow_household.py", folder)
        (folder / "site").mkdir()
        (folder / "site" / "site.yaml").write_text(json.dumps(site))  # JSON is valid YAML
        self.env = cluster.env | {
            "AEM_CACHE": str(cache),
            "AEM_OUTPUTS": str(self.outputs),
            "AEM_SITE": str(folder / "site"),
            "MASTER_ADDR": "127.0.0.1",  # virtual nodes have no addresses
            "COLUMNS": "160",
        }

    def run_command(self, module, *words, code=0, **env):
        command = [sys.executable, "-m", module, *map(str, words)]
        done = subprocess.run(
            command, cwd=self.folder, env=self.env | env, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stderr

    def submit(self, *words, **env):
        """Submit one run; return its run directory and job id."""
        out = self.run_command("aem_exp", *SLOW_RUN, *words, **env)
        lines = dict(line.split(maxsplit=1) for line in out.splitlines() if " " in line)
        return Path(lines["run"]), lines["job"]

    def here(self, *words):
        """Run the same experiment on this machine without interruption; return its run directory."""
        out = self.run_command("aem_exp", *SLOW_RUN, *words, "launch=local", f"outputs={self.folder / 'here'}")
        return Path(out.splitlines()[0].split()[1])

    def states(self, *folders):
        before = dict(os.environ)
        os.environ.update(self.env)
        try:
            return [run_state.read(folders)[folder] for folder in folders]
        finally:
            os.environ.clear()
            os.environ.update(before)
