"""The filters of `selection` that no model in training has a part in, and the pool that one of them leaves.

Sign: higher is more like the reference passages.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from benchmarks.lab import rivals
from benchmarks.lab.checkpoint import Paths
from benchmarks.lab.corpus import Lab
from benchmarks.lab.units import read_units
from benchmarks.quality.selection.arms import TUNING, TUNING_SEEDS, Unit

EDITED = ("news", "science_textbook", "wikipedia")  # what the quality filter is told to keep, and what not
UNEDITED = ("forum", "legal_terms", "spam", "web_cc")


def filtered_lab(lab: Lab) -> Lab:
    """The half of the rows that a fastText classifier of edited text against unedited web text likes best."""
    rng = np.random.default_rng(0)
    sides = []
    for names in (EDITED, UNEDITED):
        rows = np.flatnonzero(np.isin(lab.domain, [lab.domain_names.index(name) for name in names]))
        sides.append(rivals.texts_of(lab.rows.take(rng.permutation(rows)[:3_000]), lab.tokenizer))
    score = rivals.fasttext(*sides, seed=0)
    blocks = np.array_split(np.arange(len(lab.rows)), max(1, len(lab.rows) // 5_000))
    quality = np.concatenate([score(rivals.texts_of(lab.rows.take(block), lab.tokenizer)) for block in blocks])
    kept = np.sort(np.argsort(-quality, kind="stable")[: len(lab.rows) // 2])
    return dataclasses.replace(lab, rows=lab.rows.take(kept), domain=lab.domain[kept], document=lab.document[kept])


def static_filter(lab: Lab, rank: str, setting: str, seed: int) -> rivals.StaticFilter:
    """The filter of a name, fitted on the reference passages, which are cut as long as a row."""
    target = rivals.pieces_of(lab.reference["all"].rows, int(lab.rows.lengths[0]))
    ranking = rivals.text_ranking(rank, setting, lab.tokenizer, lab.rows, target, seed)
    if rank != "similarity":
        return rivals.StaticFilter(ranking)
    return rivals.StaticFilter(ranking, lambda rows: rivals.encoder_flops(rivals.texts_of(rows, lab.tokenizer)))


def tuned_setting(paths: Paths, unit: Unit, rank: str) -> str:
    """The setting of a static filter that ended lowest, mean over the seeds of the tuning; they are run before."""
    loss = {}
    for arm in [arm for arm in TUNING if TUNING[arm].rank == rank]:
        names = [dataclasses.replace(unit, arm=arm, seed=seed).name for seed in TUNING_SEEDS]
        found = read_units(paths.work, names)
        if len(found) < len(names):
            raise RuntimeError(f"`{arm}` must have been tried on seeds {TUNING_SEEDS} before `{unit.name}`.")
        loss[TUNING[arm].setting] = np.mean([result["curve"][-1]["all"] for result in found.values()])
    return min(loss, key=lambda setting: loss[setting])
