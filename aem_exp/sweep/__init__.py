"""Sweeps: many experiments that answer one question, either as arms and seeds or as the trials of a study.

`question` turns a `sweep_file` or a command-line grid into `cells`. `command` is `python -m aem_exp.sweep NAME`: it shows the
`plan`, and `submit` submits or runs the missing cells. A study searches parameters with Optuna: `study_spec` holds its file,
`study_space` its parameters, `study` its storage and trials, `study_status` its progress; `study_submit` submits its workers, and
each worker runs one `trial`.
"""
