"""One experiment, on this machine, to a result: here all parts meet.

`execution` is `run`, which begins or continues a run; `resume` finds where it begins and prepares the run dir; `session` trains
and scores the policy, with `context` (what a start is given), `serving` (what generates), `scoring` (panels and the result) and
`recorder` (what is written down); `summary` shows a finished run; `command` is `python -m aem_exp.run RUN_DIR`.
"""

from aem_exp.run.execution import run

__all__ = ["run"]
