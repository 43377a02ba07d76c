"""The n-gram influence model from the inside. A closed room: `ngram_model` alone opens it.

`tables` hold what is predicted by, `additive` solves for them, `kernels` score rows with them, `explain` names the
strongest n-grams.
"""
