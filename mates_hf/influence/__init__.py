"""Measured: what training on a candidate does to the reference loss. Read `probe.py` first.

`probe_directional` and `probe_one_step` are the two probes. `passes` runs the live model and gives one loss a row;
`reading`, with `comparison`, `compared_rows` and `compared_batches`, finds how the run's own loss follows from a row;
`example_losses` are for models of which no row alone has a loss. `difference`, `gradient_sum`,
`usual_batches` and `reference_path`, with `path_length`, are the parts of the directional probe. `preconditioner`
says how the run's optimizer would use a gradient, and opens the room `optimizer/`. `shards` keep what was measured.
"""
