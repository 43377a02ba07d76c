# /// script
# requires-python = ">=3.10"
# dependencies = ["mates-hf"]
# ///
"""1,000 rounds in one run of two processes: do memory, threads, file handles and disk stay flat?

    python benchmarks/long_run.py                 # 1,000 rounds; writes benchmarks/results/long_run.{json,md}
    python benchmarks/long_run.py --quick         # 60 rounds; prints, writes nothing unless --out is given
    python benchmarks/long_run.py --rounds 200 --processes 1 --out runs/long
    python benchmarks/long_run.py --check         # the committed page follows from the committed JSON

A small model trains two steps a round, so that the rounds are nearly all of the run; each probes, fits, scores,
selects and saves. Checkpoints are saved now and then, the older ones deleted. After each round every process looks at
itself: own memory (`RssAnon`), mapped file pages, threads, file descriptors, mapped round files; and at the round
folders and their bytes. A slope is fitted to own memory after a warm-up of a fifth of the rounds; beside it stands
what as many steps grow without the callback (the Trainer's log, torch's caches).

Trade-off: with a model this small the allocator's noise is large against what a round could leave behind, so the slope
comes with a standard error from blocks of rounds, and needs hundreds of them to say anything.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
UPDATE_STEPS, BATCH_ROWS, NUM_PROBES, KEEP_ROUNDS = 2, 4, 24, 3
LENGTH, VOCABULARY = 12, 64
WARM_UP = 0.2
KIB, MIB = 2**10, 2**20
IN_BYTES = ("own_memory", "mapped_pages", "rounds_bytes")
FIGURES = (
    "own_memory", "mapped_pages", "threads", "file_handles", "mapped_round_files", "round_folders", "rounds_bytes",
)  # fmt: skip
_WORKER = "MATES_HF_LONG_RUN_WORKER"


def look(rounds_dir: Path) -> dict[str, float]:
    """What the process and the round folders hold now."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    files = [path for path in rounds_dir.rglob("*") if path.is_file()]
    return {
        "own_memory": int(status["RssAnon"].split()[0]) * KIB,
        "mapped_pages": int(status["RssFile"].split()[0]) * KIB,
        "threads": int(status["Threads"]),
        "file_handles": len(os.listdir("/proc/self/fd")),
        "mapped_round_files": sum("/round-" in line for line in Path("/proc/self/maps").read_text().splitlines()),
        "round_folders": len(list(rounds_dir.glob("round-*"))),
        "rounds_bytes": sum(path.stat().st_size for path in files),
        "seconds": time.perf_counter(),
    }


def save_steps(num_rounds: int) -> int:
    """Steps between two checkpoints: about twenty in a run."""
    return max(UPDATE_STEPS, num_rounds * UPDATE_STEPS // 20)


def run(num_rounds: int, output_dir: Path, *, selecting: bool, processes: int) -> list[dict[str, float]]:
    """Train and look after every round; without selection, after as many steps. One of the processes of a run."""
    import torch
    from datasets import Dataset
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        default_data_collator,
    )

    from mates_hf import MatesCallback, MatesConfig, ReferenceTask

    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, VOCABULARY, (2 * num_rounds * UPDATE_STEPS * BATCH_ROWS + 4 * NUM_PROBES, LENGTH))
    passages = rng.integers(0, VOCABULARY // 4, (16, LENGTH)).tolist()
    pool = Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()})
    reference = ReferenceTask.from_dataset(Dataset.from_dict({"input_ids": passages}), input_ids_column="input_ids")
    config = MatesConfig(
        update_steps=UPDATE_STEPS,
        num_probes=NUM_PROBES,
        selection_ratio=0.5,
        on_weak_signal="select",
        keep_rounds=KEEP_ROUNDS,
    )
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
        )
    )
    seen: list[dict[str, float]] = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step % UPDATE_STEPS == 0 and state.global_step < state.max_steps:
                seen.append(look(output_dir / "_mates"))

    arguments = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=(num_rounds + 1) * UPDATE_STEPS,
        per_device_train_batch_size=BATCH_ROWS // processes,
        learning_rate=3e-4,
        logging_strategy="no",
        save_steps=save_steps(num_rounds),
        save_total_limit=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    callbacks = [MatesCallback(reference, config)] if selecting else []
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=pool,
        data_collator=default_data_collator,
        callbacks=[*callbacks, Look()],
    )
    trainer.train()
    assert len(seen) == num_rounds
    return seen


def slope(values: np.ndarray, num_warm_up: int) -> tuple[float, float]:
    """Least-squares growth a round after the warm-up, and its standard error from blocks of rounds."""
    rest = values[num_warm_up:]
    whole = float(np.polyfit(np.arange(len(rest)), rest, 1)[0])
    parts = [np.polyfit(np.arange(len(part)), part, 1)[0] for part in np.array_split(rest, 8)]
    return whole, float(np.std(parts, ddof=1) / np.sqrt(len(parts)))


def in_their_own_processes(num_rounds: int, processes: int, *, selecting: bool) -> list[list[dict[str, float]]]:
    """One run in fresh processes with a folder of its own: what each of them saw."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with tempfile.TemporaryDirectory(prefix="long-run-") as folder:
        environment = {**os.environ, _WORKER: json.dumps([selecting, folder]), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, __file__, "--rounds", str(num_rounds), "--processes", str(processes)]
        started = []
        for rank in range(processes):
            more = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            more |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            more |= {"ACCELERATE_USE_CPU": "true"}
            started.append(subprocess.Popen(command, env=environment | (more if processes > 1 else {})))
        if any([process.wait() for process in started]):
            raise SystemExit("a process of the run failed: see above")
        return [json.loads((Path(folder) / f"seen-{rank}.json").read_text()) for rank in range(processes)]


def report(payload: dict[str, Any]) -> str:
    """The Markdown page."""
    settings, arms = payload["settings"], payload["processes"]
    num_warm_up = int(WARM_UP * settings["rounds"])
    ours = [{name: np.array(columns[name]) for name in FIGURES} for columns in arms["selecting"]]
    seconds = np.diff(arms["selecting"][0]["seconds"])
    lines = [
        f"# long_run{' (quick, not to be reported)' if settings['quick'] else ''}",
        "",
        f"{settings['rounds']:,} rounds of {UPDATE_STEPS} steps of {BATCH_ROWS} rows in {len(ours)} processes "
        f"(gloo), {NUM_PROBES} probes, `keep_rounds={KEEP_ROUNDS}`, a Llama of width 32; {settings['cpu_count']} "
        f"cores, Python {settings['python']}, torch {settings['torch']}, transformers {settings['transformers']}.",
        "",
        "| process | after round | " + " | ".join(name.replace("_", " ") for name in FIGURES) + " |",
        "|---|---|" + "---|" * len(FIGURES),
    ]
    looks = sorted({0, num_warm_up, *(np.linspace(num_warm_up, settings["rounds"] - 1, 5).astype(int).tolist())})
    for rank, columns in enumerate(ours):
        for i in looks:
            values = [
                f"{columns[name][i] / MIB:.1f} MB" if name in IN_BYTES else str(columns[name][i]) for name in FIGURES
            ]
            lines.append(f"| {rank} | {i + 1} | " + " | ".join(values) + " |")
    lines += ["", "| own memory after the warm-up | process | KB a round | standard error |", "|---|---|---|---|"]
    for arm, name in (("selecting", "with the callback"), ("plain", "the same steps without it")):
        for rank, columns in enumerate(arms[arm]):
            grown, error = slope(np.array(columns["own_memory"]), num_warm_up)
            lines.append(f"| {name} | {rank} | {grown / KIB:.2f} | {error / KIB:.2f} |")
    tenth = max(1, len(seconds) // 10)
    most = {name: max(columns[name][num_warm_up:].max() for columns in ours) for name in FIGURES}
    at_warm_up = {name: max(columns[name][num_warm_up] for columns in ours) for name in FIGURES}
    every = save_steps(settings["rounds"])
    lines += [
        "",
        f"Most in any process after the warm-up: {most['threads']} threads ({at_warm_up['threads']} at its end), "
        f"{most['file_handles']} file handles ({at_warm_up['file_handles']}), {most['mapped_round_files']} mapped "
        f"round files, {most['round_folders']} round folders, {most['rounds_bytes'] / MIB:.1f} MB of them. Besides "
        f"the {KEEP_ROUNDS} newest, the rounds since the last checkpoint (one in {every} steps) "
        "stay until the next one, because a resume comes through them.",
        f"Seconds a round, median of the first and of the last tenth: {np.median(seconds[:tenth]):.3f} and "
        f"{np.median(seconds[-tenth:]):.3f}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run both arms and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=None, help="rounds (1,000; quick: 60)")
    parser.add_argument("--processes", type=int, default=2, help="that train together")
    parser.add_argument("--quick", action="store_true", help="few rounds; too short to report")
    parser.add_argument("--check", action="store_true", help="only: does the page follow from the JSON")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder of the results; a quick run has none of its own"
    )
    arguments = parser.parse_args()
    num_rounds = arguments.rounds or (60 if arguments.quick else 1_000)
    out = arguments.out or (None if arguments.quick else RESULTS)
    if worker := os.environ.get(_WORKER):
        selecting, folder = json.loads(worker)
        seen = run(num_rounds, Path(folder) / "run", selecting=selecting, processes=arguments.processes)
        (Path(folder) / f"seen-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(seen))
        return
    if arguments.check:
        payload = json.loads(((out or RESULTS) / "long_run.json").read_text(encoding="utf-8"))
        if ((out or RESULTS) / "long_run.md").read_text(encoding="utf-8") != report(payload):
            raise SystemExit("long_run.md does not follow from long_run.json: run the benchmark again")
        return
    from importlib.metadata import version

    settings = {
        "quick": arguments.quick,
        "rounds": num_rounds,
        "cpu_count": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "accelerate", "datasets")},
    }
    arms = {
        arm: [
            {name: [look[name] for look in looks] for name in looks[0]}
            for looks in in_their_own_processes(num_rounds, arguments.processes, selecting=arm == "selecting")
        ]
        for arm in ("selecting", "plain")
    }
    payload = {"settings": settings, "processes": arms}
    text = report(payload)
    print(text)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "long_run.json").write_text(json.dumps(payload) + "\n", encoding="utf-8")
        (out / "long_run.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
