"""Predicted: from a candidate's tokens to its influence, by a model that is fitted to the labels of a probe.

`ngram_model` (opens `ngram/`) and `encoder_model` (opens `encoder/`) are fitted to labels; `hidden_states` and
`feature_model` (opens `features/`) read the run's own model, the latter on rows of any modality; `text_model` (opens
`text/`) is distilled from any of them, for corpora that are scored without a tokenizer. `judge` holds labels out and
reports how well a fit predicts them, `score` runs a fitted model over a dataset, and `artifacts` saves and loads one.
"""
