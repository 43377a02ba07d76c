"""The report of a run: what its rounds recorded as one JSON object, and one HTML file of it.

The door to `page`. It reads the directories of rounds and the Trainer's state. What it cannot see from here comes as
arguments: whether the files hold (`training.verify`), and the texts, which only somebody with the pool has.

Trade-off: a report says what was recorded and measures nothing again, so what a round did not record is missing, and
the page says so.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mates_hf.config import MatesConfig
from mates_hf.errors import MatesError
from mates_hf.paths import expand_path
from mates_hf.reporting.cost import RunCost, StageCost, newest_state, run_cost
from mates_hf.reporting.lines import finite
from mates_hf.reporting.page import shapes
from mates_hf.reporting.page.checks import find_checks, last_selection
from mates_hf.reporting.page.examples import NGRAM_KINDS, example_kinds, media_kinds
from mates_hf.reporting.page.groups import group_data
from mates_hf.reporting.page.render import render
from mates_hf.reporting.page.rounds import Facts, number, part, read_infos, round_row, selects
from mates_hf.reporting.page.spending import cost_data, timeline
from mates_hf.reporting.page.verdict import find_verdict, reason_of
from mates_hf.round_files import find_rounds, newest_round

PAGE_FILE = "report.html"  # next to the rounds
TEXTS_FILE = "report-texts.json"  # the texts of the newest page that a run wrote itself
IMAGES_FILE = "report-images.json"  # thumbnails and labels of the newest page that a run wrote itself
_WORDS_OF = 3  # newest rounds whose words are listed
_MAX_ROUNDS_OF_WORDS = 12


def report_data(
    run_dir: str | os.PathLike[str],
    *,
    rounds_dir: str | os.PathLike[str] | None = None,
    price: float | None = None,
    num_devices: int = 1,
    redact: bool = False,
    verify: Mapping[str, Any] | None = None,
    texts: Mapping[str, Any] | None = None,
    media: Mapping[str, Any] | None = None,
    missing: Sequence[str] = (),
    version: str = "unknown",
) -> dict[str, Any]:
    """What a report says, as plain JSON values.

    Args:
        run_dir: The run's `output_dir`, or the directory of its rounds.
        rounds_dir: Where its rounds are, where that is neither `run_dir` nor its `_mates`.
        price: Price of one device for an hour, in any currency.
        num_devices: Number of devices that the run trained on; money counts each.
        redact: Whether texts and pictures of the pool are left out: tokens, n-grams, words, labels. Names of groups
            stay.
        verify: What `verify_run` found, as a mapping with `ok`, `problem` and `leftovers`; None where nobody looked.
        texts: `round`, `examples` and `ngrams` of the newest round that selected, or None.
        media: `round`, `examples` and `missing` of pictures and sounds of that round, or None.
        missing: Sentences on what of the texts is missing, and why.
        version: Version of this library.

    Returns:
        The data; numbers that JSON does not have are None.

    Raises:
        FileNotFoundError: there is no finished round.
        MatesError: a file is damaged.
        ValueError: `price` or `num_devices` is not above 0.
    """
    if price is not None and not price > 0:
        raise ValueError(f"`price` must be above 0, got {price!r}.")
    if num_devices < 1:
        raise ValueError(f"`num_devices` must be a whole number of at least 1, got {num_devices!r}.")
    run_path = expand_path(run_dir)
    folder, paths = find_rounds(run_path if rounds_dir is None else expand_path(rounds_dir))
    if not paths:
        newest_round(folder)  # says what is there instead
    infos = read_infos(paths)
    cost = _cost_of(run_path, folder if rounds_dir is not None else None)
    rows = [round_row(info) for info in infos]
    per_step = None if not cost.steps or cost.training.flops is None else cost.training.flops / cost.steps
    for row, info in zip(rows, infos, strict=True):
        reason = reason_of(row, info) if row["failed"] or row["decision"] != "select" else ""
        row |= {"reason": reason, "flops_share": _flops_share(row, per_step), **_word(row)}
    told_verify = None if verify is None else _verify(verify, len(rows))
    data: dict[str, Any] = {
        "run": run_path.resolve().parent.name if run_path.resolve() == folder.resolve() else run_path.resolve().name,
        "version": version,
        "written": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "redacted": redact,
        "rounds": rows,
        "groups": group_data(infos),
        "cost": cost_data(cost, price, num_devices),
        "timeline": timeline(cost, infos, _waits(run_path)),
        "verify": told_verify,
        "copies": _copies(rows),
        "words": [] if redact else _words(infos),
        "fit": dict(part(infos[-1], "fit")),
        "missing": [] if redact else list(missing),
        "ngrams": None,
        "texts": None,
        "media": None,
    }
    if media is not None and not redact:
        data["media"] = media_kinds(media)
        data["missing"] += media["missing"]
    if texts is not None and not redact:
        data["ngrams"] = None if not texts.get("ngrams") else {"round": texts["round"], **texts["ngrams"]}
        data["texts"] = example_kinds(texts)
    homes = (cost.run_dir, str(folder), str(run_path))  # a page may be sent to others: it names no folder of this disk
    data["cost"]["notes"] = [_without(note, homes, data["run"]) for note in cost.notes]
    data["checks"] = find_checks(data)
    data["verdict"] = find_verdict(rows, infos, data["checks"])
    data["card"] = _card(infos[-1], rows, cost)
    data["provenance"] = _provenance(infos[-1], folder)
    whole: dict[str, Any] = finite(data)
    return whole


def report_html(data: Mapping[str, Any]) -> str:
    """The page of a report.

    Args:
        data: What `report_data` returned.

    Returns:
        One HTML file, to be written as UTF-8.

    Raises:
        ImportError: jinja2 is not installed.
    """
    last = data["rounds"][-1]
    calibration = shapes.calibration_plot({"number": last["number"]}, data["fit"], not selects(last))
    groups = data["groups"]
    plots = {
        "signal": [shapes.signal_plot(data["rounds"]), calibration],
        "bought": [] if groups is None else [shapes.groups_plot(groups), shapes.losses_plot(groups)],
        "cost": [shapes.timeline_plot(data["timeline"])],
    }
    cost = data["cost"]
    lines = {
        "training": cost["training"],
        **cost["stages"],
        "MATES together": cost["mates"],
        "evaluation": cost["evaluation"],
    }
    money = cost["money"] | {"MATES together": cost["money"]["mates"]}
    return render(
        "report.html.jinja",
        {
            "data": data,
            "ngram_kinds": NGRAM_KINDS,
            "looks": [check for check in data["checks"] if check["status"] == "look"],
            "plots": {name: [one for one in found if one is not None] for name, found in plots.items()},
            "ledger": [(name, line, money.get(name)) for name, line in lines.items()],
        },
    )


def newest_selection(rounds: Mapping[int, Path]) -> tuple[int, Path, Mapping[str, Any]] | None:
    """The newest round that chose rows: its number, its directory and its `round.json`; None where none did."""
    for which, path in reversed(list(rounds.items())):
        (info,) = read_infos({which: path})
        if selects(round_row(info)) and (path / "scores.npy").exists():
            return which, path, info
    return None


def _cost_of(run_path: Path, rounds_dir: Path | None) -> RunCost:
    """The ledger; of a run that is still in its first steps, what its rounds say alone."""
    try:
        return run_cost(run_path, rounds_dir=rounds_dir)
    except (MatesError, TypeError, ValueError, AttributeError) as error:  # an entry that is no number, say
        nothing = StageCost(seconds=None, flops=None)
        return RunCost(
            run_dir=str(run_path), steps=None, rounds=(), seconds=None, training=nothing, stages={}, mates=nothing,
            evaluation=nothing, idle_seconds=0.0, idle_share=None, notes=(f"no ledger: {error}",),
        )  # fmt: skip


def _waits(run_path: Path) -> dict[int, float]:
    """How long training waited for each round that ran next to it, as the Trainer logged it."""
    home = run_path.resolve()
    try:
        state = newest_state(home.parent if home.name == "_mates" else home)
    except MatesError:  # the ledger says so
        return {}
    found: dict[int, float] = {}
    for entry in (state or {}).get("log_history") or ():
        which, seconds = number(entry.get("mates/round")), number(entry.get("mates/waited_seconds"))
        if which is not None and seconds is not None:
            found[int(which)] = seconds
    return found


def _without(note: str, homes: Sequence[str], name: str) -> str:
    """A note that says the run's name for where it lies."""
    for home in homes:
        note = note.replace(home, name)
    return note


def _flops_share(row: Facts, per_step: float | None) -> float | None:
    """FLOPs of a round relative to those of the training that it was for."""
    if per_step is None or row["flops"] is None or row["from_step"] is None or row["to_step"] is None:
        return None
    steps = row["to_step"] - row["from_step"]
    return row["flops"] / (per_step * steps) if steps > 0 and per_step > 0 else None


def _word(row: Facts) -> Facts:
    """The decision in a word, and its colour."""
    if row["decision"] == "select":
        weak = row["failed"] is not None or (row["low"] is not None and row["low"] <= 0)
        return {"word": "selected", "level": "look" if weak else "fine"}
    if row["decision"] == "keep_previous":
        return {"word": "kept the model before", "level": "look"}
    return {"word": "own order", "level": "refused"}


def _verify(verify: Mapping[str, Any], num_rounds: int) -> Facts:
    problem = verify.get("problem")
    text = ""
    if isinstance(problem, Mapping):
        text = "{round}/{file}: expected {expected}, found {found}".format(**problem)
    return {
        "ok": bool(verify.get("ok")),
        "num_rounds": num_rounds,
        "problem_text": text,
        "leftovers": list(verify.get("leftovers") or ()),
    }


def _copies(rows: Sequence[Facts]) -> Facts:
    """Copies and overlap of the newest selection, and overlap over all rounds."""
    last = last_selection(rows)
    if last is None or last["repeated_share"] is None:
        return {"recorded": False}
    names = ("repeated_share", "num_passed_over", "overlap_rows", "overlap_share", "overlap_ngram")
    total = sum(row["overlap_rows"] or 0 for row in rows)
    return {"recorded": True, "round": last["number"], **{name: last[name] for name in names}, "total_overlap": total}


def _words(infos: Sequence[Mapping[str, Any]]) -> list[Facts]:
    """Words that the newest rounds bought more often than their candidates have them, newest round first."""
    found: list[Facts] = []
    for info in reversed(infos[-_MAX_ROUNDS_OF_WORDS:]):
        bought = info.get("bought_most")
        for word in bought[:_WORDS_OF] if isinstance(bought, list) else ():
            if isinstance(word, Mapping) and isinstance(word.get("text"), str):
                found.append(
                    {
                        "round": info.get("number"),
                        "text": word["text"][:60],
                        "share": number(word.get("share")),
                        "candidate_share": number(word.get("candidate_share")),
                    }
                )
    return found


def _card(info: Mapping[str, Any], rows: Sequence[Facts], cost: RunCost) -> list[tuple[str, str]]:
    """What the run is, in a few pairs of a name and a text."""
    model, pool, reference = part(info, "model"), part(info, "pool"), part(info, "reference")
    given = _changed(part(info, "config"))
    card = [
        ("Model", _joined(model.get("name"), _counted(model.get("num_parameters"), "parameters"))),
        (
            "Reference task",
            _joined(
                reference.get("name") or reference.get("source"), _counted(reference.get("num_passages"), "passages")
            ),
        ),
        ("Pool", _counted(pool.get("num_rows"), "rows")),
        ("Steps trained", "not recorded" if cost.steps is None else f"{cost.steps:,}"),
        ("Rounds", f"{len(rows):,}, {sum(map(selects, rows)):,} of which selected"),
        ("Probes a round", _counted(rows[-1]["num_probed"], "candidates")),
        ("Settings that are not the default", ", ".join(given) or "none"),
    ]
    return [(name, value) for name, value in card if value]


def _changed(config: Mapping[str, Any]) -> list[str]:
    """Settings of a run that differ from their defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(MatesConfig)}
    return [f"{name}={value!r}" for name, value in config.items() if name in defaults and value != defaults[name]]


def _joined(*parts: Any) -> str:
    return ", ".join(str(each) for each in parts if each)


def _counted(value: Any, of: str) -> str:
    return f"{value:,} {of}" if isinstance(value, int) else ""


def _provenance(info: Mapping[str, Any], folder: Path) -> list[tuple[str, str]]:
    """Where the newest round comes from: hashes, seeds and versions."""
    versions = ", ".join(f"{name} {value}" for name, value in part(info, "versions").items())
    others = sorted(path.name for path in folder.glob("round-*") if path.suffix)
    found = [
        ("Seed of the selection", info.get("seed")),
        ("Order of the newest round, SHA-256", info.get("order_sha256")),
        ("Rows of the pool, SHA-256", part(info, "pool").get("rows_sha256")),
        ("Reference task, SHA-256", part(info, "reference").get("digest")),
        ("Weights that were probed", info.get("weights")),
        ("Versions", versions),
        ("Columns of the pool", part(info, "pool").get("features")),
        ("Set aside or unfinished", ", ".join(others[:20])),
        ("What left the machine", "nothing: reports and rounds are files next to the run"),
    ]
    return [(name, str(value)) for name, value in found if value not in (None, "")]
