"""The command `aem-exp`: its subcommands, their help, completion in real shells, and `aem-exp ui`."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest
from support import ROOT
from support.runs import DEADLINE, BackgroundCall, skip_or_fail

from aem_exp import __version__, commands, completion
from aem_exp.__main__ import main
from aem_exp.tracking import store_uri

SCRIPT = Path(sys.executable).with_name("aem-exp")

pytestmark = pytest.mark.usefixtures("clean")


@pytest.fixture(autouse=True)
def restored_argv(monkeypatch):
    """A subcommand replaces sys.argv; restore it after the test."""
    monkeypatch.setattr(sys, "argv", ["aem-exp"])


def refused(capsys, *words):
    """Run a command that is refused; the sentence that it prints."""
    assert main(list(words)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    return err


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_every_command_has_help(name, capsys):
    try:
        code = main([name, "--help"])
    except SystemExit as end:  # argparse's
        code = end.code
    out, err = capsys.readouterr()
    assert code == 0 and out.startswith("usage: ") and err == ""


def test_help_lists_every_command(capsys):
    assert main(["--help"]) == 0
    page = capsys.readouterr().out
    for name, command in commands.COMMANDS.items():
        assert any(line.split()[:1] == [name] and command.about in line for line in page.splitlines())
    assert "--completion" in page and "--version" in page


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"aem-exp {__version__}\n"


def test_an_unknown_command_gets_a_suggestion(capsys):
    assert "command=statsu: did you mean status? choose from run, sweep," in refused(capsys, "statsu")
    assert "choose from run, sweep," in refused(capsys, "outputs/household-x")
    assert "--completion=fish: choose from bash, zsh" in refused(capsys, "--completion", "fish")


def test_mistakes_of_a_subcommand_are_reported(capsys):
    assert "no-such-sweep" in refused(capsys, "sweep", "no-such-sweep")
    assert "--outputs=/nowhere: " in refused(capsys, "status", "--outputs", "/nowhere")
    assert "=/nowhere: " in refused(capsys, "sync", "/nowhere")
    assert "option=--onec: " in refused(capsys, "status", "--onec")


def test_run_takes_an_experiment_or_a_run_dir(capsys, tmp_path):
    assert main(["run", "trainer.steps=7", "--cfg", "job"]) == 0
    assert "steps: 7" in capsys.readouterr().out
    assert main(["run", "--config-dir", str(tmp_path), "--cfg", "job"]) == 0
    capsys.readouterr()
    for words in (["/nowhere"], ["--trust", "/nowhere"], ["/no=where", "--inexact"], ["./no=where"]):
        assert "RUN_DIR=" in refused(capsys, "run", *words)
    for override in ("seed=1", "+experiment=household_rloo", "~tracking"):
        assert "run=/nowhere: " in refused(capsys, "run", "/nowhere", override)


def test_nothing_heavy_is_imported_for_help_and_completion(tmp_path):
    script = """
import sys
from aem_exp.__main__ import main
assert main(["--help"]) == main(["--version"]) == main(["--completion", "bash"]) == 0
assert main(["--complete", "aem-exp modulation=ae"]) == main(["--complete", "aem-exp sweep --"]) == 0
heavy = {"hydra", "omegaconf", "torch", "transformers", "trl", "mlflow", "optuna", "datasets", "pandas"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run(
        [sys.executable, "-c", script], check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )


# Completion.


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """Two runs in ./outputs."""
    for name in ("household-none-s0", "household-aem-s0"):
        (tmp_path / "outputs" / name).mkdir(parents=True)
        (tmp_path / "outputs" / name / "experiment.json").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("aem-exp st", ["status"]),
        ("aem-exp modulation=ae", ["modulation=aem"]),
        ("aem-exp run modulation=ae", ["modulation=aem"]),
        ("aem-exp -m modulation=none,ae", ["modulation=none,aem"]),
        ("aem-exp seed=1 modul", ["modulation="]),
        ("aem-exp +exp", ["+experiment="]),
        ("aem-exp +experiment=swe_", ["+experiment=swe_tiny"]),
        ("aem-exp plan=t", ["plan=true"]),
        ("aem-exp --hyd", ["--hydra-help"]),
        ("aem-exp --cfg ", ["job"]),
        ("aem-exp sweep household_qu", ["household_quick"]),
        ("aem-exp sweep household_quick --sub", ["--submit"]),
        ("aem-exp sweep household_quick launch=slurm_", ["launch=slurm_cpu"]),
        ("aem-exp status --js", ["--json"]),
        ("aem-exp sync --rec", ["--reconcile"]),
        ("aem-exp run outputs/household-a", ["outputs/household-aem-s0"]),
        ("aem-exp evaluate outputs/household-a", ["outputs/household-aem-s0"]),
        ("aem-exp from=outputs/household-a", ["from=outputs/household-aem-s0"]),
        ("aem-exp evaluate x --pan", ["--panel"]),
        ("aem-exp --completion z", ["zsh"]),
        ("aem-exp nonsense x", []),
        ("aem-exp 'unclosed ", []),
        ("/venv/bin/aem-exp repo", ["report"]),
    ],
)
def test_candidates(outputs, line, expected):
    assert completion.candidates(line) == expected


def test_an_empty_word_offers_commands_and_groups_but_no_options():
    found = completion.candidates("aem-exp ")
    assert {"run", "sweep", "ui", "modulation=", "+experiment="} <= set(found)
    assert not any(word.startswith("-") for word in found)


def test_a_config_dir_adds_choices(tmp_path):
    (tmp_path / "modulation").mkdir()
    (tmp_path / "modulation" / "mine.yaml").write_text("# mine\n")
    assert completion.candidates(f"aem-exp --config-dir {tmp_path} modulation=mi") == ["modulation=mine"]


def test_candidates_are_printed_for_a_shell(capsys):
    assert main(["--complete", "aem-exp modulation=lam_"]) == 0
    assert capsys.readouterr().out.split() == ["modulation=lam_2", "modulation=lam_4", "modulation=lam_half"]


def script_environment():
    """The environment in which a shell finds the script `aem-exp`."""
    if not SCRIPT.exists():
        skip_or_fail("the package is not installed: no script aem-exp")
    return {**os.environ, "PATH": f"{SCRIPT.parent}{os.pathsep}{os.environ['PATH']}", "TERM": "dumb"}


BASH = """
eval "$(aem-exp --completion bash)"
complete -p aem-exp >/dev/null || exit 9
ask() {  # as bash calls it, whose words are split at =
    COMP_LINE=$1 COMP_POINT=${#1}
    _aem_exp aem-exp
    printf '%s\\n' "${COMPREPLY[@]}" --
}
ask "aem-exp st"
ask "aem-exp modulation=ae"
ask "aem-exp -m modulation=none,ae"
ask "aem-exp from=outputs/household-a"
ask "aem-exp run nothing-like-it"
"""


def test_bash_completes(outputs):
    done = subprocess.run(
        ["bash", "--norc", "-c", BASH],
        env=script_environment(),
        cwd=outputs,
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, done.stderr
    answers = [part.split() for part in done.stdout.split("--\n")]
    assert answers == [["status"], ["aem"], ["none,aem"], ["outputs/household-aem-s0"], [], []]


def type_into(shell, prepare, outputs):
    """Type lines with a TAB into a shell on a real terminal; everything that it shows."""
    import pty

    lines = [
        *prepare,
        "aem-exp stat\t--outputs /nowhere 2>&1 | sed s/^/SAID:/\n",
        "aem-exp modulation=ae\tseed=x\n",
        "exit\n",
    ]
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        shell,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=script_environment(),
        cwd=outputs,
        start_new_session=True,
    )
    os.close(follower)
    output = b""
    try:
        for line in lines:
            os.write(leader, line.encode())
        while chunk := os.read(leader, 4096):
            output += chunk
    except OSError:  # the terminal closes when the shell ends
        pass
    finally:
        process.kill()
        process.wait()
        os.close(leader)
    return output.decode()


@pytest.mark.slow
@pytest.mark.timeout(DEADLINE)
@pytest.mark.parametrize("shell", ["bash", pytest.param("zsh", marks=pytest.mark.machine)])
def test_a_terminal_completes(shell, outputs):
    if not shutil.which(shell):
        skip_or_fail(f"{shell} is missing (apt-get install {shell})")
    command = {"bash": ["bash", "--norc", "-i"], "zsh": ["zsh", "-f", "-i"]}[shell]
    prepare = {"bash": [], "zsh": ["autoload -U compinit && compinit -u -D\n"]}[shell]
    shown = type_into(command, [*prepare, f'eval "$(aem-exp --completion {shell})"\n'], outputs)
    assert "SAID:aem_exp: --outputs=/nowhere: " in shown, shown
    assert "aem_exp: seed=x: " in shown, shown
    assert "modulation=aem" in shown, shown


# `aem-exp ui`.


@pytest.fixture
def store_folder(tmp_path_factory):
    """An outputs folder with an empty MLflow store."""
    from aem_exp.tracking import mlflow_store

    folder = tmp_path_factory.mktemp("store") / "outputs"
    mlflow_store.create_sqlite(folder / "mlflow.db")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_ui_serves_on_loopback_and_stops_its_server(store_folder, number):
    command = [sys.executable, "-m", "aem_exp", "ui"]
    environment = {**os.environ, "AEM_OUTPUTS": str(store_folder), "PYTHONPATH": str(ROOT), "MLFLOW_HOST": "0.0.0.0"}
    environment.pop("MLFLOW_TRACKING_URI", None)
    started = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        lines = BackgroundCall(lambda: [started.stdout.readline() for _ in range(3)]).end()
        assert lines[0] == f"store   sqlite:///{store_folder}/mlflow.db\n" and "Ctrl-C" in lines[2], lines
        link = lines[1].split()[1]
        assert link.startswith("http://127.0.0.1:") and lines[1].startswith("open ")
        assert urllib.request.urlopen(f"{link}/health", timeout=DEADLINE).read() == b"OK"
        tree = psutil.Process(started.pid).children(recursive=True)
        listening = [c.laddr for child in tree for c in child.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert {address.ip for address in listening} == {"127.0.0.1"}
        assert int(link.rpartition(":")[2]) in {address.port for address in listening}
        started.send_signal(number)
        _, err = started.communicate(timeout=DEADLINE)
        assert started.returncode == 128 + number
        assert "Traceback" not in err and len(err.splitlines()) <= 2, err
        assert psutil.wait_procs(tree, timeout=DEADLINE)[1] == []
    finally:
        started.terminate()
        started.wait(DEADLINE)


@pytest.mark.parametrize(
    ("words", "fact"),
    [
        (["--uri", "nowhere.db"], "nowhere.db: "),
        (["--uri", "off"], "--uri=off: "),
        (["--uri", "gopher://x"], "gopher://x: "),
        (["--uri", "postgresql://me:pw@127.0.0.1:1/x"], "postgresql://***@127.0.0.1:1/x: "),
        (["--port", "0"], "65535"),
        (["--port", "x"], "option=--port: "),
    ],
)
def test_ui_refuses_stores_and_ports_that_it_cannot_use(capsys, store_folder, monkeypatch, words, fact):
    monkeypatch.setenv("AEM_OUTPUTS", str(store_folder))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    err = refused(capsys, "ui", *words)
    assert fact in err and ":pw@" not in err


def test_ui_refuses_a_port_that_is_taken(capsys, store_folder):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        err = refused(capsys, "ui", "--uri", str(store_folder / "mlflow.db"), "--port", str(port))
        assert f"--port={port}: " in err


@pytest.mark.slow
def test_ui_reports_a_damaged_store(capsys, tmp_path):
    (tmp_path / "mlflow.db").write_text("no database at all" * 100)
    assert main(["ui", "--uri", "mlflow.db"]) == 2
    err = capsys.readouterr().err
    assert "file is not a database" in err and err.count("\n") == 1


def test_ui_shows_the_address_of_a_remote_store(capsys):
    assert main(["ui", "--uri", "http://user:pw@host:80"]) == 0
    assert capsys.readouterr().out.startswith("open    http://host:80/ ")


def test_the_ui_command_that_a_run_prints_is_short(store_folder, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("AEM_OUTPUTS", str(store_folder))
    monkeypatch.setenv("PATH", str(SCRIPT.parent))
    uri = store_uri.resolve_uri(None, store_folder)
    if SCRIPT.exists():
        assert store_uri.ui_command(uri, 5000) == "aem-exp ui"
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", "/somewhere/bin/python")
        assert store_uri.ui_command(uri, 5001) == "/somewhere/bin/python -m aem_exp ui --port 5001"
    monkeypatch.setenv("AEM_OUTPUTS", "elsewhere")
    assert store_uri.ui_command(uri, 5000).endswith(f" ui --uri {store_folder}/mlflow.db")
    assert store_uri.ui_command("mysql://me:pw@host/x", 5000).endswith(" ui --uri 'mysql://***@host/x'")
