"""One experiment, on this machine, to a result: here all parts meet.

`execution` is `run`, which begins or continues a run; `session` holds the parts that train and evaluate; `summary` is
what a person sees of a finished run; `command` is `python -m aem_exp.run RUN_DIR`.
"""

from aem_exp.run.execution import run

__all__ = ["run"]
