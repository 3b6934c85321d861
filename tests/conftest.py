"""One thread (two are up to 15 times slower on a busy machine), no network, and a toy world whose returns always differ."""

import os

os.environ.update(
    OMP_NUM_THREADS="1",
    TRL_EXPERIMENTAL_SILENCE="1",
    HF_HUB_OFFLINE="1",
    MLFLOW_DISABLE_TELEMETRY="true",
    TOKENIZERS_PARALLELISM="false",
)
