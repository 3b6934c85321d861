"""Environment variables of tests and benches: one thread (two are up to 15 times slower on a busy machine), no network.

Import this before torch.
"""

import os

os.environ.update(
    OMP_NUM_THREADS="1",
    TRL_EXPERIMENTAL_SILENCE="1",
    HF_HUB_OFFLINE="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    TOKENIZERS_PARALLELISM="false",
)
