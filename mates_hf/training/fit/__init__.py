"""The room under `selector_fit`: a selector without a run, in parts.

In the order of the flow: `settings` and `inputs` are what was asked for and what is read, `place` where it lies,
`warm_up` gives the weights that are probed, `probe` their labels, and `result` says what came of it.
"""
