"""Rows in the formats of SWE-bench and R2E-Gym, with a small image that has git, Python and pytest."""

import json
import subprocess

from aem_exp.envs.swe import generated
from aem_exp.envs.swebench import SWEBench
from aem_exp.sandboxes.bwrap import Bwrap
from support import sandbox_images

PLAIN_PYTEST = "python3 -m pytest -rA -p no:cacheprovider"  # as in most rows of SWE-bench
# A runner that is not pytest, as in rows of Django and SymPy.
OTHER_RUNNER = """python3 -c '
import runpy, sys
sys.path.insert(0, "")
failed = 0
for path in sys.argv[1:]:
    for name, test in runpy.run_path(path).items():
        if name.startswith("test_"):
            try:
                test()
                print("PASSED", path + "::" + name)
            except Exception:
                failed = 1
                print("FAILED", path + "::" + name)
sys.exit(failed)
'"""
DEV_ROWS = 2


def write(folder, command=generated.PYTEST_COMMAND, name="dev-1"):
    """Write five training rows (R2E-Gym), one test row (SWE-bench), and their image. Return the generated instance.

    The tests of the test row run with `command`.
    """
    made = generated.generate_repository(name, 2, 2)
    sandbox_images.python(folder / "root")
    testbed = folder / "root" / "testbed"
    subprocess.run(["bash", "-c", generated.SETUP_SCRIPT], input=made.stream, cwd=testbed, check=True)
    (testbed / ".git" / "info" / "exclude").write_text("run_tests.sh\nr2e_tests\n")
    (testbed / "run_tests.sh").write_text(f"{PLAIN_PYTEST} r2e_tests\n")
    (folder / "root" / "r2e_tests").mkdir()
    file = next(iter(json.loads(made.row["FAIL_TO_PASS"]))).partition("::")[0]
    hidden = made.row["test_patch"].split("@@")[-1]
    lines = [line[1:] for line in hidden.splitlines() if line.startswith("+")]
    head = (testbed / file).read_text().split("\n\n\n")[0] if (testbed / file).exists() else ""
    (folder / "root" / "r2e_tests" / "test_1.py").write_text(f"{head}\n" + "\n".join(lines) + "\n")
    image = sandbox_images.oci(folder, folder / "root")
    functions = [line.split("(")[0].removeprefix("def ") for line in lines if line.startswith("def ")]
    old = (testbed / made.path).read_text()
    change = {
        "header": {"file": {"path": made.path}},
        "old_file_content": old,
        "new_file_content": old.replace(made.wrong, made.right),
    }
    row = {
        "repo_name": "ledger",
        "docker_image": image,
        "problem_statement": f"Repair it.\n[ISSUE]\n{made.row['problem_statement']}\n[/ISSUE]\nThanks",
        "expected_output_json": json.dumps(dict.fromkeys(functions, "PASSED")),
        "parsed_commit_content": json.dumps({"file_diffs": [change]}),
    }
    rows = [row | {"commit_hash": f"{number}{0:039}"} for number in range(5)]
    (folder / "train.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    script = made.row["eval_script"].replace(generated.PYTEST_COMMAND, command)
    (folder / "test.jsonl").write_text(json.dumps({**made.row, "image": image, "eval_script": script}) + "\n")
    return made


def files(folder):
    """The arguments of `SWEBench` that name the rows."""
    return {"train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl"), "dev": DEV_ROWS}


def prepare(folder, say=print):
    SWEBench.prepare(say, Bwrap(str(folder / "unpacked")), **files(folder))


def open_world(folder, **settings):
    return SWEBench(Bwrap(str(folder / "unpacked")), **files(folder) | settings)
