"""The training loop: the only folder that knows `transformers.Trainer`. See `rounds.run_round`, which is the method.

Of its modules these know objects of the Trainer: `callback` (the hooks), the room `checks` (its loss, its kinds, its
arguments), `opening.run_folders` (its arguments), `resume.saved_state` (its state), and `checkpoints` and
`rounds_on_disk` (the names of its files). `loop` is the same without it, and `start` opens either. Three rooms more:
`stream`, a run on a stream; `replay`, which `verify` opens; and `fit` under `selector_fit`, which does one round's
`stages` without a run: it ends with a selector, and its warm-up uses a plain Trainer.
"""
