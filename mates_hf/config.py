"""Configuration of a run: one flat, frozen, validated dataclass.

Parses beside `TrainingArguments` in `HfArgumentParser((TrainingArguments, MatesConfig))`, so no field shares a name
with it. Trade-off: flat fields are longer to read than nested groups, and work on any command line.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from typing import Any, Literal

from mates_hf.config_rules import require_valid
from mates_hf.display import changed_fields

# What every round measures beside its probe; not for users to set.
NUM_AUDITED = 16  # candidates that get both probes each round
NUM_AUDIT_PASSAGES = 8  # reference passages of the audit; few do, because both probes read the same ones
NUM_SENTINELS = 128  # candidates of a drift check
# What runs of versions without these fields did; their rounds and checkpoints do not name them.
BEFORE: dict[str, Any] = {
    "max_copies": None, "random_share": 0.0, "first_round_steps": None, "reference_passes": 0, "max_passes": 1,
    "group_column": None, "score_column": None, "max_group_boost": None, "min_group_boost": 0.0, "allow": None,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class MatesConfig:
    """How a run chooses its training data. Each field's help says what it changes.

    Raises:
        ValueError: a value outside its range; the message names the field, the value and the range.
    """

    update_steps: int = field(
        default=1_000, metadata={"help": "Optimizer steps between two rounds; a round selects the rows of that many."}
    )
    first_round_steps: int | None = field(
        default=50,
        metadata={
            "help": "Optimizer steps of the first round that selects; rounds find their length from there. A round is "
            "twice as long as the last one, up to `update_steps`, while fresh labels still prefer the kind of rows "
            "that was chosen last. Where they do not, it is half as long and in the Trainer's own order. None: every "
            "round has `update_steps`; so it is where those are no more, or `selection_ratio` is 1. A round is never "
            "shorter than `switch_lead_steps` or `average_steps`."
        },
    )
    selection_ratio: float = field(
        default=0.2, metadata={"help": "Share of the candidates of a round that is trained on, in (0, 1]."}
    )
    max_passes: int | None = field(
        default=None,
        metadata={
            "help": "Passes over the pool, and so how often a row may be trained on. None: as many as the run needs; "
            "where one does not suffice, `update_steps` is lowered so far that a round chooses from half of the pool "
            "at most. A number is a limit: a run that needs more is refused. Where the unused rows are too few for a "
            "round, a new pass begins, and every row counts as unused again. The first pass is the one in which the "
            "first selection is made."
        },
    )
    candidate_scope: Literal["slice", "pool"] = field(
        default="slice",
        metadata={
            "help": "Where a round chooses from: `slice`, the next k / selection_ratio unused rows of the shuffled "
            "pool (the paper's way), or `pool`, all unused rows. The best of very many rows use up their influence "
            "within a round, and the next labels are then reversed (docs/ablations.md)."
        },
    )
    random_share: float = field(
        default=0.3,
        metadata={
            "help": "Share of a round's rows that is drawn at random from the rest of its candidates, in [0, 1). It "
            "keeps most of the gain on the reference task and most of what the run would otherwise unlearn."
        },
    )
    reference_passes: int = field(
        default=0,
        metadata={
            "help": "How often the run also trains on each passage of the reference task, spread evenly over its "
            "steps; at most half of its rows are passages. 0: never. They are training data then, so the model must "
            "not be evaluated on them. Up to 4 passes were measured."
        },
    )
    temperature: float = field(
        default=0.0,
        metadata={
            "help": "Gumbel-top-k temperature in standard deviations of the labels; 0 takes the highest predictions."
        },
    )
    max_copies: int | None = field(
        default=1,
        metadata={
            "help": "How often a round may choose the same text: of rows with equal tokens the best so many, further "
            "ones only where other rows do not suffice. None: as often as it is there."
        },
    )
    num_probes: int = field(default=2_000, metadata={"help": "Candidates probed in each round."})
    held_out_fraction: float = field(
        default=0.2, metadata={"help": "Share of the probed candidates kept out of the fit to judge it, in (0, 1)."}
    )
    document_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the pool with the document of each row. Rows of one document are fitted or held out "
            "together. None: only copies of a text are one document."
        },
    )
    group_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the pool with the group of each row: its source, its language. Rounds record each "
            "group's share of what they choose, and its loss. None: rows have no group."
        },
    )
    score_column: str | None = field(
        default=None,
        metadata={
            "help": "Column of the pool with a score of each row, higher is better: of a filter, of a quality model. "
            "It is added to predicted influence, both in standard deviations. None: the influence model alone."
        },
    )
    max_group_boost: float | None = field(
        default=None,
        metadata={
            "help": "No group gets more rows of a round's choice than so many times its share of the candidates; at "
            "least 1. Needs `group_column`. None: no bound."
        },
    )
    min_group_boost: float = field(
        default=0.0,
        metadata={
            "help": "Each group gets at least so many times its share of the candidates, in [0, 1], as far as it has "
            "rows that may be chosen. Needs `group_column`. 0: no bound."
        },
    )
    allow: dict[str, list[str]] | str | None = field(
        default=None,
        metadata={
            "help": "Rows that may be used at all, by their entries in columns of the pool, as a dict or as text: "
            "`licence=cc-by,cc0;consent=yes`. Others, and rows without an entry, are neither probed nor trained on. "
            "None: all rows."
        },
    )
    min_spearman: float = field(
        default=0.1,
        metadata={"help": "Guard: held-out rank correlation below which a round does not select, in [-1, 1]."},
    )
    on_weak_signal: Literal["own_order", "select", "error"] = field(
        default="own_order",
        metadata={
            "help": "What a round does whose signal is too weak, or whose labels are the reverse of what the previous "
            "influence model predicts: `own_order` keeps the previous influence model or the Trainer's own order; "
            "`select` ignores the guard; `error` ends the run."
        },
    )
    random_rounds: int = field(
        default=1,
        metadata={
            "help": "Rounds in the Trainer's own order before the first selection; more than the run has: never."
        },
    )
    switch_lead_steps: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps after a round's boundary at which its selection takes effect; covers what the "
            "dataloader has already fetched. None: 32, or half of `first_round_steps` if that is less; where rounds "
            "have one length, a quarter of `update_steps` if that is less."
        },
    )
    average_steps: int | None = field(
        default=None,
        metadata={
            "help": "Probe at the weights averaged over this many optimizer steps before the boundary; 0 probes the "
            "live weights. None: min(32, steps // 2), where steps is `first_round_steps` or, without it, "
            "`update_steps`; and at most `drift_check_steps`."
        },
    )
    drift_check_steps: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps between two checks, within a round, of whether its choice still holds; where it "
            "does not, the next round starts at once and `update_steps` is a maximum. A check takes 128 probes. With "
            "`first_round_steps` it asks whether what the round buys is still worth more than what it passed over, in "
            "rounds that are longer than those. None: no check; with `first_round_steps` one, in the middle of each "
            "round of at least four times as many steps."
        },
    )
    drift_spearman: float = field(
        default=0.5,
        metadata={
            "help": "Rank correlation of a few candidates' influence with what it was at the round, below which a "
            "drift check starts the next round, in [-1, 1]. Not used with `first_round_steps`."
        },
    )
    probe_tokens_per_batch: int = field(
        default=8_192, metadata={"help": "Padded tokens in one forward pass of a probe; halved when out of memory."}
    )
    selection_seed: int = field(default=0, metadata={"help": "Seed of the pool's shuffle, the probes and the noise."})
    rounds_dir: str | None = field(
        default=None,
        metadata={
            "help": "Where round directories go; each trial of a search has a folder there. None: "
            "`<output_dir>/_mates`."
        },
    )
    keep_rounds: int | None = field(
        default=None,
        metadata={
            "help": "Keep this many newest round directories, at least 2, and those that the last checkpoint needs; "
            "rounds set aside as `.stale` are deleted with them. None: all."
        },
    )
    round_page: Literal["texts", "images", "redacted", "none"] = field(
        default="texts",
        metadata={
            "help": "Page that the main process writes next to the rounds after a round, as `mates-hf report`: with "
            "`texts` of the pool, which stay on this disk; `images`, with texts, small pictures and labels; "
            "`redacted`, without any of these; or `none`."
        },
    )

    alert_weak_rounds: int = field(
        default=2, metadata={"help": "Alert after so many rounds in a row that did not follow their own labels."}
    )
    alert_idle_share: float | None = field(
        default=0.05, metadata={"help": "Alert where devices idle for a round longer than this share of the time."}
    )
    alert_reference_overlap: float | None = field(
        default=0.05, metadata={"help": "Alert where more of the chosen rows share tokens with the reference."}
    )
    alert_group_boost: float | None = field(
        default=None, metadata={"help": "Alert where a group gets more than so many times its share of candidates."}
    )

    __repr__ = changed_fields

    def __post_init__(self) -> None:
        require_valid(self)

    @property
    def most_passes(self) -> int:
        """Passes over the pool that there may be; a number that no run reaches where `max_passes` is None."""
        return sys.maxsize if self.max_passes is None else self.max_passes

    @property
    def least_update_steps(self) -> int:
        """The least `update_steps` that the other fields leave room for."""
        drift = 0 if self.drift_check_steps is None else self.drift_check_steps + 1
        return max(1, self.switch_lead_steps or 0, self.average_steps or 0, drift)

    @property
    def first_steps(self) -> int | None:
        """Optimizer steps of the first selecting round where rounds find their length; None where all have one length.

        A round that takes every candidate leaves none that its rows could be compared with.
        """
        if self.first_round_steps is None or self.selection_ratio == 1:
            return None
        first = max(self.first_round_steps, self.switch_lead_steps or 0, self.average_steps or 0)
        return first if first < self.update_steps else None

    @property
    def shortest_steps(self) -> int:
        """Optimizer steps of the shortest round, which the first selecting one is."""
        return self.first_steps or self.update_steps

    def longest_steps(self, last_steps: int | None) -> int:
        """Optimizer steps that a round may have at most.

        Args:
            last_steps: Length of the round before, whose selection still held; None where it is the first.

        Returns:
            Twice that, up to `update_steps`; `update_steps` where rounds do not grow.
        """
        if self.first_steps is None:
            return self.update_steps
        return self.first_steps if last_steps is None else min(2 * last_steps, self.update_steps)

    def checks_inside(self, steps: int) -> range:
        """When a round is looked at before it is over.

        Where rounds grow, one that is longer than `first_round_steps` is looked at each `drift_check_steps`; without
        those once, in its middle, if it is four times as long. Where rounds have one length, each `drift_check_steps`.

        Args:
            steps: Length of the round.

        Returns:
            Optimizer steps after its boundary, of which its own rows are in training at each.
        """
        first, every = self.first_steps, self.drift_check_steps
        if first is not None and steps < (4 * first if every is None else first + 1):
            return range(0)
        if every is None:
            every = steps if first is None else (steps + 1) // 2
        return range(every * -(-self.lead_steps // every), steps, every)

    @property
    def lead_steps(self) -> int:
        """Optimizer steps between a boundary and the first step trained on its selection."""
        if self.switch_lead_steps is not None:
            return self.switch_lead_steps
        return min(32, max(1, self.shortest_steps // (4 if self.first_steps is None else 2)))

    @property
    def window_steps(self) -> int:
        """Optimizer steps before a boundary over which the probed weights are averaged (0: the live weights)."""
        if self.average_steps is not None:
            return self.average_steps
        return min(32, self.shortest_steps // 2, self.drift_check_steps or self.update_steps)

    @classmethod
    def paper(cls, **overrides: Any) -> MatesConfig:
        """The settings of arXiv:2406.06046, section 4 (round length, probes, ratio, temperature, guard off).

        The paper's temperature is 1.0; its released code uses 0.5. Its probe is `OneStepProbe` on the last word, its
        influence model a bert-base regressor: pass those to `MatesCallback`.
        """
        settings: dict[str, Any] = {
            "update_steps": 10_000,
            "first_round_steps": None,
            "selection_ratio": 0.2,
            "max_passes": 1,
            "candidate_scope": "slice",
            "random_share": 0.0,
            "reference_passes": 0,
            "temperature": 1.0,
            "max_copies": None,
            "num_probes": 80_000,
            "held_out_fraction": 0.1,
            "on_weak_signal": "select",
            "random_rounds": 1,
            "average_steps": 0,
        }
        return cls(**{**settings, **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values of all fields."""
        return dataclasses.asdict(self)
