"""One-update branches: several modulations update the same weights on the same batch, each once, and their effects are compared.

`command` reads the command line, `trainer` takes the updates, `probe` measures their effect at fixed states, `measures` has the
estimators, and `result` the statistics over batches.
"""
