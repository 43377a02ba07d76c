"""The page of a run: what its rounds recorded as plain data, and the templates that make one HTML file of it.

`rounds` reads what was recorded, `verdict` says what came of it, `checks` what to worry about. `groups`, `texts` and
`spending` are its parts, `shapes` the geometry of its plots. `plain` makes text harmless, `render` fills templates.
`reporting.report` is the door. Trade-off: everything is a plain JSON value between the two, so the page shows nothing
that `--json` does not have.
"""
