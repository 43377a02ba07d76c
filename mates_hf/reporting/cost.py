"""The cost ledger: what training, rounds and evaluations of a run took, in seconds and FLOPs, as it recorded them.

Where it is used: after a run, or beside it (`mates-hf cost`); it reads `round.json` files and the Trainer's own
`trainer_state.json`, without torch. `forecast` says what a run would cost before it starts.

Trade-off: nothing is measured again, so what was not recorded is None and printed as "not recorded", never 0. Not in
any stage, and so not in the ledger: the digest of the weights and the checksums of a round, and averaging. Training
FLOPs are the Trainer's `total_flos`, brought to the parameters that stages count by: the Trainer leaves a tied output
head out.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mates_hf.disk import COPY_AGAIN, read_json
from mates_hf.errors import MatesError
from mates_hf.flops import forward_flops
from mates_hf.paths import expand_path
from mates_hf.round_files import ROUND_FILE, find_rounds

STATE_FILE = "trainer_state.json"
UNRECORDED = "not recorded"
_INSIDE = "gap checks"
_ORDER = ("probe", "audit", "sentinel", "drift checks", "fit", "score", "select")
IDLE_STAGES = ("fit", "score", "select")  # on the CPU of the main process
# Their fit and score use the device.
_ON_DEVICE = ("EncoderInfluenceModel", "FeatureInfluenceModel", "HiddenStateInfluenceModel")
_MOST_MISSING = 0.1  # of the steps that one `train()` seems to lack: its rate is rounded


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageCost:
    """What one stage took over a run; None is "not recorded".

    Attributes:
        seconds: wall-clock.
        flops: by the rule of `mates_hf.flops`.
        share_of_seconds: Share of the run's wall-clock.
        share_of_training_flops: relative to the FLOPs of training, which are 1.
        complete: False where a part was not recorded and the FLOPs are a lower bound.
    """

    seconds: float | None
    flops: float | None
    share_of_seconds: float | None = None
    share_of_training_flops: float | None = None
    complete: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunCost:
    """The ledger of a run; None is "not recorded".

    Attributes:
        run_dir: the run's `output_dir`.
        steps: optimizer steps of the newest `trainer_state.json`.
        rounds: numbers of the rounds counted.
        seconds: wall-clock of the run's `train()`.
        training: the optimizer steps; seconds are what is left of the run without rounds and evaluations.
        stages: each stage of the rounds, by name; seconds are of its work, also where it ran beside training.
        mates: all of them together; seconds are those that training waited for.
        evaluation: `LmEvalCallback` and the Trainer's own, which does not say its FLOPs.
        idle_seconds: at most so many seconds did devices wait for the CPU in rounds: fit and score of an influence
            model that runs there, and select, in full, or as far as training had to wait for what ran beside it.
            Several devices each wait that long.
        idle_share: Idle share of the run's wall-clock.
        notes: what the reader must know of these figures.
    """

    run_dir: str
    steps: int | None
    rounds: tuple[int, ...]
    seconds: float | None
    training: StageCost
    stages: Mapping[str, StageCost]
    mates: StageCost
    evaluation: StageCost
    idle_seconds: float
    idle_share: float | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    def lines(self) -> Iterator[str]:
        """The table, a row a stage, and the notes."""
        steps = UNRECORDED if self.steps is None else self.steps
        yield f"run: {self.run_dir}, rounds {', '.join(map(str, self.rounds))}; optimizer steps: {steps}"
        yield f"{'stage':14}{'seconds':>14}{'of the run':>14}{'FLOPs':>14}{'of training':>14}"
        rows = {"training": self.training, **self.stages, "MATES together": self.mates, "evaluation": self.evaluation}
        for name, cost in rows.items():
            least = "" if cost.complete or cost.flops is None else ">= "
            cells = (
                _text(cost.seconds, "{:.2f}"),
                _text(cost.share_of_seconds, "{:.2%}"),
                _text(cost.flops, least + "{:.3e}"),
                _text(cost.share_of_training_flops, least + "{:.2%}"),
            )
            yield f"{name:14}" + "".join(f"{cell:>14}" for cell in cells)
        share = _text(self.idle_share, "{:.2%}")
        yield f"devices idle in rounds: at most {self.idle_seconds:.2f} s, of the run: {share}"
        for note in self.notes:
            yield f"note: {note}"


def run_cost(run_dir: str | os.PathLike[str], *, rounds_dir: str | os.PathLike[str] | None = None) -> RunCost:
    """Read the ledger of a run.

    A resumed run counts each round once, whatever was done twice. Unfinished rounds and those set aside as `.stale`
    are left out and named; so are rounds later than the newest `trainer_state.json`, whose FLOPs would be held against
    less training than they belong to.

    Args:
        run_dir: the run's `output_dir`, with its checkpoints, or the `_mates` in it.
        rounds_dir: where its rounds are; None is `<run_dir>/_mates`.

    Returns:
        The ledger. Wall-clock is that of one `train()` call: None where the run did not write it (the Trainer does in
        `save_state()`), or was resumed, as far as that can be told.

    Raises:
        FileNotFoundError: there is no such run, or it has no finished round.
        MatesError: a file is damaged, or a round is missing.
    """
    run_dir = expand_path(run_dir)
    if not run_dir.is_dir():
        raise FileNotFoundError(f"`{run_dir}` must be the directory of a run, and is not there.")
    folder = find_rounds(run_dir)[0] if rounds_dir is None else expand_path(rounds_dir)
    if folder == run_dir and rounds_dir is None:
        # The rounds themselves, as `verify` takes them too; or nothing at all, which is said of where they would be.
        folder = run_dir if any(run_dir.glob("round-*")) else run_dir / "_mates"
        run_dir = run_dir.resolve().parent if run_dir.resolve().name == "_mates" else run_dir
    infos, notes = _read_rounds(folder)
    state = newest_state(run_dir)
    history: Sequence[Mapping[str, Any]] = []
    steps: int | None = None
    if state is None:
        notes.append(f"`{run_dir}` has no {STATE_FILE}, in no checkpoint either: training is unknown")
    else:
        steps, history = int(state["global_step"]), state.get("log_history") or []
        late = [number for number, info in infos.items() if info["step"] > steps]
        if late:
            notes.append(f"later than step {steps} of the newest {STATE_FILE} and left out: rounds {_list(late)}")
            infos = {number: info for number, info in infos.items() if number not in late}
    stages = _stages(list(infos.values()), history)
    inside = _inside(folder / f"round-{number:04d}" for number in infos)
    if inside is not None:
        stages[_INSIDE] = inside
    training_flops = _training_flops(state, list(infos.values()), notes)
    waited = _sum(entry.get("mates/waited_seconds") for entry in history) or 0.0
    hidden = sum(_beside_seconds(info, info["stages"]) for info in infos.values())
    work = _sum(cost.seconds for cost in stages.values())
    if hidden:
        notes.append(
            f"{hidden:.2f} s of fit, score and select ran beside training, which waited {waited:.2f} s for it"
        )
    mates = StageCost(
        seconds=None if work is None else work - hidden + waited,
        flops=_sum(cost.flops for cost in stages.values()),
        complete=all(cost.flops is not None for cost in stages.values()),
    )
    evaluation = _evaluation(history, list(infos.values()))
    beside = (mates.seconds or 0.0) + (evaluation.seconds or 0.0)
    seconds = _run_seconds(history, steps, beside, notes)
    training = StageCost(seconds=None if seconds is None else seconds - beside, flops=training_flops)
    idle = waited + sum(idle_seconds(folder / f"round-{number:04d}", info) for number, info in infos.items())

    def with_shares(cost: StageCost) -> StageCost:
        return dataclasses.replace(
            cost,
            share_of_seconds=_ratio(cost.seconds, seconds),
            share_of_training_flops=_ratio(cost.flops, training_flops),
        )

    return RunCost(
        run_dir=str(run_dir),
        steps=steps,
        rounds=tuple(infos),
        seconds=seconds,
        training=with_shares(training),
        stages={name: with_shares(cost) for name, cost in stages.items()},
        mates=with_shares(mates),
        evaluation=with_shares(evaluation),
        idle_seconds=idle,
        idle_share=_ratio(idle, seconds),
        notes=tuple(notes),
    )


def _read_rounds(folder: Path) -> tuple[dict[int, dict[str, Any]], list[str]]:
    """`round.json` of each finished round by number, ascending, and notes on what is left out or gone."""
    names = sorted(path.name for path in folder.glob("round-*")) if folder.is_dir() else []
    finished = {int(name[6:]): folder / name for name in names if re.fullmatch(r"round-\d{4,9}", name)}
    if not finished:
        raise FileNotFoundError(
            f"`{folder}` must hold a finished round (`round-0001` with its {ROUND_FILE}), got "
            f"{', '.join(names) or 'none'}. Pass the run's `output_dir`, and `rounds_dir` where the run set one."
        )
    infos = {number: _read_round(path) for number, path in sorted(finished.items())}
    others = [name for name in names if folder / name not in finished.values()]
    notes = [f"not counted, though they took time: {', '.join(others)}"] if others else []
    config = infos[max(infos)].get("config") or {}
    gone = sorted(set(range(int(config.get("random_rounds", min(infos))), max(infos))) - infos.keys())
    if gone and config.get("keep_rounds") is None:
        raise MatesError(
            f"`{folder}` must hold every round up to {max(infos)}, got none for {_list(gone)}, though `keep_rounds` "
            f"is not set. {COPY_AGAIN}"
        )
    if gone:
        notes.append(f"`keep_rounds` deleted rounds {_list(gone)}: figures of stages are lower bounds")
    return infos, notes


def _read_round(path: Path) -> dict[str, Any]:
    """One `round.json`, checked for what is read from it."""
    info = read_json(path / ROUND_FILE)
    stages = info.get("stages")
    whole = isinstance(stages, dict) and all(
        isinstance(stage, dict) and isinstance(stage.get("seconds"), (int, float)) for stage in stages.values()
    )
    if not whole or not isinstance(info.get("step"), int):
        raise MatesError(
            f"`{path / ROUND_FILE}` must have `step`, a whole number, and `stages` with `seconds` each, got step "
            f"{info.get('step')!r} and stages {stages!r}. {COPY_AGAIN}"
        )
    return info


def newest_state(run_dir: Path) -> dict[str, Any] | None:
    """The `trainer_state.json` with the most steps; of two, the one that knows how long the run took."""
    states = []
    for path in (run_dir / STATE_FILE, *sorted(run_dir.glob(f"checkpoint-*/{STATE_FILE}"))):
        if path.exists():
            state = read_json(path)
            if not isinstance(state.get("global_step"), int):
                raise MatesError(f"`{path}` must have `global_step`, got {state.get('global_step')!r}. {COPY_AGAIN}")
            states.append(state)
    timed = [any("train_runtime" in entry for entry in state.get("log_history") or []) for state in states]
    best = max(range(len(states)), key=lambda i: (states[i]["global_step"], timed[i]), default=None)
    return None if best is None else states[best]


def _stages(infos: Sequence[Mapping[str, Any]], history: Sequence[Mapping[str, Any]]) -> dict[str, StageCost]:
    """Seconds and FLOPs of each stage over all rounds that ran it."""
    names = {name for info in infos for name in info["stages"]}
    found = {}
    for name in (*(name for name in _ORDER if name in names), *sorted(names - set(_ORDER))):
        ran = [info["stages"][name] for info in infos if name in info["stages"]]
        flops = [stage.get("flops") for stage in ran]
        found[name] = StageCost(
            seconds=float(sum(stage["seconds"] for stage in ran)), flops=None if None in flops else _sum(flops)
        )
    checks = [entry["step"] for entry in history if "mates/drift_spearman" in entry and "step" in entry]
    if checks:  # each runs what its round's sentinel ran; a check is logged, its seconds are not
        before = [[info for info in infos if info["step"] < step] for step in checks]
        each = [rounds[-1]["stages"].get("sentinel", {}).get("flops") if rounds else None for rounds in before]
        found["drift checks"] = StageCost(seconds=None, flops=None if None in each else _sum(each))
    return found


def _inside(folders: Iterable[Path]) -> StageCost | None:
    """What looking inside rounds took, from the file that each check leaves in its round; None without any."""
    checks = [read_json(file) for folder in folders for file in sorted(folder.glob("check-*.json"))]
    if not checks:
        return None
    flops = [check.get("flops") for check in checks]
    return StageCost(
        seconds=_sum(check.get("seconds") for check in checks), flops=None if None in flops else _sum(flops)
    )


def _training_flops(
    state: Mapping[str, Any] | None, infos: Sequence[Mapping[str, Any]], notes: list[str]
) -> float | None:
    """The Trainer's FLOPs, by the parameters that stages count by."""
    total = None if state is None else state.get("total_flos")
    if not total:  # 0 is a model that the Trainer cannot count
        return None
    counted = (infos[-1].get("flop_parameters") or {}) if infos else {}
    if not counted.get("stages") or not counted.get("trainer"):
        notes.append("rounds do not say which parameters they count: a tied output head is left out of training FLOPs")
        return float(total)
    return float(total) * float(counted["stages"]) / float(counted["trainer"])


def _evaluation(history: Sequence[Mapping[str, Any]], infos: Sequence[Mapping[str, Any]]) -> StageCost:
    """Of `LmEvalCallback`, which says how many tokens it ran, and of the Trainer, which does not."""
    seconds = _sum(entry.get(key) for entry in history for key in ("lm_eval/seconds", "eval_runtime"))
    parameters = (infos[-1].get("flop_parameters") or {}).get("stages") if infos else None
    tokens = _sum(entry.get("lm_eval/tokens") for entry in history)
    return StageCost(
        seconds=seconds,
        flops=None if tokens is None or not parameters else forward_flops(parameters, tokens),
        complete=all("eval_runtime" not in e and ("lm_eval/seconds" in e) == ("lm_eval/tokens" in e) for e in history),
    )


def _run_seconds(
    history: Sequence[Mapping[str, Any]], steps: int | None, beside: float, notes: list[str]
) -> float | None:
    """Wall-clock of a run that one `train()` did, or None."""
    calls = [entry for entry in history if "train_runtime" in entry]
    if not calls:
        return None
    seconds = float(sum(entry["train_runtime"] for entry in calls))
    rates = [entry.get("train_steps_per_second") for entry in calls]
    trained = None if None in rates else sum(r * e["train_runtime"] for r, e in zip(rates, calls, strict=True))
    missing = trained is not None and steps and trained < (1 - _MOST_MISSING) * steps
    if missing or seconds < beside:
        notes.append(f"the run was resumed: {seconds:.0f} s are those of its last `train()` only, and left out")
        return None
    return seconds


def idle_seconds(path: Path, info: Mapping[str, Any]) -> float:
    """Seconds of a round in which devices may have waited for the CPU, but for those that training waited elsewhere.

    Args:
        path: The round's directory.
        info: Its `round.json`.

    Returns:
        Seconds of fit, score and select that did not run next to training; only those of select where the influence
        model runs on the device.
    """
    config = path / "influence_model" / "config.json"
    on_device = config.exists() and read_json(config).get("kind") in _ON_DEVICE
    names = [name for name in (("select",) if on_device else IDLE_STAGES) if name in info["stages"]]
    return float(sum(info["stages"][name]["seconds"] for name in names)) - _beside_seconds(info, names)


def _beside_seconds(info: Mapping[str, Any], names: Iterable[str]) -> float:
    """Seconds of those of some stages of a round that ran beside training."""
    beside = info.get("beside_training") or ()
    return float(sum(info["stages"][name]["seconds"] for name in names if name in beside))


def _sum(values: Iterable[float | None]) -> float | None:
    """Sum of what is known; None where nothing is."""
    known = [float(value) for value in values if value is not None]
    return sum(known) if known else None


def _ratio(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else part / whole


def _text(value: float | None, form: str) -> str:
    return UNRECORDED if value is None else form.format(value)


def _list(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
