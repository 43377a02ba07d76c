"""What may be trained on and what the model should get better at, both as token rows.

`rows` is the one form that leaves this folder. `pool` makes it of a training dataset and its collator: `collated` row
by row, `columns` and `arrow` fast where that is known to say the same. `reference` makes it of a reference task, and
`corpus` makes a real corpus out of what is installed. Where it is used: every other folder gets its rows from here,
and none of them looks at a dataset's columns.
"""
