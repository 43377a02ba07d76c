"""`python -m mates_hf.configs NAME` prints the path of a config for `accelerate launch --config_file`."""

import sys
from pathlib import Path

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))


def main(arguments: list[str]) -> str:
    """The path of the config that was asked for; the folder of all of them where none was.

    Args:
        arguments: None, or the name of one config.

    Returns:
        A path.

    Raises:
        SystemExit: There is no such config; names those that there are.
    """
    folder = Path(__file__).resolve().parent
    if not arguments:
        return str(folder)
    if len(arguments) > 1 or arguments[0] not in NAMES:
        raise SystemExit(f"`NAME` must be one of {', '.join(NAMES)}, got {' '.join(arguments)!r}.")
    return str(folder / f"{arguments[0]}.yaml")


if __name__ == "__main__":
    sys.stdout.write(f"{main(sys.argv[1:])}\n")
