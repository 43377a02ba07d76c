"""One call, stage by stage: score what is not scored yet, read groups, cut, write, report.

Where it is used: `file_scoring` makes one once all is checked and the folder is claimed. Trade-off: each stage looks
for what an earlier call left, so a call that was killed anywhere continues; nothing else is remembered.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mates_hf.selection.budget import Budget, asked_for
from mates_hf.selection.cut import Cut, find_cut
from mates_hf.selection.files.folder import Folder, write_object
from mates_hf.selection.files.groups import AllGroups, BundleGroups, found_groups, group_bundle
from mates_hf.selection.files.plan import Bundle, Part
from mates_hf.selection.files.report import FilesReport as FilesReport
from mates_hf.selection.files.work import (
    FileError,
    PartFacts,
    Work,
    find_mark,
    parts_in,
    score_bundle,
    write_bundle,
)
from mates_hf.selection.files.workers import workers as started
from mates_hf.selection.prefix import PieceScores
from mates_hf.selection.quota import Bounds
from mates_hf.selection.quota_cut import GroupedScores, QuotaCut, find_quota_cut
from mates_hf.selection.score_file import open_scores

_HELD_ROWS = 2**24  # of scores that are kept in memory while the cut is found; with more they are read each time
_MOST_ERRORS = 1000  # that a report lists


class Run:
    """One call, stage by stage.

    Args:
        work: What every bundle is scored with.
        bundles: All of them.
        budget: How much to keep; None writes all rows, with their influence.
        bounds: What groups may get and must get; None where no column says the groups.
        started_at: `time.perf_counter()` when the call began.
    """

    def __init__(
        self,
        work: Work,
        bundles: Sequence[Bundle],
        budget: Budget | None,
        bounds: Bounds | None,
        started_at: float,
    ) -> None:
        self.work, self.bundles, self.budget, self.bounds, self.started_at = work, bundles, budget, bounds, started_at
        self.folder = Folder(work.out)
        self.label_std = work.fitted.label_std
        self.resumed = False

    def do(self, num_workers: int) -> FilesReport:
        """Score, cut, write, report."""
        with started(self.work, min(num_workers, len(self.bundles))) as each:
            facts = self._score(each)
            known = [one for bundle in facts for one in parts_in(bundle)]
            self._check_errors(known)
            groups = self._groups(each)
            pieces = self._pieces(groups, sum(int(bundle["num_rows"]) for bundle in facts))
            every = list(itertools.chain(*pieces))
            cut = self._cut(every, groups)
            shares = {} if groups is None or cut is None else groups.shares(every, cut)
            first_pieces = [0, *itertools.accumulate(map(len, pieces))]
            marks = self._write(each, cut, groups, first_pieces, self._key(facts))
        report = self._report(known, cut, marks, shares)
        write_object(self.folder.summary, report.to_dict())
        return report

    def _score(self, each: Callable[..., Iterator[Any]]) -> list[dict[str, Any]]:
        """What is recorded with the scores of each bundle, those that are missing made first."""
        found = [self.folder.score_facts(bundle, self.work.digest) for bundle in self.bundles]
        todo = [bundle for bundle, facts in zip(self.bundles, found, strict=True) if facts is None]
        self.resumed |= len(todo) < len(self.bundles)
        with self._progress("Scoring", todo) as count:
            for number, facts in each(_score_one, [(bundle,) for bundle in todo]):
                found[number] = facts
                count(number)
        return [facts for facts in found if facts is not None]

    def _check_errors(self, known: Sequence[PartFacts]) -> None:
        """Raise where an earlier call left something out that this one may not."""
        errors = _errors_of(known, self._parts)
        if errors and not self.work.skip:
            raise FileError(f"{errors[0]} An earlier call left it out: `on_error='skip'` does so again.")
        if all(one.dropped is not None for one in known):
            raise FileError(f"At least one file must be read, and all {len(known)} are left out: {errors[0]}")
        left_out = sum(one.not_allowed for one in known)
        if left_out and not any(one.rows for one in known):
            assert self.work.allowed is not None
            rule = "; ".join(f"{', '.join(of)} in `{name}`" for name, of in self.work.allowed.allow.items())
            raise ValueError(
                f"`allow` must leave rows, and none of {left_out:,} has {rule}. Name entries that are there."
            )

    @property
    def _parts(self) -> list[Part]:
        return [part for bundle in self.bundles for part in bundle.parts]

    def _groups(self, each: Callable[..., Iterator[Any]]) -> AllGroups | None:
        """The groups of all rows, those that are missing read first; None where none were asked for."""
        if self.bounds is None:
            return None
        column = self.bounds.column
        found = [found_groups(self.work, bundle, column) for bundle in self.bundles]
        todo = [bundle for bundle, facts in zip(self.bundles, found, strict=True) if facts is None]
        with self._progress("Groups", todo) as count:
            for number, facts in each(_group_one, [(bundle, column) for bundle in todo]):
                found[number] = facts
                count(number)
        return AllGroups.of(self.folder, self.bundles, [facts for facts in found if facts is not None], column)

    def _pieces(self, groups: AllGroups | None, num_rows: int) -> list[list[Callable[[], Any]]]:
        """What reads the scores of each bundle, with the groups of its rows where there are any."""
        pieces: list[list[Callable[[], Any]]] = []
        for bundle in self.bundles:
            url = self.folder.scores(bundle)
            opened = open_scores(url) if groups is None else groups.bundles[bundle.number].open(url)
            some: list[Callable[[], Any]] = [*opened]
            if num_rows <= _HELD_ROWS:
                some = [functools.cache(read) for read in some]
            pieces.append(some)
        return pieces

    def _cut(self, pieces: list[Callable[[], Any]], groups: AllGroups | None) -> Cut | QuotaCut | None:
        """The cut through all scores; None where all rows are written."""
        if self.budget is None:
            return None
        if groups is None or self.bounds is None:
            return find_cut(pieces, self.budget, self.label_std)
        if self.bounds.bind:
            return find_quota_cut(pieces, self.budget, self.bounds, len(groups.names), self.label_std)
        return find_cut([functools.partial(_scores_of, read) for read in pieces], self.budget, self.label_std)

    def _key(self, facts: Sequence[Mapping[str, Any]]) -> str:
        """What the written files depend on besides the inputs."""
        budget = None if self.budget is None else dataclasses.asdict(self.budget)
        bounds = None if self.bounds is None or not self.bounds.bind else dataclasses.asdict(self.bounds)
        scored = [[one["num_rows"], one["num_tokens"], one["parts"]] for one in facts]
        return hashlib.sha256(json.dumps([self.work.digest, budget, bounds, scored], default=str).encode()).hexdigest()

    def _write(
        self,
        each: Callable[..., Iterator[Any]],
        cut: Cut | QuotaCut | None,
        groups: AllGroups | None,
        first_pieces: Sequence[int],
        key: str,
    ) -> list[dict[str, Any]]:
        """The mark of each bundle, those that are missing written first."""
        marks = [find_mark(self.work, bundle, key) for bundle in self.bundles]
        todo = [bundle for bundle, mark in zip(self.bundles, marks, strict=True) if mark is None]
        self.resumed |= len(todo) < len(self.bundles)
        bound = groups.bundles if groups is not None and isinstance(cut, QuotaCut) else [None] * len(self.bundles)
        jobs = [(one, bound[one.number], cut, first_pieces[one.number], key) for one in todo]
        with self._progress("Writing", todo) as count:
            for number, mark in each(_write_one, jobs):
                marks[number] = mark
                count(number)
        return [mark for mark in marks if mark is not None]

    @contextlib.contextmanager
    def _progress(self, what: str, todo: Sequence[Bundle]) -> Iterator[Callable[[int], None]]:
        """A bar over the bytes of what is to do; the function takes the number of a bundle that is done."""
        from tqdm import tqdm

        total = sum(bundle.size for bundle in todo)
        with tqdm(total=total, desc=what, unit="B", unit_scale=True, delay=3) as bar:

            def count(number: int) -> None:
                bar.update(self.bundles[number].size)

            yield count

    def _report(
        self,
        known: Sequence[PartFacts],
        cut: Cut | QuotaCut | None,
        marks: Sequence[dict[str, Any]],
        shares: dict[str, dict[str, float]],
    ) -> FilesReport:
        seconds = time.perf_counter() - self.started_at
        written = [part for mark in marks for part in mark["parts"]]
        num_bytes = sum(bundle.size for bundle in self.bundles)
        errors = _errors_of(known, self._parts)
        return FilesReport(
            out=self.folder.url,
            asked_for="all rows" if self.budget is None else _asked_for(self.budget, self.bounds),
            files=len(known),
            files_left_out=sum(one.dropped is not None for one in known),
            lines_left_out=sum(len(one.bad) for one in known),
            rows=sum(one.rows for one in known),
            rows_kept=sum(one["rows"] for one in written),
            tokens=sum(one.tokens for one in known),
            tokens_kept=sum(one["tokens"] for one in written),
            threshold=None if cut is None or not math.isfinite(cut.threshold) else cut.threshold,
            bytes_read=num_bytes,
            bytes_scored=sum(one.content_bytes for one in known),
            bytes_written=sum(one["bytes"] for one in written),
            seconds=seconds,
            gb_per_hour=None if self.resumed else num_bytes / 1e9 / seconds * 3600,
            errors=tuple(errors[:_MOST_ERRORS]),
            rows_not_allowed=sum(one.not_allowed for one in known),
            allow=None if self.work.allowed is None else self.work.allowed.allow,
            shares=shares,
        )


def _score_one(work: Work, bundle: Bundle) -> tuple[int, dict[str, Any]]:
    return bundle.number, score_bundle(work, bundle)


def _group_one(work: Work, bundle: Bundle, column: str) -> tuple[int, dict[str, Any]]:
    return bundle.number, group_bundle(work, bundle, column)


def _write_one(
    work: Work,
    bundle: Bundle,
    groups: BundleGroups | None,
    cut: Cut | QuotaCut | None,
    first_piece: int,
    key: str,
) -> tuple[int, dict[str, Any]]:
    url = Folder(work.out).scores(bundle)
    pieces = open_scores(url) if groups is None else groups.open(url)
    return bundle.number, write_bundle(work, bundle, pieces, cut, first_piece, key)


def _scores_of(read: Callable[[], GroupedScores]) -> PieceScores:
    return read().scores


def _asked_for(budget: Budget, bounds: Bounds | None) -> str:
    """What was asked for, as it was written."""
    said = [asked_for(budget)]
    if bounds is not None and bounds.most is not None:
        said.append(f"max_group_boost={bounds.most:g}")
    if bounds is not None and bounds.least:
        said.append(f"min_group_boost={bounds.least:g}")
    return ", ".join(said)


def _errors_of(known: Sequence[PartFacts], parts: Sequence[Part]) -> list[str]:
    """What could not be read, one line each, by the file's name."""
    errors: list[str] = []
    for facts, part in zip(known, parts, strict=True):
        if facts.dropped is not None:
            errors.append(facts.dropped)
        else:
            errors += [f"`{part.url}`: {said}." for said in facts.said]
    return errors
