"""What the site says works: each page is in its table of contents, opens with whom it is for, and its blocks run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mates_hf
from mates_hf.cli.plan import number
from mates_hf.config import MatesConfig
from mates_hf.reporting.forecast import RunSize, predict_cost
from mates_hf.reporting.payback import Machine, plan_selection

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TESTED_ELSEWHERE = {"clusters.md", "launchers.md"}  # in tests/integrations, with the engines they are for
WRITTEN_BY_TESTS = {"settings.md"}
NOT_RUN = "<!-- not run:"
BLOCK = re.compile(r"^(<!-- not run:[^\n]*-->\n)?```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
STEPS, BATCH = 24, 4
# A page's sizes are those of a real run; a test's are these.
SMALLER = {
    "update_steps=1_000": f"update_steps=8, num_probes=60, rounds_dir={'{rounds_dir!r}'}",
    "max_steps=10_000": "max_steps=9",
    "batch_size=16": f"batch_size={BATCH}",
    "2_000": "60",
    ", num_proc=4": "",
    "workers=8": "workers=1",
    '"EleutherAI/pythia-160m"': '"model"',
    '"selector/")': '"selector/", num_probes=60, warm_steps=8, batch_size=4, learning_rate=1e-2)',
}


def blocks(page: Path) -> list[str]:
    """Python blocks of a page that say nothing of not being run."""
    return [source for marked, source in BLOCK.findall(page.read_text(encoding="utf-8")) if not marked]


def fitted(source: str, rounds_dir: str) -> str:
    """A block with a test's sizes."""
    for given, smaller in SMALLER.items():
        source = source.replace(given, smaller.replace("{rounds_dir!r}", repr(rounds_dir)))
    return source


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any, make_tiny_model: Callable[..., Any]
) -> dict[str, Any]:
    """What a reader has who did what README and `train.md` say: a trained model, its run, files."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments

    folder = tmp_path_factory.mktemp("reader")
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in rng.integers(low, low + 12, 16)) for low in (5, 40) for _ in range(300)]
    passages = Dataset.from_dict({"text": texts[-20:]})
    pool = Dataset.from_dict({"input_ids": tiny_tokenizer(texts)["input_ids"]})
    pool = pool.add_column("labels", pool["input_ids"]).shuffle(seed=0)
    model = make_tiny_model()
    args = TrainingArguments(
        output_dir=str(folder / "runs/my-run"), max_steps=STEPS, per_device_train_batch_size=BATCH, report_to="none",
        learning_rate=1e-2, lr_scheduler_type="constant", use_cpu=True, disable_tqdm=True, save_steps=STEPS,
    )  # fmt: skip
    names = {"model": model, "tokenizer": tiny_tokenizer, "pool": pool, "args": args, "passages": passages}
    source = blocks(DOCS / "train.md")[0].replace("1_000", "8, num_probes=60")
    exec(compile(source, "train.md", "exec"), names)
    (folder / "data").mkdir()
    Dataset.from_dict({"text": texts}).to_parquet(str(folder / "data" / "part.parquet"))
    passages.to_json(str(folder / "passages.jsonl"))
    model.save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    return {
        **names, **{name: getattr(mates_hf, name) for name in mates_hf.__all__}, "Trainer": Trainer, "torch": torch,
        "folder": folder, "optimizer": names["trainer"].optimizer, "texts": texts, "update_steps": 8,
        "batch_rows": BATCH, "dataset": Dataset.from_dict({"text": texts[::20]}),
    }  # fmt: skip


WITH_BLOCKS = [page for page in PAGES if blocks(page) and page.name not in TESTED_ELSEWHERE]


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run_in_order(page: Path, world: dict[str, Any], monkeypatch: Any) -> None:
    if page.name == "optimizers.md" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    monkeypatch.chdir(world["folder"])
    names = dict(world)
    rounds_dir = str(world["folder"] / "rounds" / page.stem)
    source = "\n".join(fitted(block, rounds_dir) for block in blocks(page))
    if page.name == "train.md":
        source = source.partition("trainer.train()\n")[2]  # `world` did this much
    callbacks = world["trainer"].callback_handler.callbacks
    before = list(callbacks)
    try:
        exec(compile(source, page.name, "exec"), names)
    finally:
        callbacks[:] = before  # a page may attach one


def test_every_file_of_a_round_is_on_its_page(world: dict[str, Any]) -> None:
    page = (DOCS / "round_files.md").read_text(encoding="utf-8")
    rounds = sorted((world["folder"] / "runs/my-run/_mates").glob("round-????"))
    found = {path.name for each in rounds for path in each.iterdir()}
    assert len(found) > 10
    assert {name for name in found if f"`{name}" not in page} == set()


def test_every_page_is_in_the_table_of_contents() -> None:
    contents = re.findall(r"^```\{toctree\}\n(.*?)^```", (DOCS / "index.md").read_text(encoding="utf-8"), re.S | re.M)
    listed = [line for part in contents for line in part.splitlines() if line and not line.startswith(":")]
    assert len(listed) == len(set(listed))
    absent = {page.stem for page in PAGES} - {"index"} - {name.rstrip("*") for name in listed}
    assert absent == set()
    assert {name for name in listed if not name.endswith("*") and not (DOCS / f"{name}.md").exists()} == set()


@pytest.mark.parametrize(
    "page", [p for p in PAGES if p.name not in WRITTEN_BY_TESTS | {"index.md"}], ids=lambda page: page.name
)
def test_a_page_opens_with_whom_it_is_for(page: Path) -> None:
    text = re.sub(r"\A---\n.*?\n---\n", "", page.read_text(encoding="utf-8"), flags=re.DOTALL).strip()
    head, _, rest = text.partition("\n\n")
    assert re.fullmatch(r"# .+", head)
    assert rest.startswith("For "), "a page begins with whom it is for, and what they have at its end"


def test_every_public_name_is_on_the_page_of_the_api() -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    named = re.findall(r"^\.\. auto\w+:: (\w+)$", page.partition("\n## Evaluation\n")[0], re.MULTILINE)
    assert sorted(named) == sorted(mates_hf.__all__)


def test_what_the_page_of_the_method_says_of_costs_is_what_is_predicted() -> None:
    size = RunSize(
        num_parameters=405_334_016, num_looked_up=50_304 * 1_024, tokens_per_row=1_024, batch_rows=512,
        max_steps=50_000, num_passages=1_024, tokens_per_passage=90,
    )  # fmt: skip
    shares = [
        predict_cost(size, MatesConfig(), probe=probe).share_of_training for probe in ("loss_reduction", "directional")
    ]
    page = (DOCS / "method.md").read_text(encoding="utf-8")
    assert f"says {shares[0]:.2%} of the training. Path labels take {shares[1]:.2%}." in page
    assert shares[0] < 0.004


def test_the_table_of_start_values_is_what_plan_proposes() -> None:
    page = (DOCS / "settings_guide.md").read_text(encoding="utf-8")
    rows = re.findall(
        r"^\| ([\d.]+[MB]) \| ([\d.]+B) \| ([\d,]+) \| ([\d,]+) \| ([\d.]+)% \| ([\d.]+)% \|$", page, re.M
    )
    assert len(rows) == 5
    for parameters, tokens, *expected in rows:
        size = RunSize(
            num_parameters=int(number(parameters)), num_looked_up=0, tokens_per_row=1_024, batch_rows=512,
            max_steps=int(number(tokens) / 524_288), num_passages=1_024, tokens_per_passage=100,
        )  # fmt: skip
        plan = plan_selection(size, Machine())
        found = [f"{plan.config.update_steps:,}", f"{plan.config.num_probes:,}"]
        assert [*found, f"{plan.cost.share_of_training:.2%}"[:-1], f"{plan.overhead:.1%}"[:-1]] == expected
