"""MLflow tracking. MLflow only shows runs: everything in it can be sent again from the run directories.

A run logs through `tracker`, and `writer` is the thread that sends. `store_uri` resolves the URI of a store and
`mlflow_store` opens it; `run_card` records the ids of a run there; `publish` writes tags, views and reports of sweeps, with
`views` for the saved views; `sync` sends the missing parts of a run. No other package imports MLflow.
"""
