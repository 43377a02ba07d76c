"""1,000 rounds in one run of two processes: do memory, threads, file handles and disk stay flat?

A small model trains two steps a round, so that the rounds are nearly all of the run; each probes, fits, scores,
selects and saves. Checkpoints are saved now and then, the older ones deleted. After each round every process looks at
itself: own memory (`RssAnon`), mapped file pages, threads, file descriptors, mapped round files; and at the round
folders and their bytes. A slope is fitted to own memory after a warm-up of a fifth of the rounds; beside it stands
what as many steps grow without the callback (the Trainer's log, torch's caches).

Trade-off: with a model this small the allocator's noise is large against what a round could leave behind, so the slope
comes with a standard error from blocks of rounds, and needs hundreds of them to say anything.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lab.harness import Bench
from benchmarks.lab.machine import in_processes, num_cores, temporary_folder, versions
from benchmarks.lab.memory import status
from benchmarks.lab.tables import markdown, table, title

SIZE = 2  # processes
UPDATE_STEPS, BATCH_ROWS, NUM_PROBES, KEEP_ROUNDS = 2, 4, 24, 3
LENGTH, VOCABULARY = 12, 64
WARM_UP = 0.2
KIB, MIB = 2**10, 2**20
IN_BYTES = ("own_memory", "mapped_pages", "rounds_bytes")
FIGURES = (
    "own_memory", "mapped_pages", "threads", "file_handles", "mapped_round_files", "round_folders", "rounds_bytes",
)  # fmt: skip


def look(rounds_dir: Path) -> dict[str, float]:
    """What the process and the round folders hold now."""
    own, mapped = status("RssAnon", "RssFile")
    return {
        "own_memory": own,
        "mapped_pages": mapped,
        "threads": len(os.listdir("/proc/self/task")),
        "file_handles": len(os.listdir("/proc/self/fd")),
        "mapped_round_files": sum("/round-" in line for line in Path("/proc/self/maps").read_text().splitlines()),
        "round_folders": len(list(rounds_dir.glob("round-*"))),
        "rounds_bytes": sum(path.stat().st_size for path in rounds_dir.rglob("*") if path.is_file()),
        "seconds": time.perf_counter(),
    }


def save_steps(num_rounds: int) -> int:
    """Steps between two checkpoints: about twenty in a run."""
    return max(UPDATE_STEPS, num_rounds * UPDATE_STEPS // 20)


def train(num_rounds: int, folder: str, selecting: bool) -> list[dict[str, float]]:
    """Train and look after every round; without selection, after as many steps. One of the processes of a run."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback

    from benchmarks.lab.corpus import as_dataset
    from benchmarks.lab.models import llama, trainer_of
    from mates_hf import MatesCallback, MatesConfig, ReferenceTask

    torch.set_num_threads(1)
    output_dir = Path(folder)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, VOCABULARY, (2 * num_rounds * UPDATE_STEPS * BATCH_ROWS + 4 * NUM_PROBES, LENGTH))
    passages = rng.integers(0, VOCABULARY // 4, (16, LENGTH)).tolist()
    pool = as_dataset(rows)
    reference = ReferenceTask.from_dataset(Dataset.from_dict({"input_ids": passages}), input_ids_column="input_ids")
    config = MatesConfig(
        update_steps=UPDATE_STEPS,
        num_probes=NUM_PROBES,
        selection_ratio=0.5,
        on_weak_signal="select",
        keep_rounds=KEEP_ROUNDS,
    )
    model = llama(VOCABULARY, width=32, inner=64, layers=2, heads=2, length=LENGTH, tied=False)
    seen: list[dict[str, float]] = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % UPDATE_STEPS == 0 and state.global_step < state.max_steps:
                seen.append(look(output_dir / "_mates"))

    callbacks = [MatesCallback(reference, config)] if selecting else []
    trainer = trainer_of(
        model, pool, output_dir, (num_rounds + 1) * UPDATE_STEPS, BATCH_ROWS // SIZE, [*callbacks, Look()],
        learning_rate=3e-4, lr_scheduler_type="linear", save_strategy="steps", save_steps=save_steps(num_rounds),
        save_total_limit=2,
    )  # fmt: skip
    trainer.train()
    assert len(seen) == num_rounds
    return seen


def slope(values: np.ndarray, num_warm_up: int) -> tuple[float, float]:
    """Least-squares growth a round after the warm-up, and its standard error from blocks of rounds."""
    rest = values[num_warm_up:]
    whole = float(np.polyfit(np.arange(len(rest)), rest, 1)[0])
    parts = [np.polyfit(np.arange(len(part)), part, 1)[0] for part in np.array_split(rest, 8)]
    return whole, float(np.std(parts, ddof=1) / np.sqrt(len(parts)))


def page(document: dict[str, Any]) -> str:
    """The Markdown page."""
    settings, arms = document["settings"], document["processes"]
    num_warm_up = int(WARM_UP * settings["rounds"])
    ours = [{name: np.array(columns[name]) for name in FIGURES} for columns in arms["selecting"]]
    seconds = np.diff(arms["selecting"][0]["seconds"])
    packages = ", ".join(f"{name} {settings[name]}" for name in ("python", "torch", "transformers"))
    about = (
        f"{settings['rounds']:,} rounds of {UPDATE_STEPS} steps of {BATCH_ROWS} rows in {len(ours)} "
        f"process{'es (gloo)' if len(ours) > 1 else ''}, {NUM_PROBES} probes, `keep_rounds={KEEP_ROUNDS}`, a Llama of "
        f"width 32; {settings['cpu_count']} cores, {packages}."
    )
    looks = sorted({0, num_warm_up, *(np.linspace(num_warm_up, settings["rounds"] - 1, 5).astype(int).tolist())})
    seen = []
    for rank, columns in enumerate(ours):
        for i in looks:
            cells = [f"{columns[name][i] / MIB:.1f} MB" if name in IN_BYTES else columns[name][i] for name in FIGURES]
            seen.append([rank, i + 1, *cells])
    rows = []
    for arm, name in (("selecting", "with the callback"), ("plain", "the same steps without it")):
        for rank, columns in enumerate(arms[arm]):
            grown, error = slope(np.array(columns["own_memory"]), num_warm_up)
            rows.append([name, rank, f"{grown / KIB:.2f}", f"{error / KIB:.2f}"])
    tenth = max(1, len(seconds) // 10)
    most = {name: max(columns[name][num_warm_up:].max() for columns in ours) for name in FIGURES}
    at_warm_up = {name: max(columns[name][num_warm_up] for columns in ours) for name in FIGURES}
    found = (
        f"Most in any process after the warm-up: {most['threads']} threads ({at_warm_up['threads']} at its end), "
        f"{most['file_handles']} file handles ({at_warm_up['file_handles']}), {most['mapped_round_files']} mapped "
        f"round files, {most['round_folders']} round folders, {most['rounds_bytes'] / MIB:.1f} MB of them. Besides "
        f"the {KEEP_ROUNDS} newest, the rounds since the last checkpoint (one in {save_steps(settings['rounds'])} "
        "steps) stay until the next one, because a resume comes through them.\n"
        f"Seconds a round, median of the first and of the last tenth: {np.median(seconds[:tenth]):.3f} and "
        f"{np.median(seconds[-tenth:]):.3f}."
    )
    return markdown(
        title("long_run", settings["quick"]),
        about,
        table(["process", "after round", *(name.replace("_", " ") for name in FIGURES)], seen),
        table(["own memory after the warm-up", "process", "KB a round", "standard error"], rows),
        found,
    )


def run(bench: Bench) -> dict[str, Any]:
    """Run both arms."""
    num_rounds = 60 if bench.quick else 1_000
    settings = {"quick": bench.quick, "rounds": num_rounds, "cpu_count": num_cores()}
    arms = {}
    for arm in ("selecting", "plain"):
        with temporary_folder(bench.work) as folder:
            seen = in_processes(train, num_rounds, str(folder), arm == "selecting", size=SIZE, steady=False)
        arms[arm] = [{name: [look[name] for look in looks] for name in looks[0]} for looks in seen]
    packages = versions("torch", "transformers", "accelerate", "datasets")
    return {"settings": {**settings, **packages}, "processes": arms}
