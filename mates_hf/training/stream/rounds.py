"""What a round of a stream decides, and going on with it after a stop.

Where it is used: `rounds` asks where a map-style pool would be scored and selected from, `session` where a run
resumes. A round probes, fits and judges as always. What it decides is by which influence model buffers to come are
selected from (`stream/rules`), since their rows are not read yet. Its own selection is empty: the rows are in the
buffers' files.

Trade-off: `mates_hf` can say what a round trained on once its buffers were made, not before.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mates_hf.errors import MatesError
from mates_hf.records import STATE_KEY, InfluenceLabels
from mates_hf.round_files import PROBES_FILE, read_labels, round_path
from mates_hf.selection.ledger import probed_rows
from mates_hf.selection.plan import PlannedRound, num_candidates
from mates_hf.selection.select_stage import label_unit
from mates_hf.selection.stream_ledger import WINDOW
from mates_hf.training import rounds_on_disk
from mates_hf.training.order import Files, Order, load_order, stream_digest
from mates_hf.training.restore import restore_models
from mates_hf.training.run import InfluenceModel, Run
from mates_hf.training.stream.files import files_in, numbered, read_aside
from mates_hf.training.stream.maker import BufferMaker
from mates_hf.training.stream.sampler import StreamSampler


def stream_facts(
    run: Run, planned: PlannedRound, labels: InfluenceLabels, scorer: InfluenceModel | None, weights: str
) -> dict[str, Any]:
    """What `round.json` says of the rule that a round decided.

    Args:
        run: the run's state.
        planned: the round.
        labels: its labels.
        scorer: selects from the buffers to come; None is the own order.
        weights: digest of the weights that it probed.

    Returns:
        `stream`: `scored_by`, the round whose influence model selects (None: none), `scale` of its predictions and
        `unit` of the labels; and the numbers of rows, which are those of whole rounds.
    """
    scored_by, scale, unit = None, 1.0, 1.0
    if scorer is not None:
        keeps = scorer is run.trusted_model
        scored_by = rounds_on_disk.last_passed(run.rounds_dir, planned.number - 1) if keeps else planned.number
        # The previous model predicts in the unit of its own labels, whose step size was another.
        scale = labels.step_size / run.trusted_step_size if keeps else 1.0
        unit = label_unit(labels)
    stream = {"scored_by": scored_by, "scale": scale, "unit": unit}
    chosen_from = 0 if scorer is None else num_candidates(planned.num_rows, run.config.selection_ratio)
    return {
        "num_rows": planned.num_rows,
        "num_candidates": chosen_from,
        "stream": stream,
        "order_sha256": stream_digest(weights, stream, _files(run, stream)),
    }


def with_files(run: Run, order: Order) -> Order:
    """In the main process: an order with the files of the influence model that its buffers are selected by."""
    stream = order.info.get("stream")
    return order if stream is None else dataclasses.replace(order, files=_files(run, stream))


def _files(run: Run, stream: Mapping[str, Any]) -> Files:
    """Files of the influence model that a rule names; of a round in the making, from its unfinished directory."""
    if stream["scored_by"] is None:
        return {}
    folder = round_path(run.rounds_dir, stream["scored_by"])
    if not folder.exists():
        folder = folder.with_suffix(".partial")
    return files_in(folder / "influence_model")


def go_on(run: Run, sampler: StreamSampler, last_round: Mapping[str, Any] | None, step: int) -> Order | None:
    """Have rules, models and rows set aside as they were in memory at a step; all processes must call it.

    Args:
        run: the run's state.
        sampler: gets the rules.
        last_round: number and hash of the last round that the checkpoint knows; None before the first.
        step: optimizer steps done.

    Returns:
        The order of that round; None before the first.

    Raises:
        MatesError: a round that is needed is not there any more.
    """
    is_main = run.processes.is_main
    orders = restore_stream(run, last_round, step, sampler.first_position) if is_main else receive_stream(run)
    for order in orders:
        sampler.take(order)
    return orders[-1] if orders else None


def restore_stream(run: Run, last_round: Mapping[str, Any] | None, step: int, position: int) -> list[Order]:
    """In the main process: rules, models and rows set aside as they were in memory; told to the others.

    Args:
        run: the run's state.
        last_round: number and hash of the last round that the checkpoint knows; None before the first.
        step: optimizer steps done.
        position: pool rows before the buffer that the run goes on in.

    Returns:
        The orders by which that buffer and later ones are selected from, in order.

    Raises:
        MatesError: a round that the buffer needs is not there any more.
    """
    orders: list[Order] = []
    if last_round is not None:
        path = rounds_on_disk.require_round(run.rounds_dir, last_round, step)
        orders = [with_files(run, load_order(path))]
        while orders[0].from_position > position and orders[0].number > run.config.random_rounds:
            earlier = rounds_on_disk.round_before(run.rounds_dir, orders[0].number)
            if earlier is None:
                missing = round_path(run.rounds_dir, orders[0].number - 1)
                raise MatesError(
                    f"Resuming at step {step} needs the finished round `{missing}`, which is not there. Move the "
                    "`_mates` folder along with the checkpoints, or resume from a later checkpoint."
                )
            orders.insert(0, with_files(run, load_order(earlier)))
        restore_models(run, orders[-1].number)
        for number in range(orders[-1].number + 1):
            labels_path = round_path(run.rounds_dir, number) / PROBES_FILE
            if labels_path.exists():
                run.ledger.mark_probed(probed_rows(read_labels(labels_path)))
    aside = {name: np.frombuffer(path.read_bytes(), np.uint8) for name, path in _aside_before(run, position)}
    run.processes.publish({"orders": [_told(order) for order in orders], "aside": list(aside)}, **aside)
    for order in orders:
        run.processes.publish({}, **order.files)
    _hold(run, aside)
    return orders


def receive_stream(run: Run) -> list[Order]:
    """In the others: what `restore_stream` told."""
    message, aside = run.processes.receive()
    orders = []
    for told in message["orders"]:
        _, files = run.processes.receive()
        orders.append(Order(rows=np.zeros(0, np.int64), files=files, **told))
    _hold(run, aside)
    return orders


def _told(order: Order) -> dict[str, Any]:
    return {"number": order.number, "from_position": order.from_position, "info": dict(order.info)}


def _aside_before(run: Run, position: int) -> list[tuple[str, Any]]:
    """Name and path of the files that a round after a position may still probe from."""
    found, num = [], 0
    for number, path in reversed(list(numbered(run.rounds_dir, "aside"))):
        at, rows, _ = read_aside(path.read_bytes())
        if at < position:
            found.append((f"aside-{number}", path))
            num += len(rows)
            if num >= WINDOW * run.config.num_probes:
                break
    return found


def _hold(run: Run, aside: Mapping[str, Any]) -> None:
    for name, data in aside.items():
        position, rows, table = read_aside(data.tobytes())
        BufferMaker.hold_in(run, int(name.removeprefix("aside-")), position, rows, table)


def prune_aside(run: Run, sampler: Any, output_dir: Path) -> None:
    """Delete rows set aside that neither this run nor a resume from one of its checkpoints can probe any more.

    Args:
        run: the run's state.
        sampler: The run's; nothing is done where it is not of a stream.
        output_dir: where its checkpoints are.
    """
    if not (run.processes.is_main and isinstance(sampler, StreamSampler)):
        return
    oldest = sampler.first_number
    for path in output_dir.glob("checkpoint-*/trainer_state.json"):
        try:
            state = json.loads(path.read_bytes())["stateful_callbacks"][STATE_KEY]["stream"]["buffer"]["number"]
        except (OSError, ValueError, KeyError, TypeError):  # half-written, or of another run
            continue
        oldest = min(oldest, int(state))
    num = 0
    for number, path in reversed(list(numbered(run.rounds_dir, "aside"))):
        if number < oldest:
            if num >= WINDOW * run.config.num_probes:
                path.unlink(missing_ok=True)
            else:
                num += len(read_aside(path.read_bytes())[1])
