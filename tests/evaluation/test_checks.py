"""What would give a number that says nothing of the model is refused before the first step; the way out works."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mates_hf.errors import EvaluationError
from mates_hf.evaluation import Evaluator, LmEvalCallback
from mates_hf.evaluation.checks import check_task
from tests.evaluation.kit import END, make_model, make_tokenizer

SPECIALS = [("<end>", END), ("<begin>", 257), ("<sep>", 258)]


def with_specials(template: str | None, **names: str) -> Any:
    """A tokenizer of bytes whose post-processor adds special tokens."""
    tokenizer = make_tokenizer(**names)
    if template is not None:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=SPECIALS
        )
    return tokenizer


def word_tokenizer(**names: str) -> Any:
    """A tokenizer that knows two words."""
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1, "yes": 2, "no": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, **{"unk_token": "<unk>", "eos_token": "<eos>", **names})


@pytest.fixture
def letters(tmp_path) -> str:
    """A task of one-letter choices."""
    rows = [{"q": f"question {i}?", "a": i % 3} for i in range(6)]
    return write_task(tmp_path, rows, doc_to_choice=["A", "B", "C"], target_delimiter="")


def write_task(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> str:
    """The path of a multiple-choice task over rows of `q` and `a`."""
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "task": "written",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}} Answer:",
        "doc_to_target": "a",
        "metric_list": [{"metric": "acc"}],
        **changes,
    }
    (folder / "task.yaml").write_text(json.dumps(config))  # JSON is YAML
    return str(folder / "task.yaml")


@pytest.mark.parametrize(
    ("template", "names", "told"),
    [
        ("$A <end>", {}, "'<end>'"),
        ("<begin> $A <end>", {"bos_token": "<begin>"}, "'<end>'"),
        ("<begin> $A <sep> <end>", {"bos_token": "<begin>", "sep_token": "<sep>"}, "'<sep>', '<end>'"),
        ("$A <end>", {"bos_token": "<end>"}, "'<end>'"),
        ("$A <sep>", {}, "'<sep>'"),  # which the tokenizer does not call special
    ],
)
def test_a_tokenizer_that_appends_is_refused_and_the_way_out_works(letters, template, names, told) -> None:
    tokenizer = with_specials(template, **names)
    tokenizer.add_tokens(["<begin>", "<sep>"])
    with pytest.raises(ValueError, match=f"add no special token behind a text, .* with {told} at the end") as caught:
        Evaluator(letters, tokenizer)
    with pytest.raises(ValueError, match="own accuracy with this tokenizer means nothing"):
        LmEvalCallback(letters, tokenizer)
    assert 'TemplateProcessing(single="$A", pair="$A $B")' in str(caught.value)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B")
    evaluator = Evaluator(letters, tokenizer)
    evaluator.run(make_model(vocab_size=260).eval())
    values = [request.resps[0][0] for request in evaluator.loaded["tasks"]["written"].instances]
    assert len(set(values)) == len(values)


def test_add_eos_token_is_refused_and_turned_off() -> None:
    if int(transformers.__version__.split(".")[0]) < 5:
        pytest.skip("this transformers builds the tokenizer from a file only")
    from transformers import LlamaTokenizer

    if (
        not hasattr(LlamaTokenizer, "update_post_processor")
        or LlamaTokenizer.vocab_files_names.get("vocab_file") is None
    ):
        pytest.skip("this transformers builds the tokenizer from a file only")
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"{c}": i for i, c in enumerate("▁aA1.the", 3)}}
    appending = LlamaTokenizer(vocab=vocabulary, merges=[], add_eos_token=True)
    with pytest.raises(ValueError, match="with '</s>' at the end"):
        Evaluator("mates_zero_shot_local", appending)
    Evaluator("mates_zero_shot_local", LlamaTokenizer(vocab=vocabulary, merges=[], add_eos_token=False))


@pytest.mark.parametrize(
    "tokenizer",
    [
        with_specials(None),
        with_specials("<begin> $A", bos_token="<begin>"),
        with_specials("<end> $A", bos_token="<end>"),
        word_tokenizer(),
        word_tokenizer(unk_token="<eos>"),  # GPT-2's unknown token is its end token
    ],
)
def test_other_tokenizers_are_taken(letters, tokenizer) -> None:
    Evaluator(letters, tokenizer)


def test_choices_that_are_the_same_tokens_are_named(tmp_path, caplog) -> None:
    model = make_model(vocab_size=260).eval()
    letters = write_task(tmp_path, [{"q": "yes", "a": 1}] * 6, doc_to_choice=["A", "B", "C"])
    evaluator = Evaluator(letters, word_tokenizer())  # A, B and C are unknown words
    with pytest.raises(
        EvaluationError, match=r"6 of 6 items of `written` .* same tokens .*\(item 0: \[' A', ' B', ' C'\]\)"
    ):
        evaluator.prepare(model)

    rows = [{"q": "yes", "a": 0, "c": ["yes", "no"] if i else ["maybe", "never"]} for i in range(4)]
    one = Evaluator(write_task(tmp_path, rows, doc_to_choice="c", target_delimiter=" "), word_tokenizer())
    with caplog.at_level(logging.WARNING, "mates_hf"):
        one.prepare(model)
    assert "1 of 4 items of `written`" in caplog.text


def test_the_same_choice_twice_is_the_benchmark_s_own(tmp_path, caplog) -> None:
    rows = [{"q": f"yes {i}", "a": 0, "c": ["yes", "yes"]} for i in range(3)]
    task = write_task(tmp_path, rows, doc_to_choice="c")
    with caplog.at_level(logging.WARNING, "mates_hf"):
        Evaluator(task, make_tokenizer()).prepare(make_model().eval())
    assert not [record for record in caplog.records if record.name.startswith("mates_hf")]


def test_choices_that_are_cut_away_with_the_context_are_named(tmp_path) -> None:
    """As in WinoGrande, the choices stand in the contexts."""
    rows = [
        {"q": f" and that was the end of story number {i}", "a": i % 2, "c": ["Ann went home", "Bob came"]}
        for i in range(4)
    ]
    task = write_task(tmp_path, rows, doc_to_text="a", doc_to_choice="c", doc_to_target="q", target_delimiter="")
    whole = Evaluator(task, make_tokenizer(), truncate=True)
    whole.prepare(make_model().eval())
    with pytest.raises(EvaluationError, match="4 of 4 items .* cut away with the context"):
        Evaluator(task, make_tokenizer(), truncate=True).prepare(make_model(max_position_embeddings=39).eval())


def test_requests_and_tasks_that_cannot_be_scored_are_refused_before_the_first_step(letters, monkeypatch) -> None:
    from lm_eval.api.task import ConfigurableTask

    plain = ConfigurableTask.construct_requests

    def generated(self: Any, doc: Any, ctx: Any, **kwargs: Any) -> Any:
        found = plain(self, doc, ctx, **kwargs)
        for request in found:
            request.request_type = "generate_until"
        return found

    with monkeypatch.context() as patch:
        patch.setattr(ConfigurableTask, "construct_requests", generated)
        with pytest.raises(EvaluationError, match="`written` asks for `generate_until`"):
            Evaluator(letters, make_tokenizer()).prepare(make_model())
    task = Evaluator(letters, make_tokenizer()).loaded["tasks"]["written"]
    for attribute, told in (("UNSAFE_CODE", "runs code"), ("MULTIMODAL", "more than text")):
        with monkeypatch.context() as patch:
            patch.setattr(task, attribute, True, raising=False)
            with pytest.raises(EvaluationError, match=told):
                check_task(task)


@pytest.mark.parametrize("secret", [-1, "", "D"])
def test_labels_that_are_no_choices_are_named(tmp_path, caplog, secret) -> None:
    """lm-eval counts such items as wrong, so that a split without labels has accuracy 0 for ever."""
    is_text = isinstance(secret, str)
    changes = {"doc_to_choice": ["A", "B", "C"], "doc_to_target": "{{a}}" if is_text else "a"}
    hidden = write_task(tmp_path, [{"q": f"q{i}", "a": secret} for i in range(4)], **changes)
    with pytest.raises(EvaluationError, match=f"4 of 4 items of `written` have a label .*item 0: {secret!r}"):
        Evaluator(hidden, make_tokenizer()).prepare(make_model())
    (tmp_path / "one").mkdir()
    rows = [{"q": f"q{i}", "a": ("A" if is_text else 0) if i else secret} for i in range(4)]
    one = write_task(tmp_path / "one", rows, **changes)
    with caplog.at_level(logging.WARNING, "mates_hf"):
        Evaluator(one, make_tokenizer()).prepare(make_model())
    assert "1 of 4 items of `written` have a label that is none of their choices" in caplog.text


def test_a_metric_that_cannot_be_computed_is_an_error_before_the_first_step(letters) -> None:
    config = json.loads(Path(letters).read_text())
    Path(letters).write_text(json.dumps({**config, "metric_list": [{"metric": "f1"}]}))  # of two classes only
    model = make_model()
    with pytest.raises(EvaluationError, match=r"tasks \['written'\], but on made-up answers .* ValueError: Target"):
        Evaluator(letters, make_tokenizer()).prepare(model)
    Path(letters).write_text(json.dumps(config))
    evaluator = Evaluator(letters, make_tokenizer())
    seen: list[Any] = []
    model.register_forward_hook(lambda *given: seen.append(given))
    evaluator.prepare(model)
    assert len(seen) == 1  # the longest batch; made-up answers cost no pass
    evaluator.run(model)
    assert len(seen) > 1
