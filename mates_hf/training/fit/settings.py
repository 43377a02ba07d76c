"""What a selector is fitted with where there is no training run: one flat, frozen, validated dataclass.

Where it is used: `fit_selector` takes its fields as keyword arguments, and `mates-hf fit` has an option for each. What
another value would change is said in `settings_that_count`: the rest may differ where a fit that was killed continues.
Trade-off: nothing heavy is imported, so that the command line knows its options without torch.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

_COSTS_ONLY = ("micro_batch_size", "gradient_checkpointing", "probe_tokens_per_batch", "device")
# What a refused fit may be given more or less of: its warm-up stays as it is.
ABOUT_PROBES = ("num_probes", "min_spearman")


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How a selector is fitted. Each field's help says what it changes.

    Raises:
        ValueError: a value outside its range; the message names the field, the value and the range.
    """

    warm_steps: int = field(
        default=200,
        metadata={
            "help": "Optimizer steps on the pool before the probe. They give the optimizer its moments, and the model "
            "the first look at the pool, in which every price changes."
        },
    )
    learning_rate: float = field(
        default=1e-4,
        metadata={
            "help": "Learning rate of the warm-up, constant after a tenth of its steps. The default suits models of "
            "100 million to a billion parameters; take a fifth of it for larger ones, and at most a tenth of the peak "
            "rate that the model was trained with."
        },
    )
    batch_size: int = field(
        default=32, metadata={"help": "Rows of one optimizer step of the warm-up, over all processes."}
    )
    micro_batch_size: int = field(
        default=8, metadata={"help": "Rows that each device trains on at once; lower it where memory runs out."}
    )
    max_length: int = field(
        default=1024,
        metadata={"help": "Tokens that a text is cut to, here and when the selector scores; at most the context."},
    )
    pool_rows: int = field(
        default=20_000,
        metadata={
            "help": "Rows of the pool that are read, drawn at random; at most half of them are for the warm-up."
        },
    )
    num_probes: int = field(
        default=2_000, metadata={"help": "Rows whose influence is measured; none of them is in the warm-up."}
    )
    min_spearman: float = field(
        default=0.1,
        metadata={"help": "Guard: held-out rank correlation below which no selector is written, in [-1, 1]."},
    )
    reference_limit: int = field(
        default=1024,
        metadata={"help": "Passages of the reference that are read, drawn at random where there are more."},
    )
    loss_on: Literal["all", "completion", "both"] = field(
        default="all",
        metadata={"help": "Tokens of a passage that count, where it has a prompt and a completion, or is of a task."},
    )
    seed: int = field(default=0, metadata={"help": "Seed of the rows that are read, of their order and of the fit."})
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto",
        metadata={
            "help": "Type that the model computes in; its weights are float32. `auto` is bfloat16 on a device that "
            "has it, and float32 on a CPU."
        },
    )
    device: Literal["auto", "cpu"] = field(
        default="auto", metadata={"help": "`cpu` leaves an accelerator alone. `accelerate launch` uses several."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Compute activations again in the backward pass: less memory, more time."}
    )
    probe_tokens_per_batch: int = field(
        default=8_192, metadata={"help": "Padded tokens in one forward pass of the probe; halved when out of memory."}
    )

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise ValueError(f"`{name}` must be {rule}, got {getattr(self, name)!r}.")

        least = {
            "warm_steps": 1, "batch_size": 1, "micro_batch_size": 1, "max_length": 2, "pool_rows": 20,
            "num_probes": 10, "reference_limit": 1, "seed": 0, "probe_tokens_per_batch": 1,
        }  # fmt: skip
        for name, number in least.items():
            value = getattr(self, name)
            is_whole = isinstance(value, int) and not isinstance(value, bool)
            require(is_whole and value >= number, name, f"a whole number of at least {number}")
        rate, spearman = self.learning_rate, self.min_spearman
        require(_is_number(rate) and 0 < rate < 1, "learning_rate", "above 0 and below 1")
        require(_is_number(spearman) and -1 <= spearman <= 1, "min_spearman", "in [-1, 1]")
        require(self.loss_on in ("all", "completion", "both"), "loss_on", "'all', 'completion' or 'both'")
        require(self.dtype in ("auto", "float32", "bfloat16"), "dtype", "'auto', 'float32' or 'bfloat16'")
        require(self.device in ("auto", "cpu"), "device", "'auto' or 'cpu'")
        require(isinstance(self.gradient_checkpointing, bool), "gradient_checkpointing", "True or False")

    @property
    def window_steps(self) -> int:
        """Optimizer steps over which the weights are averaged that the probe looks at."""
        return max(min(32, self.warm_steps // 2), 1)

    def settings_that_count(self) -> dict[str, Any]:
        """All fields but those that only change what a fit costs."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in _COSTS_ONLY}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def settings_of(given: dict[str, Any]) -> FitSettings:
    """Settings from keyword arguments.

    Args:
        given: Fields of `FitSettings`.

    Returns:
        The settings.

    Raises:
        TypeError: a name is no field; says which there are.
    """
    names = [one.name for one in dataclasses.fields(FitSettings)]
    wrong = sorted(set(given) - set(names))
    if wrong:
        raise TypeError(f"`{'`, `'.join(wrong)}` is no setting of a fit. The settings are {', '.join(names)}.")
    return FitSettings(**given)
