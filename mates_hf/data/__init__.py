"""What may be trained on and what the model should get better at, both as token rows.

`rows` is the one form that leaves this folder. `pool` makes it of a training dataset and its collator: `collated` row
by row, `columns` and `arrow` fast where that is known to say the same. `reference` makes it of a reference task, and
`corpus` makes a real corpus out of what is installed. Place in the flow: first. Nothing to the right of this folder
looks at a dataset's columns.
"""
