"""The run dir: what a run leaves on disk, which is the truth; MLflow and reports can be rebuilt from it.

One module per file or question: `metrics` (metrics.jsonl), `episodes` (episodes.parquet), `checkpoints`, `attempts`
(attempts.jsonl), `lock` (which process or job owns the run), `membership` (which sweeps it belongs to), `archive` (a run in
a few kilobytes). It imports `core` alone, so a run can be read where neither torch nor MLflow is installed.
"""

from typing import Final

RESULT: Final = "result.json"  # written last: a run dir that has it is finished
