"""One training of `selection`: from the warm start of its seed on, rounds that choose as one arm does.

Trade-off: a plain loop instead of the Trainer, with the library's own probes, influence models and selection: what
differs between two arms of a seed is the choice of rows alone.

Signs: influence > 0 helps; losses in nats/token.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from typing import Any

import numpy as np
import pandas

from benchmarks.lab import rivals
from benchmarks.lab.checkpoint import BATCH_ROWS, WINDOW, Paths, Point, one_a_document, warm_point
from benchmarks.lab.corpus import Lab, load_lab, together
from benchmarks.lab.models import TOKENS_PER_BATCH, Averager, row_losses, task_losses
from benchmarks.lab.statistics import Ids
from benchmarks.quality.selection import filters
from benchmarks.quality.selection.arms import ARMS, EVERY_ARM, RANDOM, Arm, Unit
from mates_hf.config import NUM_AUDIT_PASSAGES, NUM_AUDITED
from mates_hf.data.reference import ReferenceTask
from mates_hf.data.rows import TokenRows
from mates_hf.engine.averaging import WeightAverage
from mates_hf.flops import directional_flops, forward_flops, gradient_flops, one_step_flops
from mates_hf.influence.passes import mean_loss
from mates_hf.influence.probe import count_multiplied_parameters
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.influence.probe_one_step import OneStepProbe
from mates_hf.prediction.ngram_model import NgramInfluenceModel
from mates_hf.records import InfluenceLabels
from mates_hf.selection.choose import gumbel_top_k

SHAPE = {"width": 128, "layers": 4}  # of the model: 1.05 million parameters
POOL_DECAY = 0.9
NGRAM_FLOPS = 3.0  # a scored token: three look-ups, added


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is run; the defaults are the full run."""

    documents: int | None = None  # read of the corpus; None is all
    warm: int = 300  # random steps before the first round, the same for every arm of a seed
    steps: int = 200  # that every arm goes on for
    random_steps: int = 1_000  # that the random arm goes on for, to see when it gets as far
    every: int = 40  # steps between two evaluations
    passages: int = 256  # reference passages, and development passages
    test: int = 512  # test passages at most
    reserved: int = 5_000  # rows, one a document, that probes are drawn from and no arm trains on
    held: int = 300  # rows of the pool that no arm trains on, to see what choosing unlearns
    items: int = 100  # of each zero-shot task; 0 leaves them out, and ablations do without


QUICK = Sizes(
    documents=6_000, warm=40, steps=40, random_steps=80, every=20, passages=32, test=32, reserved=1_200, held=60,
    items=0,
)  # fmt: skip


@functools.lru_cache(maxsize=2)
def open_lab(paths: Paths, sizes: Sizes, task: str, filtered: bool) -> Lab:
    """The laboratory of a setting; a process keeps two, a pool and what the filter leaves of it."""
    lab = load_lab(
        paths.data, paths.work / task, num_documents=sizes.documents, task=task, num_reference=sizes.passages,
        num_development=sizes.passages, num_test=sizes.test,
    )  # fmt: skip
    return filters.filtered_lab(lab) if filtered else lab


class Run:
    """A training in progress: the model, the rows that are left, and what everything cost."""

    def __init__(self, lab: Lab, sizes: Sizes, paths: Paths, unit: Unit) -> None:
        self.lab, self.sizes, self.paths, self.unit = lab, sizes, paths, unit
        self.arm: Arm = EVERY_ARM[unit.arm]
        work = paths.work / (unit.task + ("-filtered" if unit.filtered else ""))
        work.mkdir(parents=True, exist_ok=True)
        self.point: Point = warm_point(lab, sizes.warm, work, unit.seed, **SHAPE)
        by_document = one_a_document(lab, self.point.rest)
        self.held, self.reserved, _ = np.split(by_document, [sizes.held, sizes.held + sizes.reserved])
        closed = np.concatenate([self.held, self.reserved])
        self.open_rows: Ids = self.point.rest[~np.isin(self.point.rest, closed)]
        self.num_parameters = count_multiplied_parameters(self.point.model)
        self.costs: dict[str, dict[str, float]] = {}
        self.curve: list[dict[str, float]] = []
        self.final: dict[str, Any] = {}
        self.rounds: list[dict[str, Any]] = []
        self._fitted: dict[str, Any] = {}  # influence models by reference loss
        self._domain_sums = np.zeros((2, len(lab.domain_names)))
        self._static: rivals.StaticFilter | None = None
        tuned = self.arm.setting == "tuned"
        self._setting = filters.tuned_setting(paths, unit, self.arm.rank) if tuned else self.arm.setting
        self._passages = np.arange(0)  # rows of the pool that are reference passages
        if self.arm.mixed == "passages":
            pieces = rivals.pieces_of(lab.reference["all"].rows, int(lab.rows.lengths[0]))
            self._passages = np.arange(len(lab.rows), len(lab.rows) + len(pieces))
            self.point.lab = dataclasses.replace(lab, rows=together(lab.rows, pieces))
        self._average = WeightAverage(self.point.model)  # what evaluations look at: first that of the warm start
        self._average.load(work / f"warm-{unit.seed}-{sizes.warm}.safetensors")
        self._seconds_evaluating = 0.0
        self._step = 0

    def cost(self, stage: str, seconds: float, flops: float) -> None:
        """Add to a stage."""
        entry = self.costs.setdefault(stage, {"seconds": 0.0, "flops": 0.0})
        entry["seconds"] += seconds
        entry["flops"] += flops

    def train(self) -> dict[str, Any]:
        """Go through all rounds; the result as JSON values."""
        self._evaluate()
        last = self.sizes.random_steps if self.unit.arm == RANDOM else self.sizes.steps
        number = 0
        while self._step < last:
            num_steps = min(self.arm.round_steps, last - self._step)
            chosen = self._choose(number, num_steps * BATCH_ROWS)
            chosen = np.random.default_rng([self.unit.seed, 4, number]).permutation(chosen)
            averager = Averager(self.point.model, num_steps, min(WINDOW, num_steps))
            begin, before = self._step, self._seconds_evaluating
            started = time.perf_counter()

            def on_step(step: int, begin: int = begin, averager: Averager = averager) -> None:
                averager.update(step)
                self._step = begin + step
                self._on_step()

            self.point.train(chosen, on_step=on_step)
            seconds = time.perf_counter() - started - (self._seconds_evaluating - before)
            if self._step <= self.sizes.steps:
                num_tokens = int(self.point.lab.rows.lengths[chosen].sum())
                self.cost("train", seconds, gradient_flops(self.num_parameters, num_tokens))
            self.point.average = averager.average
            number += 1
        return {
            **dataclasses.asdict(self.unit), "settings": dataclasses.asdict(self.arm), "setting": self._setting,
            "parameters": self.num_parameters, "curve": self.curve, "final": self.final, "rounds": self.rounds,
            "costs": self.costs,
        }  # fmt: skip

    # --- evaluation, the same for every arm and not among its costs ---

    def _on_step(self) -> None:
        every = self.sizes.every
        if 0 < self._step % every <= every - min(WINDOW, every):
            return
        self._average.update()
        if self._step % every == 0:
            self._evaluate()

    def _evaluate(self) -> None:
        """Development losses at averaged weights; after the steps that all arms have, all there is to know."""
        started = time.perf_counter()
        with self._average.swapped_in():
            self.curve.append({"step": self._step, **self.point.development()})
            if self._step == self.sizes.steps:
                self.final = self._everything()
        self._average = WeightAverage(self.point.model)
        self._seconds_evaluating += time.perf_counter() - started

    def _everything(self) -> dict[str, Any]:
        model = self.point.model
        final: dict[str, Any] = {"test": task_losses(model, self.lab.test)} if self.lab.test else {}
        final["pool"] = mean_loss(model, self.lab.rows.take(self.held), tokens_per_batch=TOKENS_PER_BATCH)
        if self.sizes.items and self.unit.arm in ARMS:  # those of other arms are not looked at
            found = open_evaluator(self.paths, self.sizes, self.unit.task).run(model)
            keys = ("choice_prob", "nll_per_byte", "accuracy")
            final["zero_shot"] = {name: value for name, value in found.items() if name.endswith(keys)}
        return final

    # --- choosing ---

    def _choose(self, number: int, k: int) -> Ids:
        """The (k,) rows of a round."""
        arm, seed = self.arm, (self.unit.seed, number)
        num_mixed = round(arm.share * k)
        if arm.rank == "random":
            chosen, self.open_rows = np.split(self.open_rows, [k - num_mixed])
            return np.concatenate([chosen, np.resize(np.roll(self._passages, -number * num_mixed), num_mixed)])
        candidates = self.open_rows
        if arm.again:
            candidates = np.random.default_rng([self.unit.seed, 5, number]).permutation(candidates)
        if arm.scope == "slice":
            candidates = candidates[: round(k / arm.ratio)]
        record: dict[str, Any] = {"step": self._step}
        probes = arm.probed and not (arm.once and number)
        labels = self._probe(number, candidates, record, arm.loss_on) if probes else None
        values = self._values(candidates, labels, number, record)
        if arm.beside:
            rows = self.lab.rows.take(candidates)
            if arm.beside == "last word":
                labels = self._probe(number, candidates, record, "completion") if probes else None
                beside = self._predicted(rows, labels, {}, "completion")
            else:
                beside = self._like_reference(arm.beside, rows)
            values = values / values.std() + beside / beside.std()
        started = time.perf_counter()
        chosen = candidates[gumbel_top_k(values, k - num_mixed, arm.temperature, seed=seed)]
        if num_mixed:  # the pool is in a random order
            chosen = np.concatenate([chosen, candidates[~np.isin(candidates, chosen)][:num_mixed]])
        self.cost("select", time.perf_counter() - started, 0.0)
        if not arm.again:
            gone = chosen if arm.scope == "pool" else candidates
            self.open_rows = self.open_rows[~np.isin(self.open_rows, gone)]
        if arm.round_steps > 1:
            record["domains"] = np.bincount(self.lab.domain[chosen], minlength=len(self.lab.domain_names)) / k
            self.rounds.append(record)
        return chosen

    def _probe(self, number: int, candidates: Ids, record: dict[str, Any], loss_on: str) -> InfluenceLabels:
        """Labels of a round's probes, which no arm trains on, or of the candidates themselves."""
        arm, started = self.arm, time.perf_counter()
        ids = candidates
        if arm.probes is not None:
            ids = self.reserved[number * arm.probes : (number + 1) * arm.probes]
        record["probes"] = len(ids)
        self._probed = ids
        reference = self.lab.reference[loss_on].subset(arm.passages, seed=number)
        probe: DirectionalProbe | OneStepProbe = OneStepProbe(max_grad_norm=1.0, tokens_per_batch=TOKENS_PER_BATCH)
        if arm.probe == "directional":
            probe = DirectionalProbe(
                tokens_per_batch=TOKENS_PER_BATCH, path_steps=arm.path_steps, path_rate=arm.path_rate
            )
        with self.point.weights(arm.averaged):
            labels = probe.measure(self.point.model, self.point.optimizer, reference, self.lab.rows.take(ids))
        self.cost("probe", time.perf_counter() - started, labels.info["flops"])
        if arm.probe == "directional" and arm.probes is not None and loss_on == arm.loss_on:
            self.cost("audit", 0.0, self._audit_flops(reference))  # not run: it changes nothing that is chosen
        return labels

    def _audit_flops(self, reference: ReferenceTask) -> float:
        """What a round's audit takes, which each round of the library has: both probes on a few candidates."""
        few = reference.subset(NUM_AUDIT_PASSAGES, seed=0)
        tokens_per_row = int(self.lab.rows.lengths[0])
        sizes: dict[str, Any] = {
            "num_candidate_tokens": NUM_AUDITED * tokens_per_row,
            "num_reference_tokens": float(few.rows.lengths.sum()),
        }
        derivative = directional_flops(
            self.num_parameters, **sizes, epsilon_steps=0, tokens_per_row=tokens_per_row, num_second_moment_tokens=0
        )
        return derivative + one_step_flops(self.num_parameters, **sizes, num_candidates=NUM_AUDITED)

    def _values(self, candidates: Ids, labels: InfluenceLabels | None, number: int, record: dict[str, Any]) -> Any:
        """(N,) what the candidates are ranked by, in standard deviations of the labels where there are any."""
        arm, lab = self.arm, self.lab
        rows = lab.rows.take(candidates)
        if labels is not None and arm.probes is None:
            values = np.empty(len(candidates), np.float32)
            values[labels.candidate_id] = labels.influence
            return values / labels.influence.std()
        if arm.rank == "influence":
            return self._predicted(rows, labels, record, arm.loss_on)
        if arm.rank in ("domain means", "best domain"):
            return self._by_domain(candidates, labels)
        started = time.perf_counter()
        if arm.rank == "stratified":
            order = np.random.default_rng([self.unit.seed, 6, number]).permutation(len(candidates))
            domain = pandas.Series(lab.domain[candidates[order]], index=order)
            return -domain.groupby(domain).cumcount().sort_index().to_numpy(np.float64)
        if arm.rank == "low loss":
            with self.point.weights(averaged=True):
                values = -row_losses(self.point.model, rows)
            self.cost("score", time.perf_counter() - started, forward_flops(self.num_parameters, len(rows.values)))
            return values
        return self._like_reference(arm.rank, rows)

    def _like_reference(self, rank: str, rows: TokenRows) -> Any:
        """(N,) what a static filter, fitted once, ranks rows by."""
        started = time.perf_counter()
        if self._static is None:
            self._static = filters.static_filter(self.lab, rank, self._setting, self.unit.seed)
            self.cost("fit", time.perf_counter() - started, 0.0)
            started = time.perf_counter()
        values = self._static.rank(rows)
        self.cost("score", time.perf_counter() - started, self._static.flops(rows))
        return values

    def _predicted(self, rows: TokenRows, labels: InfluenceLabels | None, record: dict[str, Any], key: str) -> Any:
        """(N,) predictions by the influence model of a reference loss, fitted on these labels where there are any."""
        if labels is not None:
            started = time.perf_counter()
            self._fitted[key], flops = self._fit(labels, self._fitted.get(key) if self.arm.pooled else None)
            self.cost("fit", time.perf_counter() - started, flops)
            record["held_out_spearman"] = self._fitted[key].report.spearman
        started = time.perf_counter()
        values = self._fitted[key].predict(rows) / self._fitted[key].report.label_std
        flops = NGRAM_FLOPS * len(rows.values)
        if self.arm.labels == "encoder":
            flops = rivals.encoder_flops(rivals.texts_of(rows, self.lab.tokenizer))
        self.cost("score", time.perf_counter() - started, flops)
        return values

    def _fit(self, labels: InfluenceLabels, previous: Any) -> tuple[Any, float]:
        """An influence model of the probed rows, and the FLOPs of its fit; tables are fitted without any."""
        rows, groups = self.lab.rows.take(self._probed), self.lab.domain[self._probed]
        if self.arm.labels == "encoder":
            model = rivals.encoder_model(self.lab.tokenizer, self.unit.seed)
            read = rivals.encoder_flops(rivals.texts_of(rows, self.lab.tokenizer))
            numbered = dataclasses.replace(labels, candidate_id=np.arange(len(rows)))
            return model.fit(rows, numbered, groups=groups), 3 * model.num_epochs * read
        tables = NgramInfluenceModel(seed=self.unit.seed, labels=self.arm.labels, pool_decay=POOL_DECAY)
        return tables.fit(rows, labels, groups=groups, previous=previous), 0.0

    def _by_domain(self, candidates: Ids, labels: InfluenceLabels | None) -> Any:
        """Mean label of each candidate's domain, earlier rounds decayed as the n-gram model has them; or the best."""
        assert labels is not None
        domain, size = self.lab.domain[self._probed], len(self.lab.domain_names)
        self._domain_sums *= POOL_DECAY
        self._domain_sums += [np.bincount(domain, labels.influence, size), np.bincount(domain, minlength=size)]
        sums, counts = self._domain_sums
        means = np.where(counts > 0, sums / np.maximum(counts, 1e-9), sums.sum() / counts.sum())
        values = means[self.lab.domain[candidates]] / labels.influence.std()
        return values if self.arm.rank == "domain means" else (values == values.max()).astype(float)


@functools.lru_cache(maxsize=1)
def open_evaluator(paths: Paths, sizes: Sizes, task: str) -> Any:
    """The nine zero-shot tasks with the tokenizer of a setting."""
    from mates_hf.evaluation import Evaluator

    tokenizer = open_lab(paths, sizes, task, False).tokenizer
    metadata = {"data_dir": str(paths.data / "eval")}
    return Evaluator("mates_zero_shot_local", tokenizer, limit=sizes.items, metadata=metadata, truncate=True)


def run_unit(paths: Paths, sizes: Sizes, unit: Unit) -> dict[str, Any]:
    """Train one arm of one seed; its result as JSON values."""
    lab = open_lab(paths, sizes, unit.task, unit.filtered)
    return Run(lab, sizes, paths, unit).train()
