"""One training of `horizon`: from a warm start on, rounds that choose as one arm does.

Trade-off: a plain loop instead of the Trainer, with the library's own probes, influence models and selection: what
differs between two arms of a seed is the choice of rows alone.

Signs: influence > 0 helps; losses in nats/token.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import torch
from torch import nn

from benchmarks.lab import rivals
from benchmarks.lab.checkpoint import BATCH_ROWS, WINDOW, train_once
from benchmarks.lab.corpus import together
from benchmarks.lab.machine import written_once
from benchmarks.lab.models import LR, Averager, build_model, build_optimizer, train_steps
from benchmarks.lab.statistics import Ids
from benchmarks.quality.horizon import choosing
from benchmarks.quality.horizon.arms import ARMS, Arm, Unit
from benchmarks.quality.horizon.reading import Reader
from benchmarks.quality.horizon.settings import ROW_TOKENS, SETTINGS, Lab, Scale, Setting, Sizes, open_lab, sizes_of
from mates_hf.data.reference import ReferenceTask
from mates_hf.data.rows import TokenRows
from mates_hf.engine.averaging import WeightAverage
from mates_hf.flops import gradient_flops
from mates_hf.influence.passes import mean_loss_gradient
from mates_hf.influence.probe import count_multiplied_parameters
from mates_hf.prediction.ngram.tables import Tables
from mates_hf.prediction.ngram_model import NgramInfluenceModel
from mates_hf.records import InfluenceLabels
from mates_hf.selection.choose import gumbel_top_k

DRAWN = 3  # times the probes that are placed: rows they are drawn from


class Run:
    """A training in progress; `cache` is the folder of warm starts."""

    def __init__(self, lab: Lab, setting: Setting, sizes: Sizes, cache: Path, unit: Unit) -> None:
        self.lab, self.sizes, self.unit, self.arm = lab, sizes, unit, ARMS[unit.arm]
        rng = np.random.default_rng([unit.seed, 1])
        order = rng.permutation(len(lab.rows))
        # The pool behind the warm start is shuffled anew: rows of the known domains are as usual in front as behind.
        known = np.isin(lab.domain[order], [lab.domain_names.index(name) for name in setting.known])
        warm = order[known if setting.known else np.ones(len(order), bool)][: sizes.warm * BATCH_ROWS]
        rest = rng.permutation(np.setdiff1d(order, warm))
        by_domain = [rest[lab.domain[rest] == d][: sizes.held] for d in range(len(lab.domain_names))]
        held = np.concatenate(by_domain)
        rest = rest[~np.isin(rest, held)]
        self.reserved, self.open = rest[: sizes.reserved], rest[sizes.reserved :]
        self.cache, self.start = cache, functools.partial(_warm_start, lab, setting.scale, warm, cache, unit.seed)
        self.model, self.optimizer = self.start()
        self.num_parameters = count_multiplied_parameters(self.model)
        self.reader = Reader(lab, "development" if unit.seed >= 10 else "test", held, sizes.steps)
        self.passages, self.parts = self._passages(setting), setting.parts
        self._filter: rivals.StaticFilter | None = None
        self.curve: list[dict[str, Any]] = []
        self.decayed: list[dict[str, Any]] = []
        self.rounds: list[dict[str, Any]] = []
        self.watched: list[dict[str, Any]] = []
        self.flops: dict[str, float] = {}
        # All that changes from step to step, so that a branch can be gone back from.
        self.step, self.next_round, self.number, self.length = 0, 0, 0, self.arm.first_steps or self.arm.round_steps
        if self.arm.probed and self.arm.random_first:
            self.next_round = self.arm.random_first
        self.cursor = self.probed = 0
        self.probes: Ids = self.reserved[:0]  # rows of the last labels
        self.queue: Ids = self._slice(sum(self._num_chosen(step) for step in range(self.next_round)))
        self.tables: NgramInfluenceModel | None = None
        self.weights = np.zeros(len(lab.domain_names))  # of the domains, in a mixer
        self.averages: dict[str, WeightAverage] = {}

    def train(self) -> dict[str, Any]:
        """Run it; its result as JSON values."""
        sizes = self.sizes
        self._look()
        for end in (*sizes.branches, sizes.steps):
            self._steps(end - end // 10, lambda step: 1.0)
            state = self._state() if end != sizes.steps else None
            begin, length = self.step, end // 10
            self._steps(end, lambda step, begin=begin, length=length: 1 - (step - begin) / length)
            self.decayed.append(self._losses())
            if state is not None:
                self._back_to(state)
        return {
            **dataclasses.asdict(self.unit), "settings": dataclasses.asdict(self.arm), "curve": self.curve,
            "decayed": self.decayed, "rounds": self.rounds, "flops": self.flops, "parameters": self.num_parameters,
            "watched": self.watched,
        }  # fmt: skip

    # --- steps ---

    def _steps(self, until: int, rate: Callable[[int], float]) -> None:
        """Go on to a step, at a share of the learning rate that depends on the step."""
        while self.step < until:
            if self.step == self.next_round:
                self._round()
            scheduled = rate(self.step)
            for group in self.optimizer.param_groups:
                group["lr"] = LR * scheduled
            num = self._num_chosen(self.step)
            rows, self.queue = self.queue[:num], self.queue[num:]
            batch = self.lab.rows.take(rows)
            if self.arm.masked and self.tables is not None:
                batch = choosing.best_tokens(batch, self.tables)
                self._cost("score", self.tables.report.flops_per_token * len(batch.values))
            batch = together(batch, self.lab.reference["all"].rows.take(self._mixed(self.step)))
            mean_loss_gradient(self.model, batch, tokens_per_batch=self.lab.tokens_per_batch)
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self._cost("train", gradient_flops(self.num_parameters, len(batch.values)))
            self.step += 1
            self._average("round", self.next_round, min(WINDOW, self.length // 2))
            mark = next((mark for mark in self.sizes.marks if mark >= self.step), None)
            if mark is not None:
                self._average("mark", mark, min(WINDOW, mark // 2))
                if mark == self.step and scheduled == 1.0:
                    with self.averages.pop("mark").swapped_in():
                        self._look()

    def _average(self, name: str, end: int, window: int) -> None:
        if end - window < self.step <= end:
            self.averages.setdefault(name, WeightAverage(self.model)).update()

    def _passages(self, setting: Setting) -> Ids:
        """The reference passages that are trained on, in order."""
        passes = self.arm.passes if self.arm.passes is not None else 4 * setting.mixed
        rng = np.random.default_rng([self.unit.seed, 3])
        trained = np.arange(0, len(self.lab.reference["all"]), 1 + self.arm.apart)
        order = [trained[rng.permutation(len(trained))] for _ in range(passes)]
        return np.concatenate([*order, np.zeros(0, np.int64)])[: self.sizes.steps * BATCH_ROWS // 2]

    def _mixed(self, step: int) -> Ids:
        """The reference passages of a step."""
        begin, end = (len(self.passages) * before // self.sizes.steps for before in (step, step + 1))
        return self.passages[begin:end]

    def _num_chosen(self, step: int) -> int:
        return BATCH_ROWS - len(self._mixed(step))

    def _cost(self, stage: str, flops: float) -> None:
        self.flops[stage] = self.flops.get(stage, 0.0) + flops

    _FIELDS = ("step", "next_round", "number", "length", "cursor", "probed", "queue", "tables", "weights", "flops")

    def _state(self) -> dict[str, Any]:
        state = {name: copy.deepcopy(getattr(self, name)) for name in self._FIELDS if name != "tables"}
        state |= {"tables": self.tables, "model": copy.deepcopy(self.model.state_dict())}
        return {**state, "optimizer": copy.deepcopy(self.optimizer.state_dict()), "rounds": len(self.rounds)}

    def _back_to(self, state: dict[str, Any]) -> None:
        for name in self._FIELDS:
            setattr(self, name, state[name])
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        del self.rounds[state["rounds"] :]
        self.averages.clear()

    # --- what is read of it, the same for every arm and not among its costs ---

    def _look(self) -> None:
        self.curve.append(self._losses())
        if self.arm.watched:
            rows = self.lab.rows.take(self.reserved[: self.sizes.watched])
            labels = self._measured(self._read(256), rows, 256)
            found = {"step": self.step, "label": labels.influence_per_token, "loss": labels.loss}
            for num in (256, self.arm.passages):
                further = self._measured(self._read(num), rows, num, reduction=4.0).influence_per_token
                found[f"reduction by {num}"] = further
            found["few"] = choosing.few_labels(rows, labels, self._log_odds, self.unit.seed)
            if not self.watched:
                found["log_odds"] = self._log_odds[0].plus(self._log_odds[1]).scaled(1.0).score(rows)
                found["asked"] = self._own(self.reserved[: self.sizes.watched])
            self.watched.append(found)

    def _losses(self) -> dict[str, Any]:
        return self.reader.losses(self.model, self.step, sum(self.flops.values()))

    # --- choosing ---

    def _round(self) -> None:
        """Choose the rows of the coming steps."""
        arm, record = self.arm, {"step": self.step}
        borders = [round(share * self.sizes.steps) for share in (arm.select_from, arm.select_until)]
        selects = arm.rank != "random" and borders[0] <= self.step < borders[1]
        labels = self._labels() if selects and arm.probed and not (self.tables is not None and arm.once) else None
        follow = True
        if labels is not None and self.tables is not None:
            gap = record["gap"] = self._gap(labels)
            follow = gap > 0 or arm.first_steps is None
            if arm.first_steps is not None:
                self.length = (
                    min(2 * self.length, arm.round_steps) if follow else max(self.length // 2, arm.first_steps)
                )
        if labels is not None:
            self._fit(labels, record)
        ends = [self.step + self.length, *(border for border in borders if self.step < border < self.sizes.steps)]
        self.next_round = min(ends)
        k = sum(self._num_chosen(step) for step in range(self.step, self.next_round))
        candidates = self._slice(round(k / arm.ratio) if selects else k)
        record["length"], record["followed"] = self.length, follow
        num, chosen = k - round(arm.random_share * k) if selects and follow else 0, candidates[:0]
        if arm.virtual and num:
            chosen = self._choose(candidates, num // 2)
            self._look_ahead(chosen, record)
        if num:
            left = candidates[~np.isin(candidates, chosen)]
            chosen = np.concatenate([chosen, self._choose(left, num - len(chosen))])
        others = candidates[~np.isin(candidates, chosen)][: k - len(chosen)]  # slices are in a random order
        self.queue = np.random.default_rng([self.unit.seed, 4, self.number]).permutation(
            np.concatenate([chosen, others])
        )
        self.rounds.append(record)
        self.number += 1
        self.averages.pop("round", None)

    def _choose(self, candidates: Ids, num: int) -> Ids:
        values = self._values(candidates)
        if self.arm.kinds is not None:
            kind = self._kind_of(self.lab.rows.take(candidates))
            return candidates[choosing.capped_top_k(values, kind, num, self.arm.kinds)]
        if self.arm.penalty:
            return candidates[choosing.spread_top_k(values, self.lab.rows.take(candidates), num, self.arm.penalty)]
        return candidates[gumbel_top_k(values, num, seed=(self.unit.seed, self.number))]

    def _look_ahead(self, chosen: Ids, record: dict[str, Any]) -> None:
        """Label where rows that are chosen take a copy of model and optimizer, and fit those labels too."""
        live, num_steps = (self.model, self.optimizer), len(chosen) // BATCH_ROWS
        self.model, self.optimizer = copy.deepcopy(live)
        averager = Averager(self.model, num_steps, max(1, min(WINDOW, num_steps // 2)))
        order = np.random.default_rng([self.unit.seed, 6, self.number]).permutation(chosen)
        settings: dict[str, Any] = {"batch_rows": BATCH_ROWS, "tokens_per_batch": self.lab.tokens_per_batch}
        train_steps(self.model, self.optimizer, self.lab.rows, order, on_step=averager.update, **settings)
        self._cost("ahead", gradient_flops(self.num_parameters, num_steps * BATCH_ROWS * ROW_TOKENS))
        self.averages["round"] = averager.average
        self._fit(self._labels(), record)
        self.model, self.optimizer = live

    def _slice(self, num: int) -> Ids:
        """The next rows of the shuffled pool; from its front again where it ends."""
        where = (self.cursor + np.arange(num)) % len(self.open)
        self.cursor += num
        return self.open[where]

    def _labels(self) -> InfluenceLabels:
        """Labels of a round's probes, at averaged weights."""
        arm = self.arm
        self.probes = self._draw(arm.probes)
        if arm.placed and self.tables is not None:
            usual, others = self.probes[: arm.probes // 2], self._draw(DRAWN * (arm.probes - arm.probes // 2))
            predicted = self.tables.predict(self.lab.rows.take(others))
            near = choosing.near_border(predicted, arm.probes - len(usual), arm.ratio)
            self.probes = np.concatenate([usual, others[near]])
        reference, rows = self._read(arm.passages), self.lab.rows.take(self.probes)
        average = self.averages.pop("round", None)
        with average.swapped_in() if average is not None else contextlib.nullcontext():
            labels = self._measured(reference, rows, arm.passages)
        self._cost("probe", labels.info["flops"])
        return labels

    def _draw(self, num: int) -> Ids:
        """The next rows that no arm trains on."""
        where = (self.probed + np.arange(num)) % len(self.reserved)
        self.probed += num
        return self.reserved[where]

    def _read(self, num: int) -> ReferenceTask:
        """The reference passages of a round, and pool text that should not be unlearned."""
        others = np.setdiff1d(self.reserved[-4_000:], self.probes) if self.arm.keep else self.probes[:0]
        return choosing.reference_of_round(self.lab, self.arm, num, others, (self.unit.seed, self.number))

    def _measured(self, reference: ReferenceTask, rows: TokenRows, num: int, **changes: Any) -> InfluenceLabels:
        """Labels at the present weights by `num` passages; pool text besides them makes no path longer."""
        arm = dataclasses.replace(self.arm, **changes)
        seed = (self.unit.seed, self.number)
        return choosing.measured(self.lab, arm, (self.model, self.optimizer), reference, rows, num, seed)

    @functools.cached_property
    def _kind_of(self) -> Callable[[TokenRows], Ids]:
        """Which kind of text rows are of."""
        return choosing.find_kinds(self.lab.rows.take(self.reserved), self.lab.vocab_size, self.unit.seed)

    @functools.cached_property
    def _log_odds(self) -> tuple[Tables, Tables]:
        """Log-odds of n-grams, reference against pool."""
        return choosing.counted(self.lab, self.reserved[-choosing.COUNTED :])

    def _gap(self, labels: InfluenceLabels) -> float:
        """What rows of the kind that was bought are worth now, minus the rest, in standard deviations of labels."""
        assert self.tables is not None
        predicted = self.tables.predict(self.lab.rows.take(self.probes))
        like = predicted >= np.quantile(predicted, 1 - self.arm.ratio)
        worth = labels.influence_per_token
        return float((worth[like].mean() - worth[~like].mean()) / worth.std())

    def _fit(self, labels: InfluenceLabels, record: dict[str, Any]) -> None:
        rows, seed = self.lab.rows.take(self.probes), self.unit.seed
        if self.arm.rank == "MATES":
            ahead = self.lab.rows.take(self.open[: self.sizes.reserved // 12])
            self.tables, record["spearman"], flops = choosing.encoder_tables(self.lab, rows, labels, ahead, seed)
            record["spearman of tables"] = self.tables.report.spearman
        else:
            previous, evidence = choosing.earlier(self.arm, self.tables), self._log_odds if self.arm.prior else None
            model = NgramInfluenceModel(seed=seed, evidence_weight=self.arm.evidence_weight)
            self.tables = model.fit(rows, labels, previous=previous, evidence=evidence)
            report = self.tables.report
            record["spearman"], record["evidence_weight"] = report.spearman, report.evidence_weight
            flops = report.flops or 0.0
        self._cost("fit", flops)
        worth = (labels.influence_per_token - labels.influence_per_token.mean()) / labels.influence_per_token.std()
        means, counts = self.lab.by_domain(self.probes, worth)
        self.means = means * counts / (counts + 2)
        self.weights = self.weights + self.means
        if self.arm.rank == "distilled" and not self.number:
            texts, order = np.array(rivals.texts_of(rows, self.lab.tokenizer), object), np.argsort(worth)
            num = max(1, len(order) // 5)
            self._classifier = rivals.fasttext(texts[order[-num:]], texts[order[:num]], self.unit.seed)

    def _values(self, candidates: Ids) -> Any:
        """(N,) what candidates are ranked by."""
        arm, rows = self.arm, self.lab.rows.take(candidates)
        if arm.rank == "domain means":
            return self.means[self.lab.domain[candidates]]
        if arm.rank == "mixer":  # domains are drawn by their weights
            noise = np.random.default_rng([self.unit.seed, 5, self.number]).gumbel(size=len(candidates))
            return self.weights[self.lab.domain[candidates]] + noise
        if arm.rank == "stratified":
            domain = pandas.Series(self.lab.domain[candidates])
            return -domain.groupby(domain).cumcount().to_numpy(np.float64)
        if arm.rank == "own domains":
            return self._own(candidates).astype(np.float64)
        if arm.rank == "distilled":
            return self._classifier(rivals.texts_of(rows, self.lab.tokenizer))
        if not arm.probed:
            return self._like_reference(arm, candidates)
        assert self.tables is not None
        values = self.tables.predict(rows)
        self._cost("score", self.tables.report.flops_per_token * len(rows.values))
        values = values / values.std()
        if arm.beside:
            beside = self._like_reference(ARMS[arm.beside], candidates)
            values = values + beside / beside.std()
        return values

    def _own(self, rows: Ids) -> Any:
        """(N,) whether rows are of a domain that the reference is made of."""
        return np.isin(np.array(self.lab.domain_names)[self.lab.domain[rows]], self.parts)

    def _like_reference(self, arm: Arm, candidates: Ids) -> Any:
        """(N,) what a static filter, fitted on all reference passages, ranks rows by.

        Values are kept for other arms of the seed, in whose FLOPs they are all the same.
        """
        if self._filter is None:
            settings = (self.unit.seed, self.cache, self.start, self.sizes.reserved // 2)
            self._filter = choosing.static_filter(self.lab, arm, *settings)
            self._cost("fit", self._filter.fit_flops)
            num = len(self.lab.rows)
            path = self.cache / f"{arm.rank}-{arm.filter}-{self.unit.seed}-{num}.npy".replace(" ", "_")
            written_once(path, lambda file: np.save(file, np.full(num, np.nan, np.float32)))
            self._known = np.lib.format.open_memmap(path, "r+")
        values = np.array(self._known[candidates])
        new = np.isnan(values)
        if new.any():
            self._known[candidates[new]] = values[new] = self._filter.rank(self.lab.rows.take(candidates[new]))
        self._cost("score", self._filter.flops(self.lab.rows.take(candidates)))
        return values


def _warm_start(lab: Lab, scale: Scale, rows: Ids, cache: Path, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Model and optimizer after the warm start, which is trained once and read back from then on."""
    model = build_model(lab.vocab_size, width=scale.width, layers=scale.layers, seed=seed)
    optimizer = build_optimizer(model)
    settings: dict[str, Any] = {"batch_rows": BATCH_ROWS, "warm_up": 50, "tokens_per_batch": lab.tokens_per_batch}
    train = functools.partial(train_steps, model, optimizer, lab.rows, rows, **settings)
    train_once(cache / f"warm-{seed}-{len(rows)}.pt", model, optimizer, train)
    return model, optimizer


def run_unit(data: Path, work: Path, sizes: Sizes, unit: Unit) -> dict[str, Any]:
    """Train one arm of one seed in one setting; its result as JSON values."""
    cache = work / "cache"
    folder, sizes = cache / unit.setting.replace(" ", "_"), sizes_of(unit.setting, sizes)
    folder.mkdir(parents=True, exist_ok=True)
    lab = open_lab(data, cache, unit.setting, sizes.documents, sizes.judged)
    return Run(lab, SETTINGS[unit.setting], sizes, folder, unit).train()
