"""The run dir: what a run leaves on disk, which is the truth; MLflow and reports can be rebuilt from it.

One module per file or question: `metrics` (metrics.jsonl), `episodes` (episodes.parquet), `examples` (episodes.md),
`checkpoints`, `attempts` (attempts.jsonl), `lock` (which process or job owns the run), `membership` (which sweeps it belongs
to), `archive` (a run in a few kilobytes). It imports `core` alone, so a run can be read where neither torch nor MLflow is
installed.
"""

from typing import Final

EXPERIMENT: Final = "experiment.json"  # written first: a run dir that has it can be run and resumed
BEFORE: Final = "before.json"  # the score of the policy before the first step
DIVERGED: Final = "diverged.json"  # the score of a run that can have no result
RESULT: Final = "result.json"  # written last: a run dir that has it is finished
PROVENANCE: Final = "provenance.json"
EVALUATIONS: Final = "evaluations"  # a folder each, with a result of its own
MODEL: Final = "model"  # the trained policy in Hugging Face format
