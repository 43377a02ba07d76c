"""The examples of a loop and of a probe of one's own: they run, resume, and do what their docstrings say."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from mates_hf import ReferenceTask, load_round
from mates_hf.data.corpus import BuiltinCorpus
from mates_hf.data.pool import CandidatePool
from mates_hf.training.verify import verify_run
from tests.test_examples import launch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SMALL = ["--max_steps", "14", "--update_steps", "4", "--batch_size", "4", "--num_probes", "20", "--save_steps", "3"]
SMALL += ["--hidden_size", "16"]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An example by its name, with a few hundred rows for its corpus."""
    rng = np.random.default_rng(0)
    words = ["sea", "harbour", "captain", "wave", "def", "return", "class", "self"]

    def text(first: int) -> str:
        return " ".join(rng.choice(words[first : first + 4], 140))

    def corpus(max_rows_per_kind: int | None = None) -> BuiltinCorpus:
        pool = [{"text": text(4 * int(rng.integers(2))), "kind": "any"} for _ in range(250)]
        held_out = [[text(0) for _ in range(12)] for _ in range(2)]
        return BuiltinCorpus(pool=pool, reference=held_out[0], development=held_out[1], overlap={})

    made = corpus()
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name: str) -> ModuleType:
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "builtin_corpus", lambda max_rows_per_kind=None: made)
        return module

    return load


@pytest.mark.slow
def test_the_loop_of_ones_own_selects_and_resumes(tmp_path, example, capsys):
    main, arguments = example("custom_loop").main, [*SMALL, "--max_steps", "7", "--output_dir", str(tmp_path)]
    main([*arguments, "--stop_at", "5"])  # two steps behind its last checkpoint, and a round since
    main([*arguments, "--resume"])
    steps = [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if "held-out loss" in line]
    assert steps == ["step 3", "step 6", "step 7"]
    assert [checked.number for checked in verify_run(tmp_path).rounds] == [1]
    assert verify_run(tmp_path).problem is None
    assert not list(tmp_path.glob("_mates/*.stale"))  # the round was taken over, since the run is the same bit for bit


def test_the_probe_of_ones_own_ranks_what_is_like_the_reference_first_and_leaves_no_trace(
    tmp_path, example, make_tiny_model
):
    module = example("custom_probe")
    counting = [[3 + (i + j) % 8 for j in range(12)] for i in range(20)]
    others = np.random.default_rng(0).integers(20, 60, (20, 12)).tolist()
    reference = ReferenceTask.from_dataset(Dataset.from_dict({"input_ids": counting}), input_ids_column="input_ids")
    pool = CandidatePool(Dataset.from_dict({"input_ids": counting[:10] + others}))
    model = make_tiny_model()
    before, stream = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    labels = module.TaughtCopy(learning_rate=0.5).measure(model, None, reference, pool).check()
    assert labels.influence[:10].min() > labels.influence[10:].max()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(parameter.grad is None for parameter in model.parameters())
    module.main(str(tmp_path), 10, 4)
    info = load_round(tmp_path / "_mates" / "round-0001").info
    assert info["measured_with"]["probe"]["class"].endswith("TaughtCopy")
    assert verify_run(tmp_path).problem is None


@pytest.mark.slow
def test_the_loop_of_ones_own_in_two_processes_as_users_start_it(tmp_path):
    arguments = [*SMALL, "--rows_per_kind", "80", "--output_dir", tmp_path]
    launch("examples/custom_loop.py", *arguments, "--stop_at", "8", cache=tmp_path / "cache")
    printed = launch("examples/custom_loop.py", *arguments, "--resume", cache=tmp_path / "cache")
    assert printed.count("held-out loss") == 3  # steps 9, 12 and 14, by one process
    assert verify_run(tmp_path).problem is None


SMALL_PROBE = """
import sys
sys.path.insert(0, "examples")
import custom_probe
builtin_corpus = custom_probe.builtin_corpus
custom_probe.builtin_corpus = lambda: builtin_corpus(max_rows_per_kind=80)
custom_probe.main(sys.argv[1], 10, 4)
"""


@pytest.mark.slow
def test_the_probe_of_ones_own_in_two_processes(tmp_path):
    script, run = tmp_path / "small_probe.py", tmp_path / "run"
    script.write_text(SMALL_PROBE)
    printed = launch(script, run, cache=tmp_path / "cache")
    assert printed.count("round-0001: ") == printed.count("round-0002: ") == 1  # one process speaks
    record = load_round(run / "_mates" / "round-0001")
    assert len(np.unique(record.labels.candidate_id)) == 40  # each process measured its share
    assert verify_run(run).problem is None
