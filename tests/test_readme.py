"""What the front door says works: its blocks run, its links lead somewhere, its picture follows, it stays short."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MORE_PAGES = [ROOT / name for name in ("CHANGELOG.md", "SECURITY.md", "AGENTS.md")]
MAX_LINES, MAX_WORDS, MAX_NUMBERS = 120, 1_000, 70
# The README's sizes are those of a real run; a test's are these.
SMALLER = {"update_steps=1_000": "update_steps=8, num_probes=60"}
BACKGROUNDS = ((255, 255, 255), (13, 17, 23))  # a light page and a dark one
MIN_CONTRAST = 3.0  # WCAG 2.1: graphical objects


def python_blocks(page: Path) -> list[str]:
    """Fenced Python blocks of a page, in order."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_the_blocks_of_the_readme_run_in_order(tmp_path, monkeypatch, tiny_model, tiny_tokenizer) -> None:
    """With nothing but what the README tells its reader to have."""
    from datasets import Dataset
    from transformers import TrainingArguments

    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    # Two kinds of text; the reference is of the second, so there is something to find.
    texts = [" ".join(f"w{i}" for i in rng.integers(low, low + 12, 16)) for low in (5, 40) for _ in range(300)]
    dataset = Dataset.from_dict({"text": texts[::20]})
    passages = Dataset.from_dict({"text": texts[-20:]})
    pool = Dataset.from_dict({"input_ids": tiny_tokenizer(texts)["input_ids"]})
    pool = pool.add_column("labels", pool["input_ids"]).shuffle(seed=0)
    args = TrainingArguments(
        output_dir="runs/my-run", max_steps=24, per_device_train_batch_size=4, learning_rate=1e-2,
        lr_scheduler_type="constant", use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    names = {"model": tiny_model, "tokenizer": tiny_tokenizer, "pool": pool, "args": args, "passages": passages}
    names["dataset"] = dataset
    source = "\n".join(python_blocks(README))
    for given, smaller in SMALLER.items():
        assert source.count(given) == 1
        source = source.replace(given, smaller)
    exec(compile(source, str(README), "exec"), names)

    assert (tmp_path / "runs/my-run/_mates/round-0001/round.json").exists()
    assert any("mates/spearman" in entry for entry in names["trainer"].state.log_history)
    assert names["scored"].column_names == ["text", "influence"]
    assert len(names["kept"]) == len(names["choice"].selected) == 6
    assert len(names["choice"].rejected) == len(dataset) - 6
    # What it picks is of the kind that the reference is of: the README's sign is the right one.
    assert sum(int(text.split()[0][1:]) >= 40 for text in names["kept"]["text"]) >= 5


def has_name(module: str, name: str) -> bool:
    """Whether a module has a name; of one that needs an engine, whether its source defines it."""
    if module.startswith("mates_hf.integrations."):
        source = (ROOT / Path(*module.split("."))).with_suffix(".py").read_text(encoding="utf-8")
        return name in {getattr(node, "name", "") for node in ast.parse(source).body}
    return hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_are_python_and_import_what_is_there(page: Path) -> None:
    for block in python_blocks(page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mates_hf":
                assert [alias.name for alias in node.names if not has_name(node.module, alias.name)] == []


@pytest.mark.parametrize("page", [*PAGES, *MORE_PAGES], ids=lambda page: page.name)
def test_no_link_is_dead(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    targets = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    dead = []
    for target in targets:
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            dead.append(target)
    assert dead == []


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_the_readme_stays_short() -> None:
    text = README.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```|`[^`]*`|\]\([^)]*\)", "", text, flags=re.DOTALL | re.MULTILINE)
    assert len(text.splitlines()) <= MAX_LINES
    assert len(text.split()) <= MAX_WORDS
    assert len(re.findall(r"\d[\d.,]*", prose)) <= MAX_NUMBERS


@pytest.mark.parametrize("question", ["horizon", "gain_against_cost", "pictures"])
def test_pictures_follow_from_the_committed_results(question: str) -> None:
    command = [sys.executable, "-m", "benchmarks", question, "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def luminance(colour: tuple[int, ...]) -> float:
    """Relative luminance of an sRGB colour (WCAG 2.1)."""
    linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("picture", sorted((ROOT / "docs").glob("*.svg")), ids=lambda path: path.name)
def test_a_picture_can_be_read_on_white_and_on_black(picture: Path) -> None:
    text = picture.read_text(encoding="utf-8")
    colours = {tuple(bytes.fromhex(found)) for found in re.findall(r"#([0-9a-f]{6})", text)}
    assert colours
    for colour in colours:
        for background in BACKGROUNDS:
            low, high = sorted((luminance(colour), luminance(background)))
            assert (high + 0.05) / (low + 0.05) >= MIN_CONTRAST, f"{bytes(colour).hex()} on {background}"
