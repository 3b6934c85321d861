"""What a sweep came to: tables, verdicts with their uncertainty, figures, a page.

`analysis` computes, from archives of runs; `sections` says it, `figures` draws it, `render` makes the page; `command` is
`python -m aem_exp.report NAME`.
"""
