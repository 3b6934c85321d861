"""The report of a sweep: tables, differences with intervals and verdicts, and figures.

`analysis` compares arms from archives of runs. `external_runs` reads runs of other frameworks from CSV files. `sections` builds
the parts of the report, `figures` draws SVG figures, and `render` writes HTML, Markdown and CSV. `command` is
`python -m aem_exp.report NAME`.
"""
