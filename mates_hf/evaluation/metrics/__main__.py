"""`python -m mates_hf.evaluation.metrics` prints the folder of the `evaluate` modules."""

import sys

from mates_hf.evaluation.metrics import metrics_dir

sys.stdout.write(f"{metrics_dir()}\n")
