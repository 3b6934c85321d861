"""What a sweep came to: tables, verdicts with their uncertainty, figures, a page.

`analysis` computes, from archives of runs (`external_runs` reads those of others); `sections` are the parts of the report,
`figures` draws, `render` makes the page; `command` is `python -m aem_exp.report NAME`.
"""
