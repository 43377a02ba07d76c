"""The faults of `faults`: where they are planted, who meets them, and what happens there."""

from __future__ import annotations

import dataclasses
from typing import Any

SIZE = 2  # processes
MAIN, LAST, ALL = "main", "last", "all"
ERROR, FULL, KILL, STOP = "error", "full disk", "SIGKILL", "SIGSTOP"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault."""

    place: str  # what the page calls it
    target: str  # `module:function` or `module:Class.method` that is wrapped
    who: str  # meets it
    what: str  # happens there
    call: int = 1  # the number of the call it happens at, from 1, counted once the run is in `since`
    since: str = "start"  # `start`, or the function of `Session` or `measure` that must have been entered
    resumes: bool = False  # whether the run resumes from the checkpoint of an earlier one
    sharded: bool = False  # whether weights are sharded by FSDP2
    fit_seconds: float = 0.0  # how long the main process fits
    # whether the run is to continue, because an audit is never fatal, and a file that only speeds up a rerun is not
    # either
    goes_on: bool = False
    beside: bool = False  # whether fit, score and select run beside training
    grows: bool = False  # whether rounds grow, and are looked at inside

    @property
    def name(self) -> str:
        """What its unit is called."""
        return f"{self.place}: {self.who}, {self.what}"

    @property
    def ranks(self) -> tuple[int, ...]:
        """The processes that meet it."""
        return {MAIN: (0,), LAST: (SIZE - 1,), ALL: tuple(range(SIZE))}[self.who]


def all_faults() -> list[Fault]:
    """Every fault, in the order of a run."""
    found: list[Fault] = []

    def at(place: str, target: str, *faults: tuple[str, str], **details: Any) -> None:
        found.extend(Fault(place=place, target=target, who=who, what=what, **details) for who, what in faults)

    callback, session, rounds = (f"mates_hf.training.{name}:" for name in ("callback", "session", "rounds"))
    disk, measure, start = (f"mates_hf.training.{name}:" for name in ("rounds_on_disk", "measure", "start"))
    average, stages = "mates_hf.engine.averaging:", "mates_hf.training.stages:"
    opening, scoring, audit = (f"mates_hf.training.{name}:" for name in ("opening", "scoring", "audit"))
    processes, ngram = "mates_hf.engine.processes:", "mates_hf.prediction.ngram_model:NgramInfluenceModel."
    directional, losses = "mates_hf.influence.probe_directional:", "mates_hf.influence.passes:"
    in_round = {"since": "_look"}
    # The start.
    at("run is checked", callback + "check_run", (MAIN, ERROR), (LAST, ERROR), (ALL, ERROR))
    at("loss is read", start + "read_given", (MAIN, ERROR), (LAST, ERROR))
    at("connections are opened", processes + "_new_group", (LAST, ERROR), (LAST, KILL))
    at("config is compared", processes + "Processes.require_same", (MAIN, KILL), (LAST, ERROR))
    at("sampler is made", start + "make_sampler", (LAST, ERROR))
    at("lock is taken", opening + "RoundsLock", (MAIN, ERROR))
    at("folder is tried", opening + "written_whole", (MAIN, FULL))
    at("rounds set aside", opening + "set_earlier_run_aside", (MAIN, ERROR), (MAIN, KILL), (MAIN, STOP))
    at("round is found again", disk + "require_round", (MAIN, ERROR), resumes=True)
    at("orders are received", session + "Session._restore_rounds", (LAST, ERROR), (LAST, KILL), resumes=True)
    at("running mean is read", average + "WeightAverage.load", (LAST, ERROR), (MAIN, ERROR), resumes=True)
    # Averaging and checkpoints.
    at("step of the averaging window", average + "WeightAverage.update", (MAIN, ERROR), (LAST, ERROR))
    at("running mean is written", "safetensors.torch:save_file", (MAIN, FULL), (MAIN, KILL))
    at("running means are pruned", disk + "prune_averages", (MAIN, ERROR))
    at("running mean of the last process", session + "Session.save_average", (LAST, ERROR))
    at("marks of the weights", session + "weight_marks", (LAST, ERROR), (ALL, ERROR))
    # A round.
    at("averaged weights put in", average + "WeightAverage._put_in", (LAST, ERROR))
    at("digest", measure + "weights_digest", (MAIN, ERROR), (LAST, ERROR), (LAST, KILL))
    at("first file of the round", rounds + "write_array", (MAIN, FULL))
    at("rows are drawn", "mates_hf.selection.ledger:Ledger.draw", (MAIN, ERROR))
    at("labels", measure + "_labels", (MAIN, ERROR), (LAST, ERROR), (ALL, ERROR), (MAIN, KILL), (LAST, KILL),
       (MAIN, STOP), (LAST, STOP))  # fmt: skip
    at("gradient of a share", directional + "add_gradient_of_sum", (LAST, ERROR), (MAIN, ERROR))
    at("forward pass", losses + "batch_losses", (MAIN, ERROR), (LAST, ERROR), (LAST, KILL), call=2, **in_round)
    at("gradients are added up", processes + "Processes.sum_gradients", (LAST, ERROR), (MAIN, KILL), **in_round)
    at("sum", processes + "Processes.sum", (MAIN, ERROR), (LAST, ERROR), (LAST, KILL), (MAIN, STOP), (LAST, STOP),
       call=4, **in_round)  # fmt: skip
    at("agreement on a step", processes + "Processes.agree", (LAST, ERROR), (MAIN, KILL), **in_round)
    at("publish", processes + "Processes.publish", (MAIN, ERROR), (MAIN, STOP), call=2, **in_round)
    at("receive", processes + "Processes.receive", (LAST, ERROR), (LAST, STOP), call=2, **in_round)
    at("shard of the probe is written", "mates_hf.influence.shards:write_array", (MAIN, FULL), goes_on=True)
    at("labels are written", stages + "write_labels", (MAIN, FULL), (MAIN, KILL))
    at("stage is recorded", "mates_hf.training.run:write_json", (MAIN, FULL), goes_on=True)
    at("audit", measure + "_audit_labels", (MAIN, ERROR), (LAST, ERROR), (ALL, ERROR), goes_on=True)
    at("audit", measure + "_audit_labels", (LAST, KILL), (LAST, STOP))
    at("audit is written", audit + "write_json", (MAIN, FULL), goes_on=True)
    at("sentinel", measure + "_sentinel", (MAIN, ERROR), (LAST, ERROR), (ALL, ERROR), (LAST, KILL), (MAIN, STOP))
    at("sentinel is written", "mates_hf.training.drift:write_json", (MAIN, FULL))
    at("fit", ngram + "fit", (MAIN, ERROR), (MAIN, KILL), (MAIN, STOP))
    at("while the main process fits", processes + "Processes.receive", (LAST, ERROR), (LAST, KILL), (LAST, STOP),
       call=6, fit_seconds=600, **in_round)  # fmt: skip
    at("influence model is written", stages + "write_round_model", (MAIN, FULL))
    at("guard", rounds + "decide", (MAIN, ERROR))
    at("score", ngram + "predict", (MAIN, ERROR), since="_look")
    at("share of the candidates is scored", scoring + "_predict", (LAST, ERROR), (LAST, KILL))
    at("scores are written", scoring + "write_array", (MAIN, FULL), call=2)
    at("select", rounds + "select_rows", (MAIN, ERROR), (MAIN, KILL))
    at("decision is written", rounds + "write_json", (MAIN, FULL))
    at("round is finished", "mates_hf.round_writer:RoundWriter.finish", (MAIN, FULL), (MAIN, KILL))
    at("rounds are pruned", session + "Session._prune", (MAIN, ERROR))
    at("round is released", session + "release", (MAIN, ERROR), (MAIN, STOP))
    at("order is told", "mates_hf.training.beside:share_order", (MAIN, ERROR), (MAIN, STOP))
    at("order is scheduled", session + "Session._schedule", (MAIN, ERROR), (LAST, ERROR), (LAST, KILL), **in_round)
    at("metrics are reported", callback + "MatesCallback._report", (MAIN, ERROR), (LAST, ERROR))
    at("drift check", session + "look_inside", (MAIN, ERROR))
    at("gap check", measure + "_sentinel", (MAIN, ERROR), (LAST, ERROR), (LAST, KILL), grows=True)
    at("gap check is written", "mates_hf.training.drift:write_json", (MAIN, FULL), (MAIN, KILL), grows=True)
    # What runs beside training.
    beside: dict[str, Any] = {"beside": True, **in_round}
    at("fit, beside", ngram + "fit", (MAIN, ERROR), (MAIN, KILL), **beside)
    at("candidates received, beside", processes + "Processes.receive", (LAST, ERROR), (LAST, STOP), call=5, **beside)
    at("share of the candidates, beside", scoring + "_predict", (MAIN, ERROR), (LAST, ERROR), (LAST, KILL), **beside)
    at("scores are written, beside", scoring + "write_array", (MAIN, FULL), call=2, **beside)
    at("round is finished, beside", "mates_hf.round_writer:RoundWriter.finish", (MAIN, FULL), (MAIN, KILL), **beside)
    at("order is told, beside", "mates_hf.training.beside:share_order", (MAIN, ERROR), (MAIN, STOP), **beside)
    at("round is settled", session + "Session.settle", (MAIN, ERROR), (LAST, ERROR), **beside)
    # Weights sharded by FSDP2, whose collectives are not ours.
    sharded = {"sharded": True, "call": 2, **in_round}
    at("forward pass, sharded", losses + "batch_losses", (MAIN, ERROR), (LAST, ERROR), (MAIN, KILL), (LAST, STOP),
       **sharded)  # fmt: skip
    at("audit, sharded", losses + "batch_losses", (LAST, ERROR), sharded=True, call=2, since="_audit")
    at("audit, sharded", measure + "_audit_labels", (ALL, ERROR), sharded=True, goes_on=True)
    return found
