"""A policy, scored on held-out tasks beside other agents.

`request` reads the arguments, `panels` plays and scores a panel, `evaluation` does that for an agent and records it, `agents`
are what plays, `display` shows the progress and the results; `command` is `python -m aem_exp.evaluate`. It imports everything
up to `training`.
"""
