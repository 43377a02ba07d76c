"""How much a candidate helps: measured on a few by a probe, then predicted for all by a data influence model.

Measured: `probe` (what a probe is), `directional` and `one_step` (the two), `preconditioner` with its `*_step` modules
(how the optimizer would use a gradient), `losses` and `preserve` (running the live model without a trace). Predicted:
`ngram` with `additive`, `tables` and `kernels`, judged by `fit`.
"""
