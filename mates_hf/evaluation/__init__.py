"""How good the model is: evaluation of the live model while it trains.

Place in the flow: right of `data` (it reads reference and development passages), left of everything that chooses data,
so no choice can look at a result.
"""
