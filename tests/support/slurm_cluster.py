"""A real, temporary SLURM cluster on this machine. All its files are in one folder, and it listens on 127.0.0.1.

It runs Debian's daemons with its own configuration: munge, MariaDB, slurmdbd, slurmctld, and one slurmd per virtual node. Each
daemon has a guard process (this file), which ends with the tests and then kills everything that the daemon started.
"""

import atexit
import ctypes
import os
import random
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path

INSTALL = "apt-get install -y --no-install-recommends"
INSTALL += " slurmctld slurmd slurm-client munge slurmdbd mariadb-server slurm-wlm-basic-plugins"
PROGRAMS = [
    "munged",
    "mariadbd",
    "mariadb-install-db",
    "slurmdbd",
    "slurmctld",
    "slurmd",
    "sbatch",
    "scontrol",
    "sacct",
]
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])
LIVE = {"PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "RESIZING"}

# The database is temporary, so it never needs to be flushed to the disk.
UNSAFE = ["--innodb-flush-method=nosync", "--innodb-flush-log-at-trx-commit=0", "--innodb-doublewrite=0"]
UNSAFE += ["--innodb-log-file-size=8M", "--innodb-file-per-table=0", "--sync-frm=0"]

SLURM = """\
ClusterName=throwaway
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={slurmctld}
{listen}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until its old credential has expired: 6 s, by default 121.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
LogTimeFormat=iso8601_ms
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
JobRequeue=1
KillWait=5
SlurmdTimeout={node_timeout}
# A revived node works again.
ReturnToService=2
# The nodes have more than this machine has.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
# A job that does not say how much memory it needs would get a whole node.
DefMemPerCPU=100
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobAcctGatherType=jobacct_gather/linux
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={slurmdbd}
# sacct and sacctmgr do not read AuthInfo.
AccountingStoragePass={folder}/munge.socket
AccountingStorageTRES=gres/gpu
GresTypes=gpu
{nodes}
PartitionName=gpu Nodes=ALL Default=YES PriorityTier=10 PreemptMode=OFF
PartitionName=preempt Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime={grace}
"""
NODE = "NodeName={name} NodeAddr=127.0.0.1 NodeHostname={host} Port={port} CPUs=32 RealMemory=64000 Gres=gpu:{gpus}"
SLURMDBD = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
DbdHost=localhost
DbdAddr=127.0.0.1
{listen}
DbdPort={slurmdbd}
SlurmUser=root
PidFile={folder}/slurmdbd.pid
LogFile={folder}/log/slurmdbd.log
LogTimeFormat=iso8601_ms
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
"""


def missing() -> str | None:
    """The reason that no cluster can start on this machine, with the remedy, in one sentence; None if it can start."""
    absent = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    if absent:
        return f"no {', '.join(absent)} to make a SLURM cluster of ({INSTALL})"
    if os.geteuid() != 0:
        return "SLURM's daemons need root (run pytest as root)"
    return None


class Cluster:
    """The daemons of a cluster, and operations on it: run commands, wait for jobs, stop a node."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        # The tests may themselves run inside a job of another cluster.
        clean = {key: word for key, word in os.environ.items() if not key.startswith(("SLURM", "SBATCH", "SRUN"))}
        self.env = clean | {"PATH": PATH, "SLURM_CONF": f"{folder}/slurm.conf"}

    @classmethod
    def start(cls, folder: Path, nodes: int = 2, gpus: int = 8, grace: int = 10, node_timeout: int = 10) -> "Cluster":
        """Start a cluster in a new folder; its nodes node0, node1, … have `gpus` pretended GPUs each, or none without mknod.

        A preempted job has `grace` seconds from SIGTERM to SIGKILL. A node that does not answer for `node_timeout` seconds
        is down, and the controller takes some 15 s more to find that out.
        """
        cluster = cls(folder.resolve())
        assert len(str(cluster.folder)) < 80, f"{folder}: too long for the 108 bytes of a socket's path"
        atexit.register(cluster.stop)
        try:
            cluster._start([f"node{number}" for number in range(nodes)], gpus, grace, node_timeout)
        except BaseException:
            cluster.stop()
            raise
        return cluster

    def _start(self, nodes: list[str], gpus: int, grace: int, node_timeout: int) -> None:
        for name in ("log", "dev", "state", "spool", "data", "tmp"):
            (self.folder / name).mkdir(parents=True)
        ports = free_ports(["slurmdbd", "slurmctld", *nodes])
        self._configure(nodes, ports, gpus if devices(self.folder / "dev", gpus) else 0, grace, node_timeout)
        files = [f"--{kind}-file={self.folder}/munge.{kind}" for kind in ("key", "pid", "seed", "log")]
        self._daemon("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *files)
        # A starting MariaDB server deletes files of other servers from a shared /tmp.
        own = [f"--datadir={self.folder}/data", f"--tmpdir={self.folder}/tmp"]
        tables = ["--no-defaults", "--user=root", *own, *UNSAFE]
        install = ["mariadb-install-db", *tables, "--auth-root-authentication-method=normal", "--skip-test-db"]
        with (self.folder / "log" / "mariadb-install-db").open("w") as log:
            subprocess.run(install, env=self.env, stdout=log, stderr=log, check=True, timeout=600)
        database = self.folder / "mariadb.socket"
        self._daemon("mariadbd", *tables, "--skip-networking", f"--socket={database}", f"--pid-file={database}.pid")
        self._until(database.exists)
        self._daemon("slurmdbd", "-D", MYSQL_UNIX_PORT=str(database))
        self._until(lambda: not free(ports["slurmdbd"]))
        self._daemon("slurmctld", "-D")
        self._until(lambda: not free(ports["slurmctld"]))  # a slurmd that gets no answer waits for a second
        for name in nodes:
            self._daemon("slurmd", "-D", "-N", name, name=name)
        self._until(lambda: self.node_states() == dict.fromkeys(nodes, "idle"))

    def _configure(self, nodes: list[str], ports: dict[str, int], gpus: int, grace: int, node_timeout: int) -> None:
        listen = "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny" if own_name_is_local() else ""
        values = {"folder": self.folder, "host": socket.gethostname().split(".")[0], "listen": listen, **ports}
        lines = "\n".join(NODE.format(**values, name=name, port=ports[name], gpus=gpus) for name in nodes)
        self._write("slurm.conf", SLURM.format(**values, nodes=lines, grace=grace, node_timeout=node_timeout))
        self._write("slurmdbd.conf", SLURMDBD.format(**values))
        self._write("gres.conf", f"Name=gpu File={self.folder}/dev/nvidia[0-{gpus - 1}]\n" if gpus else "")
        self._write("munge.key", secrets.token_hex(64))

    def _write(self, name: str, text: str) -> None:
        """Write a file with mode 0600, as munge and slurmdbd require."""
        (self.folder / name).touch(0o600)
        (self.folder / name).write_text(text)

    def _daemon(self, program: str, *words: str, name: str = "", **extra: str) -> None:
        guard = [sys.executable, "-I", "-S", __file__, str(os.getpid()), program, *words]
        with (self.folder / "log" / (name or program)).open("a") as log:
            self.daemons[name or program] = subprocess.Popen(
                guard, env=self.env | extra, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def _until(self, done: Callable[[], bool], seconds: float = 600) -> None:
        """Wait for a condition. Raise an error with the path of the logs if a daemon ends or the wait takes too long."""
        end = time.monotonic() + seconds
        while not done():
            ended = [name for name, process in self.daemons.items() if process.poll() is not None]
            assert not ended, f"{', '.join(ended)} has ended: see {self.folder}/log"
            assert time.monotonic() < end, f"the cluster does not get ready: see {self.folder}/log"
            time.sleep(0.05)

    def stop(self) -> None:
        """Kill all daemons and everything that they started."""
        for process in self.daemons.values():
            process.terminate()
        for process in self.daemons.values():
            process.wait(120)

    def run(self, *words: str) -> str:
        """Run a SLURM command and return its output."""
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr or done.stdout}"
        return done.stdout

    def scontrol(self, *words: str) -> str:
        return self.run("scontrol", *words)

    def sbatch(self, *words: str) -> str:
        """Submit a job and return its id."""
        return self.run("sbatch", "--parsable", *words).strip()

    def squeue(self, job: str = "") -> dict[str, str]:
        """The state of each job, or of each task of a job, from the controller, which forgets a job 5 minutes after its end."""
        # squeue --jobs fails for a job that the controller has forgotten.
        return _states(self.run("squeue", "--noheader", "--array", "--states=all", "--format=%i|%T"), job)

    def sacct(self, job: str = "") -> dict[str, str]:
        """The state of each job, or of each task of a job, from the database, which is up to 5 seconds behind."""
        chosen = f"--jobs={job}" if job else "--starttime=2000-01-01"  # the default is midnight
        return _states(self.run("sacct", "-nPXa", "--format=JobID,State", chosen), job)

    def history(self, job: str) -> list[str]:
        """The end state of each earlier start of a job, and its current state."""
        lines = self.run("sacct", "-nPXaD", "--format=State", f"--jobs={job}").splitlines()
        return [line.split()[0] for line in lines]

    def wait(self, job: str, states: Collection[str], seconds: float = 600, accounted: bool = True) -> dict[str, str]:
        """Wait until a job, or each of its tasks, is in one of `states`; with `accounted`, until sacct reports the end."""
        end = time.monotonic() + seconds
        while True:
            seen = self.squeue(job) or self.sacct(job)
            known = seen if not accounted or LIVE.intersection(seen.values()) else self.sacct(job)
            if seen and seen == known and set(seen.values()) <= set(states):
                return seen
            late = f"job {job} is {seen}, for sacct {known}, not {states} in {seconds} s: see {self.folder}/log"
            assert time.monotonic() < end, late
            time.sleep(0.1)

    def node_states(self) -> dict[str, str]:
        """The state of each node, such as idle, mixed, down or idle* (no answer); empty before the controller answers."""
        words = ["sinfo", "--noheader", "--Node", "--partition=gpu", "--format=%N %T"]
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=600)
        return dict(line.split() for line in done.stdout.splitlines())

    def kill_node(self, name: str, tell: bool = False) -> None:
        """Kill the slurmd of a node and all processes on it. The controller notices this by itself, or is told immediately.

        Until it knows, keep jobs with GPUs off the node: SLURM 22.05 would start them there, and then elsewhere without GPUs.
        """
        self.daemons[name].terminate()
        self.daemons.pop(name).wait(120)
        if tell:
            self.scontrol("update", f"NodeName={name}", "State=DOWN", "Reason=killed")

    def revive_node(self, name: str, blind: Path | None = None) -> None:
        """Start the slurmd of a node again; wait until the controller uses the node. The node cannot read the folder `blind`."""
        mounts = (
            ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(blind)] if blind else []
        )
        self._daemon(*mounts, "slurmd", "-D", "-N", name, name=name)
        self._until(lambda: self.node_states()[name] in ("idle", "mixed", "allocated"))


def _states(lines: str, job: str) -> dict[str, str]:
    """Parse lines `id|state [by user]` of all jobs, or of one job and its tasks."""
    pairs = (line.split("|") for line in lines.splitlines())
    return {number: state.split()[0] for number, state in pairs if job in ("", number, number.split("_")[0])}


def devices(folder: Path, count: int) -> bool:
    """Make device files that slurmd accepts as GPUs. Return False without the permission for mknod."""
    for number in range(count):
        try:
            os.mknod(folder / f"nvidia{number}", 0o666 | stat.S_IFCHR, os.stat("/dev/null").st_rdev)
        except PermissionError:
            return False
    return True


def own_name_is_local() -> bool:
    """Whether SLURM would listen on 127.0.0.1, which is so if the host name has that address."""
    try:
        return socket.gethostbyname(socket.gethostname()) == "127.0.0.1"
    except socket.gaierror:
        return False


def free(port: int) -> bool:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", port))
        except OSError:
            return False
        return True


def free_ports(names: list[str]) -> dict[str, int]:
    """A port for each name, below the kernel's range of ephemeral ports, so that a restarted node finds its port free."""
    candidates = random.SystemRandom().sample(
        range(10_000, 32_000), 1000
    )  # unseeded, as several clusters may start at the same time
    return dict(zip(names, filter(free, candidates), strict=False))


def guard(parent: int, words: list[str]) -> None:
    """Run a daemon. On SIGTERM, or when the parent thread ends, kill all descendants, including detached ones."""
    subreaper, death_signal = 36, 1  # options of prctl
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    ctypes.CDLL(None).prctl(subreaper, 1)  # orphaned descendants become children of this process
    ctypes.CDLL(None).prctl(death_signal, signal.SIGTERM)
    try:
        if os.getppid() == parent:
            subprocess.Popen(words)
            reap_all()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        reap_all(kill=True)


def reap_all(kill: bool = False) -> None:
    """Kill children until none is left; children of a killed process become children of this process."""
    while True:
        if kill:
            for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)
        try:
            os.wait()
        except ChildProcessError:
            return


if __name__ == "__main__":
    guard(int(sys.argv[1]), sys.argv[2:])
