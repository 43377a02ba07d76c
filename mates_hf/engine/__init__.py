"""The live model: how it runs, where its weights and optimizer state lie, and how every bit of them is put back.

`preserve` leaves no trace of a probe or an evaluation. `processes` lets the processes of a run speak to one another,
and `watch` tells them which one failed. `averaging`, in `pieces`, is the mean of the last weights that a round is
measured at; `digest` is a number that changes with any weight. `model_traits` knows what kinds of models there are.

`weight_store` says where the weights are: in the model, or in an engine's flat buffers, as `fragments`. What is known
of DeepSpeed is in the `deepspeed_*` modules.
"""
