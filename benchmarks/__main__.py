"""`python -m benchmarks NAME` runs a benchmark; `--help` lists them, `--check` compares pages with their JSON."""

import sys

from benchmarks.lab.wheels import install_from

if __name__ == "__main__":
    install_from(sys.argv[1:])  # before torch and all else is imported
    from benchmarks.lab.harness import main

    sys.exit(main(sys.argv[1:]))
