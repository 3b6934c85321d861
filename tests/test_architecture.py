"""The architecture: the imports between packages, plain names and words, style and types."""

import ast
import io
import re
import subprocess
import sys
import tokenize

import pytest
from support import ROOT

PACKAGE = ROOT / "aem_exp"
# All packages and modules, from the lowest layer up. A module imports its own package and packages of lower lines only.
LAYERS = """
    core stats aem schedules
    advantages rundir sandboxes
    config
    cluster
    envs
    rollout wheel_weights
    demonstrations
    policy tiny
    provenance
    training tracking
    warm_start
    evaluate
    jobs
    run
    sweep
    report proxy branch status prepare offer ui serve trial
    commands
    completion
    __main__
"""
LAYER = {name: height for height, line in enumerate(LAYERS.strip().splitlines()) for name in line.split()}
# Each third-party library is imported only by these packages or modules.
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
    "gymnasium": "envs.gymnasium envs.babyai",
    "minigrid": "envs.babyai",
    "textworld_express": "envs.textworld_express",
    "scienceworld": "envs.scienceworld",
    "bfcl_eval": "envs.bfcl.wheel",
    "py4j": "envs.jvm",
    "openenv": "envs.openenv offer",
}
# Private words of this project: no module, class or function has one of them as its name.
RETIRED = set(
    "again asked at begun being board boxed chapters crew door exam findings found greeted hands heard heed held here kept known"
    " lenders lent made members of ownership pages parts player players reach room rulers shown sift sit stage stores told"
    " twin voice well".split()
)
# Most of them must not be a part of a compound name or of a parameter name either; these have an ordinary meaning there.
ORDINARY = set(
    "again at begun found known made members of pages part parts player players room shown stage stages".split()
)
EXCEPTIONS = {"Made"}  # `Made` is a target in configs, and so part of signatures
# Private words that must not occur in docstrings, comments and pages of these folders.
PRIVATE_WORDS = {
    (
        "aem_exp",
        "conf",
        "docs",
        "tests",
    ): "crew crews dear door doors exam exams greeted hands heed heeds lender sift twin twins",
    ("aem_exp", "conf"): "somebody told",
}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__" and "_bundled" not in path.parts:
            yield name, ast.parse(path.read_text())


def imported(node):
    """The names that a node imports at run time, which excludes `if TYPE_CHECKING:`."""
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


def words_of(name):
    """The words of a name in snake or camel case, in lower case."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


@pytest.mark.parametrize(("module", "tree"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_names_have_no_private_words(module, tree):
    defined = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    names = {*module.split("."), *(node.name for node in ast.walk(tree) if isinstance(node, defined))} - EXCEPTIONS
    assert not {name for name in names if name.strip("_").lower() in RETIRED}
    names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    assert not {name for name in names if words_of(name) & (RETIRED - ORDINARY)}


def prose(path):
    """The line number and text of each docstring and comment of a Python file, comment of a YAML file, or line of a page."""
    text = path.read_text()
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                yield node.lineno, node.value.value
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string
    else:
        for number, line in enumerate(text.splitlines(), 1):
            yield number, line if path.suffix == ".md" else line.partition("# ")[2]


@pytest.mark.slow
@pytest.mark.parametrize(("folders", "words"), PRIVATE_WORDS.items(), ids=str)
def test_prose_has_no_private_words(folders, words):
    pattern = re.compile(rf"\b({'|'.join(words.split())})\b", re.IGNORECASE)
    files = [
        path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".yaml", ".md")
    ]
    uses = [f"{path}:{number}: {text}" for path in files for number, text in prose(path) if pattern.search(text)]
    assert not uses, "\n".join(uses)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=" ".join
)
def test_style_and_types(command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
