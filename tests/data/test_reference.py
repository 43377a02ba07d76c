"""The reference task: each way to build one, what its targets decode to, and what is refused."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import datasets
import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from mates_hf.data.reference import ReferenceTask
from mates_hf.data.rows import TokenRows

CORPUS = [
    "the old house stood by the sea and the wind was cold",
    "she said nothing, and he said nothing",
    "Question: what is the colour of the sea?\nAnswer: blue, or grey",
    "the light in the house was out; nobody came to the door",
]
PAIRS = [
    ("the old house stood by the", "sea"),
    ("she said nothing, and", "he said nothing"),
    ("Question: what colour?\nAnswer:\n", "blue, or grey"),
    ("the light in the house was ", "out"),
    ("", "nobody came to the door"),
]


@pytest.fixture(scope="module")
def tokenizer():
    """A byte-level BPE that puts a token before and one behind each text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=380, special_tokens=["<bos>", "<eos>"], initial_alphabet=alphabet)
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 0), ("<eos>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")


class WordTokenizer(PreTrainedTokenizer):
    """A tokenizer without offsets: white space is a token, and `<eos>` ends each text."""

    def __init__(self, **kwargs):
        self.words: dict[str, int] = {"<unk>": 0, "<eos>": 1, " ": 2}
        super().__init__(unk_token="<unk>", eos_token="<eos>", **kwargs)

    @property
    def vocab_size(self):
        return 500

    def get_vocab(self):
        return dict(self.words)

    def _tokenize(self, text, **kwargs):
        return [part for word in text.split(" ") for part in (" ", word) if part][1:]

    def _convert_token_to_id(self, token):
        return self.words.setdefault(token, len(self.words))

    def _convert_id_to_token(self, index):
        return list(self.words)[index]

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [*token_ids_0, 1]

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)


def pairs_dataset(pairs=PAIRS):
    return datasets.Dataset.from_dict({"context": [a for a, _ in pairs], "target": [b for _, b in pairs]})


def from_pairs(tokenizer, pairs=PAIRS, **kwargs):
    return ReferenceTask.from_dataset(
        pairs_dataset(pairs), tokenizer, prompt_column="context", completion_column="target", **kwargs
    )


def target_texts(task, tokenizer):
    out = []
    for i in range(len(task)):
        _, labels = task.rows.row(i)
        out.append(tokenizer.decode(labels[labels != -100].tolist()))
    return out


def as_lists(task):
    return [task.rows.row(i)[0].tolist() for i in range(len(task))]


def test_texts_become_exactly_what_the_tokenizer_gives(tokenizer):
    dataset = datasets.Dataset.from_dict({"text": CORPUS, "other": [0] * 4})
    task = ReferenceTask.from_dataset(dataset, tokenizer, text_column="text")
    assert as_lists(task) == [tokenizer(text)["input_ids"] for text in CORPUS]
    assert task.num_targets == sum(len(tokenizer(text)["input_ids"]) - 1 for text in CORPUS)
    assert task.loss_on == "all"
    assert task.name == "text"
    assert task.description["num_passages"] == 4
    json.dumps(task.description)


def test_all_tokens_of_prompt_and_completion_are_one_text(tokenizer):
    whole = [f"{a}{'' if not a or a[-1].isspace() else ' '}{b}" for a, b in PAIRS]
    task = from_pairs(tokenizer)
    assert as_lists(task) == [tokenizer(text)["input_ids"] for text in whole]
    assert task.num_targets == sum(len(tokenizer(text)["input_ids"]) - 1 for text in whole)


def test_completion_targets_decode_to_the_completion(tokenizer):
    task = from_pairs(tokenizer, loss_on="completion")
    # A token that holds the last white space of the prompt holds some of the completion too.
    assert [text.strip() for text in target_texts(task, tokenizer)] == [b for _, b in PAIRS]
    assert as_lists(task) == as_lists(from_pairs(tokenizer))
    assert 0 < task.num_targets < from_pairs(tokenizer).num_targets


def test_completion_that_brings_its_own_white_space(tokenizer):
    a = from_pairs(tokenizer, [("the old house", " stood"), ("she said", "\nnothing")], loss_on="completion")
    assert target_texts(a, tokenizer) == [" stood", "\nnothing"]


def test_token_over_the_border_is_a_target(tokenizer):
    whole = "the house"
    (first, *_), *_ = [as_lists(from_pairs(tokenizer, [("the ", "house")]))]
    assert first == tokenizer(whole)["input_ids"]
    task = from_pairs(tokenizer, [("the ", "house")], loss_on="completion")
    assert target_texts(task, tokenizer) == [" house"]


def test_tokenizer_without_offsets_finds_the_same_targets():
    slow = WordTokenizer()
    assert not slow.is_fast
    pairs = [("the old house", "stood by"), ("the light was ", "out"), ("", "nobody came")]
    task = from_pairs(slow, pairs, loss_on="completion")
    assert as_lists(task) == [
        slow(text)["input_ids"] for text in ("the old house stood by", "the light was out", "nobody came")
    ]
    assert [text.strip() for text in target_texts(task, slow)][:2] == ["stood by", "out"]
    assert 1 not in task.rows.labels  # the <eos> that the tokenizer adds is no part of the completion


def test_token_ids_with_and_without_labels():
    dataset = datasets.Dataset.from_dict(
        {"ids": [[5, 6, 7], [8, 9]], "labels": [[-100, -100, 7], [-100, 9]], "text": ["", ""]}
    )
    task = ReferenceTask.from_dataset(dataset, input_ids_column="ids")
    assert (as_lists(task), task.num_targets) == ([[5, 6, 7], [8, 9]], 3)
    task = ReferenceTask.from_dataset(dataset, input_ids_column="ids", labels_column="labels", loss_on="completion")
    assert (as_lists(task), task.num_targets) == ([[5, 6, 7], [8, 9]], 2)
    padded = [{"input_ids": [5, 6, 0], "attention_mask": [1, 1, 0]}]
    assert as_lists(ReferenceTask.from_dataset(padded, input_ids_column="input_ids")) == [[5, 6]]


def test_lists_streams_and_limits(tokenizer):
    dataset = datasets.Dataset.from_dict({"text": CORPUS})
    expected = as_lists(ReferenceTask.from_dataset(dataset, tokenizer, text_column="text", limit=3))
    assert expected == [tokenizer(text)["input_ids"] for text in CORPUS[:3]]
    for rows in (dataset.to_list(), dataset.to_iterable_dataset(), ({"text": text} for text in CORPUS)):
        assert as_lists(ReferenceTask.from_dataset(rows, tokenizer, text_column="text", limit=3)) == expected
    assert len(ReferenceTask.from_dataset(dataset, tokenizer, text_column="text", limit=99)) == 4
    with pytest.raises(ValueError, match="`limit` must be given for a stream"):
        ReferenceTask.from_dataset(dataset.to_iterable_dataset(), tokenizer, text_column="text")


def test_long_passages_lose_their_beginning_with_one_warning(tokenizer, caplog):
    dataset = datasets.Dataset.from_dict({"text": [*CORPUS, "sea"]})
    full = [tokenizer(text)["input_ids"] for text in dataset["text"]]
    with caplog.at_level(logging.WARNING):
        task = ReferenceTask.from_dataset(dataset, tokenizer, text_column="text", max_length=6)
    assert as_lists(task) == [row[-6:] for row in full]
    assert len(caplog.records) == 1
    assert "5 passages: 4 were longer than `max_length` (6 tokens)" in caplog.text
    assert task.description["num_cut"] == 4
    assert task.num_targets == sum(min(len(row), 6) - 1 for row in full)

    caplog.clear()
    shorter = task.fit_to_model(None, 4)
    assert as_lists(shorter) == [row[-4:] for row in full]
    assert "the model's context (4 tokens)" in caplog.text
    assert as_lists(task) == [row[-6:] for row in full]  # the task itself is as it was


def test_passages_that_lose_their_targets_are_dropped_and_counted(caplog):
    rows = [{"ids": [1, 2, 3, 4], "labels": [-100, 2, -100, -100]}, {"ids": [5, 6], "labels": [-100, 6]}]
    task = ReferenceTask.from_dataset(rows, input_ids_column="ids", labels_column="labels")
    assert len(task) == 2
    with caplog.at_level(logging.WARNING):
        fitted = task.fit_to_model(10, 2)
    assert (as_lists(fitted), fitted.num_targets, fitted.description["num_dropped"]) == ([[5, 6]], 1, 1)
    assert len(caplog.records) == 1
    with pytest.raises(ValueError, match="must have target tokens"):
        ReferenceTask.from_dataset(rows[:1], input_ids_column="ids", labels_column="labels", max_length=2)


def test_cutting_in_front_of_the_first_target_makes_it_none():
    rows = TokenRows.from_lists([[1, 2, 3, 4, 5]], [[-100, -100, -100, 4, 5]])
    task = ReferenceTask(name="x", rows=rows, loss_on="completion").fit_to_model(None, 2)
    assert task.rows.row(0)[1].tolist() == [-100, 5]  # 4 opens the passage now, so nothing predicts it


def test_token_ids_must_fit_the_vocabulary(tokenizer):
    task = from_pairs(tokenizer)
    assert task.fit_to_model(400, None) is task
    with pytest.raises(ValueError, match=r"below the model's `vocab_size` \(20\)"):
        task.fit_to_model(20, 1024)


def test_split_is_disjoint_and_whole_and_seeded():
    rows = [{"ids": [i, i + 1, i + 2]} for i in range(50)]
    task = ReferenceTask.from_dataset(rows, input_ids_column="ids")
    first, second = task.split(0.3, seed=1)
    assert (len(first), len(second)) == (15, 35)
    assert sorted(as_lists(first) + as_lists(second)) == as_lists(task)
    assert first.num_targets + second.num_targets == task.num_targets
    assert first.description["num_passages"] == 15
    assert task.split(0.3, seed=1)[0].digest() == first.digest()
    assert task.split(0.3, seed=2)[0].digest() != first.digest()
    assert len(task.split(0.001, seed=0)[0]) == 1
    assert len(task.subset(5, seed=0)) == 5
    assert task.subset(50) is task
    with pytest.raises(ValueError, match="`fraction`"):
        task.split(1.0)


def test_digest_follows_tokens_borders_and_targets():
    def digest(ids, labels=None):
        return ReferenceTask(name="x", rows=TokenRows.from_lists(ids, labels)).digest()

    base = digest([[1, 2, 3], [4, 5]])
    assert base == digest([[1, 2, 3], [4, 5]], [[1, 2, 3], [4, 5]])  # the same targets, written out
    assert len({base, digest([[1, 2], [3, 4, 5]]), digest([[1, 2, 9], [4, 5]])}) == 3
    assert base != digest([[1, 2, 3], [4, 5]], [[-100, -100, 3], [-100, 5]])


def test_wrong_arguments_name_what_there_is(tokenizer):
    dataset = pairs_dataset()

    def build(match, kind=ValueError, data=dataset, tok=tokenizer, **kwargs):
        with pytest.raises(kind, match=match):
            ReferenceTask.from_dataset(data, tok, **kwargs)

    build(r"`text_column` must be a column .* got 'text' .*\['context', 'target'\]", text_column="text")
    build(r"'text' .*\['a'\]", data=[{"a": 1}], text_column="text")
    build(r"Exactly one of .* got none\. The dataset has the columns \['context', 'target'\]")
    build("Exactly one of", text_column="context", input_ids_column="target")
    build("Exactly one of", prompt_column="context")
    build("Exactly one of", text_column="context", labels_column="target")
    build("completion to tell apart", text_column="context", loss_on="completion")
    build("`loss_on` must be 'all', 'completion' or 'both'", text_column="context", loss_on="last")
    build("`tokenizer` must be", tok=None, text_column="context")
    build("must hold texts, got int in row 0", data=[{"t": 3}], text_column="t")
    build("whole number a token", data=[{"t": "a b"}], input_ids_column="t")
    build("must have rows, got none", data=[], text_column="t")
    build("pass one of its splits", TypeError, data=datasets.DatasetDict(train=dataset), text_column="context")
    build("`limit` must be at least 1", text_column="context", limit=0)
    build("`max_length` must be at least 2", text_column="context", max_length=1)
    build("must have target tokens", data=[{"t": [7]}], input_ids_column="t")


# lm-eval tasks over local files.


@pytest.fixture
def make_task(tmp_path):
    def make(splits, **config):
        files = {}
        for split, docs in splits.items():
            path = tmp_path / f"{split}.json"
            path.write_text("\n".join(json.dumps(doc) for doc in docs))
            files[split] = str(path)
        config = {
            "task": "local_task",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files, "cache_dir": str(tmp_path / "cache")},
            **{f"{'training' if name == 'train' else name}_split": name for name in splits},
            **config,
        }
        path = tmp_path / "local_task.yaml"
        path.write_text(yaml.safe_dump(config))
        return str(path)

    return make


LAST_WORD = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{text.split(' ')[:-1]|join(' ')}}",
    "doc_to_target": "{{' '+text.split(' ')[-1]}}",
    "metric_list": [{"metric": "acc"}],
}
CHOICES = {
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [{"metric": "acc"}],
}
QUESTIONS = [
    {"question": "what is cold?", "choices": ["the house", "the wind"], "gold": 1},
    {"question": "who came?", "choices": ["nobody", "she"], "gold": 0},
]


def test_last_word_task_with_a_test_split_only_warns(make_task, tokenizer, caplog):
    path = make_task({"test": [{"text": text} for text in CORPUS]}, **LAST_WORD)
    with caplog.at_level(logging.WARNING, logger="mates_hf"):
        task = ReferenceTask.from_lm_eval(path, tokenizer, loss_on="completion", limit=3)
    assert "no split but the one it is evaluated on (test)" in caplog.text
    assert (task.name, task.description["split"], len(task)) == ("local_task", "test", 3)
    assert task.is_evaluated
    assert task.subset(2).fit_to_model(None, 100).is_evaluated
    assert as_lists(task) == [tokenizer(text)["input_ids"] for text in CORPUS[:3]]
    assert target_texts(task, tokenizer) == [" cold", " nothing", " grey"]
    whole = ReferenceTask.from_lm_eval(path, tokenizer)
    assert whole.num_targets == sum(len(tokenizer(text)["input_ids"]) - 1 for text in CORPUS)


@pytest.mark.parametrize(("delimiter", "joined"), [(" ", " the wind"), ("\n", "\nthe wind")])
def test_multiple_choice_takes_the_gold_choice_after_the_delimiter(make_task, tokenizer, caplog, delimiter, joined):
    splits = {"train": QUESTIONS, "validation": QUESTIONS[1:], "test": QUESTIONS[1:]}
    path = make_task(splits, **CHOICES, target_delimiter=delimiter)
    with caplog.at_level(logging.WARNING, logger="mates_hf"):
        task = ReferenceTask.from_lm_eval(path, tokenizer, loss_on="completion")
    assert not [record for record in caplog.records if record.name.startswith("mates_hf")]
    assert task.description["split"] == "train"
    assert target_texts(task, tokenizer)[0] == joined
    first = tokenizer.decode(as_lists(task)[0], skip_special_tokens=True)
    assert first == f"Question: what is cold?\nAnswer:{joined}"
    other = ReferenceTask.from_lm_eval(path, tokenizer, split="validation")
    assert (len(other), other.is_evaluated, task.is_evaluated) == (1, False, False)
    path = make_task({"train": QUESTIONS, "validation": QUESTIONS[1:]}, **CHOICES)
    found = [ReferenceTask.from_lm_eval(path, tokenizer, split=split) for split in ("train", "validation")]
    assert [task.is_evaluated for task in found] == [False, True]


def test_lm_eval_objects_configs_and_generation(make_task, tokenizer):
    path = make_task(
        {"validation": [{"q": "what is cold?", "a": ["the wind", "the sea"]}], "test": [{"q": "x", "a": ["y"]}]},
        output_type="generate_until",
        doc_to_text="{{q}}",
        doc_to_target="{{a}}",
        metric_list=[{"metric": "exact_match"}],
    )
    from lm_eval.tasks import TaskManager

    with open(path) as file:
        config = yaml.safe_load(file)
    built = TaskManager(include_defaults=False).load(path)["tasks"]["local_task"]
    texts = {
        tuple(target_texts(ReferenceTask.from_lm_eval(task, tokenizer, loss_on="completion"), tokenizer))
        for task in (path, config, built)
    }
    assert texts == {(" the wind",)}


def test_passages_are_what_the_harness_scores(make_task):
    from lm_eval.tasks import TaskManager

    from mates_hf.data.harness import prompt_and_target

    for config, docs in ((CHOICES, QUESTIONS), (LAST_WORD, [{"text": text} for text in CORPUS])):
        built = TaskManager(include_defaults=False).load(make_task({"test": docs}, **config))["tasks"]["local_task"]
        for doc in built.test_docs():
            requests = built.construct_requests(doc, built.fewshot_context(doc, 0), doc_id=0)
            gold = requests[doc["gold"]] if isinstance(requests, list) else requests
            assert prompt_and_target(built, doc) == gold.args


def test_choices_that_are_contexts(make_task, tokenizer):
    # As in WinoGrande: the options go into the context and the end of the sentence is what is scored.
    path = make_task({"train": [{"gold": 1, "a": "the house", "b": "the sea", "end": "was cold"}]})
    with open(path) as file:
        config = yaml.safe_load(file)
    config.update(
        output_type="multiple_choice",
        doc_to_text=lambda doc: doc["gold"],
        doc_to_choice=lambda doc: [doc["a"], doc["b"]],
        doc_to_target=lambda doc: doc["end"],
        validation_split="train",
        metric_list=[{"metric": "acc"}],
    )
    task = ReferenceTask.from_lm_eval(config, tokenizer, loss_on="completion")
    assert tokenizer.decode(as_lists(task)[0], skip_special_tokens=True) == "the sea was cold"
    assert target_texts(task, tokenizer) == [" was cold"]


def test_lm_eval_errors_say_what_there_is(make_task, tokenizer):
    path = make_task({"test": QUESTIONS}, **CHOICES)
    with pytest.raises(
        ValueError, match=r"`split` must be a split of the task `local_task` \(\['test'\]\), got 'train'"
    ):
        ReferenceTask.from_lm_eval(path, tokenizer, split="train")
    with pytest.raises(ValueError, match="`tokenizer` must be"):
        ReferenceTask.from_lm_eval(path, None)
    with pytest.raises(ValueError, match="existing file"):
        ReferenceTask.from_lm_eval("nowhere.yaml", tokenizer)
    unlabelled = make_task({"test": [{**QUESTIONS[0], "gold": -1}]}, **CHOICES)
    with pytest.raises(ValueError, match="without labels"):
        ReferenceTask.from_lm_eval(unlabelled, tokenizer)


@pytest.mark.slow
def test_unknown_task_says_how_to_list(tokenizer):
    with pytest.raises(ValueError, match=r"got 'lambada_opena'\. Close: .*lambada_openai.*lm-eval ls tasks"):
        ReferenceTask.from_lm_eval("lambada_opena", tokenizer)


def test_import_is_light():
    code = (
        "import sys, mates_hf.data.pool, mates_hf.data.reference\n"
        "print([m for m in ('torch', 'datasets', 'lm_eval', 'transformers', 'pyarrow') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_targets_never_include_a_first_token(tokenizer):
    for task in (from_pairs(tokenizer), from_pairs(tokenizer, loss_on="completion")):
        assert not task.rows.target_mask[task.rows.offsets[:-1]].any()
        assert task.num_targets == int(np.sum(task.rows.target_mask))
