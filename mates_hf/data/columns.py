"""A `datasets.Dataset` read from its Arrow columns, and the proof that its collator's rows can be read that way.

Where it is used: `pool` reads by it where it can, which is fast. Trade-off: a collator is user code, so what it does
is found by looking, at a fixed set of rows that holds the longest ones (a collator that truncates shows there), at
made-up rows with the tokenizer's special tokens (one that drops a token's label shows there), at rows that differ in
kind in a further column (`rare_rows`), and at rows with such a column changed (one that a mask or a kind of row
decides shows there, `deciding`). A collator that draws random numbers never qualifies.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import sys
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from mates_hf.data.arrow import ListColumn, Ragged, assemble, effective_labels, physical_rows
from mates_hf.data.collated import TOKEN_KEYS, Collator, forked_rng, read_row, rng_state, stack_rows
from mates_hf.data.column_types import LABELS, MASK, TOKENS, check_types, counts
from mates_hf.data.deciding import MAX_OTHERS, deciding_column, has_gap, made_up_of
from mates_hf.data.rare_rows import RareRows, WatchedRow, find_rare_rows
from mates_hf.data.rows import IGNORED, TokenRows
from mates_hf.data.segments import LENGTHS, is_packing_key, lengths_to_starts
from mates_hf.data.token_columns import aligned, read_column
from mates_hf.records import IntArray

logger = logging.getLogger(__name__)

# How labels follow from the columns: the `labels` column, every token but the first, or the same without one token id.
LabelRule: TypeAlias = Literal["column", "all"] | int

NUM_LONGEST, NUM_SHORTEST, NUM_SPREAD = 16, 8, 40
BLOCK = 1 << 20  # rows whose lengths are looked at at once


def visible_columns(dataset: Any) -> list[str] | None:
    """The columns that a row of a plain `datasets.Dataset` shows; None for other kinds and for transformed rows."""
    datasets = sys.modules.get("datasets")
    if datasets is None or not isinstance(dataset, datasets.Dataset):
        return None
    how = dataset.format
    if how["type"] == "custom" or type(dataset).__getitem__ is not datasets.Dataset.__getitem__:
        return None
    return list(dataset.column_names if how["output_all_columns"] else how["columns"])


def fixed_positions(num: int, size: int) -> IntArray:
    """Up to `size` sorted positions below `num`, one in each equal stretch: a function of both, in any version."""
    if num <= size:
        return np.arange(num)
    draws = [int.from_bytes(hashlib.sha256(f"{num},{j}".encode()).digest()[:8], "big") % num for j in range(size)]
    return np.unique([(j * num + draw) // size for j, draw in enumerate(draws)]).astype(np.int64)


class DatasetColumns:
    """The token columns of a plain `datasets.Dataset`; `find_rule` decides whether they may be read.

    Args:
        dataset: A dataset whose `visible_columns` are not None.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self._rules: dict[str, LabelRule | None] = {}
        self._packed = False  # whether the collator splits rows as the column `seq_lengths` says
        self._opened: dict[str, ListColumn] = {}
        self._indices: IntArray | None = None  # held once, not once a column

    @property
    def token_columns(self) -> list[str]:
        """Those of `input_ids`, `labels` and `attention_mask` that rows show now (formats change in place)."""
        return [name for name in visible_columns(self.dataset) or () if name in TOKEN_KEYS]

    def lengths(self, ids: IntArray) -> IntArray:
        """(N,) int64 tokens of the rows `ids`, padding included."""
        return self._column(TOKENS).lengths(ids)

    def read(self, ids: IntArray, rule: LabelRule) -> TokenRows:
        """The rows `ids` with labels by `rule`, without padding; a null row is an empty row."""
        tokens = self._read(TOKENS, ids)
        labels = mask = None
        if rule == "column":
            labels = self._aligned(LABELS, ids, tokens)
        elif rule != "all":
            labels = np.where(tokens.values == rule, IGNORED, tokens.values)
        if MASK in self.token_columns:
            mask = self._aligned(MASK, ids, tokens)
        starts = self._starts(ids, tokens) if self._packed else None
        if starts is not None:
            labels = np.where(starts, IGNORED, tokens.values if labels is None else labels)
        return assemble(tokens.values, tokens.offsets, labels, mask, starts)

    def find_rule(self, collate_fn: Collator | None) -> LabelRule | None:
        """The rule by which the columns give exactly the collator's rows; None where rows must be read one by one."""
        names = self.token_columns
        schema = self.dataset.data.schema
        if TOKENS not in names:
            return None
        if collate_fn is None:
            if any(is_packing_key(name) for name in visible_columns(self.dataset) or ()):
                return None  # which documents share a row is in columns that are not read here
            check_types(schema, names)
            return "column" if LABELS in names else "all"
        if not all(counts(name, schema.field(name).type) for name in names):
            return None  # the collator may make of it what counts
        key = f"{visible_columns(self.dataset)} {self.dataset.format['type']}"
        if key not in self._rules:
            try:
                self._rules[key] = self._look_for_rule(collate_fn, "labels" in names)
            except Exception as error:  # the looked-at rows need not be those asked for: reading these will tell
                logger.debug("The collator failed on a looked-at or made-up row (%s).", error)
                self._rules[key] = None
        return self._rules[key]

    def _look_for_rule(self, collate_fn: Collator, has_labels: bool) -> LabelRule | None:
        """Compare the collator's rows with the columns."""
        ids = self._rows_to_check()
        rows = self._collated(collate_fn, ids)
        if rows is None:
            return None
        self._packed = rows.segments is not None and LENGTHS in (visible_columns(self.dataset) or ())
        for rule in self._possible_rules(collate_fn, rows, int(ids[0]), has_labels):
            if _same(rows, self.read(ids, rule)):
                return None if self._is_decided_by_a_column(collate_fn, ids, rule) else rule
        return None

    def _collated(self, collate_fn: Collator, ids: IntArray) -> TokenRows | None:
        """What the collator makes of rows; None where that is random."""
        with forked_rng(0):
            before = rng_state()
            rows, again = (
                stack_rows(read_row(self.dataset[i], collate_fn, f"pool row {i}") for i in ids.tolist())
                for _ in range(2)
            )
            drew_random = rng_state() != before
        return None if drew_random or not _same(rows, again) else rows

    def _is_decided_by_a_column(self, collate_fn: Collator, ids: IntArray, rule: LabelRule) -> bool:
        """True where a further column changes ids, labels or mask of a collated row, or may; says which."""
        read = (*TOKEN_KEYS, LENGTHS) if self._packed else TOKEN_KEYS
        names = [name for name in visible_columns(self.dataset) or () if name not in read]
        if not names:
            return False
        columns = {name: self.dataset.data.column(name) for name in names}
        rare = find_rare_rows(columns, self._physical_rows(), len(self.dataset), ids)
        if len(rare.rows):
            rows = self._collated(collate_fn, rare.rows)
            if rows is None or not _same(rows, self.read(rare.rows, rule)):
                logger.info("Candidates are read row by row: the collator treats some rows otherwise than the rest.")
                return True
        looked_at = [self.dataset[i] for i in ids[np.linspace(0, len(ids) - 1, 24).astype(int)].tolist()]
        column = self._changes_a_row(collate_fn, looked_at, rare) or self._asks_for(collate_fn, looked_at, rare)
        if column is not None:
            logger.info("Candidates are read row by row: the collator reads the column `%s`.", column)
        return column is not None

    def _changes_a_row(self, collate_fn: Collator, looked_at: list[Any], rare: RareRows) -> str | None:
        """A column by whose change a row is collated differently."""

        def collated(row: dict[str, Any]) -> tuple[list[int], list[int], list[int]]:
            found = stack_rows([read_row(row, collate_fn, "a made-up row")])
            documents = found.offsets if found.segments is None else found.segments
            return found.values.tolist(), effective_labels(found).tolist(), documents.tolist()

        rows = {i: self.dataset[i] for shown in rare.by_column.values() for i in shown[:MAX_OTHERS]}
        others = {
            name: [_listed(row[name]) for row in [*(rows[i] for i in shown[:MAX_OTHERS]), *looked_at]]
            for name, shown in rare.by_column.items()
        }
        types = {name: self.dataset.data.column(name).type for name in others}
        for row in (looked_at[0], looked_at[len(looked_at) // 2]):
            plain = {name: _listed(value) for name, value in row.items()}
            length = len(plain["input_ids"])
            gaps = {name: made_up_of(types[name], length) if has_gap(plain[name]) else [] for name in others}
            values = {name: [*gaps[name], *others[name]] for name in others}
            with forked_rng(0):
                column = deciding_column(plain, values, length, collated)
            if column is not None:
                return column
        return None

    def _asks_for(self, collate_fn: Collator, looked_at: list[Any], rare: RareRows) -> str | None:
        """A column of more kinds than were tried for which the collator asks by its name."""
        if not rare.unproven:
            return None
        asked_for: set[str] = set()
        with forked_rng(0):
            for row in [*looked_at, *(self.dataset[i] for i in rare.rows.tolist())]:
                read_row(WatchedRow(row.items(), asked_for), collate_fn, "a watched row")
        return min(asked_for & rare.unproven, default=None)

    def _possible_rules(
        self, collate_fn: Collator, rows: TokenRows, longest: int, has_labels: bool
    ) -> list[LabelRule]:
        """The one label rule that the collator keeps on made-up rows, or none."""
        plain = self.read(np.array([longest]), "all").values.astype(np.int64)
        if len(plain) < 3:
            return []
        base = self.dataset[longest]
        inside = np.ones(len(plain), np.bool_)
        if self._packed:  # not at the first token of a document, which no rule trains
            inside = ~lengths_to_starts(base[LENGTHS], len(plain), f"pool row {longest}")
        middle = int(min(np.flatnonzero(inside), key=lambda i: abs(int(i) - len(plain) // 2), default=0))

        def label_in_the_middle(token: int, label: int) -> int | None:
            """What the collator makes of a row with this token and label in its middle; None: it changed the row."""
            ids, labels = plain.copy(), plain.copy()
            ids[middle], labels[middle] = token, label
            made_up = {"input_ids": ids.tolist(), "labels": labels.tolist(), "attention_mask": [1] * len(ids)}
            row = {**base, **{name: made_up[name] for name in base if name in made_up}}
            found = stack_rows([read_row(row, collate_fn, "a made-up row")])
            return int(found.row(0)[1][middle]) if np.array_equal(found.values, ids) else None

        with forked_rng(0):
            own = int(plain[middle])
            from_column = has_labels and label_in_the_middle(own, IGNORED) == IGNORED
            kept = {i: label_in_the_middle(i, i) for i in {own, *_special_ids(collate_fn)}}
        ignored = {token for token, label in kept.items() if label == IGNORED}
        if any(label not in (token, IGNORED) for token, label in kept.items()) or (from_column and ignored):
            return []
        if from_column:
            return ["column"]
        plain_labels = effective_labels(dataclasses.replace(rows, labels=None))
        ignored |= set(rows.values[~rows.target_mask & (plain_labels != IGNORED)].tolist())
        if len(ignored) > 1:
            return []
        return [ignored.pop()] if ignored else ["all"]

    def _rows_to_check(self) -> IntArray:
        """Up to 64 fixed pool rows, the longest first, then the shortest and some spread over the pool."""
        num, column = len(self.dataset), self._column("input_ids")
        by_length = np.zeros(0, np.int64)
        for start in range(0, num, BLOCK):
            by_length = np.concatenate([by_length, np.arange(start, min(start + BLOCK, num))])
            by_length = by_length[np.argsort(-column.lengths(by_length), kind="stable")]
            if len(by_length) > NUM_LONGEST + NUM_SHORTEST:
                by_length = np.concatenate([by_length[:NUM_LONGEST], by_length[-NUM_SHORTEST:]])
        rows = np.concatenate([by_length[:NUM_LONGEST], by_length[-NUM_SHORTEST:], fixed_positions(num, NUM_SPREAD)])
        _, first = np.unique(rows, return_index=True)
        unique: IntArray = rows[np.sort(first)]
        return unique

    def _aligned(self, name: str, ids: IntArray, tokens: Ragged) -> npt.NDArray[Any]:
        return aligned(name, tokens, self._read(name, ids), lambda i: f"pool row {int(ids[i])}")

    def _starts(self, ids: IntArray, tokens: Ragged) -> npt.NDArray[np.bool_]:
        """(T,) bool, where documents begin by the column of their lengths."""
        lengths = self._read(LENGTHS, ids)
        total = np.concatenate([[0], np.cumsum(lengths.values, dtype=np.int64)])
        wrong = np.flatnonzero(total[lengths.offsets] != tokens.offsets)
        if len(wrong):
            row = int(wrong[0]) - 1
            of = slice(lengths.offsets[row], lengths.offsets[row + 1])
            lengths_to_starts(lengths.values[of], int(np.diff(tokens.offsets)[row]), f"pool row {int(ids[row])}")
        starts = np.zeros(len(tokens.values), np.bool_)
        starts[total[:-1][lengths.values > 0]] = True
        return starts

    def _read(self, name: str, ids: IntArray) -> Ragged:
        return read_column(self._column(name), ids, lambda i: f"pool row {int(ids[i])}")

    def _column(self, name: str) -> ListColumn:
        if name not in self._opened:
            self._opened[name] = ListColumn(self.dataset.data.column(name), name, self._physical_rows())
        return self._opened[name]

    def _physical_rows(self) -> IntArray | None:
        """`physical_rows`, for all columns the same array."""
        if self._indices is None:
            self._indices = physical_rows(self.dataset)
        return self._indices


def _listed(value: Any) -> Any:
    """A value as plain Python objects, as a row without format has it."""
    return value.tolist() if hasattr(value, "tolist") else value


def _same(a: TokenRows, b: TokenRows) -> bool:
    """True where both have the same tokens and documents and train the same labels."""
    one, other = (rows.offsets if rows.segments is None else rows.segments for rows in (a, b))
    return (
        np.array_equal(a.offsets, b.offsets)
        and np.array_equal(one, other)
        and np.array_equal(a.values, b.values)
        and np.array_equal(effective_labels(a), effective_labels(b))
    )


def _special_ids(collate_fn: Any) -> list[int]:
    """Ids of the special tokens of a collator's tokenizer: those whose labels collators are known to drop."""
    collate_fn = getattr(collate_fn, "data_collator", collate_fn)  # the Trainer wraps one to remove columns
    tokenizer = getattr(collate_fn, "tokenizer", None) or getattr(collate_fn, "processing_class", None)
    ids = {*getattr(tokenizer, "all_special_ids", []), getattr(tokenizer, "pad_token_id", None)}
    ids.add(getattr(collate_fn, "pad_token_id", None))
    return sorted(i for i in ids if isinstance(i, int))
