"""Many experiments that answer one question: arms and seeds, or the trials of a study.

`question` makes the `cells` of a `sweep_file` or of a grid; `command` is `python -m aem_exp.sweep NAME`: it shows the `plan`
and, by `submit`, sends or runs what is missing. A study searches with Optuna: `study_spec` is what its file says,
`study_space` its parameters, `study` asks for trials and tells how they ended, `study_status` shows it, `study_submit` sends
its workers, and each of these is a `trial`.
"""
