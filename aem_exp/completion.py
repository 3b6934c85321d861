"""Shell completion for bash and zsh: commands, options, groups, choices, sweeps and run dirs.

The shell scripts call `aem-exp --complete`, so both shells offer the same candidates.
"""

import contextlib
import io
import os
import re
import shlex
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Final

from aem_exp import config
from aem_exp.commands import COMMANDS
from aem_exp.core.errors import ConfigError
from aem_exp.rundir import EXPERIMENT

# In bash, `=` and `:` end a word. Bash does not replace the text before the last of them, so it is cut from each candidate.
BASH: Final = """\
_aem_exp() {
    local line="${COMP_LINE:0:COMP_POINT}" answer word head
    word="${line##* }"
    head="${word%"${word##*[=:]}"}"
    COMPREPLY=()
    while IFS= read -r answer; do
        [[ $answer == *= ]] && compopt -o nospace 2>/dev/null
        COMPREPLY+=("${answer#"$head"}")
    done < <("$1" --complete "$line" 2>/dev/null)
}
complete -o default -F _aem_exp aem-exp
"""
ZSH: Final = """\
_aem_exp() {
    local -a answers
    answers=("${(@f)$(${(Q)words[1]} --complete "${(j: :)words[1,CURRENT]}" 2>/dev/null)}")
    answers=(${answers:#})
    (( $#answers )) || { _files; return }
    compadd -S '' -- ${(M)answers:#*=}
    compadd -- ${answers:#*=}
}
compdef _aem_exp aem-exp
"""
SHELLS: Final = {"bash": BASH, "zsh": ZSH}
TAKE_OVERRIDES: Final = (
    None,
    "run",
    "sweep",
    "report",
    "evaluate",
    "proxy",
    "branch",
    "prepare",
)  # commands that take overrides
TAKE_SWEEP: Final = ("sweep", "report", "prepare", "status")  # ... whose first word can be a sweep
TAKE_RUN_DIR: Final = ("run", "evaluate", "proxy", "branch", "sync")  # ... that take a run dir
KEY_VALUES: Final = {"plan": ("true", "false"), "resume": ("exact", "inexact")}
OPTION_VALUES: Final = {"--cfg": ("job",), "-c": ("job",), "--completion": tuple(SHELLS)}


def script(shell: str) -> str:
    """Return the script that a shell evaluates once to get completion of `aem-exp`."""
    if shell not in SHELLS:
        raise ConfigError("--completion", shell, SHELLS)
    return SHELLS[shell]


def candidates(line: str) -> list[str]:
    """Return the complete candidates for the last word of a command line; after a space, the last word is empty."""
    try:
        words = shlex.split(line)[1:]
    except ValueError:  # an open quote
        return []
    last = words.pop() if words and not line[-1:].isspace() else ""
    command = words[0] if words and "=" not in words[0] and words[0][:1] not in ("-", "+", "~") else None
    if command not in (None, *COMMANDS):
        return []
    return [word for word in _word_candidates(command, words, last) if word.startswith(last)]


def _word_candidates(command: str | None, words: list[str], last: str) -> Iterable[str]:
    """All words that are possible at the end."""
    if words and words[-1] in OPTION_VALUES:
        return OPTION_VALUES[words[-1]]
    if last.startswith("-"):
        return _options(command)
    groups = config.list_choices(config.config_roots(_config_dir(words))) if command in TAKE_OVERRIDES else {}
    if "=" in last:
        return _value_candidates(last, groups)
    known = [f"+{group}=" if group == "experiment" else f"{group}=" for group in groups]
    if not words:
        known += COMMANDS
    if command in TAKE_SWEEP and len(words) == 1:
        known += sorted(file.stem for file in (config.conf_root().parent / "sweeps").glob("*.yaml"))
    return [*known, *_run_dir_candidates(last)] if command in TAKE_RUN_DIR and last else known


def _config_dir(words: list[str]) -> str | None:
    at = words.index("--config-dir") + 1 if "--config-dir" in words else len(words)
    return words[at] if at < len(words) and Path(words[at]).is_dir() else None


def _value_candidates(last: str, groups: dict[str, dict[str, Path]]) -> list[str]:
    """Complete `GROUP=CHOICE`, the last choice of `GROUP=CHOICE,CHOICE`, and the keys with known values."""
    key, _, value = last.partition("=")
    if key == "from":
        return [f"from={folder}" for folder in _run_dir_candidates(value)]
    complete = value[: value.rfind(",") + 1]
    return [f"{key}={complete}{choice}" for choice in KEY_VALUES.get(key) or groups.get(key.lstrip("+"), {})]


def _run_dir_candidates(prefix: str) -> list[str]:
    """Return the run dirs in the folder of an incomplete path; without a slash, those in the outputs folder."""
    folder = Path(prefix).parent if "/" in prefix else Path(os.environ.get("AEM_OUTPUTS") or "outputs")
    return sorted(str(file.parent) for file in folder.expanduser().glob(f"*/{EXPERIMENT}"))


def _options(command: str | None) -> list[str]:
    """Return the options in the help of a command."""
    module = f"aem_exp.{COMMANDS[command].module}" if command not in (None, "run") else "aem_exp.__main__"
    first = COMMANDS[command].leading_arguments if command else ()
    page = io.StringIO()
    with contextlib.redirect_stdout(page), contextlib.suppress(SystemExit):
        import_module(module).main([*first, "--help"])
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", page.getvalue())))
