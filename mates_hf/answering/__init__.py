"""Answers for whoever must account for data: when a row was trained on, keeping rows out, a listing to sign.

Where it is used: by `mates-hf where`, `forget` and `audit`, on a run that has ended or been stopped. They read what a
run leaves on disk, so this folder stands right of all others, and a run knows nothing of it. What a run itself does
about rows that are kept out is in `training`: `blocked` (which they are), `replaced` (what stands in their place),
`redact` and `refit` (rounds and models without them).

One module a question: `rows_asked` which rows are meant, `where` at which step they were trained on, `forget` keeps
them out, `audit` lists it all.
"""
