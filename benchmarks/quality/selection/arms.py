"""The arms of `selection`: all that two runs of one seed may differ in.

Trade-off: one record with a default for everything, so that an arm reads as its difference from the library's
defaults.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from benchmarks.lab.rivals import MINILM, PACKAGES, SETTINGS_TRIED, NeedsPackage
from mates_hf.flops import PATH_STEPS

Rank = Literal[
    "random", "stratified", "influence", "domain means", "best domain", "low loss", "DSIR", "fastText", "similarity"
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm(NeedsPackage):
    """How a round chooses its rows."""

    # what candidates are ranked by. `domain means` and `best domain` are told the domain, and use the same probes as
    # `influence` does; `stratified` takes as many of each domain; the last three are static.
    rank: Rank = "influence"
    probe: Literal["directional", "one-step"] = "directional"  # how labels are measured
    # points at which the directional probe takes the reference gradient; 1 is a single step
    path_steps: int = PATH_STEPS
    path_rate: float = 0.5  # length of a stride from one to the next, in steps of the run
    loss_on: Literal["all", "completion"] = "all"  # the reference tokens that labels are about
    averaged: bool = True  # whether labels are of weights averaged over the last steps, else of the live ones
    # what the n-gram influence model is fitted on; `encoder` fine-tunes a small encoder on documents
    labels: Literal["token", "document", "both", "encoder"] = "token"
    pooled: bool = True  # whether earlier rounds' labels count
    once: bool = False  # whether the first round's influence model serves all rounds
    # candidates probed in a round; None probes those to choose from and ranks them by their labels
    probes: int | None = 500
    passages: int = 256  # of the reference, drawn anew each round
    temperature: float = 0.0  # in standard deviations of the labels; 0 is top-k
    ratio: float = 0.2  # of the slice that is chosen
    scope: Literal["slice", "pool"] = "slice"  # `slice`, or `pool`: all rows not trained on yet
    again: bool = False  # whether rows come back: every round draws its slice from all rows
    round_steps: int = 100  # optimizer steps of a round
    # what is added to this ranking, both in their standard deviations: a static one, or that by labels of the
    # passages' last words, which cost a probe more
    beside: Literal["fastText", "last word"] | None = None
    package: str | None = None  # what must be installed
    setting: str = "common"  # of a static filter; `tuned` is the one that ended lowest on the seeds of the tuning
    # what the rows of a round have among them: the reference `passages` themselves, or `random` rows
    mixed: Literal["passages", "random"] | None = None
    share: float = 0.0  # of a round's rows that are mixed in

    @property
    def probed(self) -> bool:
        """Whether it measures influence."""
        return self.rank in ("influence", "domain means", "best domain")


RANDOM, OURS, FRUGAL = "random", "ours", "ours, frugal"
# Neither is MATES: no encoder is fitted, on hundreds of labels instead of 80,000, in rounds of 40 steps.
ORACLE_TABLES, CHEAP_TABLES = "one-step oracle, n-gram tables", "cheap labels, n-gram tables"
ENCODER, ORACLE_LABEL = "one-step oracle, small encoder", "ours, labels of the one-step oracle"

_LAST_WORD: dict[str, Any] = {
    "path_steps": 1, "loss_on": "completion", "averaged": False, "pooled": False, "labels": "document",
    "temperature": 1.0, "round_steps": 40,
}  # fmt: skip
_FRUGAL: dict[str, Any] = {"probes": 200, "passages": 64, "round_steps": 200}
_ENCODER: dict[str, Any] = {"probe": "one-step", "passages": 64, "labels": "encoder", "round_steps": 100}


def _static(rank: Any, **changes: Any) -> Arm:
    return Arm(rank=rank, round_steps=40, package=PACKAGES.get(rank), **changes)


# The order is that of the tables.
ARMS: dict[str, Arm] = {
    RANDOM: Arm(rank="random", round_steps=40),
    OURS: Arm(),
    FRUGAL: Arm(**_FRUGAL),
    ORACLE_TABLES: Arm(probe="one-step", probes=200, passages=64, **_LAST_WORD),
    CHEAP_TABLES: Arm(**_LAST_WORD),
    ENCODER: Arm(package=MINILM, **{**_LAST_WORD, **_ENCODER}),
    ORACLE_LABEL: Arm(probe="one-step", labels="document", passages=64),
    "labels of one step, rounds of 40 steps": Arm(path_steps=1, round_steps=40),
    "one round's influence": Arm(once=True),
    "stratified by domain": _static("stratified"),
    "domain means": Arm(rank="domain means"),
    "random in the best domain": Arm(rank="best domain"),
    "low loss": _static("low loss"),
    "DSIR": _static("DSIR"),
    "fastText": _static("fastText"),
    "similarity": _static("similarity"),
    "DSIR, tuned": _static("DSIR", setting="tuned"),
    "fastText, tuned": _static("fastText", setting="tuned"),
    "similarity, tuned": _static("similarity", setting="tuned"),
    "random, passages mixed in": Arm(rank="random", round_steps=40, mixed="passages", share=0.2),
    "ours, random mixed in": Arm(mixed="random", share=0.5),
    "ours and fastText": Arm(beside="fastText", package="fasttext"),
    "ours, rounds of 20 steps, and fastText": Arm(beside="fastText", package="fasttext", round_steps=20),
    "ours, frugal, and fastText": Arm(beside="fastText", package="fasttext", **_FRUGAL),
    "top-k of labels, every step": Arm(probes=None, path_steps=1, passages=64, averaged=False, round_steps=1),
}
STATIC = tuple(name for name, arm in ARMS.items() if arm.rank in ("stratified", *SETTINGS_TRIED))
SLOW = ("top-k of labels, every step", ORACLE_TABLES, ENCODER, ORACLE_LABEL)

# Settings of the static filters, tried on seeds that no table reports.
TUNING: dict[str, Arm] = {
    f"{rank}: {setting}": _static(rank, setting=setting)
    for rank, settings in SETTINGS_TRIED.items()
    for setting in settings
}

# One thing changed; to be read against `ours`.
ABLATIONS: dict[str, Arm] = {
    "labels of one step": Arm(path_steps=1),
    "rounds of 20 steps": Arm(round_steps=20),
    "rounds of 40 steps": Arm(round_steps=40),
    "rounds of 200 steps": Arm(round_steps=200),
    "strides of 0.25 steps": Arm(path_rate=0.25),
    "strides of 1 step": Arm(path_rate=1.0),
    "temperature 0.5": Arm(temperature=0.5),
    "temperature 1.0": Arm(temperature=1.0),
    "ratio 0.1": Arm(ratio=0.1),
    "ratio 0.4": Arm(ratio=0.4),
    "from the whole pool": Arm(scope="pool"),
    "rows come back": Arm(again=True),
    "100 probes": Arm(probes=100),
    "1,000 probes": Arm(probes=1_000),
    "64 passages": Arm(passages=64),
    "last word": Arm(loss_on="completion"),
    "last word beside all tokens": Arm(beside="last word"),
    "live weights": Arm(averaged=False),
    "not pooled": Arm(pooled=False),
    "document labels": Arm(labels="document"),
    "token and document labels": Arm(labels="both"),
}
EVERY_ARM = {**ARMS, **TUNING, **ABLATIONS}

# Reference task, and whether the pool is filtered: which arms, how many seeds.
_FEW = (
    RANDOM, OURS, FRUGAL, CHEAP_TABLES, ORACLE_TABLES, "DSIR", "fastText", "similarity", "DSIR, tuned",
    "fastText, tuned", "similarity, tuned",
)  # fmt: skip
SETTINGS: dict[tuple[str, bool], tuple[tuple[str, ...], int]] = {
    ("lambada", False): (tuple(ARMS), 5),
    ("arc_easy", False): (_FEW, 3),
    ("boolq", False): (_FEW, 3),
    ("lambada", True): ((RANDOM, OURS, FRUGAL, "fastText", "fastText, tuned"), 5),
}
ABLATION_SEEDS = 3
DEAR = {ENCODER: 3, ORACLE_LABEL: 3}  # seeds of arms whose labels cost more than all that is trained here
DEFAULTS_CHOSEN_ON = range(5)  # seeds; the library's defaults were chosen by looking at them
TUNING_SEEDS = (10, 11)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """One training."""

    task: str  # reference task
    filtered: bool  # whether the pool is what a quality filter keeps
    arm: str  # its name
    seed: int  # of weights, warm-up, order and draws

    @property
    def name(self) -> str:
        """In messages and file names."""
        return f"{self.task}{' filtered' if self.filtered else ''}/{self.arm}/{self.seed}"
