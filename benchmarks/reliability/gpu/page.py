"""The page of the kit: a block a part, and what is not done yet."""

from __future__ import annotations

from typing import Any

from benchmarks.lab.tables import settings_page, table


def page(document: dict[str, Any]) -> str:
    """Markdown."""
    blocks = []
    for name, found in document["parts"].items():
        blocks.append(f"## {name}\n\n{document['models'].get(name, '')}".rstrip())
        if found is None:
            blocks.append("Not begun.")
            continue
        if found.get("error"):
            blocks.append(f"**Failed**: {found['error']}")
        kind = name.split()[0]
        if _BLOCKS[kind][0] in found:
            blocks.append(_BLOCKS[kind][1](found))
        if not found["done"]:
            blocks.append("Not finished: the same command goes on.")
    return settings_page("gpu", document, *blocks)


def _tests(found: dict[str, Any]) -> str:
    rows = [[name, each["outcome"], f"{each['seconds']:.1f}"] for name, each in sorted(found["outcomes"].items())]
    return table(["test", "outcome", "seconds"], rows)


def _fidelity(found: dict[str, Any]) -> str:
    rows = [[name, f"{each['spearman']:.3f}"] for name, each in found["agreement"].items()]
    rows.append(["one step, bf16, with float32 labels", f"{found['bf16_with_float32']:.3f}"])
    if found["truth_between_batches"] is not None:
        rows.append(["the truth of one batch with that of another", f"{found['truth_between_batches']:.3f}"])
    heads = [f"labels of {found['candidates']} candidates, {found['batches']} batches", "Spearman with real steps"]
    return table(heads, rows)


def _speed(found: dict[str, Any]) -> str:
    rows: list[list[Any]] = [[name, f"{each:,.0f}"] for name, each in found["tokens_a_second"].items()]
    rows.append(["probe / two forward passes", f"{found['probe_against_two_forwards']:.2f} x"])
    rows.append(["probe / training", f"{found['probe_against_training']:.2f} x"])
    return table(["what runs", "tokens/s"], rows)


def _overhead(found: dict[str, Any]) -> str:
    def times(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    rows = [
        [name, f"{seconds:.3f}", f"{seconds / found['seconds_a_step']:.1f}", times(found["peak_of_stages"][name])]
        for name, seconds in found["stage_seconds"].items()
    ]
    rows.append(["a training step", f"{found['seconds_a_step']:.4f}", "1", times(found["peak_of_a_step"])])
    return table([f"stage ({found['probes']} probes)", "seconds", "in steps", "peak, x weights"], rows)


def _training(found: dict[str, Any]) -> str:
    rows = [
        [
            arm,
            points[-1]["step"],
            f"{points[-1]['reference']:.4f}",
            f"{points[-1]['pool']:.4f}",
            f"{each['seconds']:.0f}",
        ]
        for arm, each in found["arms"].items()
        if (points := each["points"])
    ]
    left_out = f"\nLeft out, not installed: {', '.join(found['left_out'])}.\n" if found["left_out"] else ""
    return table(["arm", "steps", "development loss", "loss of the pool's text", "seconds"], rows) + left_out


_BLOCKS = {
    "tests": ("outcomes", _tests), "fidelity": ("agreement", _fidelity), "speed": ("tokens_a_second", _speed),
    "overhead": ("stage_seconds", _overhead), "training": ("arms", _training),
}  # fmt: skip
