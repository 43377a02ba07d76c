"""What a pilot is asked: one flat, frozen, validated dataclass, written down before the first step.

Where it is used: `run_pilot` takes its fields as keyword arguments, and `mates-hf pilot` has an option for each. Kill
criteria are among them, so that nobody chooses them when the result is known. Trade-off: nothing heavy is imported, so
that the command line knows its options without torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# Sizes of a pilot that ends in minutes on a CPU; a planned run that is not named is an example.
TINY: dict[str, Any] = {
    "params": 410e6, "tokens": 26e9, "pilot_params": 0.5e6, "pilot_tokens": 246_000, "row_tokens": 64,
    "batch_rows": 16, "reference_limit": 192, "held_out_limit": 128, "vocab_size": 2_048, "learning_rate": 2e-3,
}  # fmt: skip
_SCALE_PARAMS, _SCALE_TOKENS = 10, 100  # of the planned run over the pilot
MAY_GROW = "seeds"  # further seeds are what "measure more" asks for


@dataclass(frozen=True, kw_only=True)
class PilotSettings:
    """How a pilot is run. Each field's help says what it changes.

    Raises:
        ValueError: a value outside its range; the message names the field, the value and the range.
    """

    params: float = field(metadata={"help": "Parameters of the planned run, such as 410M."})
    tokens: float = field(metadata={"help": "Tokens of the planned run, such as 26B."})
    looked_up: float = field(
        default=0.0,
        metadata={"help": "Of these parameters, those of tables that ids are looked up in, unless the head is tied."},
    )
    batch_tokens: float = field(
        default=524_288.0, metadata={"help": "Tokens of an optimizer step of the planned run."}
    )
    planned_row_tokens: float = field(default=1024.0, metadata={"help": "Tokens of a row of the planned run."})
    devices: int = field(default=8, metadata={"help": "Devices of the planned run."})
    device_flops: float = field(
        default=4e14,
        metadata={"help": "FLOPs a second that one of them reaches in training (40% of an H100 in bf16)."},
    )
    price: float | None = field(
        default=None, metadata={"help": "Price of one device for an hour, in any currency. None leaves money out."}
    )
    labour: float = field(default=0.0, metadata={"help": "What the people of the pilot cost, in the same currency."})
    pilot_params: float = field(
        default=0.0, metadata={"help": "Parameters of the pilot's model, about. 0: a tenth of the planned run."}
    )
    pilot_tokens: float = field(
        default=0.0, metadata={"help": "Tokens of each arm of the pilot. 0: a hundredth of the planned run."}
    )
    model: str | None = field(
        default=None,
        metadata={"help": "Checkpoint that all arms start from, a folder or a Hub id. None: fresh weights."},
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Tokenizer. None: that of `model`, or one trained on the pool."}
    )
    vocab_size: int = field(default=8_192, metadata={"help": "Vocabulary of a tokenizer that is trained on the pool."})
    row_tokens: int = field(default=512, metadata={"help": "Tokens of a row of the pilot; passages are cut to it."})
    batch_rows: int = field(default=64, metadata={"help": "Rows of one optimizer step of the pilot."})
    micro_batch_rows: int = field(default=16, metadata={"help": "Rows that the device trains on at once."})
    learning_rate: float = field(
        default=5e-4, metadata={"help": "Learning rate of the pilot, constant after a warm-up."}
    )
    column: str = field(default="text", metadata={"help": "Column of the pool's texts."})
    reference_column: str = field(default="text", metadata={"help": "Column of the passages."})
    pool_documents: int = field(
        default=200_000,
        metadata={"help": "Documents of the pool that are read, drawn at random where there are more."},
    )
    group_column: str | None = field(
        default=None,
        metadata={"help": "Column of the pool with the group of each document. None: `kind` where there is one."},
    )
    reference_limit: int = field(default=512, metadata={"help": "Passages that labels and filters may see."})
    held_out_limit: int = field(default=256, metadata={"help": "Passages that all arms are judged by."})
    group_rows: int = field(default=24, metadata={"help": "Rows of each group that are kept out of training."})
    longer: float = field(
        default=2.0, metadata={"help": "The random arm trains so many times longer, to see what it needs."}
    )
    evaluations: int = field(default=12, metadata={"help": "How often an arm is judged on its way."})
    seeds: int = field(default=3, metadata={"help": "Seeds that are reported. A later call may raise it."})
    seed: int = field(default=0, metadata={"help": "First of them. Filters are tuned on another one."})
    static_filter: Literal["moore-lewis", "fasttext", "linear"] = field(
        default="moore-lewis",
        metadata={
            "help": "The rival: `moore-lewis`, log-odds of words and pairs, which need no package; `fasttext`; or "
            "`linear`, a logistic regression on hashed words and pairs by scikit-learn."
        },
    )
    update_steps: int | None = field(
        default=None, metadata={"help": "Most optimizer steps of a round. None: what `plan` proposes for the pilot."}
    )
    num_probes: int | None = field(
        default=None, metadata={"help": "Candidates that a round probes. None: what `plan` proposes for the pilot."}
    )
    selection_ratio: float = field(
        default=0.2, metadata={"help": "Share of the candidates that ours and filters choose."}
    )
    random_share: float = field(
        default=0.3, metadata={"help": "Share of the chosen rows that is drawn at random, of ours and of filters."}
    )
    weak_rounds: int = field(
        default=2, metadata={"help": "Kill: so many rounds of a run whose held-out Spearman interval includes 0."}
    )
    protected: tuple[str, ...] = field(
        default=(), metadata={"help": "Groups that must not get worse; `pool` is all of the pool's own text."}
    )
    max_harm: float = field(
        default=0.1,
        metadata={"help": "Kill: nats per token by which a protected group may be worse than with random rows."},
    )
    max_idle: float = field(
        default=0.05, metadata={"help": "Kill: share of the planned run's time that devices may wait for rounds."}
    )
    more_seeds: int = field(
        default=6,
        metadata={"help": "Further seeds that you would run at most to decide whether the filter is beaten."},
    )
    max_smaller: float = field(
        default=20.0,
        metadata={"help": "A go needs a planned model at most so many times larger than that of the pilot."},
    )
    max_shorter: float = field(
        default=200.0,
        metadata={"help": "A go needs a planned run at most so many times longer than an arm of the pilot."},
    )
    device: Literal["auto", "cpu"] = field(default="auto", metadata={"help": "`cpu` leaves an accelerator alone."})

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise ValueError(f"`{name}` must be {rule}, got {getattr(self, name)!r}.")

        if isinstance(self.protected, list):
            object.__setattr__(self, "protected", tuple(self.protected))
        above = (
            "params",
            "tokens",
            "batch_tokens",
            "planned_row_tokens",
            "device_flops",
            "learning_rate",
            "max_idle",
            "max_smaller",
            "max_shorter",
        )
        for name in above:
            require(_is_number(getattr(self, name)) and getattr(self, name) > 0, name, "a number above 0")
        for name in ("pilot_params", "pilot_tokens"):
            if getattr(self, name) == 0:
                scale = _SCALE_PARAMS if name == "pilot_params" else _SCALE_TOKENS
                object.__setattr__(self, name, getattr(self, name.removeprefix("pilot_")) / scale)
            require(_is_number(getattr(self, name)) and getattr(self, name) > 0, name, "a number above 0")
        for name in ("looked_up", "labour", "max_harm"):
            require(_is_number(getattr(self, name)) and getattr(self, name) >= 0, name, "a number of at least 0")
        require(self.looked_up < self.params, "looked_up", f"below `params` ({self.params:g})")
        require(self.price is None or (_is_number(self.price) and self.price > 0), "price", "None or a number above 0")
        least = {
            "devices": 1, "vocab_size": 300, "row_tokens": 16, "batch_rows": 1, "micro_batch_rows": 1,
            "pool_documents": 100, "reference_limit": 8, "held_out_limit": 8, "group_rows": 4, "evaluations": 4,
            "seeds": 1, "seed": 0, "weak_rounds": 1, "more_seeds": 0,
        }  # fmt: skip
        for name, number in least.items():
            require(_is_whole(getattr(self, name), number), name, f"a whole number of at least {number}")
        for name, number in (("update_steps", 4), ("num_probes", 20)):
            given = getattr(self, name)
            require(given is None or _is_whole(given, number), name, f"None or a whole number of at least {number}")
        require(_is_number(self.longer) and 1 <= self.longer <= 20, "longer", "from 1 to 20")
        require(_is_number(self.selection_ratio) and 0 < self.selection_ratio < 1, "selection_ratio", "in (0, 1)")
        require(_is_number(self.random_share) and 0 <= self.random_share < 1, "random_share", "in [0, 1)")
        filters = ("moore-lewis", "fasttext", "linear")
        require(self.static_filter in filters, "static_filter", "'moore-lewis', 'fasttext' or 'linear'")
        require(self.device in ("auto", "cpu"), "device", "'auto' or 'cpu'")
        ok = isinstance(self.protected, tuple) and all(isinstance(name, str) and name for name in self.protected)
        require(ok, "protected", "names of groups")
        for name in ("column", "reference_column"):
            require(isinstance(getattr(self, name), str) and getattr(self, name) != "", name, "a non-empty name")
        for name in ("model", "tokenizer", "group_column"):
            given = getattr(self, name)
            require(given is None or (isinstance(given, str) and given != ""), name, "None or a non-empty name")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values of all fields."""
        found = dataclasses.asdict(self)
        return {**found, "protected": list(self.protected)}


def settings_of(given: Mapping[str, Any], *, tiny: bool) -> PilotSettings:
    """Settings from keyword arguments.

    Args:
        given: Fields of `PilotSettings`.
        tiny: Whether what is not given has the sizes of `TINY`.

    Returns:
        The settings.

    Raises:
        TypeError: a name is no field; says which there are.
        ValueError: the planned run is not named, or a value is out of its range.
    """
    names = [one.name for one in dataclasses.fields(PilotSettings)]
    wrong = sorted(set(given) - set(names))
    if wrong:
        raise TypeError(f"`{'`, `'.join(wrong)}` is no setting of a pilot. The settings are {', '.join(names)}.")
    values = {**(TINY if tiny else {}), **given}
    missing = [name for name in ("params", "tokens") if values.get(name) is None]
    if missing:
        raise ValueError(
            f"A pilot must know the planned run, and `{'` and `'.join(missing)}` is not given. Name its parameters "
            "and its tokens, or take `tiny` to see a pilot in some minutes."
        )
    return PilotSettings(**values)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
