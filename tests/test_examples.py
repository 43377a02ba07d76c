"""The examples run, as a user runs them."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import numpy as np
import pytest
import torch

from mates_hf import load_round
from mates_hf.errors import EvaluationError
from mates_hf.evaluation.benchmarks import BENCHMARKS
from mates_hf.training.verify import verify_run

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MOST_LINES = 200
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


def load(name: str):
    """An example as a module: it does nothing before its `main()`."""
    spec = importlib.util.spec_from_file_location(f"{name}_example", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def launch(script: Path | str, *arguments: object, cache: Path) -> str:
    """What a script prints under `accelerate launch` with two processes."""
    command = "-m accelerate.commands.accelerate_cli launch --multi_gpu --num_processes 2 --num_machines 1"
    command += " --mixed_precision no --dynamo_backend no --main_process_port 0"
    done = subprocess.run(
        [sys.executable, *command.split(), str(script), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "HF_DATASETS_CACHE": str(cache)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def read_header(path: Path) -> str:
    """The TOML of a script's PEP 723 header."""
    header = re.match(r"# /// script\n((?:#(?: .*)?\n)+)# ///\n", path.read_text())
    assert header is not None, "PEP 723: the header comes first"
    return re.sub(r"(?m)^# ?", "", header[1])


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_short_and_says_what_it_takes(path):
    source = path.read_text()
    assert len(source.splitlines()) <= MOST_LINES
    told = ast.get_docstring(ast.parse(source))
    assert re.search(r"\b(minutes?|seconds)\b", told)
    assert re.search(r"\d GB\b", told)
    assert "ast lines:\n\n    " in told
    assert f"python examples/{path.name}" in told


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_lists_what_it_imports(path):
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    header = tomllib.loads(read_header(path))
    # Nothing is on an index yet: from a clone, the package is what lies next to the examples.
    here = path.parent / header["tool"]["uv"]["sources"]["mates-hf"]["path"]
    project = tomllib.loads((here / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert header["requires-python"] == project["requires-python"]
    needed, *others = header["dependencies"]
    name, _, extras = needed.rstrip("]").partition("[")
    assert name == project["name"]

    listed = set(extras.split(",")) - {""}
    given = [*project["dependencies"], *(line for extra in listed for line in project["optional-dependencies"][extra])]
    given += requires("transformers")  # whose tokenizers and YAML come with it
    names = {re.split(r"[^\w.-]", line)[0].lower().replace("-", "_") for line in given + others} | {"mates_hf"}
    nodes = list(ast.walk(ast.parse(path.read_text())))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    roots = {module.partition(".")[0] for module in imported} - set(sys.stdlib_module_names)
    assert {{"yaml": "pyyaml", "sklearn": "scikit_learn", "PIL": "pillow"}.get(root, root) for root in roots} <= names
    evaluates = any(module.startswith("mates_hf.evaluation") for module in imported)
    assert listed == {extra for extra, used in (("eval", evaluates), ("report", "matplotlib" in roots)) if used}


@pytest.fixture(scope="module")
def evaluate_example():
    return load("evaluate")


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
        include_num_input_tokens_seen=True,
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
    results = json.loads((output_dir / "evaluation.json").read_text())
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
    assert [result["tokens"] for result in results] == [2 * 16, 4 * 16]  # 2 rows of 8 tokens a step

    table = [line.split() for line in printed.splitlines() if line.startswith(str(run_dir / "checkpoint-4 "))][-1]
    assert table[-1] == f"{after['mates_zero_shot_local/accuracy']:.3f}"  # the mean comes last
    assert (output_dir / "evaluation.png").exists()


def test_evaluate_only_what_is_not_known_yet(tmp_path, run_dir, task_files, evaluate_example, capsys):
    file = tmp_path / "evaluation" / "evaluation.json"
    command = [str(run_dir), *LOCAL_TASKS, "--data_dir", str(task_files), "--output_dir", str(file.parent)]

    def evaluated(*more: str) -> list[str]:
        capsys.readouterr()
        evaluate_example.main([*command, *more])
        lines = capsys.readouterr().out.splitlines()
        return [line.split(":")[0].rpartition("-")[2] for line in lines if line.endswith(" metrics")]

    assert evaluated() == ["2", "4"]
    first = file.read_bytes()
    assert evaluated() == []
    assert file.read_bytes() == first
    weights = run_dir / "checkpoint-4" / "model.safetensors"
    os.utime(weights, ns=(1, 1))
    assert evaluated() == ["4"]
    assert evaluated("--limit", "2") == ["2", "4"]
    assert len(json.loads(file.read_text())) == 5  # nothing that was measured is lost
    assert evaluated() == []


def test_evaluate_writes_into_the_run_that_was_given(
    run_dir, task_files, evaluate_example, monkeypatch, tmp_path, capsys
):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    local = [*LOCAL_TASKS, "--data_dir", f"~/{os.path.relpath(task_files, tmp_path)}", "--limit", "2"]
    evaluate_example.main([f"~/{run_dir.name}", *local])
    results = json.loads((run_dir / "evaluation" / "evaluation.json").read_text())
    assert [result["step"] for result in results] == [2, 4]
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "~").exists()
    capsys.readouterr()
    evaluate_example.main([str(run_dir / "checkpoint-4"), *local])  # which the run may delete
    assert "1 checkpoints, 1 of them evaluated before" in capsys.readouterr().out
    parse = evaluate_example.parse
    assert parse([str(run_dir), "some/model"]).output_dir == run_dir / "evaluation"
    assert parse(["some/model"]).output_dir == Path("runs/evaluation")
    assert parse([str(run_dir), "--output_dir", "~/out"]).output_dir == tmp_path / "out"


def test_evaluate_says_the_way_out(run_dir, task_files, evaluate_example, make_tiny_model):
    with pytest.raises(ConnectionError, match="--tasks mates_zero_shot_local --data_dir FOLDER"):
        evaluate_example.main([str(run_dir)])  # there is no network in the tests
    long = [str(run_dir), *LOCAL_TASKS, "--data_dir", str(task_files)]
    for config in run_dir.glob("checkpoint-*/config.json"):
        config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 4}))
    with pytest.raises(EvaluationError, match="longer than the model's context of 4 tokens .* or pass `--truncate`"):
        evaluate_example.main(long)
    evaluate_example.main([*long, "--truncate"])


def test_evaluate_refuses_by_name(tmp_path, run_dir, task_files, evaluate_example, tiny_tokenizer):
    local = [*LOCAL_TASKS, "--data_dir", str(task_files), "--output_dir", str(tmp_path / "evaluation")]
    with pytest.raises(ValueError, match="must be a folder or a model on the Hub, got 'no/such_model'"):
        evaluate_example.main(["no/such_model", *local])
    with pytest.raises(ValueError, match="whole checkpoint"):
        evaluate_example.main([str(run_dir / "checkpoint-6"), *local])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (run_dir / "checkpoint-2" / name).unlink()
    with pytest.raises(ValueError, match="`--tokenizer` must be given"):
        evaluate_example.main([str(run_dir / "checkpoint-2"), *local])
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    evaluate_example.main([str(run_dir / "checkpoint-2"), *local, "--tokenizer", str(tmp_path / "tokenizer")])
    config = run_dir / "checkpoint-4" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="must have all weights .* without"):
        evaluate_example.main([str(run_dir / "checkpoint-4"), *local])


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
    results = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    base, adapter, merged = (result["metrics"]["mates_zero_shot_local/choice_prob"] for result in results)
    assert adapter == pytest.approx(merged, abs=ROUNDING)
    assert abs(adapter - base) > 100 * ROUNDING


@pytest.mark.slow
def test_evaluate_in_two_processes(tmp_path, run_dir, task_files, evaluate_example):
    local = [str(run_dir), *LOCAL_TASKS, "--data_dir", str(task_files), "--output_dir"]
    evaluate_example.main([*local, str(tmp_path / "one")])
    printed = launch("examples/evaluate.py", *local, tmp_path / "two", cache=tmp_path / "cache")
    assert printed.count("2 checkpoints, 0 of them evaluated before") == 1  # one process speaks
    one, two = (json.loads((tmp_path / n / "evaluation.json").read_text()) for n in ("one", "two"))
    for expected, found in zip(one, two, strict=True):
        assert found["path"] == expected["path"]
        assert found["metrics"] == pytest.approx(expected["metrics"], abs=ROUNDING)


# --- quickstart, filter_corpus ---

SMALLEST = """
import sys
sys.path.insert(0, "examples")
import quickstart
quickstart.OUTPUT_DIR, quickstart.MAX_STEPS, quickstart.UPDATE_STEPS, quickstart.NUM_PROBES = sys.argv[1], 8, 3, 40
quickstart.BATCH_SIZE, quickstart.MAX_LENGTH = 4, 64
quickstart.MODEL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
quickstart.main()
"""


def write_corpus(folder: Path) -> tuple[list[str], Path]:
    rng = np.random.default_rng(0)
    texts = [f"number {i}: {passage('sea', rng)}" for i in range(60)]
    return texts, write_jsonl(folder / "corpus.jsonl", [{"text": text} for text in texts])


def check_filtered(folder: Path, run: Path, texts: list[str], printed: str) -> None:
    """What `filter_corpus.py` printed, once, and wrote into `folder`."""
    from datasets import Dataset

    from mates_hf import MatesSelector

    kept = Dataset.from_parquet(str(folder / "kept.parquet"), cache_dir=str(folder / "cache"))["text"]
    expected = MatesSelector.from_pretrained(run).filter(Dataset.from_dict({"text": texts}), ratio=0.25)
    assert list(kept) == list(expected["text"])
    for said in ("45 rows rejected; half the budget would keep 8", "highest influence", "lowest influence"):
        assert printed.count(said) == 1, said
    assert "its best stretch: " in printed


@pytest.mark.slow
def test_quickstart_and_its_run_filters_a_corpus(tmp_path, monkeypatch, capsys):
    quickstart = load("quickstart")
    sizes = {"MAX_STEPS": 8, "UPDATE_STEPS": 3, "NUM_PROBES": 40, "BATCH_SIZE": 4, "MAX_LENGTH": 64}
    for name, value in {**sizes, "OUTPUT_DIR": str(tmp_path / "run")}.items():
        monkeypatch.setattr(quickstart, name, value)
    tiny = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setattr(quickstart, "MODEL", tiny)
    quickstart.main()
    printed = capsys.readouterr().out
    assert printed.count("round 1 at step 3, 40 probed, ") == 1
    assert "Loss on other passages of the manual: " in printed

    texts, corpus = write_corpus(tmp_path)
    out = tmp_path / "out" / "kept.parquet"
    command = ["filter_corpus.py", "--selector", tmp_path / "run", "--corpus", corpus, "--ratio", "0.25", "--out", out]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    load("filter_corpus").main()
    check_filtered(out.parent, tmp_path / "run", texts, capsys.readouterr().out)


@pytest.mark.slow
def test_quickstart_and_filter_corpus_in_two_processes(tmp_path):
    script, run, cache = tmp_path / "smallest.py", tmp_path / "run", tmp_path / "cache"
    script.write_text(SMALLEST)
    printed = launch(script, run, cache=cache)
    assert printed.count("held-out Spearman") >= 1
    assert len(re.findall(r"(?m)^round 1 at step 3, 40 probed, ", printed)) == 1  # one process speaks
    assert printed.count("Loss on other passages of the manual: ") == 1

    texts, corpus = write_corpus(tmp_path)
    out = tmp_path / "out" / "kept.parquet"
    command = ["--selector", run, "--corpus", corpus, "--ratio", "0.25", "--out", out]
    printed = launch("examples/filter_corpus.py", *command, cache=cache)
    check_filtered(out.parent, run, texts, printed)


# --- pretrain, compare ---


@pytest.fixture(scope="module")
def own_data(tmp_path_factory):
    """A folder as `compare.py` takes it: the reference is like half of the pool, of which two texts are copies."""
    rng = np.random.default_rng(0)
    folder = tmp_path_factory.mktemp("own")
    reference, held_out = ([{"text": passage("sea", rng)} for _ in range(20)] for _ in range(2))
    pool = [{"text": passage(kind, rng, 500), "kind": kind} for kind in rng.choice(list(WORDS), 400)]
    pool += [{"text": f"print {rows[0]['text']} print", "kind": "copy"} for rows in (reference, held_out)]
    for name, rows in {"pool": pool, "reference": reference, "held_out": held_out}.items():
        write_jsonl(folder / f"{name}.jsonl", rows)
    return folder


def test_pretrain_reads_flags_over_a_file_over_its_defaults(tmp_path):
    pretrain = load("pretrain")
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 1e-4\nupdate_steps: 7\nnum_probes: 50\narm: random\nbf16: false\npool: a.jsonl\n")
    data, training, config = pretrain.parse([str(file), "--num_probes", "60", "--use_cpu"])
    assert (data.arm, data.pool, data.block_size) == ("random", "a.jsonl", 128)
    assert (training.learning_rate, training.max_steps) == (1e-4, pretrain.DEFAULTS["max_steps"])
    assert (config.update_steps, config.num_probes) == (7, 60)
    file.write_text("update_step: 7\n")
    with pytest.raises(SystemExit):
        pretrain.parse([str(file)])


def test_pretrain_cuts_each_text_by_itself():
    cut = load("pretrain").cut
    texts = [[1, 2, 3, 4, 5], [6, 7, 8], [9]]
    assert cut(texts, 3, 0)["input_ids"] == [[1, 2, 3], [4, 5, 0], [6, 7, 8], [0, 9, 0]]
    assert cut(texts, 3, None)["labels"] == [[1, 2, 3], [6, 7, 8], [4, 5, 9]]


@pytest.mark.slow
def test_pretrain_in_two_processes_and_resumed(tmp_path, own_data, monkeypatch, capsys):
    """One process reads, tokenises, speaks and writes; alone, the run continues from its last whole checkpoint."""
    settings = {
        "pool": str(own_data / "pool.jsonl"), "reference": str(own_data / "reference.jsonl"),
        "held_out": str(own_data / "held_out.jsonl"), "output_dir": str(tmp_path / "run"), "block_size": 32,
        "max_steps": 8, "update_steps": 3, "num_probes": 20, "per_device_train_batch_size": 2, "save_steps": 4,
        "on_weak_signal": "select", "use_cpu": True, "disable_tqdm": True, "num_proc": 2,
    }  # fmt: skip
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(settings))  # JSON is YAML
    printed = launch("examples/pretrain.py", file, cache=tmp_path / "cache")
    for said in ("2 of 402 texts of the pool", "round 1 at step 3", "***** held_out metrics *****"):
        assert printed.count(said) == 1, said
    assert len(list((tmp_path / "cache").rglob("cache-*_of_*.arrow"))) == 2  # tokenised once, by `num_proc` processes
    assert load_round(tmp_path / "run" / "_mates" / "round-0001").selection is not None

    more = ["--max_steps", "10", "--resume_from_checkpoint", "last", "--per_device_train_batch_size", "4"]
    monkeypatch.setattr(sys, "argv", ["pretrain.py", str(file), *more])
    (tmp_path / "run" / "checkpoint-9").mkdir()  # a killed run left it half-written
    capsys.readouterr()
    load("pretrain").main()
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert state["global_step"] == 10
    assert not (tmp_path / "run" / "_mates" / "round-0001.stale").exists()
    assert "held_out_loss" in capsys.readouterr().out


COMPARE = "--max_steps 20 --update_steps 12 --random_rounds 1 --num_probes 30 --longer 2 --seeds 2".split()


def check_comparison(folder: Path, printed: str) -> None:
    """The table, the JSON and the picture of `COMPARE`."""
    results = json.loads((folder / "results.json").read_text())
    arms = [(r["arm"], r["seed"], r["curve"][-1][0]) for r in results["results"]]
    assert arms == [("mates", 0, 20), ("random", 0, 40), ("mates", 1, 20), ("random", 1, 40)]
    ours, theirs = (dict(r["curve"])[20] for r in results["results"][:2])
    assert results["differences"][0] == pytest.approx(ours - theirs)
    assert f"{ours:>12.3f} {theirs:>8.3f}" in printed
    assert printed.count("95% interval") == 1
    assert results["results"][0]["flops_share"] > 0
    record = load_round(folder / "mates-1" / "_mates" / "round-0001")
    assert record.info["seed"] == 1  # each seed draws its own slices and probes
    assert set(results["results"][2]["chosen"]) >= {"sea", "code"}
    assert (folder / "held_out_loss.png").exists()


@pytest.mark.slow
def test_compare_in_two_processes(tmp_path, own_data):
    out = tmp_path / "two"
    printed = launch(
        "examples/compare.py", *COMPARE, "--data", own_data, "--output_dir", out, cache=tmp_path / "cache"
    )
    assert printed.count("loss: mates") == 1  # one process speaks
    check_comparison(out, printed)


@pytest.mark.slow
def test_compare_alone(tmp_path, own_data, monkeypatch, capsys):
    compare = load("compare")
    monkeypatch.setattr(sys, "argv", ["compare.py", *COMPARE, "--data", str(own_data), "--output_dir", str(tmp_path)])
    compare.main()
    check_comparison(tmp_path, capsys.readouterr().out)


def test_compare_reads_off_where_a_curve_reaches_a_loss():
    compare = load("compare")
    curve = [(20, 5.0), (40, 4.0), (60, 4.2), (80, 3.0)]
    assert compare.steps_to(curve, 4.5) == 30
    assert compare.steps_to(curve, 3.6) == 70
    assert compare.steps_to(curve, 2.0) == float("inf")
    assert compare.interval([-0.5]) == "-0.500 (one seed: no interval)"
    assert compare.interval([-0.4, -0.6]) == "-0.500 (95% interval -1.771 to +0.771, 2 seeds)"  # t of 1 degree: 12.706


# --- images, speech, vision_language ---

SMALL_RUN = "--max_steps 12 --update_steps 4 --hidden_size 16".split()
SMALL_ROWS = [*SMALL_RUN, *"--num_probes 24 --num_rows 240 --num_reference 12 --per_device_train_batch_size 8".split()]
SMALL_ROWS += ["--on_weak_signal", "select"]  # so few labels do not convince the guard


def check_arms(folder: Path, printed: str, said: str) -> None:
    """Each arm has said once what it came to, and the selecting one selected."""
    for arm in ("random", "selected"):
        assert len(re.findall(rf"(?m)^{arm} rows: loss \d+\.\d{{4}} nats.*{said}", printed)) == 1
    record = load_round(folder / "selected" / "_mates" / "round-0001")
    assert record.selection is not None
    assert record.info["loss"]["fed"] == "collated"  # examples, not tokens
    assert verify_run(folder / "selected").problem is None
    assert not (folder / "random" / "_mates").exists()


@pytest.mark.slow
def test_images_selects_from_a_folder(tmp_path, capsys):
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for number, name in enumerate(("dark", "light")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(100):
            pixels = rng.integers(0, 120, (20, 16 + i % 5, 3)) + 130 * number
            image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "photos" / name / f"{i}.png")
    sizes = ["--image_size", "16", "--hidden_size", "16", "--max_steps", "12", "--update_steps", "3"]
    example = load("images")
    example.main(
        ["--folder", str(tmp_path / "photos"), "--wanted", "light", "--num_probes", "40", *sizes]
        + ["--output_dir", str(tmp_path / "run")]
    )
    printed = capsys.readouterr().out
    assert re.search(r"random rows: loss \d+\.\d{4} nats, accuracy .* held-out images of light", printed)
    assert re.search(r"selected rows: loss \d+\.\d{4} nats", printed)
    assert list((tmp_path / "run" / "selected" / "_mates").glob("round-0001/round.json"))


@pytest.mark.slow
def test_images_in_two_processes(tmp_path):
    pytest.importorskip("sklearn")
    sizes = [*SMALL_RUN, "--num_probes", "100", "--output_dir", tmp_path]
    check_arms(tmp_path, launch("examples/images.py", *sizes, cache=tmp_path / "cache"), "of 0 1 2 3 4")


@pytest.mark.slow
@pytest.mark.parametrize("voice", ["--tones", "espeak-ng"])
def test_speech_alone(tmp_path, voice, capsys):
    if voice == "espeak-ng" and shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng is not installed")
    load("speech").main([*SMALL_ROWS, *(["--tones"] if voice == "--tones" else []), "--output_dir", str(tmp_path)])
    check_arms(tmp_path, capsys.readouterr().out, "words right in 12 held-out texts")


@pytest.mark.slow
def test_speech_in_two_processes(tmp_path):
    printed = launch("examples/speech.py", *SMALL_ROWS, "--tones", "--output_dir", tmp_path, cache=tmp_path / "cache")
    check_arms(tmp_path, printed, "words right in 12 held-out texts")


def test_speech_says_how_to_install_what_speaks(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="espeak-ng is not on PATH: .*apt install espeak-ng.* or pass `--tones`"):
        load("speech").main(["--output_dir", str(tmp_path / "run"), "--use_cpu"])
    assert not (tmp_path / "run").exists()


def test_speech_is_heard_by_its_words():
    """Recordings of one word are nearer to each other than to those of another; the reference has numbers alone."""
    speech = load("speech")
    args = speech.SpeechArguments(tones=True, num_rows=200, num_reference=8, wrong=0.3)
    pool, reference, held_out = speech.make_rows(args, seed=0)
    assert (len(pool), len(reference), len(held_out)) == (200, 8, 8)
    assert pool[0]["input_features"].shape == (speech.MEL_BINS, speech.FRAMES)
    numbers = set(map(speech.WORDS.index, speech.NUMBERS))
    assert all(set(row["labels"][:-1]) <= numbers for row in reference + held_out)
    means = speech.record(["one", "one", "red", "red"], 0, tones=True).mean(-1)
    assert (means[0] - means[1]).norm() < (means[0] - means[2]).norm()
    assert (means[2] - means[3]).norm() < (means[1] - means[3]).norm()
    clean = speech.make_rows(dataclasses.replace(args, wrong=0.0), seed=0)[1]
    assert [row["labels"] for row in clean] == [row["labels"] for row in reference]  # the share is of the pool alone


@pytest.mark.slow
def test_vision_language_alone(tmp_path, capsys):
    pytest.importorskip("PIL")
    load("vision_language").main([*SMALL_ROWS, "--output_dir", str(tmp_path)])
    check_arms(tmp_path, capsys.readouterr().out, "of 12 held-out captions right")


@pytest.mark.slow
def test_vision_language_in_two_processes(tmp_path):
    pytest.importorskip("PIL")
    printed = launch("examples/vision_language.py", *SMALL_ROWS, "--output_dir", tmp_path, cache=tmp_path / "cache")
    check_arms(tmp_path, printed, "of 12 held-out captions right")


def test_pictures_are_drawn_as_their_captions_say():
    pytest.importorskip("PIL")
    drawn = load("vision_language")
    rng = np.random.default_rng(0)
    red, blue = (drawn.paint(f"a large {colour} square", rng).mean((1, 2)) for colour in ("red", "blue"))
    assert red.argmax() == 0
    assert blue.argmax() == 2
    lit = {
        (size, shape): float((drawn.paint(f"a {size} white {shape}", rng) > 0).float().mean())
        for size in drawn.SIZES
        for shape in drawn.SHAPES
    }
    assert all(lit["large", shape] > 2 * lit["small", shape] for shape in drawn.SHAPES)
    assert lit["large", "square"] > lit["large", "circle"] > lit["large", "triangle"] > lit["large", "cross"]
    pool, reference, _ = drawn.make_rows(drawn.CaptionArguments(num_rows=20, num_reference=5), seed=0)
    wanted = set(map(drawn.WORDS.index, drawn.WANTED))
    assert {row["labels"][-2] for row in reference} <= wanted
    assert {row["labels"][-2] for row in pool} - wanted
    assert pool[0]["labels"][drawn.NUM_PATCHES :] == [-100, *pool[0]["input_ids"][drawn.NUM_PATCHES + 1 :]]
