"""Tables of the results of `aem-exp proxy`."""

from collections.abc import Mapping, Sequence
from typing import Any

Results = Mapping[str, Mapping[str, Any]]  # policy -> content of its result.json
GATES = {"gated": 0.1, "ungated": 0.0}  # nats: the gate of the paper, and no gate
GROUP_ROWS = {  # statistic of `statistics.group_validity` -> its row
    "r": "r with S - H(s)",
    "r_within": "  part within states",
    "r_between": "  part between states",
    "within": "r within states",
    "within_share": "variance of alpha within states",
    "equal_length": "r at equal length",
    "within_equal_length": "r within states at equal length",
    "length": "alpha with length",
    "turn": "alpha with turn",
    "position": "alpha with position",
    "state_entropy": "alpha with H(s)",
}


def format_groups(results: Results) -> str:
    """Format the results at states of rollout groups as a table."""
    first = next(iter(results.values()))
    lines = [
        f"1 - alpha against S - H(s): {first['states']} states of {first['groups']} groups, {first['samples']} responses at each",
        "(in brackets: 95 % intervals over groups)",
    ]
    for name, gate in GATES.items():
        lines += ["", f"{f'gate {gate:g}' if gate else 'no gate':34}" + "".join(f"{agent:>22}" for agent in results)]
        lines += [
            f"{'responses that are modulated':34}" + "".join(f"{r[name]['open']:>22.0%}" for r in results.values())
        ]
        for key, title in GROUP_ROWS.items():
            cells = [
                f"{_number(r[name][key], '.2f')} {_interval(r[name][f'{key}_interval'], '.2f')}"
                for r in results.values()
            ]
            lines.append(f"{title:34}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def format_states(results: Results) -> str:
    """Format the results at single states as a table."""
    first = next(iter(results.values()))
    lines = [
        f"1 - alpha against S - H(s): {first['ungated']['states']} states, {first['samples']} responses at each",
        "(in brackets: 95 % intervals over states; the paper: r = 0.63, 55 of 64 states)",
        f"{'':20}{'r':>20}{'states agree':>26}{'responses agree':>26}",
    ]
    for agent, result in results.items():
        for name, gate in GATES.items():
            f = result[name]
            title = f"{agent}, gate {gate:g}" if gate else f"{agent}, no gate"
            r = f"{_number(f['r'], '.2f')} {_interval(f['r_interval'], '.2f')}"
            states = f"{f['states_agree']} of {f['states_open']} {_interval(f['states_agree_interval'], '.0%')}"
            share = f"{_number(f['responses_agree'], '.0%')} {_interval(f['responses_agree_interval'], '.0%')}"
            lines.append(f"{title:20}{r:>20}{states:>26}{share:>26}")
    return "\n".join(lines)


def _interval(ends: Sequence[float | None], spec: str) -> str:
    return "[" + ", ".join(_number(end, spec) for end in ends) + "]"


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
