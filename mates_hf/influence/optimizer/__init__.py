"""How each kind of optimizer turns a gradient into a step. A closed room: `preconditioner` alone opens it.

`parameter_step` is what all of them promise; `adaptive_step` with `adaptive_state`, `factored_step`, `muon_step` and
`sgd_step` keep it.
"""
