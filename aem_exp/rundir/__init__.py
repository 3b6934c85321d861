"""The run directory: the files that a run writes. They are the source of truth: MLflow and reports are rebuilt from them.

One module per file or question: `metrics` (metrics.jsonl), `episodes` (episodes.parquet), `examples` (episodes.md),
`checkpoints`, `attempts` (attempts.jsonl), `lock` (which process or job owns the run), `membership` (which sweeps contain the
run), `archive` (a run in a few kilobytes), `measured_memory` (memory.json). The package imports only `core`, so a run can be
read where neither torch nor MLflow is installed.
"""

from typing import Final

EXPERIMENT: Final = "experiment.json"  # written first; with this file, a run can start and resume
BEFORE: Final = "before.json"  # score of the policy before the first step
DIVERGED: Final = "diverged.json"  # score of a run that diverged; such a run has no result.json
FINAL_SCORES: Final = "final_scores.json"  # scores on the final panel after the last steps, if the result is their mean
RESULT: Final = "result.json"  # written last; with this file, a run is finished
PROVENANCE: Final = "provenance.json"
EVALUATIONS: Final = "evaluations"  # one folder per evaluation, each with its own result.json
WARM_START: Final = "warm_start.json"  # what the warm start trained and measured; absent without one
FIXED_STATES: Final = "fixed_states.json"  # states on which the KL divergence of each step is measured
MODEL: Final = "model"  # the trained policy in Hugging Face format
