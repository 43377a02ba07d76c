"""Predicted: from a candidate's tokens to its influence, by a model that is fitted to the labels of a probe.

`ngram_model` (opens `ngram/`) and `encoder_model` (opens `encoder/`) are the two that are shipped to users;
`hidden_states` reads the run's own model. `judge` holds labels out and reports how well a fit predicts them, `score`
runs a fitted model over a dataset, and `artifacts` saves and loads one.
"""
