"""Scores a policy and other agents on held-out tasks.

`request` reads the arguments, `panels` plays and scores a panel, `evaluation` evaluates one agent and records the result,
`agents` has the agents, `display` shows progress and results; `command` is `python -m aem_exp.evaluate`. The package may
import everything up to `training`.
"""
