"""`python -m mates_hf.evaluation.tasks` prints the folder that lm-eval's `--include_path` takes."""

import sys

from mates_hf.data.harness import TASKS_DIR

sys.stdout.write(f"{TASKS_DIR}\n")
