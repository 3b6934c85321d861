"""The house in order: rooms, dependency direction, style and types."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "aem_exp"
# Each room and the rooms of ours that it may know; nothing knows a room that is not named here.
KNOWS = {
    "aem": set(),
    "schedules": set(),
    "advantages": {"values"},
    "arms": {"aem"},
    "disk": {"values"},
    "metrics": {"disk"},
    "stores": {"metrics", "values"},
    "progress": set(),
    "checkpoints": {"disk", "values"},
    "door": {"stores", "trust", "values"},
    "trust": {"values"},
    "download": {"disk", "progress", "values"},
    "values": set(),
    "extras": set(),
    "envs": {"values"},
    "keywords": {"values"},
    "targets": {"values"},
    "rules": {"config", "keywords", "stores", "values"},
    "config": {"compose", "disk", "keywords", "rules", "targets", "trust", "values"},
    "compose": {"config", "continued", "keywords", "rules", "values", "yamls"},
    "continued": {"checkpoints", "config", "ownership", "values"},
    "yamls": {"values"},
    "diagnostics": set(),
    "render": {"values"},
    "sample": set(),
    "engine": {"sample"},
    "crew": set(),
    "addresses": {"disk", "values"},
    "lend": {"addresses", "disk", "door", "launch", "workers"},
    "servers": {"addresses", "answers", "values"},
    "serve": {
        "addresses",
        "answers",
        "config",
        "disk",
        "door",
        "launch",
        "policy",
        "provenance",
        "servers",
        "values",
        "worlds",
    },
    "answers": {"values"},
    "served": {"sample", "servers", "values"},
    "weights": {"addresses", "servers"},
    "stage": {"envs"},
    "workers": {"addresses", "config", "envs", "stage", "targets", "values"},
    "rollout": {"config", "crew", "envs", "render", "sample", "stage"},
    "batch": {"rollout"},
    "credit": {"advantages", "blame", "diagnostics", "rollout", "values"},
    "episodes": {"disk", "rollout"},
    "policy": {"config", "disk", "envs", "targets"},
    "tiny": {"values", "config", "envs", "render", "rollout", "sample", "stage"},
    "scores": set(),
    "exam": {
        "blame",
        "config",
        "disk",
        "envs",
        "episodes",
        "players",
        "provenance",
        "rollout",
        "sample",
        "scoreboard",
        "scores",
        "stage",
        "values",
    },
    "blame": {"values"},
    "smoke": {"advantages", "blame", "config", "credit", "envs", "envs.tagged", "stage", "values"},
    "leaks": {"envs", "values"},
    "worlds": {"blame", "config", "envs", "exam", "leaks", "smoke"},
    "players": {
        *(
            "addresses",
            "config",
            "envs",
            "envs.tagged",
            "policy",
            "render",
            "rollout",
            "sample",
            "served",
            "servers",
            "stage",
        ),
        "workers",
    },
    "scoreboard": {"progress"},
    "evaluate": {
        *(
            "compose",
            "config",
            "disk",
            "door",
            "envs",
            "exam",
            "players",
            "policy",
            "progress",
            "scoreboard",
            "servers",
        ),
        "worlds",
    },
    "proxy": {
        *("aem", "config", "diagnostics", "disk", "door", "evaluate", "exam", "players", "progress", "rollout"),
        *("sample", "scoreboard", "show", "values", "workers"),
    },
    "prepare": {"config", "door", "policy", "progress", "questions", "values", "worlds"},
    "tracking": {"disk", "door", "metrics", "state", "stores", "values", "views"},
    "show": {"disk", "episodes", "metrics", "progress", "scores", "tracking"},
    "attempts": {"disk", "values"},
    "board": {"progress", "state"},
    "dispatch": {
        *(
            "attempts",
            "config",
            "disk",
            "door",
            "interrupt",
            "launch",
            "ownership",
            "policy",
            "preflight",
            "progress",
            "provenance",
            "smoke",
            "stores",
            "values",
            "worlds",
        ),
    },
    "preflight": {"config", "policy", "rehearsal", "values"},
    "rehearsal": {"sample"},
    "interrupt": set(),
    "launch": {"config", "disk", "ranks", "values"},
    "members": {"disk", "values"},
    "ownership": {"disk"},
    "parts": {
        *(
            "checkpoints",
            "config",
            "disk",
            "engine",
            "episodes",
            "exam",
            "interrupt",
            "metrics",
            "policy",
            "provenance",
        ),
        *("ranks", "render", "rollout", "sample", "served", "servers", "sharded", "trainer", "values"),
        *("addresses", "weights", "workers"),
    },
    "power": set(),
    "compare": {"power"},
    "archive": {"attempts", "disk", "episodes", "metrics", "values"},
    "findings": {"archive", "compare", "rules", "values"},
    "figures": {"compare", "findings", "show"},
    "pages": {"disk"},
    "chapters": {"archive", "compare", "figures", "findings", "pages", "power", "scores"},
    "report": {
        *(
            "archive",
            "attempts",
            "chapters",
            "door",
            "findings",
            "pages",
            "questions",
            "state",
            "stores",
            "tracking",
            "values",
        ),
    },
    "questions": {"compose", "config", "door", "rules", "values", "yamls"},
    "labels": {"values"},
    "ranks": set(),
    "state": {"attempts", "disk", "episodes", "launch", "metrics", "ownership"},
    "status": {"board", "door", "labels", "members", "questions", "state", "values"},
    "sweep": {
        *("attempts", "config", "dispatch", "door", "members", "power", "progress", "questions", "state", "stores"),
        *("provenance", "study", "tracking", "values", "views", "worlds"),
    },
    "study": {
        *("attempts", "compose", "config", "disk", "dispatch", "launch", "provenance", "questions", "state", "stores"),
        *("values", "views"),
    },
    "trial": {
        *("attempts", "config", "disk", "dispatch", "door", "interrupt", "launch", "members", "metrics", "ownership"),
        *("progress", "provenance", "ranks", "run", "stores", "study", "tracking", "values", "views"),
    },
    "views": {"values"},
    "provenance": {"config", "disk", "policy", "targets", "trust"},
    "sharded": set(),
    "trainer": {
        *("aem", "arms", "batch", "checkpoints", "config", "credit", "keywords", "rollout", "sample", "sharded"),
        "values",
    },
    "run": {
        *("attempts", "checkpoints", "config", "continued", "disk", "door", "interrupt", "launch", "members"),
        *("ownership", "parts", "policy", "progress", "provenance", "ranks", "show", "stores", "tracking"),
        *("addresses", "values", "views", "worlds"),
    },
    "commands": {"values"},  # and, by name and when asked, the module of each command
    "completion": {"commands", "config", "values"},
    "ui": {"door", "stores", "tracking", "values"},
    "__main__": {
        *("commands", "completion", "compose", "config", "disk", "dispatch", "door", "launch"),
        *("preflight", "questions", "run", "stores", "sweep", "values", "worlds"),
    },
    "sandboxes": {"sandboxes.process"},
    "sandboxes.memory": set(),
    "sandboxes.process": {"sandboxes.memory"},
    "sandboxes.seccomp": set(),
    "sandboxes.bwrap": {"disk", "sandboxes", "sandboxes.process", "sandboxes.seccomp", "values"},
    "sandboxes.apptainer": {"disk", "sandboxes"},
    "sandboxes.docker": {"sandboxes", "sandboxes.process"},
    "sandboxes.local": {"sandboxes"},
    "envs.swe_tools": {"sandboxes"},
    "envs.swe_made": {"envs.swe_tools"},
    "envs.swe_rows": {"disk", "sandboxes", "values"},
    "envs.swe_grading": {"extras", "envs.swe_rows", "sandboxes", "values"},
    "envs.swe": {
        *("envs", "envs.swe_grading", "envs.swe_made", "envs.swe_rows", "envs.swe_tools", "sandboxes", "values"),
    },
    "envs.swebench": {"envs", "envs.swe", "envs.swe_rows", "sandboxes", "values"},
    "envs.tagged": set(),
    "envs.household": {"values", "envs", "envs.tagged"},
    "envs.foreign": {"values", "envs", "envs.tagged"},
    "envs.gymnasium": {"extras", "values", "envs.foreign"},
    "envs.openenv": {"extras", "values", "envs.foreign"},
    "envs.webshop_words": set(),
    "envs.webshop_search": {"envs.webshop_words"},
    "envs.webshop_catalogue": {"disk", "values", "envs.webshop_search"},
    "envs.webshop_goals": {"envs.webshop_catalogue", "envs.webshop_words"},
    "envs.webshop_made": {"disk", "values", "envs.webshop_catalogue"},
    "envs.webshop_player": {"envs.webshop", "envs.webshop_catalogue", "envs.webshop_words"},
    "envs.webshop": {
        *("disk", "extras", "progress", "values", "envs", "envs.tagged", "envs.webshop_catalogue"),
        *("envs.webshop_goals", "envs.webshop_made", "envs.webshop_player"),
    },
    "envs.alfworld_engine": {"extras", "values"},
    "envs.alfworld_games": {"values", "envs.alfworld_engine"},
    "envs.alfworld_player": {"envs.alfworld_games"},
    "envs.alfworld": {
        *("disk", "download", "progress", "values", "envs", "envs.household", "envs.tagged"),
        *("envs.alfworld_engine", "envs.alfworld_games", "envs.alfworld_player"),
    },
}
# One foreign library, one room.
SPEAKS = {
    "hydra": {"compose", "__main__"},
    "omegaconf": {"compose", "config"},
    "trl": {"trainer", "weights"},
    "httpx": {"answers"},
    "peft": {"policy"},
    "mlflow": {"tracking"},
    "rich": {"board", "progress", "report", "scoreboard", "show", "status", "sweep"},
    "submitit": {"launch"},
    "textworld": {"envs.alfworld_engine"},
    "fast_downward": {"envs.alfworld_engine"},
    "spacy": {"envs.webshop_goals"},
    "gymnasium": {"envs.gymnasium"},
    "openenv": {"envs.openenv"},
    "optuna": {"study"},
    "matplotlib": {"figures", "show"},
    "jinja2": {"pages"},
    "pyarrow": {"episodes", "exam"},
}


def rooms():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if name != "__init__" and "_bundled" not in path.parts:
            yield name, ast.parse(path.read_text())


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(name):
    """The room that an import names, if it is one of ours."""
    parts = name.split(".")
    if (
        parts[0] != "aem_exp" or len(parts) == 1 or parts[1].isupper() or parts[1][0] == "_"
    ):  # a constant of the package itself
        return None
    inner = ".".join(parts[1:3])
    return inner if inner in KNOWS else parts[1]


@pytest.mark.parametrize(("room", "tree"), list(rooms()), ids=lambda value: value if isinstance(value, str) else "")
def test_dependencies_point_down(room, tree):
    known = {ours(name) for name in imported(tree)} - {None, room}
    assert known <= KNOWS[room], f"{room} must not know {known - KNOWS[room]}"
    for library, speakers in SPEAKS.items():
        if room not in speakers:
            assert not any(name.split(".")[0] == library for name in imported(tree)), f"{room} must not speak {library}"


@pytest.mark.parametrize(
    "command", [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]], ids=" ".join
)
def test_style_and_types(command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
