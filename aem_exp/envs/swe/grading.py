"""Grades a patch: applies it in a fresh sandbox and runs the tests, with SWE-bench's own functions.

Rows of R2E-Gym are graded as in R2E-Gym: each test must have exactly the status that the row states.
"""

import json
import re
import tempfile
from importlib.util import find_spec
from typing import Final, Literal

from aem_exp.core.errors import MissingResource
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
    if not patch.strip():
        return "no_patch", ""
    if instance.format == "r2e":
        sandbox.run(R2E_SETUP_SCRIPT, APPLY_SECONDS)
    elif instance.setup_script:
        sandbox.run(instance.setup_script, APPLY_SECONDS, instance.setup_input)
    if len(patch) > MAX_PATCH_BYTES or not _apply_patch(sandbox, patch):
        return "not_applied", ""
    try:
        return (_grade_r2e if instance.format == "r2e" else _grade_swebench)(sandbox, instance, seconds)
    except SandboxBroken as broken:  # for example by a git hook in the patch
        return "tests_fail", str(broken)


def _apply_patch(sandbox: Sandbox, patch: bytes) -> bool:
    """Apply a patch as SWE-bench does: try several commands, each on a clean tree. Returns whether one succeeded."""
    from swebench.harness.run_evaluation import GIT_APPLY_CMDS

    attempts = f" && exit 0; {RESET_COMMAND}; ".join(f"{command} {PATCH_FILE}" for command in GIT_APPLY_CMDS)
    script = f"cat > {PATCH_FILE} || exit 1; {attempts} && exit 0; git apply --check --reverse {PATCH_FILE}"
    return sandbox.run(script, APPLY_SECONDS, patch).code == 0


def _grade_swebench(sandbox: Sandbox, instance: Instance, seconds: float) -> tuple[Verdict, str]:
    from swebench.harness.grading import PARSER_REGISTRY, get_eval_report
    from swebench.harness.utils import make_test_spec

    spec = make_test_spec(dict(instance.row))
    assert spec.log_parser in PARSER_REGISTRY, f"{instance.id}: no parser {spec.log_parser}"  # an error of the row
    log, stopped = _run_tests(sandbox, spec.eval_script, seconds)
    if stopped:
        return stopped, log
    prediction = {"instance_id": instance.id, "model_name_or_path": "policy", "model_patch": "applied"}
    # SWE-bench reads the file in the locale's encoding
    with tempfile.NamedTemporaryFile("w", suffix=".log", errors="replace") as file:
        file.write(log)
        file.flush()
        try:
            report = get_eval_report(spec, prediction, file.name, include_tests_status=False)[instance.id]
        except Exception as error:  # of any type: parsers fail on unexpected lines, and the agent's code may print them
            return "tests_fail", f"{log}\nthe parser could not read this log: {error}"
    return "resolved" if report["resolved"] else "tests_fail", log


def _grade_r2e(sandbox: Sandbox, instance: Instance, seconds: float) -> tuple[Verdict, str]:
    log, stopped = _run_tests(sandbox, "bash /root/run_tests.sh\n", seconds)
    if stopped:
        return stopped, log
    statuses, expected = _parse_statuses(_COLOUR.sub("", log)), json.loads(instance.row["expected_output_json"])
    expected = {_COLOUR.sub("", name).partition(" - ")[0]: status for name, status in expected.items()}
    return "resolved" if statuses and statuses == expected else "tests_fail", log


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
