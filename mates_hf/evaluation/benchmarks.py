"""The paper's nine zero-shot benchmarks, and LAMBADA, as documents that lm-eval scores.

Where it is used: under the task files in `tasks/`. A benchmark comes from the Hub (one reader here for each) or from
local files (`local_files`); both become *rows* of `context`, `question`, `choices` and `label`, and one function here
makes each row the *document* that is scored, so that a benchmark has one prompt, wherever its data lie. Prompts and
choices are those of lm-evaluation-harness, so that results can be compared with published ones.

Trade-off: LogiQA's script on the Hub no longer loads, so it is read from the authors' files at a fixed commit.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

Row: TypeAlias = Mapping[str, Any]
Document: TypeAlias = dict[str, Any]

LOGIQA_FILES = "https://raw.githubusercontent.com/lgw863/LogiQA-dataset/ff6c4cbca47627b3ac2da94a29fa28204a167b41"
_LOGIQA_LINES = 8
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Splits(Mapping[str, Any]):
    """Splits of a dataset that are read when they are first asked for.

    Args:
        readers: what reads each split, by its name.
    """

    def __init__(self, readers: Mapping[str, Callable[[], Any]]) -> None:
        self._readers = readers
        self._read: dict[str, Any] = {}

    def __getitem__(self, split: str) -> Any:
        if split not in self._read:
            self._read[split] = self._readers[split]()
        return self._read[split]

    def __contains__(self, split: object) -> bool:
        return split in self._readers  # without reading it, as `Mapping` would

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def sciq(dataset: Any) -> Any:
    """Documents of `allenai/sciq`."""

    def read(raw: Row) -> Row:
        wrong = [raw[f"distractor{i}"] for i in (1, 2, 3)]
        return {
            "context": raw["support"],
            "question": raw["question"],
            "choices": [*wrong, raw["correct_answer"]],
            "label": len(wrong),
        }

    return _map(dataset, "sciq", read)


def arc(dataset: Any) -> Any:
    """Documents of either part of `allenai/ai2_arc`."""

    def read(raw: Row) -> Row:
        label = raw["choices"]["label"].index(raw["answerKey"])
        return {"question": raw["question"], "choices": raw["choices"]["text"], "label": label}

    return _map(dataset, "arc_easy", read)


def load_logiqa(**metadata: Any) -> Splits:
    """LogiQA from its authors' files, downloaded once into the cache of `datasets`; for lm-eval's `custom_dataset`.

    Args:
        **metadata: what lm-eval passes on; not read.

    Returns:
        Its splits, not yet downloaded.
    """

    def read(file: str) -> Any:
        import datasets

        # The commit is in the address, so there is nothing to ask the server about a file that is in the cache.
        manager = datasets.DownloadManager(download_config=datasets.DownloadConfig(use_etag=False))
        lines = Path(manager.download(f"{LOGIQA_FILES}/{file}")).read_text(encoding="utf-8").split("\n")
        return datasets.Dataset.from_list([document("logiqa", row) for row in logiqa_rows(lines)])

    files = {"train": "Train.txt", "validation": "Eval.txt", "test": "Test.txt"}
    return Splits({split: functools.partial(read, file) for split, file in files.items()})


def logiqa_rows(lines: Sequence[str]) -> list[Row]:
    """Rows of the authors' file: eight lines each, which are blank, letter, context, question and four options."""
    return [
        {
            "context": _spaced(lines[start + 2]),
            "question": _spaced(lines[start + 3]),
            "choices": [_spaced(line[2:]) for line in lines[start + 4 : start + _LOGIQA_LINES]],
            "label": "abcd".index(lines[start + 1].strip()),
        }
        for start in range(0, len(lines) - _LOGIQA_LINES + 1, _LOGIQA_LINES)
    ]


def openbookqa(dataset: Any) -> Any:
    """Documents of `allenai/openbookqa`."""

    def read(raw: Row) -> Row:
        label = raw["choices"]["label"].index(raw["answerKey"].strip())
        return {"question": raw["question_stem"], "choices": raw["choices"]["text"], "label": label}

    return _map(dataset, "openbookqa", read)


def boolq(dataset: Any) -> Any:
    """Documents of `boolq` in `aps/super_glue`."""

    def read(raw: Row) -> Row:
        return {
            "context": raw["passage"],
            "question": f"{raw['question']}?",
            "choices": ["no", "yes"],
            "label": raw["label"],
        }

    return _map(dataset, "boolq", read)


def hellaswag(dataset: Any) -> Any:
    """Documents of `Rowan/hellaswag`, without the marks that WikiHow left in it."""

    def read(raw: Row) -> Row:
        question = f"{raw['activity_label']}: {raw['ctx_a']} {raw['ctx_b'].capitalize()}"
        choices = [_without_marks(ending) for ending in raw["endings"]]
        return {"question": _without_marks(question), "choices": choices, "label": int(raw["label"])}

    return _map(dataset, "hellaswag", read)


def piqa(dataset: Any) -> Any:
    """Documents of `baber/piqa`."""

    def read(raw: Row) -> Row:
        return {"question": raw["goal"], "choices": [raw["sol1"], raw["sol2"]], "label": raw["label"]}

    return _map(dataset, "piqa", read)


def winogrande(dataset: Any) -> Any:
    """Documents of `winogrande_xl` in `allenai/winogrande`."""

    def read(raw: Row) -> Row:
        return {
            "question": raw["sentence"],
            "choices": [raw["option1"], raw["option2"]],
            "label": int(raw["answer"]) - 1,
        }

    return _map(dataset, "winogrande", read)


def lambada(dataset: Any) -> Any:
    """Documents of `EleutherAI/lambada_openai`; the target is what follows the last space."""

    def read(raw: Row) -> Row:
        context, _, target = raw["text"].rpartition(" ")
        return {"context": context, "target": target}

    return _map(dataset, "lambada", read)


def document(benchmark: str, row: Row) -> Document:
    """What is scored of a row.

    Args:
        benchmark: a key of `BENCHMARKS`.
        row: `context` (where the benchmark has one), `question`, `choices` and `label`; LAMBADA: `context`, `target`.

    Returns:
        `prompt`, `choices`, `label` (position of the right choice); WinoGrande: `choices` (one context for each),
        `continuation`, `label`; LAMBADA: `prompt`, `target`, `text`.
    """
    return BENCHMARKS[benchmark](row)


def _map(dataset: Any, benchmark: str, read: Callable[[Row], Row]) -> Any:
    """Documents in the place of the Hub's rows."""
    return dataset.map(
        lambda raw: document(benchmark, read(raw)), remove_columns=dataset.column_names, desc=f"Reading {benchmark}"
    )


def _asked(row: Row, prompt: str) -> Document:
    return {"prompt": prompt, "choices": list(row["choices"]), "label": row["label"]}


def _question_answer(row: Row) -> Document:
    return _asked(row, f"Question: {row['question']}\nAnswer:")


def _passage_question_answer(row: Row) -> Document:
    return _asked(row, f"{row['context'].lstrip()}\nQuestion: {row['question']}\nAnswer:")


def _yes_or_no(row: Row) -> Document:
    return _asked(row, f"{row['context']}\nQuestion: {row['question']}\nAnswer:")


def _continued(row: Row) -> Document:
    return _asked(row, row["question"])


def _listed(row: Row) -> Document:
    options = "".join(f"{letter}. {choice}\n" for letter, choice in zip(_LETTERS, row["choices"], strict=False))
    return _asked(row, f"Passage: {row['context']}\nQuestion: {row['question']}\nChoices:\n{options}Answer:")


def _filled_in(row: Row) -> Document:
    """WinoGrande: each choice fills the blank, and what follows the blank is scored after it."""
    before, _, after = row["question"].partition("_")
    return {
        "choices": [before + choice for choice in row["choices"]],
        "continuation": after.strip(),
        "label": row["label"],
    }


def _last_word(row: Row) -> Document:
    context, target = row["context"], row["target"]
    return {"prompt": context, "target": f" {target}", "text": f"{context} {target}"}


def _spaced(text: str) -> str:
    """Text of LogiQA, whose sentences are joined without a space."""
    return text.replace(".", ". ").strip()


def _without_marks(text: str) -> str:
    """Text of HellaSwag without the brackets of WikiHow's headings."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


BENCHMARKS: dict[str, Callable[[Row], Document]] = {
    "sciq": _passage_question_answer,
    "arc_easy": _question_answer,
    "arc_challenge": _question_answer,
    "logiqa": _listed,
    "openbookqa": _continued,
    "boolq": _yes_or_no,
    "hellaswag": _continued,
    "piqa": _question_answer,
    "winogrande": _filled_in,
    "lambada": _last_word,
}


def required_columns(benchmark: str) -> Iterable[str]:
    """Columns that a local row of the benchmark must have."""
    if benchmark == "lambada":
        return ("context", "target")
    reads_context = benchmark in ("sciq", "logiqa", "boolq")
    return ("context", "question", "choices", "label") if reads_context else ("question", "choices", "label")
