"""`fit_selector`: from a public checkpoint, a pool and a reference to a `MatesSelector`, without a training run.

Read `fit_selector`; it is `run_round` for people who have no run: warm up, probe, fit, guard. Where it is used: by
`mates-hf fit`, and from Python. Each part leaves what it has done in the working folder (`fit.place`), so the same
call again continues where it was killed, and says so where it was done.

Trade-off: influence follows the model, and this one was trained on the pool for some hundred steps only. So a selector
knows what helps this checkpoint now, and says less of a model that is trained for long.

Sign: influence > 0 helps; higher is better, everywhere.
"""

from __future__ import annotations

import gc
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mates_hf.allow import parse_allow
from mates_hf.data.column_types import is_conversation
from mates_hf.data.conversations import render_conversations
from mates_hf.data.reference import ReferenceTask
from mates_hf.engine.digest import weight_marks
from mates_hf.engine.processes import ALONE, Processes
from mates_hf.errors import WeakSignalError
from mates_hf.paths import expand_path
from mates_hf.prediction.ngram_model import NgramInfluenceModel
from mates_hf.records import FitReport, IntArray
from mates_hf.selection.selector import MatesSelector
from mates_hf.training.fit.counted import count_filter, require_counted
from mates_hf.training.fit.inputs import (
    Inputs,
    load_model,
    load_tokenizer,
    read_inputs,
    read_pool,
    type_of,
)
from mates_hf.training.fit.place import Place, write_beside
from mates_hf.training.fit.probe import probe_and_fit, split_rows
from mates_hf.training.fit.result import SelectorFit
from mates_hf.training.fit.settings import FitSettings, settings_of
from mates_hf.training.fit.warm_up import is_warm, measured, training_arguments, warm_up
from mates_hf.training.guard import probes_needed, weakness
from mates_hf.training.run import Stages

logger = logging.getLogger(__name__)


def fit_selector(
    model: str | os.PathLike[str] | None,
    pool: Any,
    reference: Any,
    out: str | os.PathLike[str],
    *,
    column: str | None = None,
    reference_column: str | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    pool_split: str = "train",
    work: str | os.PathLike[str] | None = None,
    keep_work: bool = False,
    distil: bool = False,
    progress: bool = True,
    allow: Mapping[str, Any] | str | None = None,
    **settings: Any,
) -> SelectorFit:
    """Fit a selector to a checkpoint: warm it up on the pool, probe, fit, judge, and write what passed.

    The same call again continues a fit that was killed, and returns at once where it was done. A call with other
    arguments for the same folders raises an error that names what differs. What a refused fit asks for (`num_probes`)
    may differ: the warm-up is not done again. In several processes (`accelerate launch`) all of them must call it, and
    see the same files.

    Where the guard refuses, nothing is written. The error says about how many probes would do. That is
    `prediction.judge.times_needed`: the interval narrows, and a correlation that is small rises, with the square root
    of the number of labels.

    Args:
        model: A causal language model of transformers: a folder or a repository on the Hub. It is never written to.
            None asks no model: the selector is a filter by words (`MooreLewisModel`), and `tokenizer` must be named
            where there are texts.
        pool: What a run would be trained on: a path, a glob or an `fsspec` URL of Parquet or JSON Lines files (or a
            list of these), a folder of them, a dataset on the Hub, or a `datasets.Dataset`.
        reference: What the model should get better at: passages in any of these forms (also a text file, a passage a
            line), `"lm-eval:TASK"`, or a `ReferenceTask`.
        out: Folder of the selector, which must not be there yet.
        column: The pool's column of texts, token ids or conversations. None takes `input_ids`, `text` or `messages`.
        reference_column: Column of the passages. None takes one of these, or `prompt` with `completion`.
        tokenizer: A folder or a repository on the Hub with the tokenizer, where the model's holds none.
        pool_split: Split of a pool on the Hub.
        work: Folder for what is done on the way. None takes `out` with `.fit` behind its name.
        keep_work: Whether to leave that folder where it is when the selector is written.
        distil: Whether to also write a selector that reads texts without a tokenizer, in `out` with `-text` behind its
            name (see `MatesSelector.distil`).
        progress: Whether to show progress bars.
        allow: Rows of the pool that may be used at all, as in `MatesConfig.allow`; no other is read.
        **settings: Fields of `FitSettings`, such as `warm_steps`, `num_probes` and `seed`.

    Returns:
        Where the selector is, what was measured, how good it is and what it took.

    Raises:
        OSError: something is not there.
        TypeError: something is of another kind, or a setting is not known.
        ValueError: model, pool, reference or settings cannot be fitted with.
        WeakSignalError: the guard refused; about how many probes would do.
        MatesError: a folder belongs to something else, or the influence cannot be measured.
    """
    given = settings_of(settings)
    counts = given.settings_that_count() if model is not None else require_counted(given)
    names = {
        "model": None if model is None else os.fspath(model),
        "tokenizer": None if tokenizer is None else os.fspath(tokenizer),
        "pool": _name_of(pool), "pool_split": pool_split, "column": column, "reference": _name_of(reference),
        "reference_column": reference_column, **({} if allow is None else {"allow": parse_allow(allow)}),
    }  # fmt: skip
    place = Place(expand_path(out), None if work is None else expand_path(work), {**names, **counts})
    finished = place.finished()  # before torch.distributed is asked for: most mistakes are made here
    arguments = training_arguments(given, place.warm_up)  # joins the other processes, where there are some
    processes = Processes.of_run()
    with processes.together():
        finished = _told(processes, finished)
        if finished is None:
            try:
                if model is None:
                    _count(place, given, names, pool, reference, processes, distil, progress)
                else:
                    _fit(place, given, names, arguments, pool, reference, processes, distil=distil, progress=progress)
                finished = _told(processes, place.finished() if processes.is_main else None)
            finally:
                place.close()
        if processes.is_main:
            if distil and not _text_place(place).exists():
                _distil(place, given, names, pool)
            if not keep_work:
                place.clear()
        processes.meet()
    return SelectorFit(place.out, finished, _text_place(place) if distil else None)


def _fit(
    place: Place,
    settings: FitSettings,
    names: Mapping[str, Any],
    arguments: Any,
    pool: Any,
    reference: Any,
    processes: Processes,
    *,
    distil: bool,
    progress: bool,
) -> None:
    """All that is not done yet, up to the selector, which the main process writes."""
    verdict = None
    if processes.is_main:
        place.check()
        verdict = place.verdict(settings.num_probes)
    verdict = _told(processes, verdict)
    inputs = None
    if verdict is None:  # read before anything is written: what is wrong with it leaves nothing behind
        inputs = read_inputs(
            names["model"], pool, reference, settings, column=names["column"],
            reference_column=names["reference_column"], tokenizer_name=names["tokenizer"],
            pool_split=names["pool_split"], allow=names.get("allow"), distil=distil,
            progress=progress and processes.is_main,
        )  # fmt: skip
        train, probes = split_rows(len(inputs.dataset), settings)
    if processes.is_main:
        place.open()
    if inputs is not None:
        found = _measure(place, settings, names, arguments, inputs, train, probes, processes, progress)
        if processes.is_main:
            place.keep_verdict(found)
        verdict = _told(processes, found)
    assert verdict is not None
    _require_signal(verdict, settings, place)
    about = {key: value for key, value in verdict.items() if key != "reason"}
    if processes.is_main:
        place.publish(_selector(place, names, settings, verdict), about)


def _count(
    place: Place,
    settings: FitSettings,
    names: Mapping[str, Any],
    pool: Any,
    reference: Any,
    processes: Processes,
    distil: bool,
    progress: bool,
) -> None:
    """Count and write a filter, in the main process."""
    if processes.is_main:
        place.check()
        counted = count_filter(names, pool, reference, settings, distil=distil, progress=progress)
        place.open()  # what is wrong with pool or passages leaves nothing behind
        place.publish(*counted)


def _measure(
    place: Place,
    settings: FitSettings,
    names: Mapping[str, Any],
    arguments: Any,
    inputs: Inputs,
    train: IntArray,
    probes: IntArray,
    processes: Processes,
    progress: bool,
) -> dict[str, Any]:
    """Warm up, probe and fit; what was found in the main process, nothing in the others."""
    if processes.is_main:
        place.require_read(_digests(inputs))
        place.prepare_probe(settings.num_probes)
    stages, rows = Stages(), inputs.dataset.select(train)
    if processes.is_main:
        stages.load(place.work)
    if not processes.agree(float(processes.is_main and is_warm(settings, place.warm_up))):
        if settings.warm_steps * settings.batch_size > len(rows):
            logger.info("The warm-up trains on %d rows several times: the pool has few.", len(rows))
        with stages.timed("warm_up"):
            warm_up(inputs.take_model(), rows, arguments, settings, progress=progress)
        _free_memory()
        inputs.model = load_model(names["model"])
    found: dict[str, Any] = measured(
        inputs.take_model(), rows, arguments, settings,
        lambda live, optimizer, average, args: probe_and_fit(
            inputs, settings, place, probes, model=live, optimizer=optimizer, average=average, arguments=args,
            progress=progress,
        ),
    )  # fmt: skip
    if not processes.is_main:
        return {}
    warm = stages.seconds_and_flops.get("warm_up", {"seconds": 0.0})
    return {
        **found,
        "step": settings.warm_steps,
        "num_usable": len(inputs.dataset),
        "num_trained": len(train),
        "read": inputs.facts,
        "max_length": inputs.max_length,
        "seconds": {"warm_up": warm["seconds"], **found["seconds"]},
        "flops": {"warm_up": found["model"].pop("warm_up_flops"), **found["flops"]},
        "num_processes": processes.size,
    }


def _digests(inputs: Inputs) -> dict[str, Any]:
    """What was read, so that a fit that continues has the same."""
    marks = json.dumps(weight_marks(inputs.model, ALONE), sort_keys=True).encode()
    pool = hashlib.sha256()
    for batch in inputs.dataset.with_format("numpy").iter(1_000):
        for ids in batch["input_ids"]:
            pool.update(np.asarray(ids, "<i4").tobytes() + b"|")
    return {
        "model": hashlib.sha256(marks).hexdigest(),
        "pool": pool.hexdigest(),
        "reference": inputs.reference.digest(),
    }


def _require_signal(verdict: Mapping[str, Any], settings: FitSettings, place: Place) -> None:
    """Raise where the guard refuses, with the reason and what would do."""
    kept = f"Nothing was written but `{place.work}`, which keeps the warm-up"
    if verdict["fit"] is None:
        raise WeakSignalError(
            f"No selector can be fitted: the labels rank no row ({str(verdict['reason']).rstrip('.')}). {kept}."
        )
    report = FitReport.from_dict(verdict["fit"])
    failed, complaint = weakness(report, settings.min_spearman, settings.num_probes)
    if failed is None:
        return
    wanted = probes_needed(report, settings.min_spearman, settings.num_probes)
    left = verdict["num_usable"] - verdict["num_trained"]
    way_out = f"{kept}"
    if wanted is not None and wanted <= left:
        way_out += f": fit again with `num_probes={wanted}`"
    elif wanted is not None:
        way_out += (
            f", and {left:,} rows are left to probe: fit again into another folder, with "
            f"`num_probes={wanted}` and `pool_rows={wanted + settings.warm_steps * settings.batch_size}`"
        )
    raise WeakSignalError(f"The guard refuses this selector: {complaint}. {way_out}.")


def _selector(
    place: Place, names: Mapping[str, Any], settings: FitSettings, verdict: Mapping[str, Any]
) -> MatesSelector:
    """The selector, with what its card says of it."""
    tokenizer = load_tokenizer(names["model"], names["tokenizer"])
    model = NgramInfluenceModel.from_pretrained(place.probe / "influence_model")
    if tokenizer is not None and model.vocab_size > len(tokenizer):
        tokenizer = None  # of token columns alone, whose ids it does not have
    origin = {
        "model": {key: verdict["model"][key] for key in ("name", "num_parameters")},
        "step": settings.warm_steps,
        "reference": verdict["reference"],
        "num_probed": verdict["num_probed"],
        "fidelity": verdict["fidelity"],
    }
    return MatesSelector(model, tokenizer, max_length=verdict["max_length"], origin=origin)


def _distil(place: Place, settings: FitSettings, names: Mapping[str, Any], pool: Any) -> None:
    """Write the selector that reads texts, from the rows of the pool that were read."""
    selector = MatesSelector.from_pretrained(place.out)
    loaded, column = read_pool(pool, names["column"], names["pool_split"], settings, names.get("allow"))
    texts: Any = loaded.dataset
    if is_conversation(type_of(texts, column), column):
        rendered = render_conversations(texts[column], selector.tokenizer, column)
        distilled = selector.distil(rendered, seed=settings.seed)
    else:
        distilled = selector.distil(texts, column=column, seed=settings.seed)
    write_beside(distilled, _text_place(place))


def _text_place(place: Place) -> Path:
    return place.out.with_name(place.out.name + "-text")


def _told(processes: Processes, value: Any) -> Any:
    """The main process's JSON value, in all of them."""
    if processes.size == 1:
        return value
    if processes.is_main:
        processes.publish({"value": value})
        return value
    return processes.receive()[0]["value"]


def _name_of(source: Any) -> Any:
    """What a pool or a reference is known by: its names, or a digest where it has none."""
    if isinstance(source, ReferenceTask):
        return f"ReferenceTask {source.digest()}"
    if isinstance(source, (str, os.PathLike)):
        return os.fspath(source)
    if isinstance(source, (list, tuple)):
        return [str(one) if isinstance(one, (str, os.PathLike)) else type(one).__name__ for one in source]
    return f"{type(source).__name__} {getattr(source, '_fingerprint', '')}".strip()


def _free_memory() -> None:
    """Give back what the first Trainer held on the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
