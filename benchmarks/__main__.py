"""`python -m benchmarks NAME` runs a benchmark; `--help` lists them, `--check` compares pages with their JSON."""

import sys

from benchmarks.lab.harness import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
