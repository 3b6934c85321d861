"""The architecture: which package imports which, and style and types everywhere."""

import ast
import subprocess
import sys

import pytest
from support import ROOT

PACKAGE = ROOT / "aem_exp"
# What the package consists of, bottom up: a module imports its own package and lower lines, nothing else of ours.
LAYERS = """
    core stats aem schedules
    advantages rundir sandboxes
    config
    cluster
    envs
    rollout
    policy tiny
    provenance
    training tracking
    evaluate
    jobs
    run
    sweep
    report proxy status prepare ui serve trial
    commands
    completion
    __main__
"""
LAYER = {name: height for height, line in enumerate(LAYERS.strip().splitlines()) for name in line.split()}
# A library that is not ours is imported by one package, or by one module.
IMPORTED_BY = {
    "hydra": "config.compose config.hydra_internals __main__",
    "omegaconf": "config",
    "trl": "training rollout.sampling.weight_sync",
    "httpx": "rollout.sampling.http",
    "peft": "policy",
    "mlflow": "tracking",
    "submitit": "cluster.slurm",
    "optuna": "sweep.study sweep.study_space",
    "matplotlib": "core.plots run.summary report.figures",
    "jinja2": "report.render",
    "rich": "core.console",
    "pyarrow": "rundir.episodes rundir.examples evaluate.evaluation",
    "textworld": "envs.alfworld",
    "fast_downward": "envs.alfworld",
    "spacy": "envs.webshop",
    "gymnasium": "envs.gymnasium",
    "openenv": "envs.openenv",
}


# Words that only this project used: no module, class or function is named by one of them again.
RETIRED = set(
    "again asked at begun being board boxed chapters crew door exam findings found greeted hands heard heed held here kept known"
    " lenders lent made members of ownership pages parts player players reach room rulers shown sift sit stage stores told"
    " twin voice well".split()
)
TARGETS = {"Made"}  # stands in configs, and so in signatures


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__" and "_bundled" not in path.parts:
            yield name, ast.parse(path.read_text())


def imported(node):
    """What runs of the imports below a node: not those of `if TYPE_CHECKING:`, which no process makes."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from imported(child)


@pytest.mark.parametrize(("module", "tree"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_point_down(module, tree):
    package, names = module.split(".")[0], list(imported(tree))
    below = {name for name, height in LAYER.items() if height < LAYER[package]} | {package, "METHOD", "__version__"}
    ours = {name.split(".")[1] for name in names if name.startswith("aem_exp.")}
    assert ours <= below, f"{module} must not import {ours - below}"
    for library, importers in IMPORTED_BY.items():
        if not any(module == importer or module.startswith(f"{importer}.") for importer in importers.split()):
            assert library not in {name.split(".")[0] for name in names}, f"{module} must not import {library}"


@pytest.mark.parametrize(("module", "tree"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_names_are_the_fields_own(module, tree):
    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    names = {*module.split("."), *(node.name for node in ast.walk(tree) if isinstance(node, defined))} - TARGETS
    assert not {name for name in names if name.strip("_").lower() in RETIRED}


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=" ".join
)
def test_style_and_types(command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
