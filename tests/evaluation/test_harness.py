"""Live evaluation gives lm-eval's own numbers, whatever a task does, and draws what lm-eval draws."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import numpy as np
import pytest
import torch
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import processors

from mates_hf.data.reference import ReferenceTask
from mates_hf.data.texts import texts_of
from mates_hf.evaluation import Evaluator, check_contamination
from mates_hf.evaluation.evaluator import flat_metrics
from mates_hf.evaluation.live import longest_input
from tests.evaluation.kit import END, make_model, make_tokenizer, text, write_rows

SAME = 1e-9  # of float64 log-likelihoods, summed in another order
BEGIN = 257

UTILS = """
import random
import numpy as np
import torch
from lm_eval.api.metrics import mean
from lm_eval.api.task import MultipleChoiceTask

def choices(doc):
    return list(doc["c"])

def drawn_choices(doc):
    return random.sample(doc["c"], 3)

def drawn_text(doc):
    return f"{random.random():.3f} {np.random.random():.3f} {torch.rand(1).item():.3f} {doc['q']}"

def shuffled(doc):
    choices, right = list(doc["c"]), doc["c"][doc["a"]]
    random.shuffle(choices)
    return {"c": choices, "a": choices.index(right)}

def process(docs):
    return docs.map(shuffled)

def process_uncached(docs):
    return docs.map(lambda doc: shuffled(doc), load_from_cache_file=False)  # another function: another cache file

def process_by_numpy(docs):
    return docs.select(np.random.permutation(len(docs)))

def process_by_torch(docs):
    return docs.select(torch.randperm(len(docs)).tolist())

def judged(doc, results):
    return {"acc": random.random(), "best": np.float32(max(value for value, _ in results))}

def doubled(items):
    return np.float32(2 * sum(items))

class OwnTask(MultipleChoiceTask):
    VERSION = 0

    def __init__(self):
        super().__init__()
        self.docs = [{"q": f"is {i}?", "choices": random.sample(["a b", "cd", "e"], 3), "gold": 1} for i in range(5)]

    def download(self, *args, **kwargs):
        self.dataset = None

    def has_training_docs(self):
        return False

    def has_validation_docs(self):
        return False

    def has_test_docs(self):
        return True

    def test_docs(self):
        return self.docs

    def doc_to_text(self, doc):
        return doc["q"]

    def construct_requests(self, doc, ctx, apply_chat_template=False, chat_template=None, **kwargs):
        return super().construct_requests(doc, ctx, **kwargs)
"""


class Function(str):
    """A function that a YAML file names."""


yaml.SafeDumper.add_representer(Function, lambda dumper, value: dumper.represent_scalar("!function", str(value)))


def metrics(*names: str) -> list[dict[str, str]]:
    return [{"metric": name} for name in names]


CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{q}}",
    "doc_to_choice": "c",
    "doc_to_target": "a",
    "metric_list": metrics("acc", "acc_norm", "acc_bytes", "exact_match", "brier_score", "mcc"),
}
GIVEN = {"doc_to_text": "{{q}}", "doc_to_target": "{{' '+gold}}", "metric_list": metrics("acc", "perplexity")}
TASKS: dict[str, dict[str, Any]] = {
    "plain": CHOICE,
    "few_first": {**CHOICE, "num_fewshot": 3, "fewshot_config": {"sampler": "first_n"}},
    "few_drawn": {**CHOICE, "num_fewshot": 3},
    "few_of_test": {**CHOICE, "num_fewshot": 2, "fewshot_split": "test"},
    "described": {
        **CHOICE,
        "num_fewshot": 2,
        "description": "About {{q}}:\n",
        "fewshot_delimiter": "\n###\n",
        "target_delimiter": " -> ",
    },
    "no_delimiter": {**CHOICE, "target_delimiter": ""},
    "prefixed": {**CHOICE, "num_fewshot": 1, "gen_prefix": "prefix"},
    "choices_by_function": {**CHOICE, "doc_to_choice": Function("utils.choices")},
    "choices_drawn": {**CHOICE, "doc_to_choice": Function("utils.drawn_choices")},
    "text_drawn": {**CHOICE, "doc_to_text": Function("utils.drawn_text")},
    "processed": {**CHOICE, "process_docs": Function("utils.process")},
    "processed_uncached": {**CHOICE, "process_docs": Function("utils.process_uncached")},
    "several_right": {**CHOICE, "doc_to_target": "both", "metric_list": metrics("acc", "acc_norm", "exact_match")},
    "target_as_text": {**CHOICE, "doc_to_target": "gold"},
    "choices_in_contexts": {**CHOICE, "doc_to_text": "a", "doc_to_target": "q"},
    "mutual": {**CHOICE, "metric_list": metrics("acc", "acc_mutual_info")},
    "decontaminated": {**CHOICE, "should_decontaminate": True, "doc_to_decontamination_query": "q"},
    "judged_by_function": {
        **CHOICE,
        "process_results": Function("utils.judged"),
        "metric_list": [
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
            {"metric": "best", "aggregation": Function("utils.doubled"), "higher_is_better": True},
        ],
    },
    "filtered": {
        **CHOICE,
        "filter_list": [{"name": name, "filter": [{"function": "take_first"}]} for name in ("first", "again")],
    },
    "repeated": {**CHOICE, "repeats": 2},
    "given": {**GIVEN, "output_type": "loglikelihood"},
    "given_few": {**GIVEN, "output_type": "loglikelihood", "num_fewshot": 2},
    "no_context": {**GIVEN, "output_type": "loglikelihood", "doc_to_text": "", "doc_to_target": "gold"},
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "long",
        "metric_list": metrics("word_perplexity", "byte_perplexity", "bits_per_byte"),
    },
}
GROUP = {
    "group": "weighted",
    "task": ["plain", "few_drawn", "given"],
    "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}],
}


def rows(num: int, seed: int) -> list[dict[str, Any]]:
    found = []
    for i in range(num):
        choices = [text(10 * i + j + seed, 1 + (i + j) % 3) for j in range(3)]
        label = (i * 2) % 3
        found.append(
            {
                "q": f"{text(i + seed, 6)}?",
                "c": choices,
                "a": label,
                "gold": choices[label],
                "both": [0, i % 3],
                "long": text(i + seed, 40),
                "prefix": "So",
            }
        )
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """All tasks as YAML files over two splits, with functions of their own."""
    found: Path = tmp_path_factory.mktemp("tasks")
    write_rows(found / "train.jsonl", rows(5, 50))
    write_rows(found / "test.jsonl", rows(6, 0))
    (found / "utils.py").write_text(UTILS)
    (found / "own_task.yaml").write_text("task: own_task\nclass: !function utils.OwnTask\n")
    files = {split: str(found / f"{split}.jsonl") for split in ("train", "test")}
    data = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files, "cache_dir": str(found / "cache")},
        "training_split": "train",
        "test_split": "test",
    }
    for name, config in TASKS.items():
        (found / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, **config}, sort_keys=False))
    # What `datasets` has cached is not drawn again, so that lm-eval itself finds other numbers the first time.
    _ = Evaluator(str(found / "processed.yaml"), make_tokenizer()).loaded
    return found


@pytest.fixture(autouse=True)
def streams_are_left_as_found() -> Iterator[None]:
    """In every test here: the caller's random streams are where they were."""
    random.seed(11)
    np.random.seed(12)  # noqa: NPY002
    torch.manual_seed(13)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    yield
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


def by_the_harness(model: Any, tokenizer: Any, specs: list[Any], **arguments: Any) -> Any:
    """What `lm_eval.simple_evaluate` finds; one row a batch, because its cache of logits mixes equal windows up."""
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    manager = TaskManager(include_defaults=False)
    found = lm_eval.simple_evaluate(lm, tasks=specs, bootstrap_iters=0, task_manager=manager, **arguments)
    random.setstate(state[0])
    np.random.set_state(state[1])  # noqa: NPY002
    torch.set_rng_state(state[2])
    return found


def check_equal(live: dict[str, float], theirs: Any) -> None:
    wanted = flat_metrics(theirs["results"])
    numbers = [key for found in theirs["results"].values() for key in found if "," in key and "_stderr," not in key]
    assert len(wanted) == len(numbers)  # no metric is lost, whatever its type
    assert live == pytest.approx(wanted, rel=SAME)


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model(vocab_size=BEGIN + 1).eval()


def beginning_tokenizer() -> Any:
    tokenizer = make_tokenizer(bos_token="<begin>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<begin> $A", pair="<begin> $A $B", special_tokens=[("<begin>", BEGIN)]
    )
    return tokenizer


@pytest.mark.quick("beginning*")
@pytest.mark.parametrize(("make", "limit"), [(make_tokenizer, None), (beginning_tokenizer, 3)])
def test_every_kind_of_task_gives_the_harness_numbers(folder, model, make, limit) -> None:
    specs: list[Any] = [str(folder / f"{name}.yaml") for name in [*TASKS, "own_task"]]
    theirs = by_the_harness(model, make(), specs, limit=limit)
    evaluator = Evaluator(specs, make(), limit=limit)
    evaluator.prepare(model)
    found = evaluator.run(model)
    check_equal(found, theirs)
    assert evaluator.run(model) == found
    for name, task in evaluator.loaded["tasks"].items():
        samples = {sample["doc_id"]: sample["arguments"] for sample in theirs["samples"][name]}  # one of each filter
        assert [request.args for request in task.instances] == [tuple(a) for s in samples.values() for a in s], name


def test_a_group_weighs_its_tasks_as_the_harness_does(folder, model) -> None:
    def load() -> Any:
        (folder / "weighted.yaml").write_text(yaml.safe_dump(GROUP))
        return TaskManager(include_defaults=False, include_path=str(folder)).load("weighted")["groups"]["weighted"]

    state = random.getstate()
    group = load()  # lm-eval draws a name for a task whenever it is asked for its own
    random.setstate(state)
    live = Evaluator([group], make_tokenizer(), limit=5).run(model)
    assert not any(hasattr(task, "_instances") for task in group.get_all_tasks())  # the caller's is left as found
    check_equal(live, by_the_harness(model, make_tokenizer(), [load()], limit=5))
    random.setstate(state)
    assert "weighted/acc" in live


@pytest.mark.parametrize("positions", [64, 2048])
def test_texts_are_cut_where_the_harness_cuts_them(folder, positions) -> None:
    """The model's config says how long an input may be; a tokenizer that says less is not asked."""
    small = make_model(max_position_embeddings=positions).eval()
    tokenizer = make_tokenizer(model_max_length=32)
    specs = [str(folder / f"{name}.yaml") for name in ("rolling", "few_first")]
    live = Evaluator(specs, tokenizer, truncate=True).run(small)
    check_equal(live, by_the_harness(small, tokenizer, specs))


def test_the_longest_input_is_the_harness_s() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    with torch.random.fork_rng():
        mamba = AutoModelForCausalLM.from_config(AutoConfig.for_model("mamba", vocab_size=END + 1, **sizes))
    for limits in ({}, {"model_max_length": 100}, {"model_max_length": 5_000}):
        tokenizer = make_tokenizer(**limits)
        assert longest_input(mamba, tokenizer) == HFLM(pretrained=mamba, tokenizer=tokenizer).max_length
    mamba.config.max_seq_len = 64  # MPT's name for it, which lm-eval does not know, and the model cannot read more
    assert longest_input(mamba, make_tokenizer()) == 64


DRAWN = ("processed", "processed_uncached", "text_drawn", "choices_drawn", "by_numpy", "by_torch")


@pytest.fixture(scope="module")
def drawn_folder(folder) -> Path:
    for name in ("by_numpy", "by_torch"):
        config = (folder / "plain.yaml").read_text().replace("task: plain", f"task: {name}")
        (folder / f"{name}.yaml").write_text(f"{config}process_docs: !function utils.process_{name}\n")
    return folder


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("caching", [True, False])
def test_a_reference_of_a_task_that_draws_is_one_reference(drawn_folder, name, caching, request) -> None:
    spec = str(drawn_folder / f"{name}.yaml")
    if not caching:
        datasets.disable_caching()
        request.addfinalizer(datasets.enable_caching)
    digests = set()
    for seed in (0, 1, 42):
        state = random.getstate()
        random.seed(seed)
        digests.add(ReferenceTask.from_lm_eval(spec, make_tokenizer()).digest())
        random.setstate(state)
    assert len(digests) == 1


def test_a_reference_has_the_documents_that_the_harness_asks_about(drawn_folder, model) -> None:
    for name in ("processed_uncached", "text_drawn", "by_torch"):
        spec = str(drawn_folder / f"{name}.yaml")
        task = ReferenceTask.from_lm_eval(spec, make_tokenizer(), split="test")
        found = [make_tokenizer().decode(task.rows.row(i)[0]) for i in range(len(task))]
        contexts = [
            sample["arguments"][0][0] for sample in by_the_harness(model, make_tokenizer(), [spec])["samples"][name]
        ]
        assert all(passage.startswith(context) for passage, context in zip(found, contexts, strict=True)), name


def test_contamination_reads_a_task_that_draws_as_it_is_evaluated(drawn_folder) -> None:
    evaluator = Evaluator(str(drawn_folder / "text_drawn.yaml"), make_tokenizer())
    task = evaluator.loaded["tasks"]["text_drawn"]
    first = list(texts_of(task, "evaluation"))
    assert list(texts_of(task, "evaluation")) == first
    report = check_contamination(pool=first, evaluation={"text_drawn": task})
    assert report.counts == {"pool/text_drawn": len(first)}
    reference = ReferenceTask.from_lm_eval(task, make_tokenizer(), split="test")
    report = check_contamination(reference=reference, evaluation={"mine": task}, tokenizer=make_tokenizer())
    assert report.also_evaluated == {"mine": True}
    assert report.counts == {"reference/mine": len(first)}


def test_a_task_whose_documents_change_is_named(drawn_folder, caplog) -> None:
    """lm-eval judges the choices of one shuffle by the label of the next, unless `datasets` has the first cached."""
    names = ("processed", "processed_uncached", "plain")
    with caplog.at_level(logging.WARNING, "mates_hf"):
        _ = Evaluator([str(drawn_folder / f"{name}.yaml") for name in names], make_tokenizer()).loaded
    told = [record.getMessage() for record in caplog.records if record.name.startswith("mates_hf")]
    assert len(told) == 1
    assert told[0].startswith("Task `processed_uncached`: ")
    assert "of 6 documents are others each time they are read" in told[0]


def test_a_task_of_the_caller_s_is_left_as_found(folder, model) -> None:
    before = random.getstate()
    task = TaskManager(include_defaults=False).load(str(folder / "few_drawn.yaml"))["tasks"]["few_drawn"]
    random.setstate(before)
    task.set_config("num_fewshot", None)
    state = task.sampler.rnd.getstate()
    Evaluator([task], make_tokenizer()).run(model)
    assert task.get_config("num_fewshot") is None
    assert task.sampler.rnd.getstate() == state
    assert not hasattr(task, "_instances")
