"""Task files for lm-eval: the groups `mates_zero_shot` (Hub) and `mates_zero_shot_local` (local files).

Where it is used: data for lm-eval, which finds them by `--include_path $(python -m mates_hf.evaluation.tasks)`. What
they score is in `benchmarks`, how in `item_metrics`.
"""
