"""How much of a selector's gain does the text model keep that was distilled from it?

An n-gram selector (`lab/text_teacher.py`) is distilled from 20,000 texts of the corpus. Of the others each of the two
takes its best fifth; texts that share a 13-gram with a passage were dropped before. Fresh models are trained on these,
and on all of them at random: packed rows, one epoch, a constant rate after a warm-up. They are judged by passages like
those that influence was measured on, after 200 steps and after 1,000, with the mean of the last weights. The gain is
how much lower the loss is than with random rows; the share kept is the text model's gain over its teacher's.

Arms of a seed share weights, the order of texts, and steps. With `--data` the corpus there is read, else the built-in
one. Trade-off: models of a million parameters, minutes each; intervals are over seeds, and not over passages.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.lab.corpus import END, as_rows, as_tasks, lambada, read_documents
from benchmarks.lab.harness import Bench, say
from benchmarks.lab.machine import versions
from benchmarks.lab.statistics import mean_interval
from benchmarks.lab.tables import markdown, table, title
from benchmarks.lab.text_teacher import CHARACTERS, NUM_REFERENCE, ROW_TOKENS, text_teacher
from benchmarks.lab.units import run_units
from mates_hf.evaluation.agreement import rank_correlation, top_precision

DATA = False
DIGITS = 6
RANDOM, SELECTOR, TEXT_MODEL = "random", "selector", "text model"
ARMS = (RANDOM, SELECTOR, TEXT_MODEL)
RATIO, LR, WARM_UP, WINDOW, BATCH_ROWS = 0.2, 2e-3, 20, 10, 8
LEAST = 0.95  # of the selector's gain


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is run."""

    seeds: int = 3  # fresh models of each arm
    marks: tuple[int, ...] = (200, 1_000)  # steps after which a model is judged
    documents: int | None = None  # of the corpus; None is all
    distilled: int = 20_000  # texts
    passages: int = 512  # that models are judged by


QUICK = Sizes(seeds=2, marks=(4, 8), documents=3_000, distilled=1_000, passages=32)


@dataclasses.dataclass(frozen=True)
class Pool:
    """Texts to choose from."""

    tokens: npt.NDArray[np.uint16]  # of all N texts, one after the other, each with the token that ends it
    borders: npt.NDArray[np.int64]  # (N + 1,) where each begins
    best: dict[str, npt.NDArray[np.bool_]]  # (N,) True for the best fifth, by arm

    def blocks(self, arm: str, seed: int, num: int) -> npt.NDArray[np.int64]:
        """(`num`, ROW_TOKENS) the first rows of an arm's texts, in the seed's order of all."""
        order = np.random.default_rng(seed).permutation(len(self.borders) - 1)
        if arm != RANDOM:
            order = order[self.best[arm][order]]
        ends = np.cumsum(np.diff(self.borders)[order])
        enough = int(np.searchsorted(ends, num * ROW_TOKENS)) + 1
        if enough > len(order):
            raise SystemExit(f"`{arm}` has {int(ends[-1])} tokens, and {num * ROW_TOKENS} are to be trained on.")
        flat = np.concatenate([self.tokens[self.borders[i] : self.borders[i + 1]] for i in order[:enough]])
        return flat[: num * ROW_TOKENS].astype(np.int64).reshape(num, ROW_TOKENS)


def make_pool(work: Path, data: Path, corpus: Path, sizes: Sizes, quick: bool) -> dict[str, Any]:
    """Fit, distil and choose; what came of it, kept under `work` beside the pool."""
    if (work / "pool.json").exists():
        return dict(json.loads((work / "pool.json").read_text(encoding="utf-8")))
    from datasets import Dataset

    from mates_hf.data.overlap import find_overlap
    from mates_hf.prediction.text_model import TextInfluenceModel

    texts = [document["text"][:CHARACTERS] for document in read_documents(corpus, sizes.documents)]
    teacher = text_teacher(texts, data, quick)
    first, second = lambada(data / "eval" / "lambada")
    shared = find_overlap(texts, [one["text"] for one in (*first[:NUM_REFERENCE], *second[: sizes.passages])])
    free = np.setdiff1d(np.arange(len(texts)), shared)
    free = free[np.random.default_rng(1).permutation(len(free))]
    values = teacher.score(Dataset.from_dict({"text": [texts[i] for i in free]})).influence
    num = sizes.distilled
    say(f"Distilling from {num:,} texts, choosing from {len(free) - num:,}")
    model = TextInfluenceModel.distil(values[:num], [texts[i] for i in free[:num]])
    pool = [texts[i] for i in free[num:]]
    ranked = {SELECTOR: values[num:], TEXT_MODEL: model.predict_texts(pool)}
    best = {arm: best_fifth(scores) for arm, scores in ranked.items()}
    tokenizer = teacher.tokenizer
    end = tokenizer.convert_tokens_to_ids(END)
    ids = [np.array([*row, end], np.uint16) for row in tokenizer(pool, add_special_tokens=False)["input_ids"]]
    borders = np.concatenate([[0], np.cumsum([len(row) for row in ids])])
    np.savez(work / "pool.npz", tokens=np.concatenate(ids), borders=borders, **best)
    tokenizer.save_pretrained(work / "tokenizer")
    found = {
        "texts": len(texts), "dropped": len(shared), "distilled_from": num, "pool": len(pool),
        "kept": int(best[SELECTOR].sum()), "units": model.units,
        "source_spearman": teacher.influence_model.report.spearman,
        "spearman": rank_correlation(ranked[TEXT_MODEL], ranked[SELECTOR]),
        "best_fifth": top_precision(ranked[TEXT_MODEL], ranked[SELECTOR]),
    }  # fmt: skip
    (work / "pool.json").write_text(json.dumps(found), encoding="utf-8")
    return found


def best_fifth(scores: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """(N,) True for the highest."""
    best = np.zeros(len(scores), bool)
    best[np.argsort(-scores, kind="stable")[: int(RATIO * len(scores))]] = True
    return best


def train(work: Path, data: Path, sizes: Sizes, arm: str, seed: int) -> dict[str, Any]:
    """Train one fresh model on what an arm has; the seed decides weights and order. Losses at the marks."""
    from transformers import AutoTokenizer

    from benchmarks.lab.models import build_model, build_optimizer, task_losses, train_steps
    from mates_hf.engine.averaging import WeightAverage

    stored = np.load(work / "pool.npz")
    pool = Pool(stored["tokens"], stored["borders"], {name: stored[name] for name in (SELECTOR, TEXT_MODEL)})
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    passages = lambada(data / "eval" / "lambada")[1][: sizes.passages]
    tasks = as_tasks(passages, tokenizer, "development")
    model = build_model(len(tokenizer), seed=seed).train()
    average, found = WeightAverage(model), []

    def on_step(step: int) -> None:
        nonlocal average
        mark = min(mark for mark in sizes.marks if mark >= step)
        if step > mark - WINDOW:
            average.update()
        if step == mark:
            with average.swapped_in():
                model.eval()
                found.append({"step": step, **task_losses(model, tasks)})
                model.train()
            average = WeightAverage(model)

    rows = as_rows(pool.blocks(arm, seed, sizes.marks[-1] * BATCH_ROWS), ROW_TOKENS)
    train_steps(
        model, build_optimizer(model, lr=LR), rows, np.arange(len(rows)), batch_rows=BATCH_ROWS, warm_up=WARM_UP,
        on_step=on_step,
    )  # fmt: skip
    return {"arm": arm, "seed": seed, "losses": found}


def run(bench: Bench) -> dict[str, Any]:
    """Choose once, train what is missing; the JSON document of what is done so far."""
    sizes, work, data = QUICK if bench.quick else Sizes(), bench.work, bench.data
    work.mkdir(parents=True, exist_ok=True)
    large = data / "large" / "corpus.jsonl.gz"
    corpus = large if large.exists() else data / "corpus.jsonl.gz"
    chosen = make_pool(work, data, corpus, sizes, bench.quick)
    units = {f"{arm}-{seed}": (work, data, sizes, arm, seed) for seed in range(sizes.seeds) for arm in ARMS}
    found = run_units(bench, train, units)
    return {
        "settings": {
            "quick": bench.quick, "ratio": RATIO, "learning_rate": LR, "batch_rows": BATCH_ROWS,
            "row_tokens": ROW_TOKENS, "warm_up": WARM_UP, "window": WINDOW, **dataclasses.asdict(sizes),
            "corpus": "large" if large.exists() else "small" if bench.options.data else "built-in",
            **versions("torch", "transformers"),
        },
        "chosen": chosen,
        "units": [found[name] for name in units if name in found],
    }  # fmt: skip


# --- the page ---


def page(document: dict[str, Any]) -> str:
    """The Markdown page."""
    settings, chosen = document["settings"], document["chosen"]
    losses = {
        (unit["arm"], unit["seed"], entry["step"]): entry["all"]
        for unit in document["units"]
        for entry in unit["losses"]
    }
    first = settings["marks"][0]
    seeds = [seed for seed in range(settings["seeds"]) if all((arm, seed, first) in losses for arm in ARMS)]
    rows, shares = [], []
    for mark in settings["marks"]:
        kept = []
        for seed in seeds:
            random, teacher, text = (losses[arm, seed, mark] for arm in ARMS)
            kept.append((random - text) / (random - teacher))
            figures = [random, teacher, text, random - teacher, random - text]
            rows.append([f"{mark:,}", seed, *(f"{figure:.4f}" for figure in figures), f"{kept[-1]:.3f}"])
        if kept:
            mean, half = mean_interval(kept)
            shares.append(
                [f"{mark:,}", len(kept), f"{mean:.3f} ({mean - half:.3f} to {mean + half:.3f})", f"≥ {LEAST}"]
            )
    return markdown(
        title("text_model_gain", settings["quick"]),
        f"{chosen['texts']:,} texts of the {settings['corpus']} corpus, without {chosen['dropped']:,} that share a "
        f"13-gram with a passage. The selector has a held-out Spearman of {chosen['source_spearman']:.3f}. The text "
        f"model is distilled from {chosen['distilled_from']:,} texts and counts {chosen['units']}. Of the other "
        f"{chosen['pool']:,} each takes its best {chosen['kept']:,}. There the two agree with a Spearman of "
        f"{chosen['spearman']:.3f}, and {chosen['best_fifth']:.1%} of the selector's are among the text model's.",
        f"Fresh models of a million parameters, AdamW, learning rate {settings['learning_rate']:g} (constant after "
        f"{settings['warm_up']} steps), {settings['batch_rows']} rows of {settings['row_tokens']} tokens a step, no "
        f"text twice. Loss on {settings['passages']} passages like the reference, nats/token, at the mean of the last "
        f"{settings['window']} steps' weights. Python {settings['python']}, torch {settings['torch']}, transformers "
        f"{settings['transformers']}.",
        table(
            ["steps", "seed", *ARMS, "gain of the selector", "gain of the text model", "share kept"],
            rows,
        ),
        table(["steps", "seeds", "share of the gain that is kept (95 % interval over seeds)", "target"], shares),
    )
