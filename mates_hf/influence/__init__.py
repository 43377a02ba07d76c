"""How much a candidate helps: measured on a few by a probe, then predicted for all by a data influence model.

Measured: `probe` (what a probe is), `directional` and `one_step` (the two), `preconditioner` with its `*_step` modules
(how the optimizer would use a gradient), `losses` (running the live model), `flops` (what that costs). Predicted:
`ngram` with `additive`, `tables` and `kernels`; `encoder` with `folding` and `fine_tune`; `hidden_states`; the last
two with `pooling` and `ridge`. `fit` judges all of them, `artifacts` saves them, `scoring` runs them over datasets.
"""
