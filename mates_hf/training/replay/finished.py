"""One finished round, read with distrust and recomputed from what it left on disk.

Where it is used: under `verify`, which goes through a run's rounds in order. The rules are not written down twice:
candidates and probes come from the run's own `Ledger.draw`, selections from its own `select_rows`.

Trade-off: numpy and pyarrow alone, so a run is checked on a machine without torch; the price is that what only the
model can tell (labels, predicted influence) is checked by its checksum and its consequences, not measured again.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from mates_hf.config import BEFORE, MatesConfig
from mates_hf.disk import sha256_of
from mates_hf.errors import MatesError, UnrankableError
from mates_hf.records import InfluenceLabels, IntArray
from mates_hf.round_files import (
    CHECKSUMS_FILE,
    GROUPS_FILE,
    KEY_FILE,
    PROBES_FILE,
    ROUND_FILE,
    SELECTION_KEYS,
    STRATA_FILE,
    read_checksums,
    read_labels,
)
from mates_hf.selection.choose import stage_seed
from mates_hf.selection.ledger import Ledger
from mates_hf.selection.quota import quota_of
from mates_hf.selection.select_stage import select_rows
from mates_hf.training.redact import REDACTED_FILE
from mates_hf.training.replay.blocked import (
    RoundWithBlocked,
    check_late,
    check_replaced,
    consumed_after,
    read_blocked_of,
    read_probed,
    redacted_probes,
    rows_between,
)
from mates_hf.training.replay.groups import check_groups, read_groups_of, strata_of
from mates_hf.training.replay.length import (
    RoundWithLength,
    check_inside,
    check_length,
    check_rise,
    lengths_of,
    rows_per_step,
)
from mates_hf.training.replay.passages import RoundWithPassages, check_passages
from mates_hf.training.replay.passes import WAITING_FILE, RoundWithPasses, asked_of, check_pass, pass_of, read_waiting
from mates_hf.training.replay.reader import WrongError, first_of

DECISIONS = ("select", "keep_previous", "own_order")

_COUNTS = (
    "number", "step", "from_step", "to_step", "from_position", "num_rows", "cursor", "num_candidates", "num_probed",
    "num_skipped", "seed",
)  # fmt: skip
_SCORED = ["candidates.npy", "scores.npy", "num_targets.npy"]
_MAPPINGS = ("config", "pool", "reference", "guard", "probe", "stages")


class FinishedRound(RoundWithLength, RoundWithPassages, RoundWithPasses, RoundWithBlocked):
    """A finished round: read and checked piece by piece, each check by the name of its file."""

    def __init__(self, path: Path, number: int) -> None:
        super().__init__(path)
        self.number = number
        info = self.info = self.json(ROUND_FILE)
        for name in _COUNTS:
            value = info.get(name)
            ok = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
            self.require(ok, ROUND_FILE, f"`{name}` as a whole number of at least 0", repr(value))
        for name in _MAPPINGS:
            self.require(isinstance(info.get(name), dict), ROUND_FILE, f"`{name}` as an object", repr(info.get(name)))
        self.require(info["number"] == number, ROUND_FILE, f"`number` {number}", str(info["number"]))
        self.decision = info["guard"].get("decision")
        what = f"`decision` of `guard` to be one of {', '.join(DECISIONS)}"
        self.require(self.decision in DECISIONS, ROUND_FILE, what, repr(self.decision))
        self.order_file = "own_order.npy" if self.decision == "own_order" else "selection.npy"
        try:
            self.config = MatesConfig(**{**BEFORE, **info["config"]})
        except (TypeError, ValueError) as error:
            raise WrongError(ROUND_FILE, "`config` of this version of mates-hf", str(error)) from error
        self.num_pool_rows = self._read_num_pool_rows()
        self.pass_number = pass_of(self)
        self.require(info["cursor"] < self.num_pool_rows, ROUND_FILE, "`cursor` in the pool", f"{info['cursor']}")

        self.steps, self.num_rows_drawn_for = lengths_of(self)

    def _read_num_pool_rows(self) -> Any:
        """Rows of the pool, as the round says."""
        num = self.info["pool"].get("num_rows")
        ok = isinstance(num, int) and 0 < num < 2**63
        self.require(ok, ROUND_FILE, "`num_rows` of `pool` as a number of rows", repr(num))
        return num

    @property
    def has_hashes(self) -> bool:
        """Whether the round says which of its candidates are one text."""
        return self.config.max_copies is not None or "repeated_share" in self.info

    def _check_whole(self, before: FinishedRound | None) -> None:
        """What every kind of round has is there: a key, files as they were written, and the passages it says."""
        self._check_key()
        self._check_checksums()
        check_passages(self, before)

    def check(self, before: FinishedRound | None) -> None:
        """All of it, the cheap first.

        Args:
            before: the round before this one, where it is on disk.

        Raises:
            WrongError: the first thing that is wrong.
        """
        self._check_whole(before)
        order_file = self.order_file
        other_file = "selection.npy" if self.decision == "own_order" else "own_order.npy"
        there = (self.path / other_file).exists()
        self.require(not there, other_file, f"no such file, as `guard` decided {self.decision}", "one")
        self.rows: IntArray = self.array(order_file, np.int64, self.info["num_rows"])
        self._check_order_hash()
        consumed = self.array("consumed.npy", np.uint8, -(-self.num_pool_rows // 8))
        try:
            ledger = Ledger.from_bits(np.asarray(consumed), self.num_pool_rows, self.config.selection_seed, 0)
        except ValueError as error:
            raise WrongError("consumed.npy", f"the bits of {self.num_pool_rows} rows", str(error)) from error
        self.consumed, self.ledger = ledger.consumed, ledger
        self.waiting = read_waiting(self)
        self.blocked = read_blocked_of(self)
        cursor = self._cursor_before(before)
        self.probed = read_probed(self, before)
        if before is not None:
            self._check_goes_on(before)
            self.ledger = before.ledger  # the pool's shuffled order is made once
        else:
            num = int(np.count_nonzero(self.consumed))
            position = self.info["from_position"]
            self.require(
                num <= position or self.number > self.config.random_rounds, "consumed.npy",
                f"at most {position} consumed rows, those before `from_position`", str(num),
            )  # fmt: skip
        self.labels = self._read_labels()
        self._check_unused(self.probes, PROBES_FILE)
        self._check_rows()
        check_length(self, before)
        check_rise(self, before)
        candidates = None
        if self.decision != "own_order":
            candidates = self.array("candidates.npy", np.int64, self.info["num_candidates"])
            self._check_candidates(candidates)
        self._check_draw(candidates, cursor)
        check_replaced(self)
        check_late(self, before if before is not None and before.pass_number == self.pass_number else None)
        if candidates is not None:
            self._check_selection(candidates)
        check_inside(self)

    def _check_key(self) -> None:
        """`key.json` and `selection.json` say what `round.json` says."""
        key, info = self.json(KEY_FILE), self.info
        self.key = key
        for name in ("config", "pool", "reference"):
            value = key.get(name)
            self.require(isinstance(value, dict), KEY_FILE, f"`{name}` as an object", repr(value))
            assert isinstance(value, dict)
            self.same(KEY_FILE, value, {entry: info[name].get(entry) for entry in value}, f"`{name}` of round.json")
        self.same(KEY_FILE, key["pool"], info["pool"], "`pool` of round.json")
        for name in ("step", "weights"):
            self.same(KEY_FILE, {name: key.get(name)}, {name: info.get(name)}, "round.json")
        measured = self.mapping(info, "measured_with", ROUND_FILE)
        self.same(KEY_FILE, self.mapping(key, "measured_with", KEY_FILE), measured, "`measured_with` of round.json")
        seed = self.config.selection_seed
        self.require(info["seed"] == seed, ROUND_FILE, f"`seed` {seed}, as `selection_seed`", str(info["seed"]))
        seed = stage_seed(seed, self.number, "probe")
        what = f"`probe_seed` {seed}, as `selection_seed` and the round give"
        self.require(info.get("probe_seed") == seed, ROUND_FILE, what, str(info.get("probe_seed")))
        short = {name: info.get(name) for name in SELECTION_KEYS}
        self.same("selection.json", self.json("selection.json"), short, "round.json")
        for low, high in (("step", "from_step"), ("from_step", "to_step")):
            self.require(info[low] < info[high], ROUND_FILE, f"`{high}` after `{low}` ({info[low]})", str(info[high]))

    def _check_checksums(self) -> None:
        """Every file is the one that was written."""
        self.redacted = self.json(REDACTED_FILE) if (self.path / REDACTED_FILE).exists() else None
        try:
            checksums = read_checksums(self.path)
            names = [ROUND_FILE, KEY_FILE, "consumed.npy", PROBES_FILE, "selection.json", self.order_file]
            names += [STRATA_FILE] if "strata" in self.info else []
            names += ["probed.npy", *self._scored_files()]
            names += [WAITING_FILE] if "num_waiting" in self.info else []
            names += [] if self.info.get("fit") is None or self.lacks_model else ["influence_model/"]
            for name in names:
                ok = any(listed == name or (name[-1] == "/" and listed.startswith(name)) for listed in checksums)
                self.require(ok, CHECKSUMS_FILE, f"a checksum of {name}", "none")
            for name, digest in checksums.items():
                file = self.path / name
                self.require(file.exists(), name, f"a file with SHA-256 {digest}", "no such file")
                now = sha256_of(file)
                self.require(now == digest, name, f"SHA-256 {digest}, as {CHECKSUMS_FILE}", now)
        except (OSError, MatesError) as error:
            raise WrongError(CHECKSUMS_FILE, "a checksum of each file", str(error)) from error

    def _scored_files(self) -> list[str]:
        """The files of a round that scored candidates."""
        if self.decision == "own_order":
            return []
        more = {"hashes.npy": self.has_hashes, GROUPS_FILE: self.config.group_column is not None}
        return [*_SCORED, *(name for name, there in more.items() if there)]

    def _check_order_hash(self) -> None:
        digest = hashlib.sha256(np.ascontiguousarray(self.rows, "<i8").tobytes()).hexdigest()
        expected = self.info.get("order_sha256")
        self.require(digest == expected, self.order_file, f"rows whose SHA-256 is {expected}, as round.json", digest)

    def _cursor_before(self, before: FinishedRound | None) -> int | None:
        """Where the round's slice begins in the shuffled pool; None where the round that tells is deleted."""
        if before is not None:
            goes_on = self.pass_number == before.pass_number or self.waiting is not None
            return int(before.info["cursor"]) if goes_on else 0  # earlier versions began a pass at the start
        if self.number == self.config.random_rounds:
            return 0
        moved = self.decision != "own_order" and self.config.candidate_scope == "slice"
        return None if moved else int(self.info["cursor"])

    def _check_goes_on(self, before: FinishedRound) -> None:
        """The round goes on where the one before it ends: the same run, positions in a row, its rows consumed."""
        for name in ("pool", "reference"):
            self.same(ROUND_FILE, self.info[name], before.info[name], f"round {before.number}")
        self.same(ROUND_FILE, asked_of(self), asked_of(before), f"`asked` of round {before.number}")
        self.same(ROUND_FILE, self.key["config"], before.key["config"], f"round {before.number}")
        info, earlier = self.info, before.info
        ok = info["step"] > earlier["step"]
        self.require(
            ok, ROUND_FILE, f"`step` after {earlier['step']}, that of round {before.number}", f"{info['step']}"
        )
        kept = info["from_position"] - earlier["from_position"]
        end = earlier["from_position"] + earlier["num_rows"]
        what = f"`from_position` {end}, where the rows of round {before.number} end"
        # A drift check starts a round early; a changed batch size or `max_steps` starts it early or late.
        moved = info["from_step"] != earlier["to_step"] or rows_per_step(info) != rows_per_step(earlier)
        ok = 0 < kept < self.num_pool_rows if moved else kept == len(before.rows)
        self.require(ok, ROUND_FILE, what, str(info["from_position"]))
        was, now = consumed_after(before, self), self.consumed
        was[before.trained_on(self)[:kept]] = True
        more = rows_between(before, self, kept - len(before.rows))
        was[more] = True
        if check_pass(self, before, was, more):
            was[:] = False
        wrong = np.flatnonzero(was != now)
        if len(wrong):
            row = int(wrong[0])
            self.require(
                False, "consumed.npy",
                f"the rows consumed in round {before.number} and its own, so row {row} "
                f"{'consumed' if was[row] else 'unused'}",
                f"{len(wrong)} rows that differ, the first of them row {row}",
            )  # fmt: skip

    def _read_labels(self) -> InfluenceLabels:
        """The probes: as many as recorded, no row twice, none consumed, with the ones that had no trained token."""
        try:
            labels = read_labels(self.path / PROBES_FILE)
            if self.redacted is None:
                with contextlib.nullcontext() if self.info.get("fit") else contextlib.suppress(UnrankableError):
                    labels.check()
        except (OSError, MatesError) as error:
            raise WrongError(PROBES_FILE, "the labels of the round's probes", str(error)) from error
        skipped = labels.info.get("skipped", [])
        ok = isinstance(skipped, list) and all(isinstance(row, int) and 0 <= row < 2**63 for row in skipped)
        self.require(ok, PROBES_FILE, "`skipped` as a list of rows", repr(skipped))
        num, gone = self.info["num_skipped"], redacted_probes(self)
        ok = len(skipped) == num or (len(gone) > 0 and len(skipped) < num)
        self.require(ok, PROBES_FILE, f"{num} skipped rows, as round.json", str(len(skipped)))
        self.probes: IntArray = np.concatenate([labels.candidate_id, np.asarray(skipped, np.int64), gone])
        expected = self.info["num_probed"]
        self.require(len(self.probes) == expected, PROBES_FILE, f"{expected} probed rows", str(len(self.probes)))
        return labels

    def _check_unused(self, rows: IntArray, file: str) -> None:
        """Rows are in the pool, each once, and none was trained on in this pass."""
        outside = rows[(rows < 0) | (rows >= self.num_pool_rows)]
        self.require(not len(outside), file, f"rows of the pool, below {self.num_pool_rows}", first_of(outside))
        ordered = np.sort(rows)
        twice = ordered[1:][ordered[1:] == ordered[:-1]]
        self.require(not len(twice), file, "each row once", f"{first_of(twice)} more than once")
        used = rows[self.consumed[rows]]
        self.require(not len(used), file, "rows not trained on in this pass", f"{first_of(used)} consumed before")
        if self.blocked is not None:
            wrong = rows[self.blocked[rows]]
            self.require(not len(wrong), file, "rows that may be used", f"{first_of(wrong)} not allowed or removed")

    def _check_rows(self) -> None:
        """The rows to train on: unused, each once, none of them probed."""
        self._check_unused(self.rows, self.order_file)
        probed = np.intersect1d(self.rows, self.probes)
        self.require(not len(probed), self.order_file, "no probed row", f"{first_of(probed)} in {PROBES_FILE} too")

    def _check_candidates(self, candidates: IntArray) -> None:
        """Candidates: unused, each once, none of them probed; the selection is of them."""
        self._check_unused(candidates, "candidates.npy")
        probed = np.intersect1d(candidates, self.probes)
        self.require(not len(probed), "candidates.npy", "no probed row", f"{first_of(probed)} in {PROBES_FILE} too")
        others = np.setdiff1d(self.rows, candidates)
        self.require(
            not len(others), self.order_file, "rows of candidates.npy only", f"{first_of(others)}, which is none"
        )

    def _check_draw(self, candidates: IntArray | None, cursor: int | None) -> None:
        """Candidates and probes are what ledger, seed and round number draw."""
        if cursor is None:
            # The slice began at its first candidate, or at rows before it that were all used.
            assert candidates is not None
            cursor = int(np.flatnonzero(self.ledger.shuffled == candidates[0])[0]) if len(candidates) else 0
        file = PROBES_FILE if candidates is None else "candidates.npy"
        self.ledger.consumed, self.ledger.probed, self.ledger.cursor = self.consumed, self.probed, cursor
        self.ledger.waiting, self.ledger.blocked = self.waiting, self.blocked
        try:
            draw = self.ledger.draw(
                round_number=self.number,
                num_selected=self.num_rows_drawn_for,
                selection_ratio=self.config.selection_ratio,
                candidate_scope=self.config.candidate_scope,
                num_probes=self.config.num_probes,
                group_of=strata_of(self, self.info),
            )
            draw = self.ledger.narrowed(draw, self.info["num_rows"], self.config)
        except MatesError as error:
            raise WrongError("consumed.npy", "rows enough for the round", str(error)) from error
        if candidates is not None:
            self._first_difference(file, draw.candidates, candidates, "what ledger and seed draw")
            cursor_after = draw.cursor_after
        else:
            cursor_after = cursor
        self._first_difference(PROBES_FILE, np.sort(draw.probes), np.sort(self.probes), "what ledger and seed draw")
        expected = int(self.info["cursor"])
        self.require(expected == cursor_after, ROUND_FILE, f"`cursor` {cursor_after}, after its slice", str(expected))

    def _check_selection(self, candidates: IntArray) -> None:
        """The selection is what scores, labels and seed give, in that order."""
        scores = self.array("scores.npy", np.float32, len(candidates))
        num_targets = self.array("num_targets.npy", np.int32, len(candidates))
        hashes = self.array("hashes.npy", np.uint64, len(candidates)) if self.has_hashes else None
        groups = read_groups_of(self, self.info, len(candidates)) if self.config.group_column else None
        if self.is_gone(candidates) or self.is_gone(self.probes):
            if groups is not None:
                check_groups(self, self.info, groups, candidates, self.rows)
            return  # values that the choice hung on were taken out
        try:
            selected = select_rows(
                np.asarray(candidates),
                np.asarray(scores),
                np.asarray(num_targets),
                self.labels,
                self.info["num_rows"],
                temperature=self.config.temperature,
                selection_seed=self.config.selection_seed,
                round_number=self.number,
                hashes=None if hashes is None else np.asarray(hashes),
                max_copies=self.config.max_copies,
                random_share=self.config.random_share,
                quota=quota_of(self.config, groups),
            )
        except (MatesError, ValueError) as error:
            raise WrongError("scores.npy", "predicted influence that can be selected on", str(error)) from error
        self._first_difference("selection.npy", selected.rows, self.rows, "what scores, labels and seed give")
        if groups is not None:
            check_groups(self, self.info, groups, candidates, selected.rows)
        if hashes is not None:
            facts = {
                "repeated_share": selected.num_repeated / max(1, len(candidates)),
                "num_passed_over": selected.num_passed_over,
                **({"num_random": selected.num_random} if "num_random" in self.info else {}),
            }
            self.same(ROUND_FILE, {name: self.info.get(name) for name in facts}, facts, "hashes.npy gives")

    def _first_difference(self, file: str, expected: IntArray, found: IntArray, source: str) -> None:
        """Raise the first place where two lists of rows differ."""
        self.require(len(expected) == len(found), file, f"{len(expected)} rows, {source}", str(len(found)))
        if len(wrong := np.flatnonzero(expected != found)):
            at = int(wrong[0])
            where = f"{len(wrong)} of {len(found)} rows that differ, the first of them row {found[at]}"
            raise WrongError(file, f"row {expected[at]} at position {at}, {source}", where)
