"""The training loop: the only folder that knows `transformers.Trainer`. See `rounds.run_round`, which is the method.

Of its modules these know objects of the Trainer: `callback` (the hooks), `own_loss` (its loss), `preference` (its
kinds), `checks`, `parallel` and `opening.run_folders` (its arguments), `resume.saved_state` (its state), and
`checkpoints` and `rounds_on_disk` (the names of its files). `loop` is the same without it, and `start` opens either.
`selector_fit` does one round's `stages` without a run: it ends with a selector, and its warm-up uses a plain Trainer.
"""
