"""`episodes.md`: a few episodes of a run, as Markdown."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aem_exp.rundir import episodes
from aem_exp.rundir.episodes import FILE, PARTS


def select_examples(run_dir: Path, tasks: int = 3, members: int = 3) -> list[dict[str, Any]]:
    """Select episodes: `tasks` held-out tasks before and after training, then `members` training episodes of the last step."""
    file = run_dir / FILE
    files = [file] if file.exists() else sorted((run_dir / PARTS).glob("*.parquet"))
    if not files:
        return []
    import pyarrow.compute

    in_full = pyarrow.compute.field("responses").is_valid()
    rows = [row for part in files for row in episodes.read(part, filters=in_full).to_pylist()]
    held_out = [row for row in rows if row["split"] != "train" and row["member"] == 0]
    trained = [row for row in rows if row["split"] == "train"]
    first = min((row["step"] for row in held_out), default=0)
    chosen = list(dict.fromkeys(row["task"] for row in held_out if row["step"] == first))[:tasks]
    last = max((row["step"] for row in held_out), default=0)
    pairs = [row for task in chosen for row in held_out if row["task"] == task and row["step"] in (first, last)]
    newest = max((row["step"] for row in trained), default=0)
    return pairs + [row for row in trained if row["step"] == newest][:members]


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Format episodes as Markdown: observations, responses, rewards, entropy and alpha."""
    about = (
        "Entropy is the mean over a response's tokens, in nats; alpha is what the advantage of the response was "
        "multiplied by (absent where nothing was trained on the episode).\n"
    )
    return "\n".join(["# Episodes\n", about, *(_episode_markdown(row) for row in rows)])


def _episode_markdown(row: dict[str, Any]) -> str:
    outcome = "won" if row.get("won") else "not won"
    ended = {"over": "", "turns": ", out of turns", "context": ", out of context"}.get(
        row["ended"], f", {row['ended']}"
    )
    facts = f"{outcome}{ended}, return {row['return']:g}, after {row['step']} steps of training"
    error = f"\n{_code_block(row['error'])}" if row.get("error") else ""
    turns = (_turn_markdown(number, response) for number, response in enumerate(row.get("responses") or [], start=1))
    goal = [f"{_block_quote(row['goal'])}\n"] if row.get("goal") else []
    return "\n".join([f"## {row['split']}: {row['task']}\n", *goal, f"**{facts}**\n{error}", *turns])


def _turn_markdown(number: int, response: dict[str, Any]) -> str:
    alpha = response.get("alpha")
    facts = [
        f"reward {response['reward']:g}",
        *([f"entropy {response['entropy']:.3f}"] if response["entropy"] is not None else []),
        *([f"alpha {alpha:.3f}"] if alpha is not None else []),
        *([] if response.get("valid", True) else ["invalid"]),
    ]
    observation, text = _block_quote(response["observation"]), _code_block(response["text"])
    return f"### Turn {number}: {', '.join(facts)}\n\n{observation}\n\n{text}\n"


def _block_quote(text: str, max_characters: int = 2000) -> str:
    return "\n".join(f"> {line}" for line in _truncate(text, max_characters).splitlines())


def _code_block(text: str, max_characters: int = 4000) -> str:
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{_truncate(text, max_characters)}\n{fence}"


def _truncate(text: str, max_characters: int) -> str:
    more = len(text) - max_characters
    return text if more <= 0 else f"{text[:max_characters]}… ({more} more characters)"
