"""One round of MATES (arXiv:2406.06046): probe, fit, score, select. Read `run_round`; it is the method.

Where it is used: `MatesCallback` opens a `Session` when training begins, which runs a round at each boundary; the
order it returns goes into the `ScheduledSampler`. Each stage leaves its result in the round directory before the next
one starts, so a killed round continues where it stopped.

Trade-off: training waits for labels, which is the only way to measure the model as it is. By count of FLOPs, the
paper's 80,000 probes of 1,024 tokens are 1 % of its 10,000 steps. What follows needs no device, and runs beside
training where it can (`beside`).

A round may be shorter than it was drawn for: labels also say whether the prices that the last one paid still hold, and
`trust` makes a length of it.

Sign: influence > 0 helps; higher is better, everywhere.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mates_hf.data.groups import shares_by_group
from mates_hf.disk import write_array, write_json
from mates_hf.errors import UnrankableError
from mates_hf.influence.probe import count_multiplied_parameters
from mates_hf.records import InfluenceLabels, IntArray
from mates_hf.reporting.lines import tell_round
from mates_hf.round_files import SELECTION_KEYS, round_path
from mates_hf.round_writer import RoundWriter
from mates_hf.selection.ledger import RoundDraw
from mates_hf.selection.plan import PlannedRound, RunPlan
from mates_hf.selection.quota import quota_of
from mates_hf.selection.select_stage import select_rows
from mates_hf.selection.stream_ledger import StreamLedger
from mates_hf.training.audit import audit_round
from mates_hf.training.bought import most_bought
from mates_hf.training.drift import set_sentinel
from mates_hf.training.duplicates import selection_facts
from mates_hf.training.groups import candidate_groups, group_facts, probe_strata
from mates_hf.training.guard import Judged, decide
from mates_hf.training.measure import measure_digest
from mates_hf.training.mixed_in import passage_facts
from mates_hf.training.order import Order, load_order
from mates_hf.training.redact import probed_by
from mates_hf.training.replaced import read_replaced, with_replaced
from mates_hf.training.restore import rows_offered
from mates_hf.training.rise import course_so_far, measure_rise
from mates_hf.training.run import InfluenceModel, Run, Stages, takes
from mates_hf.training.scoring import Scored, predict_rows, score_candidates
from mates_hf.training.stages import fitted_model, measured_labels, why_unrankable
from mates_hf.training.stream.rounds import stream_facts, with_files
from mates_hf.training.trust import GAP_FILE, Gap, length_facts, measure_gap, shortened

CONCLUDING = ("fit", "guard", "score", "select")  # the stages that may run beside training


class Measured(NamedTuple):
    """A round whose labels are there.

    Attributes:
        planned: number and steps of the round, as long as it may be.
        plan: says what a shorter one would be.
        from_position: pool rows before the selection takes effect.
        own_rows: (N,) the Trainer's own order of the pool.
        beside: the rest runs beside training.
        writer: Writer of the round's directory.
        stages: what was done, and what it cost.
        draw: which rows are candidates, and which were probed.
        labels: Labels of the probed candidates.
        reason: why they rank no candidate; empty where they do.
        fidelity: what the audit found.
        facts: what `round.json` says of the model as it was measured.
    """

    planned: PlannedRound
    plan: RunPlan
    from_position: int
    own_rows: npt.NDArray[Any]
    beside: bool
    writer: RoundWriter
    stages: Stages
    draw: RoundDraw
    labels: InfluenceLabels
    reason: str
    fidelity: dict[str, Any]
    facts: dict[str, Any]


def run_round(
    run: Run, planned: PlannedRound, plan: RunPlan, *, from_position: int, own_rows: npt.NDArray[Any], beside: bool
) -> Callable[[], Order]:
    """Probe some candidates; then fit an influence model, score the others, select what is trained on next.

    Called in the main process; the others `assist` where it measures.

    Args:
        run: the run's state; its ledger must have every row trained on before `from_position` marked.
        planned: number and steps of the round, as long as it may be: its labels may shorten it (`trust`).
        plan: says what a shorter one would be.
        from_position: pool rows before the selection takes effect.
        own_rows: (N,) integer, the Trainer's own order of the pool, for the case that the guard refuses to select.
        beside: whether the rest is to run beside training; for the record.

    Returns:
        The rest of the round, which needs labels and texts but neither the model nor a device. Called, here or beside
        training, it returns the rows to train on next, in order, and what led to them. Until it has, nobody else may
        use the run's ledger and influence models.

    Raises:
        InfluenceError: influence that is not finite.
        WeakSignalError: from the rest: the guard refused and `on_weak_signal="error"`.
        RoundMismatchError: the round directory belongs to another config or pool.
    """
    stages = Stages()
    with stages.timed("digest") as cost:
        weights = measure_digest(run)
        cost["flops"] = 0.0  # it adds up integers
    writer = RoundWriter(run.rounds_dir, planned.number, run.key(planned.boundary_step, weights))
    if writer.complete:
        return functools.partial(_take_over, run, load_order(writer.final_path))
    stages.load(writer.path)
    write_array(writer.path / "consumed.npy", run.ledger.to_bits())
    write_array(writer.path / "probed.npy", run.ledger.probed_to_bits())
    waiting = run.ledger.waiting_to_bits()
    if waiting is not None:
        write_array(writer.path / "waiting.npy", waiting)
    group_of, strata = probe_strata(run, writer.path)
    draw = run.ledger.draw(
        round_number=planned.number,
        num_selected=planned.num_rows,
        selection_ratio=run.config.selection_ratio,
        candidate_scope=run.config.candidate_scope,
        num_probes=run.config.num_probes,
        group_of=group_of,
    )

    with stages.timed("probe") as cost:
        labels = measured_labels(run, writer.path, draw.probes)
        _note_flops(cost, labels.info.get("flops"))
    reason = why_unrankable(labels)
    fidelity: dict[str, Any] = {}
    if not reason:
        with stages.timed("audit") as cost:
            fidelity = audit_round(run, writer.path, labels, planned.number)
            cost["flops"] = fidelity.get("flops", 0.0)
        if run.config.drift_check_steps and run.config.first_steps is None:
            with stages.timed("sentinel") as cost:
                _note_flops(cost, set_sentinel(run, writer.path, labels, planned.number))
    facts = {
        "step": planned.boundary_step,
        "probe_seed": run.settings.seed,
        "rate_steps": run.settings.rate_steps,
        "averaged_steps": run.averaged_steps,
        "flop_parameters": _flop_parameters(run.model),
        **strata,
        **run.describe(),
    }
    measured = Measured(
        planned, plan, from_position, own_rows, beside, writer, stages, draw, labels, reason, fidelity, facts
    )
    return functools.partial(_conclude, run, measured)


def _conclude(run: Run, measured: Measured) -> Order:
    """Fit, guard, score, select, and the record of it all."""
    judged = _judge(run, measured)
    decision, scorer = decide(run, judged)
    planned = shortened(run, measured.planned, measured.plan, decision, judged.gap)
    draw = run.ledger.narrowed(measured.draw, planned.num_rows, run.config)
    found: dict[str, Any] = {}
    if isinstance(run.ledger, StreamLedger):
        rows, cursor = np.zeros(0, np.int64), draw.cursor_after
        write_array(measured.writer.path / ("own_order.npy" if scorer is None else "selection.npy"), rows)
        found = stream_facts(run, planned, measured.labels, scorer, measured.writer.key["weights"])
    elif scorer is None:
        rows = run.ledger.own_order(measured.own_rows, planned.num_rows, exclude=draw.probes)
        cursor = run.ledger.cursor
        write_array(measured.writer.path / "own_order.npy", rows)
    else:
        rows, found = _score_and_select(run, measured, planned, scorer, draw)
        cursor = draw.cursor_after
    return _record(run, measured, planned, draw, judged, decision, rows, int(cursor), found)


def _judge(run: Run, measured: Measured) -> Judged:
    """What the guard is asked about: the fresh fit, the model trusted so far, and the course of the reference loss."""
    if measured.reason:
        judged = Judged.unrankable(measured.reason)
    else:
        judged = _fit_and_judge(run, measured.writer.path, measured.labels, measured.planned.number, measured.stages)
    return dataclasses.replace(judged, rise=measure_rise(run, measured.labels, measured.facts))


def _score_and_select(
    run: Run, measured: Measured, planned: PlannedRound, scorer: InfluenceModel, draw: RoundDraw
) -> tuple[IntArray, dict[str, Any]]:
    """The rows to train on, (k,) int64 in training order, and what `round.json` says of copies and of leaks."""
    stages, labels, path = measured.stages, measured.labels, measured.writer.path
    with stages.timed("score") as cost:
        # The previous model predicts in the unit of its own labels, whose step size was another.
        unit = labels.step_size / run.trusted_step_size if scorer is run.trusted_model else 1.0
        scored = score_candidates(run, path, scorer, draw.candidates, unit)
        each = scorer.report.flops_per_token
        _note_flops(cost, None if each is None else each * float(scored.num_targets.sum(dtype=np.int64)))
    with stages.timed("select") as cost:
        cost["flops"] = 0.0  # it sorts
        rows, found = _select(run, path, labels, scored, planned.num_rows, planned.number)
        write_array(path / "selection.npy", rows)
    return rows, found


def _record(
    run: Run,
    measured: Measured,
    planned: PlannedRound,
    draw: RoundDraw,
    judged: Judged,
    decision: dict[str, Any],
    rows: IntArray,
    cursor: int,
    found: dict[str, Any],
) -> Order:
    """Write the round down and take it over."""
    writer, labels, facts, done = measured.writer, measured.labels, measured.facts, measured.stages.seconds_and_flops
    info = {
        "number": planned.number,
        "step": planned.boundary_step,
        "from_step": planned.from_step,
        "to_step": planned.to_step,
        "from_position": int(measured.from_position),
        "num_rows": len(rows),
        **length_facts(run, measured.planned, planned),
        **passage_facts(measured.plan.clock, planned.from_step, planned.to_step),
        "order_sha256": hashlib.sha256(np.ascontiguousarray(rows, np.int64).tobytes()).hexdigest(),
        "cursor": cursor,
        "pass": run.ledger.pass_number,
        **({} if run.ledger.waiting is None else {"num_waiting": int(np.count_nonzero(run.ledger.waiting))}),
        "num_candidates": len(draw.candidates),
        "num_probed": len(draw.probes),
        "num_probed_before": run.ledger.num_probed_before(draw.probes),
        "num_skipped": len(labels.info.get("skipped", ())),
        "step_size": labels.step_size,
        "probe": dict(labels.info),
        "fit": None if judged.fitted is None else judged.fitted.report.to_dict(),
        "fidelity": measured.fidelity,
        "guard": decision,
        "gap": None if judged.gap is None else judged.gap.to_dict(),
        "rise": None if judged.rise is None else judged.rise.to_dict(),
        "reference_course": course_so_far(run, labels, {"guard": decision, **facts}),
        **found,
        **group_facts(run, labels, found.get("groups")),
        "stages": done,
        "beside_training": [name for name in CONCLUDING if name in done] if measured.beside else [],
        **facts,
        "weights": writer.key["weights"],
    }
    write_json(writer.path / "selection.json", {name: info[name] for name in SELECTION_KEYS})
    tell_round(info, has_bars=run.settings.progress)
    return _take_over(run, load_order(writer.finish(info)))


def _note_flops(cost: dict[str, float], flops: float | None) -> None:
    """Record a stage's FLOPs, or nothing where what ran does not say them."""
    if flops is not None:
        cost["flops"] = float(flops)


def _flop_parameters(model: Any) -> dict[str, int | None]:
    """The parameters by which our stages count FLOPs, and those by which the Trainer counts its `total_flos`."""
    count = getattr(model, "num_parameters", None)
    return {
        "stages": count_multiplied_parameters(model),
        "trainer": None if count is None else int(count(exclude_embeddings=True)),
    }


def _take_over(run: Run, order: Order) -> Order:
    """What a finished round leaves to the next ones: influence model, decision, probed rows, and the cursor."""
    path = round_path(run.rounds_dir, order.number)
    run.note_decision(order.info)
    if order.info["fit"] is not None and (path / "influence_model").exists():  # unless rows of it were removed
        run.remember(run.load_model(path), order.info)
    run.ledger.mark_probed(probed_by(path))
    run.ledger.cursor = int(order.info["cursor"])
    if "num_waiting" not in order.info:  # of an earlier version, or of the first pass
        run.ledger.waiting = None
    run.ledger.mark_offered(rows_offered(path, order))
    return with_files(run, with_replaced(order, read_replaced(path)))  # a round from before a stop may have some


def _fit_and_judge(run: Run, path: Path, labels: InfluenceLabels, number: int, stages: Stages) -> Judged:
    """Fit the round's influence model, and ask the one that was trusted so far about the same labels."""
    documents = run.documents(labels.candidate_id)
    try:
        with stages.timed("fit") as cost:
            fitted = fitted_model(run, path, labels, documents, number)
            _note_flops(cost, fitted.report.flops)
    except UnrankableError as error:
        return Judged.unrankable(str(error))
    fresh = gap = None
    if run.trusted_model is not None:
        with stages.timed("guard") as cost:
            more = {"documents": documents} if takes(run.trusted_model.evaluate, "documents") else {}
            read = run.read_by(run.trusted_model, labels.candidate_id)
            fresh = run.trusted_model.evaluate(read, labels, **more)
            num_asked = 1
            if run.last_decision != "own_order":  # else its kind of rows was not bought
                gap, num_asked = _gap(run, path, labels), 2
            each = run.trusted_model.report.flops_per_token
            _note_flops(
                cost, None if each is None else num_asked * each * float(labels.num_tokens.sum(dtype=np.int64))
            )
    return Judged(fitted=fitted, fresh=fresh, gap=gap)


def _gap(run: Run, path: Path, labels: InfluenceLabels) -> Gap | None:
    """What the last round bought against the rest; what the model that chose it predicts is left for `replay`."""
    assert run.trusted_model is not None
    predicted = predict_rows(run, run.trusted_model, labels.candidate_id)
    predicted = (predicted * np.float32(labels.step_size / run.trusted_step_size)).astype(np.float32)
    write_array(path / GAP_FILE, predicted)
    return measure_gap(predicted, labels, run.config.selection_ratio)


def _select(
    run: Run, path: Path, labels: InfluenceLabels, scored: Scored, num_rows: int, number: int
) -> tuple[IntArray, dict[str, Any]]:
    """The rows to train on, (k,) int64 in training order, and what `round.json` says of copies, leaks and groups."""
    groups = candidate_groups(run, path, scored.candidates)
    selected = select_rows(
        scored.candidates,
        scored.influence,
        scored.num_targets,
        labels,
        num_rows,
        temperature=run.config.temperature,
        selection_seed=run.config.selection_seed,
        round_number=number,
        hashes=scored.hashes,
        max_copies=run.config.max_copies,
        random_share=run.config.random_share,
        quota=quota_of(run.config, groups),
    )
    found = scored.found | selection_facts(run, selected, scored.candidates, scored.hashes, number)
    found["bought_most"] = most_bought(run, selected.rows, scored.candidates)
    if groups is not None:
        found["groups"] = shares_by_group(groups, scored.candidates, selected.rows)
    return selected.rows, found
