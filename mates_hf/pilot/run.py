"""`run_pilot`: three arms at a few seeds, resumable, and a verdict by criteria that were fixed before the first step.

Read `run_pilot`: it is the experiment as one would write it down. Random rows, a static filter at the best of its
settings, and ours train the same model on equal tokens; random rows train on, so that one sees what they need. Units
that are done are kept, and a pilot that was killed continues.

Trade-off: units run one after the other in one process, on one device. That keeps arms comparable, and takes longer.
"""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from mates_hf.disk import write_json, written_whole
from mates_hf.engine.model_traits import context_length, vocabulary_size
from mates_hf.influence.probe import count_multiplied_parameters
from mates_hf.paths import expand_path
from mates_hf.pilot.filters import SETTINGS, require_filter
from mates_hf.pilot.inputs import BUILT_IN, PilotInputs, read_pilot_inputs
from mates_hf.pilot.page import page_data, render_lines, render_page, template
from mates_hf.pilot.place import PAGE_FILE, RESULT_FILE, PilotPlace
from mates_hf.pilot.schedule import Schedule, make_schedule, planned_machine, planned_size, require_rows
from mates_hf.pilot.settings import PilotSettings, settings_of
from mates_hf.pilot.summary import ARMS, POOL, summarise
from mates_hf.pilot.training import Unit, make_model, train_unit
from mates_hf.pilot.verdict import decide
from mates_hf.reporting.lines import finite
from mates_hf.reporting.payback import SelectionPlan, plan_selection

TUNING_SEED = 1_000  # behind the first seed: filters are tuned on it, and it is not reported


@dataclasses.dataclass(frozen=True)
class PilotResult:
    """What a pilot ended with.

    Attributes:
        out: Its folder.
        data: The verdict, its criteria and every figure, JSON values.
    """

    out: Path
    data: Mapping[str, Any]

    @property
    def decision(self) -> str:
        """`"go"`, `"no-go"` or `"measure more"`."""
        return str(self.data["verdict"]["decision"])

    @property
    def page(self) -> Path:
        """The page for people, one HTML file without requests."""
        return self.out / PAGE_FILE

    def lines(self) -> Iterator[str]:
        """The page as text."""
        yield from render_lines(self.data)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(self.data)


def run_pilot(
    out: str | os.PathLike[str],
    pool: Any = BUILT_IN,
    reference: Any = None,
    *,
    held_out: Any = None,
    tiny: bool = False,
    progress: bool = True,
    **settings: Any,
) -> PilotResult:
    """Run a pilot to its verdict.

    The same call again continues a pilot that was killed, and returns at once where it was done. A call with other
    settings for the same folder raises an error that names what differs; `seeds` alone may be raised.

    Args:
        out: Folder of the pilot.
        pool: What the planned run would be trained on: files in any form that `load_rows` takes, or `"built-in"`, text
            that every Python installation carries.
        reference: What the model should get better at: a file of passages. None with the built-in pool.
        held_out: Passages that arms are judged by, which labels never see. None takes a part of `reference`.
        tiny: Whether what is not given is so small that a pilot takes some minutes on a CPU.
        progress: Whether to show a progress bar.
        **settings: Fields of `PilotSettings`; `params` and `tokens` name the planned run.

    Returns:
        The verdict and what it is made of; the page is in the folder.

    Raises:
        OSError: something is not there.
        ImportError: the package of the filter, or jinja2, is not installed.
        TypeError: a setting is not known.
        ValueError: settings, pool or reference cannot be used; says what would do.
        MatesError: the folder belongs to something else.
    """
    given = settings_of(settings, tiny=tiny)
    require_filter(given.static_filter)
    template()  # what the page needs is missed now, and not after the last step
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError(
            "A pilot must run in one process, got a launch of several. Start it without `accelerate launch`."
        )
    names = {"pool": _name_of(pool), "reference": _name_of(reference), "held_out": _name_of(held_out)}
    place = PilotPlace(expand_path(out), {**names, **given.to_dict()})
    place.check()
    place.open()
    try:
        inputs = read_pilot_inputs(place.data, pool, reference, held_out, given)
        schedule, plan = _planned(inputs, given)
        place.write_asked(
            {
                "schedule": dataclasses.asdict(schedule),
                "filters": SETTINGS[given.static_filter],
                "groups": inputs.facts["groups"],
            }
        )
        data = _run(place, inputs, given, schedule, plan, names, progress)
    finally:
        place.close()
    return PilotResult(place.out, data)


def _planned(inputs: PilotInputs, settings: PilotSettings) -> tuple[Schedule, SelectionPlan]:
    """The steps of the pilot and the plan of the run, both refused here where they cannot be."""
    groups = [POOL, *sorted(inputs.facts["groups"])]
    unknown = [name for name in settings.protected if name not in groups]
    if unknown:
        raise ValueError(f"`protected` must be groups of the pool ({', '.join(groups)}), got {unknown[0]!r}.")
    rows = inputs.passages["reference"].rows
    passages: dict[str, Any] = {"num_passages": len(rows), "passage_tokens": float(rows.lengths.mean())}
    plan = plan_selection(planned_size(settings, **passages), planned_machine(settings))
    if not plan.cost.num_rounds:
        raise ValueError(f"The planned run must have rounds, and has none: {plan.warnings[0]}.")
    model = make_model(settings, inputs.tokenizer, settings.seed)
    _require_fits(model, inputs.tokenizer, settings)
    schedule = make_schedule(settings, multiplied=count_multiplied_parameters(model), **passages)
    require_rows(schedule, settings, len(inputs.pool))
    return schedule, plan


def _require_fits(model: Any, tokenizer: Any, settings: PilotSettings) -> None:
    """Refuse a model that cannot read the rows."""
    longest, known = context_length(model), vocabulary_size(model)
    if longest is not None and longest < settings.row_tokens:
        raise ValueError(
            f"`row_tokens` must be at most the model's context of {longest}, got {settings.row_tokens}. Lower it."
        )
    if known is not None and known < len(tokenizer):
        raise ValueError(
            f"`tokenizer` must be the model's own: the model knows {known:,} ids and the tokenizer has "
            f"{len(tokenizer):,}. Leave `tokenizer` out."
        )


def _run(
    place: PilotPlace,
    inputs: PilotInputs,
    settings: PilotSettings,
    schedule: Schedule,
    plan: SelectionPlan,
    names: Mapping[str, Any],
    progress: bool,
) -> dict[str, Any]:
    """Train what is not trained yet, and write the verdict."""
    tried, tuned_on = list(SETTINGS[settings.static_filter]), settings.seed + TUNING_SEED
    seeds = range(settings.seed, settings.seed + settings.seeds)
    bar = tqdm(total=len(tried) + len(ARMS) * len(seeds), desc="pilot", unit="run", disable=not progress)

    def done(name: str, unit: Unit) -> dict[str, Any]:
        bar.set_postfix_str(name)
        found = place.unit(name)
        if found is None:
            found = train_unit(unit, place.run_dir(name), inputs, settings, schedule)
            place.keep(name, found)
            gc.collect()
        bar.update()
        return found

    with bar:
        tuning = {
            setting: done(
                f"tuning-{number}-seed-{tuned_on}",
                Unit(arm="filter", seed=tuned_on, setting=setting, part="tuning"),
            )
            for number, setting in enumerate(tried)
        }  # fmt: skip
        losses = {setting: sum(found["sums"][-1]) / sum(found["tokens"]) for setting, found in tuning.items()}
        best = min(tried, key=lambda setting: (losses[setting], tried.index(setting)))
        units: dict[str, list[Unit]] = {
            arm: [Unit(arm=arm, seed=seed, setting=best if arm == "filter" else None) for seed in seeds]
            for arm in ARMS
        }  # fmt: skip
        results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
        for number in range(len(seeds)):  # a seed after the other, so that what is done is of whole seeds
            for arm in ARMS:
                unit = units[arm][number]
                results[arm].append(done(f"{arm}-seed-{unit.seed}", unit))
    summary = summarise(
        results, schedule, plan, inputs.facts["groups"], tuning={"tuning": list(tuning.values())},
        step_tokens=settings.batch_rows * settings.row_tokens,
    )  # fmt: skip
    data: dict[str, Any] = finite(
        page_data(
            settings, schedule, plan, summary, decide(summary.findings, settings),
            facts={**inputs.facts, "sources": dict(names), "num_parameters": results["ours"][0]["num_parameters"]},
            tuned={"best": best, "losses": losses, "seed": tuned_on}, seeds_asked=place.seeds_asked,
        )
    )  # fmt: skip
    write_json(place.out / RESULT_FILE, data)
    with written_whole(place.out / PAGE_FILE) as file:
        file.write(render_page(data).encode("utf-8"))
    return data


def _name_of(source: Any) -> Any:
    """What a source is known by."""
    if source is None or isinstance(source, (str, os.PathLike)):
        return None if source is None else os.fspath(source)
    if isinstance(source, (list, tuple)):
        return [os.fspath(one) if isinstance(one, (str, os.PathLike)) else type(one).__name__ for one in source]
    return f"{type(source).__name__} {getattr(source, '_fingerprint', '')}".strip()
