"""A policy, scored on held-out tasks beside other agents.

`request` reads what is asked, `evaluation` plays and records it, `agents` are those who play, `display` shows them at
it; `command` is `python -m aem_exp.evaluate`. It imports everything up to `training`.
"""
