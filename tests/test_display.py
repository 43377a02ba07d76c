"""What public objects print: at most ten lines of at most 100 characters, whatever they hold."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

import mates_hf
from mates_hf.data.pool import CandidatePool
from mates_hf.data.rows import TokenRows
from mates_hf.disk import write_array
from mates_hf.display import brief, call, card, html_card
from mates_hf.records import FitReport, InfluenceLabels
from mates_hf.round_files import load_round, write_labels
from mates_hf.round_writer import RoundWriter
from mates_hf.selection.budget import Budget
from mates_hf.selection.cut import find_cut
from mates_hf.selection.task_cut import TaskCut
from mates_hf.training.fit.result import SelectorFit

EVIL = "<script>alert(1)</script>\n\x1b[31m" + "x" * 5_000


def labels(num: int, value: float = 1.0, probe: str = "directional") -> InfluenceLabels:
    values = np.arange(num, dtype=np.float32)
    values[1:] *= np.float32(value)
    return InfluenceLabels(
        candidate_id=np.arange(num),
        influence=values,
        influence_per_token=values,
        loss=values,
        num_tokens=np.ones(num, np.int32),
        probe=np.full(num, probe),
        token_derivatives=values,
        info={"skipped": list(range(5_000)), "epsilon": 1e-3, "other": EVIL},
    )


def record(folder: Path, info: dict[str, Any], num: int = 300) -> Any:
    writer = RoundWriter(folder, 3, {})
    write_labels(writer.path / "probes.parquet", labels(num))
    write_array(writer.path / "candidates.npy", np.arange(num))
    write_array(writer.path / "scores.npy", np.ones(num, np.float32))
    write_array(writer.path / "selection.npy", np.arange(num // 3))
    return load_round(writer.finish(info))


def report(**changes: Any) -> FitReport:
    pairs = tuple((float(i), float(i)) for i in range(1_000))
    given = {"num_labels": 10, "num_held_out": 4, "spearman": 0.5, "interval": (0.1, 0.9), "calibration": pairs}
    return FitReport(**{**given, **changes})


def optimizer(num: int) -> torch.optim.Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2, 3))], "lr": 0.1 / (i + 1)} for i in range(num + 1)]
    return torch.optim.SGD(groups) if num % 2 else torch.optim.AdamW(groups)


def fit_about() -> dict[str, Any]:
    """What a fit without a run says of itself."""
    read = {"num_rows": 10**9, "num_empty": 10**8, "num_shared": 10**7, "pool": EVIL, "column": EVIL}
    return {
        "read": read, "model": {"name": EVIL, "num_parameters": 10**12}, "seconds": {EVIL: 1e9}, "flops": {EVIL: 1e30},
        "fit": report().to_dict(), "fidelity": {"num_candidates": 16, "spearman": 0.5}, "max_length": 8, "step": 200,
        "reference": {"name": EVIL}, "num_passages": 3, "reference_loss": float("nan"), "num_probed": 14,
    }  # fmt: skip


def objects(folder: Path) -> list[Any]:
    """One or more of every public class, plain and extreme."""
    rows = TokenRows.from_lists([list(range(500))] * 400)
    task = mates_hf.ReferenceTask(name=EVIL, rows=rows, description={"source": EVIL})
    dataset = Dataset.from_dict({"input_ids": [[1, 2, 3]] * 50})
    config = mates_hf.MatesConfig(rounds_dir="d" * 5_000, update_steps=77)
    probes = [mates_hf.DirectionalProbe(learning_rates=(0.1,) * 500, loss=print), mates_hf.OneStepProbe(loss=print)]
    probes.append(mates_hf.LossReductionProbe(learning_rates=(0.1,) * 500, loss=print))
    strange = {"number": EVIL, "guard": {"decision": EVIL, "spearman": float("nan"), "interval": EVIL}, "stages": [1]}
    return [
        rows, task, task.rows.take(np.arange(0)), CandidatePool(dataset), CandidatePool(dataset).select([1]), config,
        mates_hf.MatesConfig(), mates_hf.MatesConfig.paper(), *probes, mates_hf.DirectionalProbe(),
        mates_hf.MatesCallback(task, config, probe=probes[0]),
        mates_hf.MatesRounds(task, dataset, config, output_dir=folder / EVIL[:900], probe=probes[0]),
        mates_hf.NgramInfluenceModel(pool_decay=0.5), mates_hf.TextInfluenceModel(num_buckets=2),
        mates_hf.FeatureInfluenceModel(), mates_hf.MooreLewisModel(seed=3),
        mates_hf.MooreLewisModel(num_buckets=2).fit(task, rows),
        mates_hf.MatesStream(dataset.to_iterable_dataset(), spool_dir="d" * 5_000),
        labels(0), labels(1), labels(300), labels(9, float("nan")), labels(9, float("inf")),
        labels(9, probe=EVIL[:900]), report(), report(spearman_within_group=0.1),
        report(spearman=float("nan"), interval=(float("nan"),) * 2, calibration=()),
        record(folder / "a", {}), record(folder / "b", strange), record(folder / "c", {"number": 3, "guard": None}),
        SelectorFit(folder / EVIL[:900], fit_about(), folder / "text"), SelectorFit(folder, fit_about()),
        TaskCut(EVIL, find_cut([], Budget(k=0)), (), ()),
        mates_hf.MatesError("what is wrong"), mates_hf.CombinedOptimizer(*(optimizer(i) for i in range(30))),
    ]  # fmt: skip


def test_every_public_object_prints_in_ten_short_lines_and_escaped_in_a_notebook(tmp_path):
    made = objects(tmp_path)
    for one in made:
        lines = repr(one).split("\n")
        assert len(lines) <= 10, repr(one)
        assert max(map(len, lines)) <= 100, repr(one)
        assert " object at 0x" not in repr(one)
        assert "array(" not in repr(one)
        assert "\x1b" not in repr(one)
        if hasattr(one, "_repr_html_"):
            found = one._repr_html_()
            assert found.startswith("<table>")
            assert "<script>" not in found
            assert len(found) < 5_000
    classes = {type(one).__name__ for one in made}
    # These have tests where an encoder or a tokenizer is at hand; the rest are functions.
    elsewhere = {"EncoderInfluenceModel", "MatesSelector"}
    public = {name for name in mates_hf.__all__ if isinstance(getattr(mates_hf, name), type)}
    assert public - elsewhere <= classes


def test_settings_print_what_was_changed_as_one_would_write_it():
    config = mates_hf.MatesConfig(update_steps=500, average_steps=0)
    assert repr(config) == "MatesConfig(update_steps=500, average_steps=0)"
    assert eval(repr(config), {"MatesConfig": mates_hf.MatesConfig}) == config
    assert repr(mates_hf.DirectionalProbe(path_steps=32)) == "DirectionalProbe(path_steps=32)"
    assert repr(mates_hf.OneStepProbe()) == "OneStepProbe()"


def test_labels_print_their_spread_and_a_large_array_is_sampled(monkeypatch):
    assert "300 candidates (directional)" in repr(labels(300))
    assert "mean +1.50e+02" in repr(labels(300))
    assert "none" in repr(labels(0))
    read: list[int] = []
    quantile = np.quantile
    monkeypatch.setattr(np, "quantile", lambda values, q: (read.append(len(values)), quantile(values, q))[1])
    assert "3,000,000 candidates" in repr(labels(3_000_000))
    assert max(read) <= 1 << 20


def test_labels_become_a_table():
    table = labels(4).to_pandas()
    assert list(table.columns) == ["candidate_id", "influence", "influence_per_token", "loss", "num_tokens", "probe"]
    assert table["influence"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert str(table["influence"].dtype) == "float32"
    assert table["probe"].tolist() == ["directional"] * 4
    assert len(labels(0).to_pandas()) == 0


def test_without_pandas_the_error_says_what_to_install(monkeypatch):
    monkeypatch.delitem(sys.modules, "pandas", raising=False)
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "pandas":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match="pip install pandas"):
        labels(2).to_pandas()


def test_cards_and_calls_are_cut_and_escaped():
    many = {f"fact {i}": EVIL for i in range(40)}
    assert len(card(EVIL, many).split("\n")) == 10
    assert "more" in card("title", many)
    assert "<script>" not in html_card(EVIL, {EVIL: EVIL})
    assert len(call("f", {f"argument_{i}": i for i in range(500)}).split("\n")) <= 10
    assert card("title", {}) == "title"
    assert brief([1] * 50) == "<50 values>"
    assert brief(np.zeros(9)) == "<ndarray>"
