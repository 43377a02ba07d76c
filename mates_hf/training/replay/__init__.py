"""A finished round, decided once more from its files alone, with numpy and pyarrow.

Where it is used: `training.verify` opens each round of a run as a `FinishedRound`, the module to read first. `reader`
reads files with distrust; each other module checks one matter of a round: `blocked` the rows that must not be used,
`passes` and `passages`, `length` and what was found inside, `groups`, and `stream` for buffers.
"""
