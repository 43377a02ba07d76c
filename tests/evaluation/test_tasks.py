"""The task files: they load offline, ask what lm-eval's own tasks ask, average nine tasks, and name what is wrong."""

from __future__ import annotations

import gzip
import http.server
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import datasets
import lm_eval.tasks
import numpy as np
import pytest
from lm_eval.tasks import TaskManager
from lm_eval.tasks.logiqa import utils_logiqa

from mates_hf.data.harness import TASKS_DIR, task_manager
from mates_hf.data.reference import ReferenceTask
from mates_hf.errors import EvaluationError
from mates_hf.evaluation import Evaluator, benchmarks, item_metrics
from mates_hf.evaluation.local_files import load
from tests.evaluation.kit import (
    NINE,
    local_rows,
    logiqa_text,
    make_model,
    make_tokenizer,
    write_hub_cache,
    write_local,
    write_rows,
)

ROOT = Path(__file__).resolve().parents[2]
ROUNDING = 1e-12  # of a mean of nine numbers, summed in another order
OWN_ACCURACY = ("boolq", "winogrande")  # those the paper's harness does not divide by length
# Without these the harness's tasks would be looked for among several thousand files.
HARNESS_FOLDERS = ("sciq", "arc", "openbookqa", "super_glue/boolq", "hellaswag", "piqa", "winogrande", "lambada")


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    return write_hub_cache(tmp_path_factory.mktemp("hub"))


@pytest.fixture
def from_hub(hub, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", hub)
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", hub / "downloads")


@pytest.mark.slow
def test_the_command_runs_offline_and_the_group_is_the_mean_of_nine(tmp_path, hub) -> None:
    make_tokenizer().save_pretrained(tmp_path / "model")
    make_model(double=False).save_pretrained(tmp_path / "model")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(hub), "OMP_NUM_THREADS": "1"}
    environment["HF_HOME"] = str(tmp_path / "home")
    folder = subprocess.run(
        [sys.executable, "-m", "mates_hf.evaluation.tasks"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    command = [
        *(sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={tmp_path / 'model'}"),
        *("--include_path", folder, "--tasks", "mates_zero_shot", "--limit", "4", "--device", "cpu"),
        *("--output_path", str(tmp_path / "out")),
    ]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())
    results, group = found["results"], found["results"]["mates_zero_shot"]
    for metric in ("accuracy", "choice_prob", "nll_per_byte"):
        each = [results[f"mates_{name}"][f"{metric},none"] for name in NINE]
        assert math.isclose(group[f"{metric},none"], statistics.fmean(each), rel_tol=ROUNDING)
        assert len(set(each)) > 1
    for name in NINE:
        own = "acc" if name in OWN_ACCURACY else "acc_norm"
        assert results[f"mates_{name}"]["accuracy,none"] == results[f"mates_{name}"][f"{own},none"]
        assert found["versions"][f"mates_{name}"] == 1.0
        assert found["n-samples"][f"mates_{name}"]["effective"] == 4
    assert float(found["versions"]["mates_zero_shot"]) == 1.0


@pytest.mark.usefixtures("from_hub")
@pytest.mark.parametrize("name", [name for name in NINE if name != "logiqa"])
def test_a_task_asks_and_judges_as_the_harness_does(name) -> None:
    paths = [str(Path(lm_eval.tasks.__file__).parent / folder) for folder in HARNESS_FOLDERS]
    theirs = TaskManager(include_defaults=False, include_path=paths).load(name)["tasks"][name]
    ours = task_manager([f"mates_{name}"], None).load(f"mates_{name}")["tasks"][f"mates_{name}"]
    for task in (ours, theirs):
        task.build_all_requests(limit=None, rank=0, world_size=1)
    assert [request.args for request in ours.instances] == [request.args for request in theirs.instances]
    assert len(ours.eval_docs) == len(theirs.eval_docs) == 6
    rng = np.random.default_rng(0)
    for our_doc, their_doc in zip(ours.eval_docs, theirs.eval_docs, strict=True):
        results = [(float(value), False) for value in rng.normal(-20, 8, len(our_doc["choices"]))]
        theirs_found, found = theirs.process_results(their_doc, results), ours.process_results(our_doc, results)
        assert {key: found[key] for key in theirs_found} == theirs_found
        assert found["accuracy"] == theirs_found.get("acc_norm", theirs_found["acc"])


@pytest.mark.usefixtures("from_hub")
def test_lambada_asks_as_the_harness_does() -> None:
    path = str(Path(lm_eval.tasks.__file__).parent / "lambada")
    theirs = TaskManager(include_defaults=False, include_path=path).load("lambada_openai")["tasks"]["lambada_openai"]
    names = ["mates_lambada_last_word", "mates_lambada_all_tokens"]
    tasks = task_manager(names, None).load(names)["tasks"]
    for task in (theirs, *tasks.values()):
        task.build_all_requests(limit=None, rank=0, world_size=1)
    last_word, all_tokens = (tasks[name].instances for name in names)
    assert [request.args for request in last_word] == [request.args for request in theirs.instances]
    assert [request.args for request in all_tokens] == [("".join(request.args),) for request in last_word]


@pytest.mark.usefixtures("from_hub")
def test_logiqa_is_read_from_its_authors_files_as_the_harness_showed_it() -> None:
    task = task_manager(["mates_logiqa"], None).load("mates_logiqa")["tasks"]["mates_logiqa"]
    lines = logiqa_text(6).split("\n")
    for i, doc in enumerate(task.eval_docs):
        block = lines[8 * i : 8 * i + 8]
        spaced = [line.replace(".", ". ").strip() for line in block]
        options = [line[2:].replace(".", ". ").strip() for line in block[4:]]
        theirs = {"context": spaced[2], "question": spaced[3], "options": options, "label": block[1]}
        assert doc["prompt"] == utils_logiqa.doc_to_text(theirs)
        assert doc["choices"] == options
        assert doc["label"] == utils_logiqa.doc_to_target(theirs)
    assert len(task.eval_docs) == 6


def test_logiqa_is_downloaded_once(tmp_path, monkeypatch) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "Test.txt").write_text(logiqa_text(3))
    served: list[str] = []

    class Site(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, directory=str(tmp_path / "site"), **kwargs)

        def log_message(self, *args: Any) -> None:
            served.append(self.command)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    code = (
        "import sys, datasets; from mates_hf.evaluation import benchmarks; benchmarks.LOGIQA_FILES = sys.argv[1]; "
        "print(len(benchmarks.load_logiqa()['test']), benchmarks.load_logiqa()['test'][1]['label'])"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", code, address],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout.split() == ["3", "1"], done.stderr[-2000:]
        requests = list(served)
        server.shutdown()
        server.server_close()
    assert "GET" in requests


def test_item_metrics_are_what_they_say() -> None:
    document = {"choices": ["ab", "abcdefgh", "ü"], "label": 1}
    log_likelihoods = [-2.0, -4.0, -3.0]
    found = item_metrics.of_choices(document, [(value, False) for value in log_likelihoods])
    weights = np.exp(log_likelihoods)
    assert found["acc"] == 0.0  # -2 is the highest
    assert found["acc_norm"] == found["accuracy"] == 1.0  # -0.5 a character against -1 and -3
    assert math.isclose(found["choice_prob"], weights[1] / weights.sum())
    assert math.isclose(found["nll_per_byte"], 4.0 / 8)
    umlaut = item_metrics.of_plain_choices({**document, "label": 2}, [(v, False) for v in log_likelihoods])
    assert math.isclose(umlaut["nll_per_byte"], 3.0 / 2)  # two bytes
    filled = item_metrics.of_plain_choices(
        {"choices": ["a x", "b x"], "continuation": "yes", "label": 0}, [(-6, 0)] * 2
    )
    assert filled["nll_per_byte"] == 2.0
    assert filled["choice_prob"] == 0.5
    assert filled["acc"] == 1.0
    word = item_metrics.of_last_word({"target": " four"}, [(-8.0, True)])
    assert word == {"acc": 1.0, "accuracy": 1.0, "perplexity": -8.0, "nll_per_byte": 2.0}


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_likelihood_that_is_no_number_is_an_error(value) -> None:
    with pytest.raises(EvaluationError, match="must be finite"):
        item_metrics.of_choices({"choices": ["a", "b"], "label": 0}, [(value, False), (-1.0, False)])


def test_a_local_folder_gives_each_split_its_role(tmp_path) -> None:
    for split, num in (("train", 3), ("validation", 4), ("test_a", 5)):
        write_rows(tmp_path / "sciq" / f"{split}.jsonl", local_rows("sciq", num))
    splits = load(benchmark="sciq", data_dir=tmp_path)
    assert {role: len(splits[role]) for role in splits} == {"test": 5, "train": 3, "validation": 4}
    chosen = load(benchmark="sciq", data_dir=tmp_path, split="validation", version=1.0, pretrained="ignored")
    assert {role: len(chosen[role]) for role in chosen} == {"test": 4, "train": 3}


def test_a_split_that_is_not_asked_for_is_not_read(tmp_path) -> None:
    write_local(tmp_path)
    (tmp_path / "sciq" / "train.jsonl").write_text('{"question": "only half a row"}\n', encoding="utf-8")
    assert {"train", "test"} <= set(load(benchmark="sciq", data_dir=tmp_path))
    metadata = {"data_dir": str(tmp_path)}
    task = ReferenceTask.from_lm_eval("mates_sciq_local", make_tokenizer(), metadata=metadata, split="test")
    assert len(task) == 6
    with pytest.raises(ValueError, match=r"train.jsonl, line 1 must have"):
        ReferenceTask.from_lm_eval("mates_sciq_local", make_tokenizer(), metadata=metadata, split="train")


def test_gzipped_files_are_read(tmp_path) -> None:
    (tmp_path / "piqa").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in local_rows("piqa"))
    (tmp_path / "piqa" / "validation_a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert len(load(benchmark="piqa", data_dir=tmp_path)["test"]) == 6


def test_what_is_missing_in_a_folder_is_named(tmp_path) -> None:
    write_local(tmp_path)
    with pytest.raises(ValueError, match="data_dir"):
        load(benchmark="sciq")
    with pytest.raises(FileNotFoundError, match=r"Benchmarks found in .*: none"):
        load(benchmark="sciq", data_dir=tmp_path / "nowhere")
    (tmp_path / "piqa" / "validation.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"piqa/<split>.jsonl.*'arc_challenge', 'arc_easy'"):
        load(benchmark="piqa", data_dir=tmp_path)
    with pytest.raises(ValueError, match=r"`split` 'test'; it has \['validation'\]"):
        load(benchmark="sciq", data_dir=tmp_path, split="test")
    (tmp_path / "sciq" / "validation.jsonl").rename(tmp_path / "sciq" / "train.jsonl")
    with pytest.raises(ValueError, match=r"a split to evaluate on .*it has \['train'\]"):
        load(benchmark="sciq", data_dir=tmp_path)


GOOD = {"context": "c", "question": "q _", "choices": ["a", "b"], "label": 1}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{nonsense", "line 2 must be a JSON object"),
        ("[1]", "line 2 must have"),
        (
            json.dumps({k: v for k, v in GOOD.items() if k != "choices"}),
            r"must have \['choices'\].*it has \['context'",
        ),
        (json.dumps({**GOOD, "choices": ["a"]}), "`choices` must be a list of two or more texts, got"),
        (json.dumps({**GOOD, "choices": ["a", ""]}), "`choices` must be a list of two or more texts, got"),
        (json.dumps({**GOOD, "label": 2}), "`label` must be the position of the right choice, 0 to 1, got 2"),
        (json.dumps({**GOOD, "label": "1"}), "`label` must be"),
        (json.dumps({**GOOD, "label": True}), "`label` must be"),
        (json.dumps({**GOOD, "question": None}), "`question` must be a text, got None"),
        (json.dumps({**GOOD, "choices": []}), "`choices` must be a list of two or more texts, got"),
        (json.dumps({**GOOD, "choices": ["a", "  "]}), "`choices` must be a list of two or more texts, got"),
        (json.dumps({**GOOD, "choices": ["a", None]}), "`choices` must be a list of two or more texts, got"),
        (json.dumps({**GOOD, "label": -1}), "`label` must be the position of the right choice, 0 to 1, got -1"),
        (json.dumps({**GOOD, "label": 1.0}), "`label` must be"),
        (json.dumps({**GOOD, "label": None}), "`label` must be"),
        (json.dumps({**GOOD, "context": None}), "`context` must be a text, got None"),
        ("", "line 2 must be a JSON object, got a blank line"),
        ("   ", "line 2 must be a JSON object, got a blank line"),
        ("\ufeff" + json.dumps(GOOD), "line 2 must be a JSON object, got a byte order mark"),
        (json.dumps(GOOD)[:-3], "line 2 must be a JSON object"),
        ('{"context": "caf\udce9"}', "line 2 must be text in UTF-8"),
    ],
)
def test_a_wrong_row_is_named_with_its_line(tmp_path, line, message) -> None:
    (tmp_path / "logiqa").mkdir()
    text = f"{json.dumps(GOOD)}\n{line}\n"
    (tmp_path / "logiqa" / "test.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=message):
        load(benchmark="logiqa", data_dir=tmp_path)["test"]
    (tmp_path / "logiqa" / "test.jsonl").write_text("")
    with pytest.raises(ValueError, match="at least one row"):
        load(benchmark="logiqa", data_dir=tmp_path)["test"]


@pytest.mark.parametrize(
    ("benchmark", "change", "message"),
    [
        ("winogrande", {"question": "no blank"}, "`question` must be a text with one blank `_`, and text after it"),
        ("winogrande", {"question": "a _ or a _ here"}, "`question` must be a text with one blank"),
        ("winogrande", {"question": "it was the _  "}, "`question` must be a text with one blank"),
        ("lambada", {"target": " "}, "`target` must be a text, got ' '"),
        ("lambada", {"target": None}, "`target` must be a text, got None"),
    ],
)
def test_a_row_that_its_benchmark_cannot_score_is_named(tmp_path, benchmark, change, message) -> None:
    good = local_rows(benchmark, 3)
    write_rows(tmp_path / benchmark / "test.jsonl", [*good, {**good[0], **change}])
    with pytest.raises(ValueError, match=rf"test\.jsonl, line 4: {message}"):
        load(benchmark=benchmark, data_dir=tmp_path)["test"]
    write_rows(tmp_path / benchmark / "test.jsonl", good)
    assert len(load(benchmark=benchmark, data_dir=tmp_path)["test"]) == 3


def test_a_damaged_gzip_file_is_named(tmp_path) -> None:
    (tmp_path / "piqa").mkdir()
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in local_rows("piqa")).encode())
    for damaged in (b"no gzip", whole[:-20], whole[:40] + b"xxxx" + whole[44:]):
        (tmp_path / "piqa" / "test.jsonl.gz").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"test\.jsonl\.gz must be a whole gzip file"):
            load(benchmark="piqa", data_dir=tmp_path)["test"]


def test_a_folder_and_a_task_file_in_the_home_folder_are_found(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_local(tmp_path / "eval", "train", 3)
    write_local(tmp_path / "eval", "validation", 3)
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\ninclude: {TASKS_DIR / '_choices.yaml'}\n"
        "custom_dataset: !function mates_hf.evaluation.local_files.load\n"
        "dataset_kwargs: {benchmark: piqa}\ntraining_split: train\nvalidation_split: validation\ntest_split: test\n"
    )
    metadata = {"data_dir": "~/eval"}
    tasks = ["mates_piqa_local", "~/mine.yaml", Path("~/mine.yaml")]
    for task in tasks:
        assert len(ReferenceTask.from_lm_eval(task, make_tokenizer(), metadata=metadata)) == 3
        found = Evaluator(task, make_tokenizer(), metadata=metadata).loaded["tasks"]
        assert [len(task.eval_docs) for task in found.values()] == [3]


def test_every_local_task_has_its_hub_twin() -> None:
    manager = task_manager(["mates_zero_shot"], None)
    hub_tasks = {name for name in manager.all_tasks if not name.endswith("_local")}
    assert {f"{name}_local" for name in hub_tasks} == set(manager.all_tasks) - hub_tasks
    assert set(benchmarks.BENCHMARKS) == {*NINE, "lambada"}
    assert sorted(path.stem for path in (TASKS_DIR / "hub").iterdir()) == sorted(
        path.stem for path in (TASKS_DIR / "local").iterdir()
    )


def test_a_local_task_is_a_reference_too(tmp_path, caplog) -> None:
    write_local(tmp_path, "train", 5)
    write_local(tmp_path, "validation", 3)
    metadata = {"data_dir": str(tmp_path)}
    with caplog.at_level(logging.WARNING, "mates_hf"):
        task = ReferenceTask.from_lm_eval("mates_sciq_local", make_tokenizer(), metadata=metadata)
    assert (len(task), task.description["split"]) == (5, "train")
    assert not [record for record in caplog.records if record.name.startswith("mates_hf")]
    with pytest.raises(ValueError, match=r"\['train', 'test'\]\), got 'validation'"):
        ReferenceTask.from_lm_eval("mates_sciq_local", make_tokenizer(), metadata=metadata, split="validation")
    row = local_rows("lambada", 5)[4]
    words = ReferenceTask.from_lm_eval(
        "mates_lambada_last_word_local", make_tokenizer(), metadata=metadata, split="train", loss_on="completion"
    )
    ids, labels = words.rows.row(4)
    assert make_tokenizer().decode(ids) == f"{row['context']} {row['target']}"
    assert make_tokenizer().decode(labels[labels >= 0]) == f" {row['target']}"
