"""Benchmarks: `python -m benchmarks --help` lists the questions; `lab/` is what they share, `results/` the answers.

Each question is one module (or one folder) of `quality/`, `cost/` or `reliability/`. It imports from `lab/` and from
`mates_hf`, never from another question.
"""
