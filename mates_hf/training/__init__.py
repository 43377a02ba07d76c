"""The only folder that knows `transformers.Trainer`: the data order, the rounds, and the callback that drives both.

Read `rounds.py` first: `run_round` is the method.
"""
