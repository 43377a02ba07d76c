"""The arms of `horizon`: all that two runs of one seed and setting may differ in.

Trade-off: one record with a default for everything, so that an arm reads as its difference from `ours`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from benchmarks.lab.rivals import SETTINGS_TRIED, NeedsPackage
from mates_hf.flops import PATH_STEPS

Rank = Literal["random", "influence", "stratified", "domain means", "mixer", "fastText", "DSIR", "distilled"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm(NeedsPackage):
    """How a run chooses its rows."""

    # what candidates are ranked by. `domain means` and `mixer` are told the domain and use probes as `influence` does:
    # the mean label of a candidate's domain, or weights of domains that labels multiply. `distilled` is a classifier
    # of the first round's best and worst labelled rows. Others are static.
    rank: Rank = "influence"
    filter: str = "common"  # the setting of a static filter
    random_share: float = 0.0  # of each round's rows, drawn at random from the rest of its slice
    # how often the run trains on each reference passage, spread evenly; None is what the setting says
    passes: int | None = None
    ratio: float = 0.2  # of a slice that is chosen
    round_steps: int = 100  # optimizer steps of a round, at most
    # optimizer steps in random order before the first round, so that the model knows what the pool is like at all
    random_first: int = 50
    # optimizer steps of the first round. Each next one is twice as long while what was bought is still worth more than
    # the rest, half as long and in random order where it is not. None: all are alike.
    first_steps: int | None = None
    probes: int = 200  # candidates probed in a round
    passages: int = 64  # of the reference that a round reads
    path_steps: int = PATH_STEPS  # points at which the reference gradient is taken
    pooled: bool = True  # whether earlier rounds' labels count
    once: bool = False  # whether the first round's influence model serves all rounds
    beside: str | None = None  # a static filter whose ranking is added, both in their standard deviations
    prior: bool = False  # whether the tables shrink towards log-odds of the reference against the pool
    watched: bool = False  # whether the same rows are probed again and again, to see how labels change
    package: str | None = None  # what must be installed

    @property
    def probed(self) -> bool:
        """Whether it measures influence."""
        return self.rank in ("influence", "domain means", "mixer", "distilled")


def _shares(name: str, arm: Arm) -> dict[str, Arm]:
    """An arm, with a share of random rows mixed in, and with the reference passages."""
    return {
        name: arm,
        f"{name}, 30 % random": dataclasses.replace(arm, random_share=0.3),
        f"{name}, 60 % random": dataclasses.replace(arm, random_share=0.6),
        f"{name}, passages": dataclasses.replace(arm, passes=4),
        f"{name}, 30 % random, passages": dataclasses.replace(arm, random_share=0.3, passes=4),
    }


FILTERS = {
    f"{rank}: {setting}": Arm(rank=rank, filter=setting, package=package)  # type: ignore[arg-type]
    for rank, package in (("fastText", "fasttext"), ("DSIR", "data_selection"))
    for setting in SETTINGS_TRIED[rank]
}
FAIR = Arm(rank="fastText", filter="6,000 negatives, 5 epochs", package="fasttext")
RANDOM, OURS = "random", "ours"
ARMS: dict[str, Arm] = {
    RANDOM: Arm(rank="random"),
    "random, watched": Arm(rank="random", watched=True),
    "random, passages": Arm(rank="random", passes=4),
    **_shares(OURS, Arm()),
    **_shares("fastText", FAIR),
    **_shares("DSIR", Arm(rank="DSIR", filter="smoothed, mean over n-grams", package="data_selection")),
    **_shares("ours and fastText", Arm(beside="fastText", package="fasttext")),
    **_shares("ours with a prior", Arm(prior=True)),
    "ours, one round's model": Arm(once=True),
    "ours, rounds of 500": Arm(round_steps=500, probes=500, passages=256),
    "ours, growing rounds": Arm(round_steps=800, first_steps=25),
    "ours, growing rounds, 30 % random": Arm(round_steps=800, first_steps=25, random_share=0.3),
    "stratified by domain": Arm(rank="stratified"),
    "domain means": Arm(rank="domain means"),
    "domain means, 30 % random": Arm(rank="domain means", random_share=0.3),
    "mixer": Arm(rank="mixer"),
    "distilled": Arm(rank="distilled", probes=1_000, once=True, package="fasttext"),
    **FILTERS,
}
REPORTED_SEEDS, TUNING_SEEDS = (0, 1, 2), (10, 11)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Unit:
    """One training."""

    setting: str
    arm: str
    seed: int  # of weights, warm start, order and draws; from 10 on results are of development passages

    @property
    def name(self) -> str:
        """In messages and file names."""
        return f"{self.setting}/{self.arm}/{self.seed}"
