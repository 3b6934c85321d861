"""Records what a run is executed with: a frozen copy of the code, package versions, weights, and the type of machine.

A resume under other conditions is refused, or marked as inexact.
"""

import json
import os
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from aem_exp import METHOD, config, policy
from aem_exp.config import ConfigError, Experiment, targets
from aem_exp.core import disk, trust
from aem_exp.rundir import PROVENANCE

CODE = "code"
COMMIT = ".commit"  # file with the git commit of code that was frozen before the start of its run
PACKAGES = ("torch", "trl", "transformers", "accelerate", "peft", "numpy")  # packages that may influence results
_PACKAGE_ROOT = disk.PACKAGE.resolve()


def list_changes(run_dir: Path, experiment: Experiment, weights: str | None, ranks: int | None = None) -> list[str]:
    """List the differences between the recorded code and conditions and the present ones.

    Args:
        weights: folder of the initial weights.
        ranks: number of processes; None: the recorded number.
    """
    if ranks is None:
        ranks = read(run_dir)["processes"] if (run_dir / PROVENANCE).exists() else 1
    return _compare_with_recorded(run_dir, _current_facts(experiment, weights, ranks), _code_files(experiment))


def record_start(
    run_dir: Path, experiment: Experiment, weights: str | None, step: int | None, ranks: int = 1
) -> list[str]:
    """Freeze the code and record the conditions at a start of a run; return all changes since its first start.

    Args:
        weights: folder of the initial weights.
        step: the saved step at which the run resumes; None: nothing was trained yet.
        ranks: number of processes.

    Raises:
        ConfigError: the code or conditions differ from the recorded ones, and `resume` is exact.
    """
    now, code = _current_facts(experiment, weights, ranks), _code_files(experiment)
    new = [] if step is None else _compare_with_recorded(run_dir, now, code)
    if new and experiment.resume == "exact":
        problem = f"the run would continue under other conditions ({'; '.join(new)})"
        raise ConfigError("resume", "exact", f"{problem}; resume=inexact continues anyway and marks the run")
    if (commit := _PACKAGE_ROOT.parents[1] / COMMIT).exists():  # this process runs frozen code
        now["commit"] = commit.read_text().strip() or None
    file = run_dir / PROVENANCE
    marks = read(run_dir)["resumed"] if step is not None and file.exists() else []
    if new:
        marks = [*marks, {"step": step, "changes": new}]
        if (run_dir / CODE).exists():
            (run_dir / CODE).rename(run_dir / f"{CODE}-to-step-{step}-{len(marks)}")
    _freeze_files(run_dir / CODE, code)
    disk.write_atomically(file, json.dumps({**now, "resumed": marks}, indent=1) + "\n")
    return [change for mark in marks for change in mark["changes"]]


def freeze_code(runs: Mapping[Path, Experiment]) -> None:
    """Freeze the code for runs that jobs will start. A run that has started keeps its code."""
    commit, codes = _read_commit(_PACKAGE_ROOT) or "", dict[frozenset[str], dict[str, Path]]()
    for run_dir, experiment in runs.items():
        trust.check_run_dir(run_dir)  # a job imports modules from this folder first
        if not (run_dir / PROVENANCE).exists():
            modules = _user_modules(experiment)
            run_dir.mkdir(parents=True, exist_ok=True)
            if modules in codes:
                # Frozen files never change, so runs with the same modules can share one copy.
                _freeze_files(run_dir / CODE, codes[modules], disk.link_or_copy)
            else:
                code = _code_files(experiment)
                _freeze_files(run_dir / CODE, code)
                codes[modules] = {name: run_dir / CODE / name for name in code}
            (run_dir / COMMIT).write_text(commit + "\n")


def read(run_dir: Path) -> dict[str, Any]:
    """Read the record that `record_start` wrote."""
    return disk.read_json(run_dir / PROVENANCE, "processes", "packages", "commit", "resumed")


def method_revision(run_dir: Path) -> int | None:
    """The method revision of a run (`aem_exp.METHOD`); None if the run has not started."""
    return int(read(run_dir).get("method", 0)) if (run_dir / PROVENANCE).exists() else None


def _compare_with_recorded(run_dir: Path, now: Mapping[str, Any], code: Mapping[str, Path]) -> list[str]:
    before = read(run_dir) if (run_dir / PROVENANCE).exists() else {}
    return [*_changed_facts(before, now), *_edited_files(run_dir / CODE, code)]


def _current_facts(experiment: Experiment, weights: str | None, ranks: int) -> dict[str, Any]:
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": "gpu" if experiment.launch.gpus_per_node else "cpu",
        "processes": ranks,
        "packages": package_versions(),
        "weights": policy.fingerprint(weights) if weights else None,
        "commit": _read_commit(_PACKAGE_ROOT),
        "method": METHOD,
    }


def package_versions() -> dict[str, str]:
    """The versions of `PACKAGES`; those that are not installed are left out."""
    versions = dict[str, str]()
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _changed_facts(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Differences that may change results. The Python version and the commit are recorded, but not compared.

    The version of a package is not compared if the package is not installed here, as it cannot run anything then.
    """
    old, new = ({**data.get("packages", {}), **data} for data in (before, now))
    keys = ("processes", "device", "machine", "weights", *PACKAGES)
    changed = [
        f"{key} {old[key]}, now {new[key]}" for key in keys if key in old and key in new and old[key] != new[key]
    ]
    if before and before.get("method", 0) != now["method"]:
        changed.append(f"method revision {before.get('method', 0)}, now {now['method']}")
    return changed


def _code_files(experiment: Experiment) -> dict[str, Path]:
    """The code of a run: name in the frozen copy -> present file. It covers our package, `conf/` and the user's modules."""
    code = {f"aem_exp/{file.relative_to(_PACKAGE_ROOT)}": file for file in _source_files(_PACKAGE_ROOT)}
    if not (root := config.conf_root()).is_relative_to(_PACKAGE_ROOT):
        code |= {f"conf/{file.relative_to(root)}": file for file in _source_files(root)}
    installed = tuple(sysconfig.get_paths().values())
    for module in _user_modules(experiment):
        location = targets.module_location(module)
        if location is None or str(location).startswith(installed):
            continue
        folder = location.parent
        if location.is_dir():
            files = _source_files(location)
        else:  # a module may import the other modules of its folder
            files = [file for file in _source_files(folder) if file.parent == folder and file.suffix == ".py"]
        code |= {str(file.relative_to(folder)): file for file in files}
    return code


def _user_modules(experiment: Experiment) -> frozenset[str]:
    """Top-level modules of the user's functions in the config."""
    return frozenset(target.partition(".")[0] for target in _find_targets(config.to_dict(experiment))) - {"aem_exp"}


def _find_targets(data: Any) -> Iterator[str]:
    """Yield all values of `_target_`."""
    if isinstance(data, dict):
        if "_target_" in data:
            yield data["_target_"]
        for value in data.values():
            yield from _find_targets(value)


def _source_files(folder: Path) -> list[Path]:
    """Files that git tracks or does not ignore; without git, all files except caches."""
    names = _run_git(folder, "ls-files", "-coz", "--exclude-standard").split("\0")
    files = [folder / name for name in names if name]
    files = files or [file for file in folder.rglob("*") if not {"__pycache__", ".git"} & set(file.parts)]
    return sorted(file for file in files if file.is_file())


def _edited_files(frozen: Path, code: Mapping[str, Path]) -> list[str]:
    """Python files that differ from their frozen copies, were added, or were removed."""
    before = {str(file.relative_to(frozen)) for file in frozen.rglob("*.py")} if frozen.exists() else set()
    now = {name for name in code if name.endswith(".py")} if before else set()
    return [
        f"{name} was edited"
        for name in sorted(before | now)
        if name not in before or name not in now or (frozen / name).read_bytes() != code[name].read_bytes()
    ]


def _copy_read_only(source: Path, target: Path) -> None:
    shutil.copy2(source, target)
    target.chmod(target.stat().st_mode & 0o555)  # protects the copy, which other runs may share, from accidental edits


def _freeze_files(frozen: Path, code: Mapping[str, Path], copy: Callable[[Path, Path], None] = _copy_read_only) -> None:
    """Replace a folder by read-only copies of the code; `copy` creates one file."""
    if _PACKAGE_ROOT.is_relative_to(frozen.resolve()):  # this process runs the frozen copy
        return
    part = frozen.with_name(f".{CODE}.{os.getpid()}")
    for name, file in code.items():
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        copy(file, part / name)
    shutil.rmtree(frozen, ignore_errors=True)
    part.replace(frozen)


def _read_commit(folder: Path) -> str | None:
    """The git commit of `folder`, with `+` if tracked files have changed; None outside git."""
    commit = _run_git(folder, "rev-parse", "HEAD").strip()
    return (
        commit + ("+" if _run_git(folder, "status", "--porcelain", "--untracked-files=no") else "") if commit else None
    )


def _run_git(folder: Path, *arguments: str) -> str:
    """Output of a git command; empty if it fails, or if there is no git."""
    if shutil.which("git") is None:
        return ""
    done = subprocess.run(["git", "-C", str(folder), *arguments], check=False, capture_output=True, text=True)
    return done.stdout if done.returncode == 0 else ""
