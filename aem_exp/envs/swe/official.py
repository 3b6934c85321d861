"""Grades a patch: applies it in a fresh sandbox and runs the tests, with SWE-bench's own functions.

Rows of R2E-Gym are graded as in R2E-Gym: each test must have exactly the status that the row states.
"""

import json
import re
import tempfile
from importlib.util import find_spec
from typing import Any, Final, Literal

from aem_exp.core.errors import ConfigError, MissingResource
from aem_exp.core.extras import install_command
from aem_exp.envs.swe.rows import Instance
from aem_exp.sandboxes import Sandbox, SandboxBroken

Verdict = Literal["resolved", "no_patch", "not_applied", "tests_fail", "tests_timeout"]
VERDICTS: Final[tuple[Verdict, ...]] = ("resolved", "no_patch", "not_applied", "tests_fail", "tests_timeout")
MAX_PATCH_BYTES: Final = 4 << 20  # larger patches are not applied
PATCH_FILE: Final = "/tmp/agent.patch"
SCRIPT_FILE: Final = "/tmp/eval.sh"
APPLY_SECONDS: Final = 60.0  # to set up the repository, and to apply the patch
RESET_COMMAND: Final = "git checkout -q -- . && git clean -qfd"
R2E_SETUP_SCRIPT: Final = """mkdir -p /root
find / -name __pycache__ -path '*r2e_tests*' -prune -exec rm -rf {} +
for name in run_tests.sh r2e_tests; do test -e /testbed/$name && mv /testbed/$name /root/; done
test -e /r2e_tests && mv /r2e_tests /root/r2e_tests
ln -sfn /root/r2e_tests /testbed/r2e_tests"""
R2E_COMMAND: Final = "bash /root/run_tests.sh\n"
_COLOUR: Final = re.compile(r"\x1b\[[0-9;]*m|\r")


def check_installed() -> None:
    if find_spec("swebench") is None:
        raise MissingResource("env.make", "swe", f"grading needs SWE-bench's library: {install_command('swe')}")


def grade(sandbox: Sandbox, instance: Instance, patch: bytes, seconds: float) -> tuple[Verdict, str]:
    """The verdict on a patch, and the log of its tests.

    Args:
        sandbox: a fresh sandbox on the instance's image, started.
        seconds: time limit of the tests.

    Raises:
        SandboxLost: the sandbox was lost, so there is no verdict.
    """
    prepare(sandbox, instance)
    return run_tests(sandbox, instance, patch, seconds)


def run_tests(sandbox: Sandbox, instance: Instance, patch: bytes, seconds: float) -> tuple[Verdict, str]:
    """As `grade`, in a sandbox that is already prepared."""
    if not patch.strip():
        return "no_patch", ""
    if not apply_patch(sandbox, patch):
        return "not_applied", ""
    try:
        log, stopped = _run_tests(sandbox, eval_script(instance), seconds)
    except SandboxBroken as broken:  # for example by a git hook in the patch
        return "tests_fail", str(broken)
    return (stopped, log) if stopped else parse_verdict(instance, log)


def prepare(sandbox: Sandbox, instance: Instance) -> None:
    """Set up the repository and its hidden tests in a fresh sandbox."""
    script, stdin = setup_script(instance)
    if script:
        sandbox.run(script, APPLY_SECONDS, stdin)


def setup_script(instance: Instance) -> tuple[str, bytes]:
    """The script that sets up a fresh sandbox for grading, and its stdin."""
    return (R2E_SETUP_SCRIPT, b"") if instance.format == "r2e" else (instance.setup_script, instance.setup_input)


def apply_patch(sandbox: Sandbox, patch: bytes) -> bool:
    """Apply a patch as SWE-bench does: try several commands, each on a clean tree. Returns whether one succeeded."""
    from swebench.harness.run_evaluation import GIT_APPLY_CMDS

    if len(patch) > MAX_PATCH_BYTES:
        return False
    attempts = f" && exit 0; {RESET_COMMAND}; ".join(f"{command} {PATCH_FILE}" for command in GIT_APPLY_CMDS)
    script = f"cat > {PATCH_FILE} || exit 1; {attempts} && exit 0; git apply --check --reverse {PATCH_FILE}"
    return sandbox.run(script, APPLY_SECONDS, patch).code == 0


def eval_script(instance: Instance) -> str:
    """The script that runs the hidden tests, as the benchmark runs them."""
    return R2E_COMMAND if instance.format == "r2e" else str(make_spec(instance).eval_script)


def make_spec(instance: Instance) -> Any:
    """SWE-bench's description of the tests of a row."""
    from swebench.harness.grading import PARSER_REGISTRY
    from swebench.harness.utils import make_test_spec

    spec = make_test_spec(dict(instance.row))
    if spec.log_parser not in PARSER_REGISTRY:
        raise ConfigError("env.make", instance.id, f"SWE-bench has no log_parser {spec.log_parser}; correct this row")
    return spec


def parse_verdict(instance: Instance, log: str) -> tuple[Verdict, str]:
    """The benchmark's verdict on the log of its tests, and the log."""
    return (_parse_r2e if instance.format == "r2e" else _parse_swebench)(instance, log)


def _parse_swebench(instance: Instance, log: str) -> tuple[Verdict, str]:
    from swebench.harness.grading import get_eval_report

    prediction = {"instance_id": instance.id, "model_name_or_path": "policy", "model_patch": "applied"}
    # SWE-bench reads the file in the locale's encoding
    with tempfile.NamedTemporaryFile("w", suffix=".log", errors="replace") as file:
        file.write(log)
        file.flush()
        try:
            report = get_eval_report(make_spec(instance), prediction, file.name, include_tests_status=False)
        except Exception as error:  # of any type: parsers fail on unexpected lines, and the agent's code may print them
            return "tests_fail", f"{log}\nthe parser could not read this log: {error}"
    return "resolved" if report[instance.id]["resolved"] else "tests_fail", log


def _parse_r2e(instance: Instance, log: str) -> tuple[Verdict, str]:
    statuses, expected = _parse_statuses(_COLOUR.sub("", log)), expected_statuses(instance)
    return "resolved" if statuses and statuses == expected else "tests_fail", log


def expected_statuses(instance: Instance) -> dict[str, str]:
    """Test -> status that a row of R2E-Gym states."""
    expected = json.loads(instance.row["expected_output_json"])
    return {_COLOUR.sub("", name).partition(" - ")[0]: status for name, status in expected.items()}


def _run_tests(sandbox: Sandbox, script: str, seconds: float) -> tuple[str, Verdict | None]:
    """The log of a test script, and the verdict if the script was stopped. The log of a stopped script does not count."""
    ran = sandbox.run(f"cat > {SCRIPT_FILE} && bash {SCRIPT_FILE} < /dev/null", seconds, script.encode())
    return ran.text, ("tests_timeout" if ran.stop_reason == "time" else "tests_fail") if ran.stop_reason else None


def _parse_statuses(log: str) -> dict[str, str]:
    """Test -> status, read from pytest's short summary as in R2E-Gym."""
    statuses = {}
    for line in log.partition("short test summary info")[2].splitlines():
        status = next((one for one in ("PASSED", "FAILED", "ERROR") if one in line), None)
        if status:
            statuses[".".join(line.split("::")[1:]).partition(" - ")[0]] = status
    return statuses
