"""Runs one experiment on this machine until it has a result. All other packages are combined here.

`execution` has `run`, which starts or resumes a run; `resume` finds the step to start from and prepares the run directory;
`session` trains and scores the policy, with `context` (the inputs of a start), `serving` (samplers), `scoring` (panels and
the result) and `recorder` (records of the run); `progress` shows a run while it is active, `summary` shows a finished run;
`command` is `python -m aem_exp.run RUN_DIR`.
"""

from aem_exp.run.execution import run

__all__ = ["run"]
