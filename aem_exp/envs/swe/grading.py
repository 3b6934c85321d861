"""What a patch is worth: applied and tested in a fresh sandbox that no agent has touched, judged by SWE-bench's own functions.

R2E-Gym's rows are judged as R2E-Gym does it: each test must come to exactly what the row says.
"""

import json
import re
import tempfile
from importlib.util import find_spec
from typing import Final, Literal

from aem_exp.core.errors import Missing
from aem_exp.core.extras import install
from aem_exp.envs.swe.rows import Instance
from aem_exp.sandboxes import Ruined, Sandbox

Verdict = Literal["resolved", "no_patch", "not_applied", "tests_fail", "tests_timeout"]
VERDICTS: Final[tuple[Verdict, ...]] = ("resolved", "no_patch", "not_applied", "tests_fail", "tests_timeout")
LARGEST: Final = 4 << 20  # bytes of a patch that is applied
PATCH: Final = "/tmp/agent.patch"
SCRIPT: Final = "/tmp/eval.sh"
APPLY: Final = 60.0  # seconds
UNDO: Final = "git checkout -q -- . && git clean -qfd"
R2E_LAY: Final = """mkdir -p /root
find / -name __pycache__ -path '*r2e_tests*' -prune -exec rm -rf {} +
for name in run_tests.sh r2e_tests; do test -e /testbed/$name && mv /testbed/$name /root/; done
test -e /r2e_tests && mv /r2e_tests /root/r2e_tests
ln -sfn /root/r2e_tests /testbed/r2e_tests"""
_COLOUR: Final = re.compile(r"\x1b\[[0-9;]*m|\r")


def check_installed() -> None:
    if find_spec("swebench") is None:
        raise Missing("env.make", "swe", f"grading needs SWE-bench's library: {install('swe')}")


def grade(sandbox: Sandbox, instance: Instance, patch: bytes, seconds: float) -> tuple[Verdict, str]:
    """The verdict on a patch, and the log of its tests.

    Args:
        sandbox: fresh, started, on the instance's image.
        seconds: for the tests.

    Raises:
        Lost: the sandbox is gone: nothing is said of the patch.
    """
    if not patch.strip():
        return "no_patch", ""
    if instance.format == "r2e":
        sandbox.run(R2E_LAY, APPLY)
    elif instance.lay:
        sandbox.run(instance.lay, APPLY, instance.given)
    if len(patch) > LARGEST or not _applied(sandbox, patch):
        return "not_applied", ""
    try:
        return (_r2e if instance.format == "r2e" else _swebench)(sandbox, instance, seconds)
    except Ruined as ruined:  # by a hook that the patch brought, say
        return "tests_fail", str(ruined)


def _applied(sandbox: Sandbox, patch: bytes) -> bool:
    """As SWE-bench does it: one command after the other, each on a clean tree."""
    from swebench.harness.run_evaluation import GIT_APPLY_CMDS

    ways = f" && exit 0; {UNDO}; ".join(f"{how} {PATCH}" for how in GIT_APPLY_CMDS)
    script = f"cat > {PATCH} || exit 1; {ways} && exit 0; git apply --check --reverse {PATCH}"
    return sandbox.run(script, APPLY, patch).code == 0


def _swebench(sandbox: Sandbox, instance: Instance, seconds: float) -> tuple[Verdict, str]:
    from swebench.harness.grading import PARSER_REGISTRY, get_eval_report
    from swebench.harness.utils import make_test_spec

    spec = make_test_spec(dict(instance.row))
    assert spec.log_parser in PARSER_REGISTRY, (
        f"{instance.id}: no parser {spec.log_parser}"
    )  # the row's fault, no agent's
    log, stopped = _tested(sandbox, spec.eval_script, seconds)
    if stopped:
        return stopped, log
    told = {"instance_id": instance.id, "model_name_or_path": "policy", "model_patch": "applied"}
    with tempfile.NamedTemporaryFile(
        "w", suffix=".log", errors="replace"
    ) as file:  # it is read in the locale's encoding
        file.write(log)
        file.flush()
        try:
            report = get_eval_report(spec, told, file.name, include_tests_status=False)[instance.id]
        except Exception as error:  # of many kinds: parsers take lines for granted, and these may be the agent's
            return "tests_fail", f"{log}\nno parser could read this: {error}"
    return "resolved" if report["resolved"] else "tests_fail", log


def _r2e(sandbox: Sandbox, instance: Instance, seconds: float) -> tuple[Verdict, str]:
    log, stopped = _tested(sandbox, "bash /root/run_tests.sh\n", seconds)
    if stopped:
        return stopped, log
    found, wanted = _statuses(_COLOUR.sub("", log)), json.loads(instance.row["expected_output_json"])
    wanted = {_COLOUR.sub("", name).partition(" - ")[0]: status for name, status in wanted.items()}
    return "resolved" if found and found == wanted else "tests_fail", log


def _tested(sandbox: Sandbox, script: str, seconds: float) -> tuple[str, Verdict | None]:
    """The log of a test script; and the verdict, where it was stopped: what it had said by then counts for nothing."""
    ran = sandbox.run(f"cat > {SCRIPT} && bash {SCRIPT} < /dev/null", seconds, script.encode())
    return ran.text, ("tests_timeout" if ran.stopped == "time" else "tests_fail") if ran.stopped else None


def _statuses(log: str) -> dict[str, str]:
    """Test -> status, read from pytest's short summary as R2E-Gym reads it."""
    found = {}
    for line in log.partition("short test summary info")[2].splitlines():
        status = next((one for one in ("PASSED", "FAILED", "ERROR") if one in line), None)
        if status:
            found[".".join(line.split("::")[1:]).partition(" - ")[0]] = status
    return found
