"""What is asked of a run before its first step: the Trainer's arguments, its loss, its processes, its longest row.

A closed room: `callback`, `loop`, `start` and `fit/warm_up` open it. Read `trainer` first.
"""
