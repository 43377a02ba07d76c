"""Accuracies equal those of a scorer written here, which reads the files and the model and nothing else."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM

from mates_hf.data.harness import task_manager
from mates_hf.errors import EvaluationError
from mates_hf.evaluation import Evaluator
from mates_hf.evaluation.continuations import Continuations, log_likelihoods
from tests.evaluation.kit import NINE, make_model, make_tokenizer, write_local

SAME_SUM = 1e-9  # of float64 log-likelihoods, summed in another order
FLOAT32_INSIDE = 1e-5  # Mamba's scan and Gemma's norms compute in float32 whatever the model's type
# A folder like the one `local_files` describes, with real data; the test on it is skipped without.
REAL_DATA = os.environ.get("MATES_EVAL_DATA")


def read(folder: Path, benchmark: str) -> Iterator[dict[str, Any]]:
    files = sorted(folder.glob(f"{benchmark}/*.jsonl"))
    wanted = [f for f in files if f.stem.startswith("test")] or [f for f in files if f.stem.startswith("validation")]
    yield from map(json.loads, wanted[0].read_text(encoding="utf-8").splitlines())


def questions(benchmark: str, row: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Context, continuation and the text whose length divides its log-likelihood, for each choice."""
    context, question, choices = row["context"], row["question"], row["choices"]
    if benchmark == "winogrande":
        before, after = question.split("_", 1)
        return [(before + choice, " " + after.strip(), "") for choice in choices]
    prompt = {
        "sciq": f"{context.lstrip()}\nQuestion: {question}\nAnswer:",
        "boolq": f"{context}\nQuestion: {question}\nAnswer:",
        "openbookqa": question,
        "hellaswag": question,
        "logiqa": f"Passage: {context}\nQuestion: {question}\nChoices:\n"
        + "".join(f"{'ABCDEF'[i]}. {choice}\n" for i, choice in enumerate(choices))
        + "Answer:",
    }.get(benchmark, f"Question: {question}\nAnswer:")
    return [(prompt, " " + choice, choice) for choice in choices]


def score(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    """Log-likelihood of one continuation, from the logits of one row."""
    whole = tokenizer.encode(context + continuation)
    start = len(tokenizer.encode(context))
    with torch.no_grad():
        logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(float(logits[i - 1, whole[i]]) for i in range(start, len(whole)))


def independent(model: Any, tokenizer: Any, folder: Path, benchmark: str) -> dict[str, float]:
    right: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    for row in read(folder, benchmark):
        asked = questions(benchmark, row)
        found = np.array([score(model, tokenizer, context, continuation) for context, continuation, _ in asked])
        right["acc"].append(found.argmax() == row["label"])
        if benchmark not in ("boolq", "winogrande"):
            lengths = [len(choice) for *_, choice in asked]
            right["acc_norm"].append((found / lengths).argmax() == row["label"])
    means = {name: float(np.mean(values)) for name, values in right.items() if values}
    return {**means, "accuracy": means.get("acc_norm", means["acc"])}


def by_the_harness(model: Any, tokenizer: Any, folder: Path, **arguments: Any) -> dict[str, Any]:
    """The results of the plain harness on the same model."""
    group = "mates_zero_shot_local"
    loaded = task_manager([group], {"data_dir": str(folder)}).load([group])
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)
    return lm_eval.evaluate(lm=lm, task_dict=loaded, bootstrap_iters=0, log_samples=False, **arguments)["results"]


@pytest.mark.parametrize("data", ["made up", pytest.param("real", marks=pytest.mark.slow)])
def test_accuracies_are_those_of_an_independent_scorer(data, tmp_path) -> None:
    if data == "real" and not REAL_DATA:
        pytest.skip("MATES_EVAL_DATA does not name a folder of real benchmarks")
    folder = Path(REAL_DATA) if data == "real" else write_local(tmp_path, num=12)
    model = make_model(max_position_embeddings=8192).eval()
    tokenizer = make_tokenizer()
    if data == "real":
        model, tokenizer = _for_real_data(folder)
    evaluator = Evaluator("mates_zero_shot_local", tokenizer, metadata={"data_dir": str(folder)})
    live, plain = evaluator.run(model), by_the_harness(model, tokenizer, folder)
    for benchmark in NINE:
        task = f"mates_{benchmark}_local"
        for metric, value in independent(model, tokenizer, folder, benchmark).items():
            assert plain[task][f"{metric},none"] == value, (benchmark, metric)
            assert live[f"{task}/{metric}"] == value, (benchmark, metric)
    for name, value in live.items():
        task, metric = name.split("/")
        assert value == pytest.approx(plain[task][f"{metric},none"], rel=SAME_SUM)


def _for_real_data(folder: Path) -> tuple[Any, Any]:
    """A tokenizer fitted to the files and a model for it: single bytes would make rows of thousands of tokens."""
    tokenizer = make_tokenizer()
    texts = (line for path in sorted(folder.glob("*/*.jsonl")) for line in path.open(encoding="utf-8"))
    trained = tokenizer.train_new_from_iterator(texts, 2048)
    return make_model(vocab_size=len(trained), max_position_embeddings=4096).eval(), trained


@pytest.mark.parametrize(("bos", "prefix"), [(None, 256), ("<begin>", 257)])
def test_lambada_is_what_one_row_after_another_gives(tmp_path, bos, prefix) -> None:
    folder = write_local(tmp_path)
    tokenizer = make_tokenizer(**({"bos_token": bos} if bos else {}))
    model = make_model(vocab_size=258).eval()
    names = ["mates_lambada_last_word_local", "mates_lambada_all_tokens_local"]
    found = Evaluator(names, tokenizer, metadata={"data_dir": str(folder)}).run(model)
    rows = list(read(folder, "lambada"))
    last = [score(model, tokenizer, row["context"], f" {row['target']}") for row in rows]
    per_byte = [-value / len(row["target"]) for value, row in zip(last, rows, strict=True)]
    assert found[f"{names[0]}/nll_per_byte"] == pytest.approx(np.mean(per_byte), rel=SAME_SUM)
    assert found[f"{names[0]}/perplexity"] == pytest.approx(np.exp(-np.mean(last)), rel=SAME_SUM)
    texts = [f"{row['context']} {row['target']}" for row in rows]
    total = 0.0
    for text in texts:
        ids = [prefix, *tokenizer.encode(text)]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total += sum(float(logits[i, ids[i + 1]]) for i in range(len(ids) - 1))
    bits = -total / np.log(2) / sum(len(text.encode()) for text in texts)
    assert found[f"{names[1]}/bits_per_byte"] == pytest.approx(bits, rel=SAME_SUM)


ARCHITECTURES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256},
    "gpt_neox": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "qwen3": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 64,
    },
    "opt": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "ffn_dim": 64,
        "word_embed_proj_dim": 32,
    },
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "gemma2": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 64,
        "sliding_window": 8,
    },
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_batch_gives_what_each_row_alone_gives(kind) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, vocab_size=64, **ARCHITECTURES[kind])
        model = AutoModelForCausalLM.from_config(config).double().eval()
    rng = np.random.default_rng(1)
    pairs = [(rng.integers(3, 64, n).tolist(), rng.integers(3, 64, m).tolist()) for n, m in zip(*SHAPES, strict=True)]
    pairs.append((pairs[0][0], [*pairs[0][1][:-1], 5]))  # shares its row of input with the first
    sums, greedy = log_likelihoods(model, Continuations.from_pairs(pairs), batch_rows=3)
    for (context, targets), found, is_greedy in zip(pairs, sums, greedy, strict=True):
        ids = torch.tensor([context + targets])
        with torch.no_grad():
            logits = model(ids).logits[0, len(context) - 1 : -1].double().log_softmax(-1)
        expected = logits[torch.arange(len(targets)), ids[0, len(context) :]].sum()
        rel = FLOAT32_INSIDE if kind in ("mamba", "gemma2") else SAME_SUM
        assert found == pytest.approx(float(expected), rel=rel)
        assert is_greedy == bool((logits.argmax(-1) == ids[0, len(context) :]).all())


SHAPES = ((9, 1, 4, 14, 2, 7, 30, 1), (2, 1, 6, 3, 1, 1, 5, 9))  # tokens of contexts and of continuations


def test_requests_that_differ_in_their_last_token_share_a_row() -> None:
    model = make_model()
    seen: list[torch.Size] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    requests = Continuations.from_pairs([([1, 2, 3], [4]), ([1, 2, 3], [5]), ([1, 2], [3, 6]), ([7], [8])])
    log_likelihoods(model, requests, batch_rows=8)
    assert seen == [torch.Size([2, 3])]


def test_contexts_are_cut_from_the_left_as_in_the_harness(tmp_path) -> None:
    folder, tokenizer = write_local(tmp_path), make_tokenizer()
    model = make_model(max_position_embeddings=96).eval()
    metadata = {"data_dir": str(folder)}
    with pytest.raises(
        EvaluationError, match=r"requests of `mates_\w+_local` are longer than the model's context of 96"
    ):
        Evaluator("mates_zero_shot_local", tokenizer, metadata=metadata).prepare(model)
    live = Evaluator("mates_zero_shot_local", tokenizer, metadata=metadata, truncate=True).run(model)
    plain = by_the_harness(model, tokenizer, folder)
    for name, value in live.items():
        task, metric = name.split("/")
        assert value == pytest.approx(plain[task][f"{metric},none"], rel=SAME_SUM)
    piqa, short = Evaluator("mates_piqa_local", tokenizer, metadata=metadata, truncate=True), make_model()
    short.config.max_position_embeddings = 8
    with pytest.raises(EvaluationError, match="Every choice must fit into the model's context of 8 tokens"):
        piqa.prepare(short)


def test_requests_are_tokenised_and_tasks_built_once(tmp_path, monkeypatch) -> None:
    tokenizer = make_tokenizer()
    evaluator = Evaluator(
        "mates_zero_shot_local", tokenizer, metadata={"data_dir": str(write_local(tmp_path))}, limit=3
    )
    evaluator.prepare(make_model())
    calls: list[str] = []
    encode = functools.partial(type(tokenizer).encode, evaluator.tokenizer)
    monkeypatch.setattr(
        type(tokenizer), "encode", lambda self, text, **kwargs: calls.append(text) or encode(text, **kwargs)
    )
    loaded = evaluator.loaded
    first, second = evaluator.run(make_model()), evaluator.run(make_model())
    assert first == second
    assert not calls
    assert evaluator.loaded is loaded
