"""The arms of `horizon`: all that two runs of one seed and setting may differ in.

Trade-off: one record with a default for everything, so that an arm reads as its difference from `ours`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from benchmarks.lab.rivals import MINILM, PACKAGES, SETTINGS_TRIED, NeedsPackage
from mates_hf.flops import PATH_STEPS

Rank = Literal[
    "random", "influence", "stratified", "domain means", "mixer", "distilled", "MATES", "fastText", "DSIR",
    "similarity", "CoLoR", "log-odds", "own domains",
]  # fmt: skip
PROBED = ("influence", "domain means", "mixer", "distilled", "MATES")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm(NeedsPackage):
    """How a run chooses its rows."""

    # what candidates are ranked by. `domain means` and `mixer` are told the domain and use probes as `influence` does:
    # the mean label of a candidate's domain, or weights of domains that labels multiply. `distilled` is a classifier
    # of the first round's best and worst labelled rows. `MATES` has labels of the one-step oracle and an encoder that
    # is fine-tuned on them. Others are static.
    rank: Rank = "influence"
    filter: str = "common"  # the setting of a static filter
    random_share: float = 0.0  # of each round's rows, drawn at random from the rest of its slice
    # how often the run trains on each reference passage, spread evenly; None is what the setting says
    passes: int | None = None
    apart: bool = False  # whether it trains on one half of the passages, and influence is measured on the other
    ratio: float = 0.2  # of a slice that is chosen
    round_steps: int = 200  # optimizer steps of a round, at most
    # optimizer steps in random order before the first round, so that the model knows what the pool is like at all
    random_first: int = 50
    # optimizer steps of the first round. Each next one is twice as long while what was bought is still worth more than
    # the rest, half as long and in random order where it is not. None: all are alike.
    first_steps: int | None = 50
    # in which part of all steps it selects; the order is random in the rest. Decays that are branched off before the
    # end are of what was trained on until then, so only the last one says what such an arm is worth.
    select_from: float = 0.0
    select_until: float = 1.0
    probes: int = 500  # candidates probed in a round
    passages: int = 1_000  # of the reference that a round reads, at most
    weighted: bool = True  # whether parts of the reference count alike, and answers as much as everything
    keep: float = 0.0  # tokens of pool text that a round reads as reference besides, for each token of the passages
    path_steps: int = PATH_STEPS  # points at which the reference gradient is taken
    # passes over a round's passages that `LossReductionProbe` trains for; 0 is the derivative along the path
    reduction: float = 0.0
    pooled: bool = True  # whether earlier rounds' labels count
    once: bool = False  # whether the first round's influence model serves all rounds
    # whether one half of a round is chosen by labels of where the other half takes a copy of model and optimizer
    virtual: bool = False
    penalty: float = 0.0  # in standard deviations, for each nat by which chosen tokens are unlike the slice's
    # of what is chosen, at most so many times a kind's share of its slice; kinds are clusters of rows by their words
    kinds: float | None = None
    # whether half of a round's probes are drawn from where choosing decides: rows that are predicted near its border
    placed: bool = False
    masked: bool = False  # whether the loss is on the half of each row's tokens that tables give the higher effect
    beside: str | None = None  # an arm of a static filter whose ranking is added, both in their standard deviations
    prior: bool = True  # whether the tables shrink towards log-odds of the reference against the pool
    evidence_weight: float = 1.0  # how much those log-odds count once more, beside the labels, in what is predicted
    evidence_kept: bool = False  # whether they count no less than in an earlier round
    watched: bool = False  # whether the same rows are probed again and again, to see how labels change
    package: str | None = None  # what must be installed

    @property
    def probed(self) -> bool:
        """Whether it measures influence."""
        return self.rank in PROBED


def _mixed(name: str, arm: Arm) -> dict[str, Arm]:
    """An arm, and with a share of random rows mixed in."""
    return {name: arm, f"{name}, 30 % random": dataclasses.replace(arm, random_share=0.3)}


def _shares(name: str, arm: Arm) -> dict[str, Arm]:
    """An arm, with shares of random rows mixed in, and with the reference passages."""
    most = {f"{name}, 60 % random": dataclasses.replace(arm, random_share=0.6)}
    passages = {f"{mixed}, passages": dataclasses.replace(arm, passes=4) for mixed, arm in _mixed(name, arm).items()}
    return {**_mixed(name, arm), **most, **passages}


def _changed(changes: dict[str, dict[str, Any]]) -> dict[str, Arm]:
    """`ours` with one thing changed, each alone and with a share of random rows."""
    found = {name: _mixed(f"ours, {name}", Arm(**fields)) for name, fields in changes.items()}
    return {name: arm for arms in found.values() for name, arm in arms.items()}


TRIED: dict[str, dict[str, dict[str, Any]]] = {
    **SETTINGS_TRIED, "CoLoR": {"2 passes": {"passes": 2}, "8 passes": {"passes": 8}}
}  # fmt: skip
FILTERS = {
    f"{rank}: {setting}": Arm(rank=rank, filter=setting, package=PACKAGES.get(rank))  # type: ignore[arg-type]
    for rank in ("fastText", "DSIR", "similarity", "CoLoR")
    for setting in TRIED[rank]
}
FAIR = FILTERS["fastText: 6,000 negatives, 5 epochs"]
RANDOM, OURS = "random", "ours"
# The order is that of the tables.
GROUPS: dict[str, dict[str, Arm]] = {
    "random": {
        RANDOM: Arm(rank="random"),
        "random, watched": Arm(rank="random", watched=True),
        "random, passages": Arm(rank="random", passes=4),
        "stratified by domain": Arm(rank="stratified"),
        # What no method is told: rows of the domains that the reference is made of come first, in a random order.
        **_mixed("own domains, known", Arm(rank="own domains")),
    },
    "static filters": {
        **_shares("fastText", FAIR),
        **_shares("DSIR", FILTERS["DSIR: smoothed, mean over n-grams"]),
        # What a run counts itself, of pieces of words and their pairs, without a label: our evidence as a filter.
        **_shares("log-odds", Arm(rank="log-odds")),
        "log-odds, 30 % random, watched": Arm(rank="log-odds", random_share=0.3, watched=True),
        # An encoder reads 6,000 rows, and tables fitted to them rank the slices (held-out Spearman 0.71 when tried).
        **_shares("similarity", FILTERS["similarity: nearest passage"]),
        # It reads every row of a slice with two models: in FLOPs three times the training, and in time as much.
        **_shares("CoLoR", FILTERS["CoLoR: 8 passes"]),
    },
    "labels, used in other ways": {
        **_mixed("domain means", Arm(rank="domain means")),
        **_mixed("mixer", Arm(rank="mixer")),
        **_mixed("distilled", Arm(rank="distilled", probes=1_000, once=True, package="fasttext")),
        # Not MATES as published: 22 million parameters in place of bert-base's 110, 200 labels a round of 500 steps
        # in place of 80,000 a round of 10,000, all tokens of 32 passages in place of the last word of 1,024, and
        # top-k without noise. The encoder reads 1,000 rows a round, and tables fitted to that rank the slice. With
        # that a round is two minutes of one core, and all eight three times the training's FLOPs.
        **_mixed(
            "MATES, small encoder",
            Arm(
                rank="MATES",
                round_steps=500,
                first_steps=None,
                probes=200,
                passages=32,
                weighted=False,
                pooled=False,
                package=MINILM,
            ),  # fmt: skip
        ),
    },
    "ours": {
        **_shares(OURS, Arm()),
        # DSIR's scores stand in the place of the run's own log-odds.
        **_shares("ours and DSIR", Arm(beside="DSIR", evidence_weight=0.0)),
    },
    "ours, one thing changed": {
        **_changed(
            {
                "one round's model": {"once": True},
                "rounds of 500": {"round_steps": 500, "first_steps": None},
                "evidence as prior alone": {"evidence_weight": 0.0},
                "evidence three times": {"evidence_weight": 3.0},
                "evidence kept, rounds of up to 800": {"evidence_kept": True, "round_steps": 800},
                "evidence three times, kept, rounds of up to 800": {
                    "evidence_kept": True,
                    "evidence_weight": 3.0,
                    "round_steps": 800,
                },
                "without evidence": {"prior": False},
                "every token alike": {"weighted": False},
                "labels of one round": {"pooled": False},
                "2,000 labels": {"probes": 2_000},
                "200 labels on 64 passages": {"probes": 200, "passages": 64},
                "rounds of 100": {"round_steps": 100, "first_steps": None},
                "rounds of up to 800": {"round_steps": 800},
                "penalty 1": {"penalty": 1.0},
                "penalty 3": {"penalty": 3.0},
                "virtual labels": {"virtual": True},
                "twice of a kind": {"kinds": 2.0},
                "probes near the border": {"placed": True},
                "loss reduction": {"reduction": 1.0},
                "loss reduction, four passes": {"reduction": 4.0},
                "loss reduction, four passes, rounds of up to 800": {"reduction": 4.0, "round_steps": 800},
                "loss reduction, eight passes, rounds of up to 800": {"reduction": 8.0, "round_steps": 800},
                "loss reduction, four passes, evidence kept, rounds of up to 800": {
                    "reduction": 4.0,
                    "evidence_kept": True,
                    "round_steps": 800,
                },
                "keep 0.1": {"keep": 0.1},
                "keep 0.3": {"keep": 0.3},
                "keep 1": {"keep": 1.0},
                "early": {"select_until": 0.5},
                "late": {"select_from": 0.5},
                "in the decay": {"select_from": 0.9},
                "best two fifths": {"ratio": 0.4},
                "best two fifths, tokens masked": {"ratio": 0.4, "masked": True},
                "tokens masked": {"masked": True},
                "passages apart": {"passes": 4, "apart": True},
            }
        ),
    },
    "static filters, every setting": FILTERS,
}
ARMS = {name: arm for group in GROUPS.values() for name, arm in group.items()}
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
