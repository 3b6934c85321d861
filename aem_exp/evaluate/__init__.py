"""A policy, scored on held-out tasks beside other agents.

`request` reads the arguments, `evaluation` plays and records, `agents` are what plays, `display` shows the progress and the
results; `command` is `python -m aem_exp.evaluate`. It imports everything up to `training`.
"""
