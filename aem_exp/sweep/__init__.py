"""Many experiments that answer one question: arms and seeds, or the trials of a study.

`question` reads the YAML of a sweep; `study` and `trial` search with Optuna; `command` is `python -m aem_exp.sweep NAME`.
"""
