"""MLflow, which shows runs and is never the truth: everything that it holds can be sent again from the run dirs.

`tracker` is what a run logs through, `writer` its thread; `mlflow_store` opens a store and `store_uri` names one;
`run_card` is what a run is called there; `publish` shows sweeps, `views` their saved views; `sync` sends what is
missing. MLflow is spoken here alone.
"""
