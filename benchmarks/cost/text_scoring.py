"""How fast a text influence model reads, and how nearly it ranks as what it was distilled from.

What an n-gram model predicts of texts, tokenising included, is distilled: from few and from many texts. That model is
fitted to labels of a model of a million parameters (`lab/text_teacher.py`). Agreement is on texts no fit has seen,
all together and by group of domains. Speed is bytes of text a second with one thread and with two, arms taking turns:
scoring, fastText's `predict` on the same texts, reading them with pyarrow from a Parquet file without compression (the
page cache holds it), and the tokenizer with the n-gram model.

`--agreement` measures that alone, on a busy machine too. With `--data` the corpus there is read, else the built-in
one. Trade-off: one small model's labels; texts are cut to 1,500 characters.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.lab import rivals
from benchmarks.lab.corpus import read_documents
from benchmarks.lab.harness import Bench, say
from benchmarks.lab.machine import alternate, median_ratio, num_cores, temporary_folder, versions
from benchmarks.lab.tables import markdown, table, title
from benchmarks.lab.text_teacher import CHARACTERS, text_teacher
from mates_hf.evaluation.agreement import rank_correlation, top_precision
from mates_hf.prediction.text_model import TextInfluenceModel
from mates_hf.prediction.threads import at_most_threads
from mates_hf.selection.selector import MatesSelector

DATA = False
# Groups of the large corpus's domains; what is in none is counted with all texts only.
GROUPS = {
    "English prose": ("wikipedia", "fiction_classic", "news", "un_speeches", "blogs", "humanities_textbook"),
    "German": ("german_fiction", "german_law", "german_drama"),
    "Chinese and Japanese": ("chinese_poetry", "japanese_literature"),
    "code and its documentation": ("tech_docs", "cli_help", "standards", "tables_csv"),
}
SCORED, FASTTEXT, READ, TOKENISED = "text model", "fastText, `predict`", "pyarrow, read", "tokenizer and n-gram model"


def agreement(
    values: npt.NDArray[Any], predicted: npt.NDArray[Any], groups: dict[str, npt.NDArray[np.bool_]]
) -> dict[str, Any]:
    """Rank correlation, and share of the best fifth that is found, of all texts and of each group."""
    return {
        name: {
            "texts": int(member.sum()),
            "spearman": rank_correlation(predicted[member], values[member]),
            "best_fifth": top_precision(predicted[member], values[member]),
        }
        for name, member in groups.items()
    }


def timed(
    texts: list[str], model: TextInfluenceModel, selector: MatesSelector, work: Path, quick: bool
) -> dict[str, dict[str, list[float]]]:
    """Seconds of each arm, with one thread and with two."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Dataset

    array = pa.array(texts)
    path = work / "texts.parquet"
    pq.write_table(pa.table({"text": array}), path, compression="none", use_dictionary=False)
    few = Dataset.from_dict({"text": texts[: max(1, len(texts) // 20)]})
    flat = [text.replace("\n", " ") for text in few["text"]]
    found = {}
    for threads in (1, 2):
        arms: dict[str, Callable[[], Any]] = {
            SCORED: lambda: model.predict_texts(array),
            READ: lambda threads=threads: pq.read_table(path, use_threads=threads > 1),  # type: ignore[misc]
        }
        if threads == 1:
            arms[TOKENISED] = lambda: MatesSelector(selector.influence_model, selector.tokenizer).score(few)
            if importlib.util.find_spec("fasttext"):
                classify = rivals.fasttext(flat[: len(flat) // 2], flat[len(flat) // 2 :], 0, epoch=1)
                arms[FASTTEXT] = functools.partial(classify, flat)
        with at_most_threads(threads):
            model.predict_texts(array)
            found[str(threads)] = alternate(arms, 2 if quick else 7)
    return found


def fitted(
    texts: list[str], values: npt.NDArray[Any], domains: npt.NDArray[Any]
) -> tuple[list[dict[str, Any]], TextInfluenceModel]:
    """How models distilled from few and from many texts agree with the values of a fifth kept out; the last model."""
    order = np.random.default_rng(1).permutation(len(texts))
    held, rest = order[: len(texts) // 5], order[len(texts) // 5 :]
    groups = {"all": np.ones(len(held), bool)}
    groups |= {name: np.isin(domains[held], members) for name, members in GROUPS.items()}
    groups = {name: member for name, member in groups.items() if member.sum() > 50}
    fits = []
    for num in dict.fromkeys((min(20_000, len(rest)), len(rest))):
        say(f"Distilling from {num} texts")
        model = TextInfluenceModel.distil(values[rest[:num]], [texts[i] for i in rest[:num]])
        predicted = model.predict_texts([texts[i] for i in held])
        fits.append({
            "texts": num, "units": model.units, "seconds": model.report.seconds, "reported": model.report.spearman,
            "agreement": agreement(values[held], predicted, groups),
        })  # fmt: skip
    return fits, model


def with_fits(bench: Bench, fits: list[dict[str, Any]], load: float) -> dict[str, Any]:
    """The newest document with other fits; its times stay."""
    document = bench.earlier()
    if document is None:
        raise SystemExit(
            "`--agreement` keeps the times of results that are there, and there are none: run it without."
        )
    return {**document, "settings": {**document["settings"], "load_of_fits": load}, "fits": fits}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The part that needs no idle machine."""
    parser.add_argument("--agreement", action="store_true", help="only the fits; times are kept as they are there")


def run(bench: Bench) -> dict[str, Any]:
    """Fit what is distilled, distil it, compare, and take times."""
    from datasets import Dataset

    data = bench.data
    large = data / "large" / "corpus.jsonl.gz"
    documents = read_documents(large if large.exists() else data / "corpus.jsonl.gz", 3_000 if bench.quick else None)
    texts = [document["text"][:CHARACTERS] for document in documents]
    selector = text_teacher(texts, data, bench.quick)
    values = selector.score(Dataset.from_dict({"text": texts})).influence
    load = os.getloadavg()[0]
    fits, model = fitted(texts, values, np.array([document["domain"] for document in documents]))
    if bench.options.agreement:
        return with_fits(bench, fits, load)
    with temporary_folder(bench.work) as work:
        seconds = timed(texts, model, selector, work, bench.quick)
    num_bytes = [len(text.encode()) for text in texts]
    few = max(1, len(texts) // 20)
    return {
        "settings": {
            "quick": bench.quick,
            "corpus": "large" if large.exists() else "small" if bench.options.data else "built-in",
            "texts": len(texts), "bytes": sum(num_bytes), "few_bytes": sum(num_bytes[:few]),
            "source_spearman": selector.influence_model.report.spearman, "cores": num_cores(),
            "load_before": load, "load_of_fits": load,
            **versions("pyarrow", "numba"),
        },
        "fits": fits,
        "seconds": seconds,
    }  # fmt: skip


def page(document: dict[str, Any]) -> str:
    """The Markdown page."""
    settings, fits, seconds = document["settings"], document["fits"], document["seconds"]
    ranked = [
        [f"{fit['texts']:,}", fit["units"], name, f"{found['texts']:,}", f"{found['spearman']:.3f}",
         f"{found['best_fifth']:.3f}"]
        for fit in fits
        for name, found in fit["agreement"].items()
    ]  # fmt: skip
    size = {name: settings["few_bytes"] if name in (FASTTEXT, TOKENISED) else settings["bytes"] for name in
            (SCORED, FASTTEXT, READ, TOKENISED)}  # fmt: skip
    speed = [
        [threads, name, f"{size[name] / 1e6 / float(np.median(times)):,.1f}",
         f"{size[SCORED] / size[name] / median_ratio(arms[SCORED], times):.2f}"]
        for threads, arms in seconds.items()
        for name, times in arms.items()
    ]  # fmt: skip
    return markdown(
        title("text_scoring", settings["quick"]),
        f"{settings['cores']} cores (load before: {settings['load_before']:.1f}), Python {settings['python']}. "
        f"{settings['texts']:,} texts of the {settings['corpus']} corpus, {settings['bytes'] / 1e6:,.0f} MB. The "
        f"n-gram model that is distilled has a held-out Spearman of {settings['source_spearman']:.3f}.",
        "How nearly the text model ranks texts that no fit has seen. Best fifth: share of it that is found.",
        table(["distilled from", "units", "texts of", "held out", "Spearman", "best fifth"], ranked),
        "Distilling took "
        + " and ".join(f"{fit['seconds']:,.0f} s" for fit in fits)
        + f" at a load of {settings['load_of_fits']:.1f}.",
        "Bytes of text a second; the last column is how many times as fast the text model is.",
        table(["threads", "what", "MB a second", "text model is faster by"], speed),
    )
