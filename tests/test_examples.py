"""The examples run, as a user runs them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mates_hf import load_round
from mates_hf.errors import EvaluationError
from mates_hf.evaluation.benchmarks import BENCHMARKS

ROOT = Path(__file__).parent.parent
LOCAL_TASKS = ["--tasks", "mates_zero_shot_local"]
RIGHT, WRONG = "w5", "w6"  # of every item of the task files here
ROUNDING = 1e-5  # of float32 log-likelihoods, batched in another way
WORDS = {
    "sea": "the ship sailed over a grey wave and the captain watched the harbour light".split(),
    "code": "def return import class self value index error list print while lambda".split(),
}


def passage(kind: str, rng: np.random.Generator, length: int = 60) -> str:
    return " ".join(rng.choice(WORDS[kind], length))


def write_tasks(folder: Path, num_items: int = 6) -> Path:
    """Files of all local tasks; the right choice is `RIGHT`, in either place, also after WinoGrande's blank."""
    for benchmark in BENCHMARKS:
        (folder / benchmark).mkdir(parents=True)
        rows = []
        for i in range(num_items):
            label = i % 2
            question = f"w{10 + i} w{20 + i}" + (" _ w7" if benchmark == "winogrande" else "")
            rows.append({"context": f"w{30 + i}", "question": question, "target": RIGHT, "label": label,
                         "choices": [WRONG, RIGHT] if label else [RIGHT, WRONG]})  # fmt: skip
        (folder / benchmark / "validation.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def evaluate_example():
    spec = importlib.util.spec_from_file_location("evaluate_example", ROOT / "examples" / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def task_files(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def run_dir(tmp_path, make_tiny_model, tiny_tokenizer):
    """A run that learns that `RIGHT` follows everything, with checkpoints at steps 2 and 4 and half of one at 6."""
    from datasets import Dataset
    from transformers import Trainer, TrainingArguments, default_data_collator

    right = tiny_tokenizer.convert_tokens_to_ids(RIGHT)
    rows = [[right] * 8 for _ in range(8)]
    path = tmp_path / "run"
    args = TrainingArguments(
        output_dir=str(path),
        max_steps=4,
        save_steps=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    Trainer(
        model=make_tiny_model(),
        args=args,
        train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        data_collator=default_data_collator,
        processing_class=tiny_tokenizer,
    ).train()
    (path / "checkpoint-6").mkdir()
    (path / "checkpoint-6" / "model.safetensors").write_bytes(b"cut short")
    return path


def probability_of_right(path: Path, tokenizer, num_items: int = 6) -> float:
    """SciQ's `choice_prob`, by hand: every choice is one token, so it is a softmax over two logits."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path)
    ids = tokenizer.convert_tokens_to_ids([RIGHT, WRONG])
    found = []
    for i in range(num_items):
        prompt = tokenizer(f"w{30 + i}\nQuestion: w{10 + i} w{20 + i}\nAnswer:", return_tensors="pt").input_ids
        with torch.no_grad():
            found.append(model(prompt).logits[0, -1, ids].softmax(0)[0].item())
    return float(np.mean(found))


def test_evaluate_a_run(tmp_path, run_dir, task_files, tiny_tokenizer, evaluate_example, capsys):
    output_dir = tmp_path / "evaluation"
    command = [str(run_dir), *LOCAL_TASKS, "--data_dir", str(task_files), "--output_dir", str(output_dir)]
    evaluate_example.main(command)
    printed = capsys.readouterr().out
    results = json.loads((output_dir / "evaluation.json").read_text())["results"]
    assert [result["step"] for result in results] == [2, 4]
    assert f"Skipped {run_dir / 'checkpoint-6'}: it has no trainer_state.json" in printed

    before, after = (result["metrics"] for result in results)
    for result in results:
        metrics = result["metrics"]
        by_hand = probability_of_right(Path(result["path"]), tiny_tokenizer)
        assert metrics["mates_sciq_local/choice_prob"] == pytest.approx(by_hand, abs=ROUNDING)
        nine = [metrics[f"mates_{name}_local/accuracy"] for name in BENCHMARKS if name != "lambada"]
        assert metrics["mates_zero_shot_local/accuracy"] == pytest.approx(np.mean(nine))
    assert after["mates_sciq_local/choice_prob"] > before["mates_sciq_local/choice_prob"] + 0.01  # it was taught that
    assert after["mates_sciq_local/accuracy"] == 1.0
    # 2 rows of 8 tokens a step; nobody asked the Trainer to count them.
    assert [result["tokens"] for result in results] == [2 * 16, 4 * 16]

    table = [line.split() for line in printed.splitlines() if line.startswith(str(run_dir / "checkpoint-4"))][-1]
    assert table[1:3] == ["4", "6.4e-05"]
    assert table[-1] == f"{after['mates_zero_shot_local/accuracy']:.4f}"  # the mean comes last
    assert (output_dir / "evaluation.png").exists()


def test_evaluate_only_what_is_not_known_yet(tmp_path, run_dir, task_files, evaluate_example, capsys):
    file = tmp_path / "evaluation" / "evaluation.json"
    command = [str(run_dir), *LOCAL_TASKS, "--data_dir", str(task_files), "--output_dir", str(file.parent)]

    def evaluated(*more: str) -> list[str]:
        capsys.readouterr()
        evaluate_example.main([*command, *more])
        lines = capsys.readouterr().out.splitlines()
        return [line.split(":")[0].rpartition("-")[2] for line in lines if "metrics in" in line]

    assert evaluated() == ["2", "4"]
    first = file.read_bytes()
    assert evaluated() == []
    assert file.read_bytes() == first
    weights = run_dir / "checkpoint-4" / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    assert evaluated() == ["4"]
    assert evaluated("--limit", "2") == ["2", "4"]
    assert len(json.loads(file.read_text())["results"]) == 4  # both limits are kept, the old weights are not
    assert evaluated() == []


def test_evaluate_writes_into_the_run_that_was_given(
    run_dir, task_files, evaluate_example, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    local = [*LOCAL_TASKS, "--data_dir", f"~/{os.path.relpath(task_files, tmp_path)}", "--limit", "2"]
    evaluate_example.main([f"~/{run_dir.name}", *local])
    results = json.loads((run_dir / "evaluation" / "evaluation.json").read_text())["results"]
    assert [result["step"] for result in results] == [2, 4]
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "~").exists()
    capsys.readouterr()
    evaluate_example.main([str(run_dir / "checkpoint-4"), *local])  # which the run may delete
    assert "1 checkpoints, 1 of them evaluated before" in capsys.readouterr().out
    parse = evaluate_example.parse
    assert parse(["some/model", str(run_dir)]).output_dir == str(run_dir / "evaluation")
    assert parse(["some/model"]).output_dir == "runs/evaluation"
    assert parse([str(run_dir), "--output_dir", "~/out"]).output_dir == str(tmp_path / "out")


def test_evaluate_says_the_way_out(run_dir, task_files, evaluate_example, make_tiny_model):
    with pytest.raises(ConnectionError, match="--tasks mates_zero_shot_local --data_dir FOLDER"):
        evaluate_example.main([str(run_dir)])  # there is no network in the tests
    long = [str(run_dir), *LOCAL_TASKS, "--data_dir", str(task_files)]
    for config in run_dir.glob("checkpoint-*/config.json"):
        config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 4}))
    with pytest.raises(EvaluationError, match="longer than the model's context of 4 tokens .* or pass `--truncate`"):
        evaluate_example.main(long)
    evaluate_example.main([*long, "--truncate"])


def test_evaluate_says_over_what_it_plots(evaluate_example):
    def result(step, tokens, source):
        return {"step": step, "tokens": tokens, "tokens_from": source}

    counted = [result(1, 2e6, evaluate_example.COUNTED), result(2, 4e6, evaluate_example.COUNTED)]
    derived = [result(1, 3e6, evaluate_example.DERIVED)]
    unknown = [result(7, None, evaluate_example.STEPS)]
    assert evaluate_example.axis(counted, None) == ([2.0, 4.0], evaluate_example.COUNTED)
    assert evaluate_example.axis(counted + derived, None) == ([1.0, 2.0, 1.0], evaluate_example.STEPS)
    assert evaluate_example.axis(counted + unknown, None) == ([1.0, 2.0, 7.0], evaluate_example.STEPS)
    assert evaluate_example.axis(unknown, 10**6) == ([7.0], evaluate_example.ASKED)


def test_evaluate_refuses_by_name(tmp_path, run_dir, task_files, evaluate_example, tiny_tokenizer):
    local = [*LOCAL_TASKS, "--data_dir", str(task_files), "--output_dir", str(tmp_path / "evaluation")]
    with pytest.raises(ValueError, match="neither"):
        evaluate_example.main(["no/such_model", *local])
    with pytest.raises(ValueError, match="complete checkpoint"):
        evaluate_example.main([str(run_dir / "checkpoint-6"), *local])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (run_dir / "checkpoint-2" / name).unlink()
    with pytest.raises(ValueError, match="`--tokenizer` must be given"):
        evaluate_example.main([str(run_dir / "checkpoint-2"), *local])
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    evaluate_example.main([str(run_dir / "checkpoint-2"), *local, "--tokenizer", str(tmp_path / "tokenizer")])
    (tmp_path / "evaluation" / "evaluation.json").write_text("[]")
    with pytest.raises(ValueError, match="no other file called"):
        evaluate_example.main([str(run_dir), *local])


def test_evaluate_an_adapter(tmp_path, make_tiny_model, tiny_tokenizer, task_files, evaluate_example):
    from transformers import AutoModelForCausalLM

    peft = pytest.importorskip("peft")
    make_tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer.save_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        peft.LoraConfig(r=2, lora_alpha=8, task_type="CAUSAL_LM", init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    tiny_tokenizer.save_pretrained(tmp_path / "merged")
    local = [*LOCAL_TASKS, "--data_dir", str(task_files), "--output_dir", str(tmp_path / "evaluation")]
    evaluate_example.main([*(str(tmp_path / name) for name in ("base", "adapter", "merged")), *local])
    results = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())["results"]
    base, adapter, merged = (result["metrics"]["mates_zero_shot_local/choice_prob"] for result in results)
    assert adapter == pytest.approx(merged, abs=ROUNDING)
    assert abs(adapter - base) > 100 * ROUNDING


@pytest.mark.slow
def test_evaluate_in_two_processes(tmp_path, run_dir, task_files, evaluate_example):
    local = [str(run_dir), *LOCAL_TASKS, "--data_dir", str(task_files), "--output_dir"]
    evaluate_example.main([*local, str(tmp_path / "one")])
    launch = "-m accelerate.commands.accelerate_cli launch --multi_gpu --num_processes 2 --num_machines 1"
    launch += " --mixed_precision no --dynamo_backend no --main_process_port 0"
    done = subprocess.run(
        [sys.executable, *launch.split(), "examples/evaluate.py", *local, str(tmp_path / "two")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("2 checkpoints, 0 of them evaluated before") == 1  # one process speaks
    one, two = (json.loads((tmp_path / n / "evaluation.json").read_text())["results"] for n in ("one", "two"))
    for expected, found in zip(one, two, strict=True):
        assert found["path"] == expected["path"]
        assert found["metrics"] == pytest.approx(expected["metrics"], abs=ROUNDING)


@pytest.mark.slow
def test_pretrain_on_local_files(tmp_path):
    rng = np.random.default_rng(0)
    pool = [{"body": passage(kind, rng), "domain": kind} for kind in rng.choice(list(WORDS), 500)]
    reference = [{"text": passage("sea", rng)} for _ in range(40)]
    evaluated = passage("code", rng)
    copies = [reference[0]["text"], reference[1]["text"], evaluated]  # of a reference, held-out and evaluated text
    pool += [{"body": f"print {text} print", "domain": "copy"} for text in copies]
    (tmp_path / "tasks" / "piqa").mkdir(parents=True)
    item = {"question": evaluated, "choices": ["sea", "harbour"], "label": 1}
    (tmp_path / "tasks" / "piqa" / "validation.jsonl").write_text(json.dumps(item))
    for name, rows in {"pool.jsonl": pool, "reference.jsonl": reference}.items():
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows))
    command = f"""{ROOT}/examples/pretrain.py --output_dir {tmp_path}/run --dataset json
        --data_files {tmp_path}/pool.jsonl --text_column body --group_column domain
        --reference {tmp_path}/reference.jsonl --seeds 2 --max_steps 24 --update_steps 8 --num_probes 40
        --selection_ratio 0.5 --candidate_scope pool --block_size 32 --vocab_size 300 --hidden_size 32 --num_layers 1
        --per_device_train_batch_size 4 --learning_rate 3e-3 --evaluate_steps 8 --save_strategy no --report_to none
        --extend_random 1.5 --on_weak_signal select --use_cpu true --disable_tqdm true --eval_tasks mates_piqa_local
        --eval_every 12 --eval_data_dir {tmp_path}/tasks --eval_truncate true"""
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, *command.split()], capture_output=True, text=True, env=environment, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert [(r["arm"], r["seed"]) for r in results["results"]] == [
        ("mates", 0), ("random", 0), ("mates", 1), ("random", 1)
    ]  # fmt: skip
    assert [r["curve"][-1]["step"] for r in results["results"]] == [24, 36, 24, 36]
    assert len(results["summary"]["paired"]) == 3
    assert (tmp_path / "run" / "held_out_loss.png").exists()
    record = load_round(tmp_path / "run" / "mates-0" / "_mates" / "round-0001")
    assert results["summary"]["rounds"][0]["spearman"] == record.info["guard"]["spearman"]
    assert "held-out Spearman" in done.stdout
    assert "2 of 503 pool documents dropped" in done.stdout
    assert "1 of 501 pool documents dropped" in done.stdout
    assert "copy" not in results["summary"]["rounds"][0]["shares"]
    assert [[entry["step"] for entry in r["evaluations"]] for r in results["results"][:2]] == [[12, 24], [12, 24, 36]]
    assert all("lm_eval/mates_piqa_local/accuracy" in entry for entry in results["results"][0]["evaluations"])


@pytest.mark.slow
def test_pretrain_in_two_processes(tmp_path):
    """One process reads, tokenises, speaks and writes; each seed draws its own slices and probes."""
    rng = np.random.default_rng(0)
    pool = [{"text": passage(kind, rng)} for kind in rng.choice(list(WORDS), 300)]
    reference = [{"text": passage("sea", rng)} for _ in range(20)]
    pool.append({"text": reference[0]["text"]})
    for name, rows in {"pool.jsonl": pool, "reference.jsonl": reference}.items():
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows))
    launch = "-m accelerate.commands.accelerate_cli launch --multi_gpu --num_processes 2 --num_machines 1"
    launch += " --mixed_precision no --dynamo_backend no --main_process_port 0"
    command = f"""{launch} examples/pretrain.py --output_dir {tmp_path}/run --dataset json --arms mates
        --data_files {tmp_path}/pool.jsonl --reference {tmp_path}/reference.jsonl --seeds 2 --max_steps 8
        --update_steps 3 --num_probes 20 --selection_ratio 0.5 --block_size 32 --vocab_size 300 --hidden_size 32
        --num_layers 1 --per_device_train_batch_size 2 --learning_rate 3e-3 --evaluate_steps 8 --save_strategy no
        --report_to none --on_weak_signal select --use_cpu true --disable_tqdm true --num_proc 2"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, *command.split()],
        cwd=ROOT,
        env={**environment, "HF_DATASETS_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for said in ("1 of 301 pool documents dropped", "rows of 32 tokens", "arm ", "results.json"):
        assert done.stdout.count(said) == 1, said
    assert len(list((tmp_path / "cache").rglob("cache-*_of_*.arrow"))) == 2  # tokenised once, by `num_proc` processes
    results = json.loads((tmp_path / "run" / "results.json").read_text())["results"]
    assert [result["curve"][-1]["tokens"] for result in results] == [8 * 4 * 31] * 2
    draws = [load_round(tmp_path / "run" / f"mates-{seed}" / "_mates" / "round-0001") for seed in (0, 1)]
    assert [record.info["seed"] for record in draws] == [0, 1]
    assert set(draws[0].labels.candidate_id.tolist()) != set(draws[1].labels.candidate_id.tolist())
