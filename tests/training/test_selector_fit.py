"""A selector from a checkpoint without a run: what it keeps, when it is refused, how it continues, what it refuses."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from mates_hf import MatesSelector, ReferenceTask, fit_selector
from mates_hf.cli import main
from mates_hf.errors import MatesError, WeakSignalError
from mates_hf.training import selector_fit
from mates_hf.training.fit import warm_up
from mates_hf.training.fit.place import ABOUT_FILE
from mates_hf.training.fit.probe import split_rows
from mates_hf.training.fit.settings import FitSettings
from mates_hf.training.lock import RoundsLock
from tests.launch import free_port, start_processes
from tests.training.fit_kit import (
    QUICK,
    is_good,
    make_texts,
    tokenizer,
    write_all,
    write_jsonl,
    write_model,
    write_parquet,
)


def fit(given: dict[str, Any], **changes: Any) -> Any:
    return fit_selector(**{**given, **QUICK, "progress": False, **changes})


def share_of_good(selector: MatesSelector) -> float:
    """Of the best quarter of unseen texts, a quarter of which are of the good domain."""
    kept = selector.filter(Dataset.from_dict({"text": make_texts(200, seed=5)}), ratio=0.25)
    return sum(map(is_good, kept["text"])) / len(kept)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file below a folder."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_all(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def model_before(inputs: dict[str, Any]) -> dict[str, str]:
    return digests(Path(inputs["model"]))


@pytest.fixture(scope="module")
def fitted(inputs: dict[str, Any], model_before: dict[str, str]) -> Any:
    return fit(inputs, keep_work=True)


# ---- what comes of it


def test_the_rows_that_help_are_kept(fitted, inputs):
    assert share_of_good(fitted.selector) > 0.9  # a sign flip keeps none of them, chance a quarter
    assert fitted.report.interval[0] > 0.5
    about = json.loads((fitted.out / ABOUT_FILE).read_text())
    assert about["num_probed"] == 200
    assert about["flops"]["warm_up"] > about["flops"]["probe"] > 0
    assert fitted.flops == sum(about["flops"].values())
    assert inputs["model"] not in (fitted.out / ABOUT_FILE).read_text()  # no path is told
    card = (fitted.out / "README.md").read_text()
    assert "| Candidates probed | 200 |" in card
    assert "| Optimizer steps at the fit | 40 |" in card
    assert fitted.selector.max_length == QUICK["max_length"]
    lines = list(fitted.lines())
    assert len(lines) == 10
    assert any(line.startswith("score: mates-hf score") for line in lines)


def test_the_model_is_left_as_it_was_and_done_is_done(fitted, inputs, model_before, monkeypatch):
    monkeypatch.setattr(selector_fit, "read_inputs", None)  # nothing is read again
    again = fit(inputs, keep_work=True)
    assert again.about == fitted.about
    assert digests(Path(inputs["model"])) == model_before
    assert json.dumps(again.to_dict(), allow_nan=False)


def test_the_probes_are_of_rows_that_the_warm_up_did_not_train_on(fitted, inputs):
    from mates_hf.round_files import read_labels

    settings = FitSettings(**QUICK)
    train, probes = split_rows(799, settings)
    assert not np.intersect1d(train, probes).size
    labels = read_labels(fitted.out.with_name("selector.fit") / "probe" / "probes.parquet")
    np.testing.assert_array_equal(labels.candidate_id, probes)
    more_train, more = split_rows(799, FitSettings(**{**QUICK, "num_probes": 300}))
    np.testing.assert_array_equal(more_train, train)  # so that more probes need no other warm-up
    np.testing.assert_array_equal(more[:200], probes)


@pytest.mark.slow
def test_a_selector_that_reads_texts_is_written_next_to_it(fitted, inputs, caplog):
    distilled = fit(inputs, distil=True, keep_work=True)
    assert distilled.text_out == fitted.out.with_name("selector-text")
    texts = MatesSelector.from_pretrained(distilled.text_out)
    assert texts.tokenizer is None
    assert share_of_good(texts) > 0.9
    assert len(list(distilled.lines())) == 11


@pytest.mark.parametrize("kind", ["llama", pytest.param("neox", marks=pytest.mark.slow)])
def test_the_mean_of_the_last_weights_is_probed_at_the_moments_of_the_warm_up(tmp_path, monkeypatch, kind):
    """All of them: the Trainer of transformers 5 left the output head of GPT-NeoX (Pythia) as it was made."""
    import torch

    seen: dict[str, Any] = {}
    whole = warm_up.weight_marks

    def watch(model: Any, *args: Any) -> Any:
        seen.setdefault("trained", []).append({name: p.detach().clone() for name, p in model.named_parameters()})
        return whole(model, *args)

    class Looked(BaseException):
        pass

    def look(*args: Any, model: Any, optimizer: Any, average: Any, **kwargs: Any) -> None:
        seen["last"] = {name: p.detach().clone() for name, p in model.named_parameters()}
        seen["steps"] = {int(state["step"]) for state in optimizer.optimizer.state.values()}
        with average.swapped_in():
            seen["mean"] = {name: p.detach().clone() for name, p in model.named_parameters()}
        raise Looked

    monkeypatch.setattr(warm_up, "weight_marks", watch)
    monkeypatch.setattr(selector_fit, "probe_and_fit", look)
    with pytest.raises(Looked):
        fit(write_all(tmp_path, kind=kind))
    assert seen["steps"] == {40}
    for name, value in seen["trained"][-1].items():
        assert torch.equal(seen["last"][name], value), name
    assert average_steps(tmp_path) == 20
    assert any(not torch.equal(seen["mean"][name], value) for name, value in seen["last"].items())


def average_steps(folder: Path) -> int:
    from safetensors import safe_open

    with safe_open(folder / "selector.fit/warm-up" / warm_up.AVERAGE_FILE, framework="np") as file:
        return int(file.metadata()["num_steps"])


# ---- columns


@pytest.mark.slow
def test_tokens_need_no_tokenizer(tmp_path):
    texts = make_texts()
    rows = [{"input_ids": tokenizer()(text)["input_ids"], "more": text} for text in texts]
    model = write_model(tmp_path / "model", with_tokenizer=False)
    good = [row for row, text in zip(rows, texts, strict=True) if is_good(text)]
    others = [row for row in rows if row not in good[:20]]
    pool = write_jsonl(tmp_path / "pool.jsonl.zst", others)
    reference = write_jsonl(tmp_path / "passages.jsonl", good[:20])
    given = {"model": model, "pool": pool, "reference": reference, "out": tmp_path / "selector"}
    with pytest.raises(ValueError, match="`distil` must have a pool of texts or conversations"):
        fit(given, distil=True)
    found = fit(given)
    assert found.selector.tokenizer is None
    kept = found.selector.filter(Dataset.from_list(rows), ratio=0.25)
    assert sum(map(is_good, kept["more"])) > 0.9 * len(kept)


@pytest.mark.slow
def test_conversations_go_through_the_chat_template(tmp_path):
    given = write_all(tmp_path)
    chat = tokenizer()
    template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    folder = Path(given["model"])
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    rows = [{"messages": [{"role": "user", "content": text}], "id": i} for i, text in enumerate(make_texts())]
    pool = write_jsonl(tmp_path / "chat.jsonl.gz", rows)
    found = fit({**given, "pool": pool}, distil=True)
    assert found.about["read"]["column"] == "messages"
    selector = found.selector
    kept = selector.filter(Dataset.from_list(rows), ratio=0.25)
    assert sum(is_good(row["messages"][0]["content"]) for row in kept) > 0.9 * len(kept)
    assert share_of_good(MatesSelector.from_pretrained(found.text_out)) > 0.9
    assert chat.chat_template is None


@pytest.mark.slow
def test_a_dataset_and_a_task_can_be_given(tmp_path, inputs):
    dataset = Dataset.from_dict({"meta": [{"text": text} for text in make_texts()]})
    texts = [text for text in make_texts(100, seed=3) if is_good(text)]
    task = ReferenceTask.from_dataset([{"t": text} for text in texts], tokenizer(), text_column="t")
    given = {"model": inputs["model"], "pool": dataset, "reference": task, "out": tmp_path / "selector"}
    assert share_of_good(fit(given, column="meta.text").selector) > 0.9
    with pytest.raises(MatesError, match="they differ in `pool`"):
        fit({**given, "pool": dataset.select(range(700))}, column="meta.text")


# ---- the guard


@pytest.mark.slow
def test_noise_is_refused_and_nothing_is_written(tmp_path, capsys):
    given = write_all(tmp_path, of_noise=True)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in QUICK.items()]
    command = ["fit", *(f"--{name}={value}" for name, value in given.items()), *options, "--quiet"]
    for _ in range(2):  # the second time from what was found the first time
        assert main(command) == 1
        told = capsys.readouterr()
        assert told.out == ""
        (line,) = [line for line in told.err.splitlines() if line.startswith("mates-hf: ")]
        assert "The guard refuses this selector: held-out Spearman is " in line
        assert "no number of probes is known to do" in line or "probes would do" in line
        assert not Path(given["out"]).exists()


@pytest.mark.slow
def test_a_refusal_says_how_many_probes_would_do_and_they_do(tmp_path, inputs, monkeypatch):
    given = {**inputs, "out": tmp_path / "selector"}
    with pytest.raises(WeakSignalError, match="includes 0; about 48 probes would do") as refused:
        fit(given, num_probes=12)
    assert not (tmp_path / "selector").exists()
    advice = str(refused.value).rpartition("fit again with `num_probes=")[2].partition("`")[0]
    monkeypatch.setattr(selector_fit, "warm_up", None)  # it is not trained again
    found = fit(given, num_probes=int(advice))
    assert found.about["num_probed"] == int(advice)
    assert share_of_good(found.selector) > 0.6


@pytest.mark.slow
def test_a_lower_bar_is_judged_without_measuring_again(tmp_path, inputs, monkeypatch):
    given = {**inputs, "out": tmp_path / "selector"}
    with pytest.raises(WeakSignalError, match="below `min_spearman`=0.999"):
        fit(given, min_spearman=0.999)
    monkeypatch.setattr(selector_fit, "read_inputs", None)
    assert share_of_good(fit(given, min_spearman=0.5).selector) > 0.9


# ---- other settings, other folders


def test_other_settings_in_the_same_folder_are_refused_with_what_differs(fitted, inputs, tmp_path):
    with pytest.raises(MatesError, match=r"they differ in `seed` \(there 0, here 7\)"):
        fit(inputs, seed=7)
    with pytest.raises(MatesError, match="they differ in `reference`"):
        fit({**inputs, "reference": inputs["pool"]})
    work = tmp_path / "selector.fit"
    shutil.copytree(fitted.out.with_name("selector.fit"), work)
    given = {**inputs, "out": tmp_path / "selector"}
    with pytest.raises(MatesError, match=r"not done, and was begun otherwise: they differ in `warm_steps`"):
        fit(given, warm_steps=30)
    shutil.rmtree(work / "probe")
    (work / "read.json").write_text(json.dumps({"model": "", "pool": "", "reference": ""}))
    with pytest.raises(MatesError, match="another content of model and pool and reference"):
        fit(given)


def test_folders_of_something_else_are_left_alone(fitted, inputs, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    with pytest.raises(MatesError, match="`out` must be a folder that is not there yet"):
        fit({**inputs, "out": tmp_path / "notes"})
    with pytest.raises(MatesError, match="`work` must be a new folder"):
        fit({**inputs, "out": tmp_path / "selector"}, work=tmp_path / "notes")
    held = tmp_path / "held"
    held.mkdir()
    with held_by_another_thread(held), pytest.raises(MatesError, match="another one that lives has it"):
        fit({**inputs, "out": tmp_path / "selector"}, work=held)
    assert fit(inputs, keep_work=False, work=tmp_path / "notes").out.exists()  # it is done: nothing is deleted there
    assert (tmp_path / "notes" / "mine.txt").read_text() == "mine"


@contextlib.contextmanager
def held_by_another_thread(folder: Path) -> Iterator[None]:
    """A fit that lives: a lock of this thread would be one that broke off."""
    taken, over = threading.Event(), threading.Event()

    def hold() -> None:
        lock = RoundsLock(folder, taken)
        taken.set()
        over.wait()
        lock.release()

    holder = threading.Thread(target=hold)
    holder.start()
    taken.wait()
    try:
        yield
    finally:
        over.set()
        holder.join()


# ---- bad input


def wrong(tmp_path: Path) -> dict[str, tuple[dict[str, Any], str]]:
    """Arguments that are wrong by their name, and what is said of them."""
    blank = write_parquet(tmp_path / "blank.parquet", {"text": ["", None, "w1"] * 10})
    chat = write_jsonl(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": "w1 w2"}]}] * 50)
    small = write_model(tmp_path / "small", vocab=40)
    tokenizer().save_pretrained(small)
    bare = write_model(tmp_path / "bare", with_tokenizer=False)
    good = [text for text in make_texts() if is_good(text)]
    empty = write_parquet(tmp_path / "empty.parquet", {"text": []})
    few = write_jsonl(tmp_path / "few.jsonl", [{"text": text} for text in make_texts(30)])
    (tmp_path / "not.jsonl").write_text("hello\n" * 20)
    return {
        "no reference": ({"reference": tmp_path / "none.jsonl"}, "`reference` must be files that are there"),
        "no task": ({"reference": "lm-eval:no_such_task"}, "no_such_task"),
        "empty pool": ({"pool": empty}, "`pool` must have rows, got none"),
        "blank pool": ({"pool": blank}, "`pool` must have texts, got 30 rows with fewer than two tokens"),
        "no files": ({"pool": tmp_path / "none-*.parquet"}, "nothing matches"),
        "no column": ({"column": "body"}, r"must have a column `body`, got the columns \['url', 'text'\]"),
        "no lines": ({"pool": tmp_path / "not.jsonl"}, "must hold one JSON object a line"),
        "mixed": ({"pool": [blank, chat]}, "All files must have the columns"),
        "no model": ({"model": tmp_path / "none"}, "`model` must be a folder or a repository"),
        "no tokenizer": ({"model": bare}, "`model` must have a tokenizer"),
        "no template": ({"pool": chat}, "must have a chat template"),
        "another tokenizer": ({"model": small}, "`tokenizer` must be the model's own: the model knows 40 ids"),
        "too few rows": ({"pool": few}, r"30 can be used: .* set `num_probes` to at most 22"),
        "reference in the pool": (
            {"pool": write_jsonl(tmp_path / "good.jsonl", [{"text": text} for text in good]),
             "reference": tmp_path / "good.jsonl"},
            "`reference` must not be text of the pool",
        ),
    }  # fmt: skip


def test_wrong_input_is_one_line_that_says_what_to_do_and_leaves_nothing(tmp_path, inputs, capsys):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in QUICK.items()]
    for name, (changes, said) in wrong(tmp_path).items():
        given = {**inputs, "out": tmp_path / "out", **changes}
        pool = given.pop("pool")
        command = ["fit", *(f"--{key}={value}" for key, value in given.items()), *options, "--quiet", "--pool"]
        assert main([*command, *map(str, pool if isinstance(pool, list) else [pool])]) == 1, name
        told = capsys.readouterr()
        assert told.out == "", name
        (line,) = [line for line in told.err.splitlines() if line.startswith("mates-hf: ")]
        assert re.search(said, line), (name, line)
        assert not list(tmp_path.glob("out*")), name


@pytest.mark.parametrize("option", ["--warm-steps=0", "--learning-rate=0", "--dtype=float8", "--seed=x", "--nonsense"])
def test_usage_is_exit_2(inputs, option, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["fit", *(f"--{name}={value}" for name, value in inputs.items()), option])
    assert ended.value.code == 2
    assert option.partition("=")[0].strip("-").replace("-", "_") in capsys.readouterr().err.replace("-", "_")


def test_a_setting_that_is_not_known_is_named():
    with pytest.raises(TypeError, match="`probes` is no setting of a fit. The settings are warm_steps"):
        fit_selector("m", "p", "r", "o", probes=3)


def test_too_few_rows_say_what_would_do():
    settings = FitSettings(num_probes=100, batch_size=8, warm_steps=50)
    with pytest.raises(ValueError, match="at least 200 rows of text") as refused:
        split_rows(150, settings)
    assert "`num_probes` to at most 78" in str(refused.value)
    assert len(split_rows(200, settings)[1]) == 100
    assert len(split_rows(150, FitSettings(num_probes=78, batch_size=8, warm_steps=50))[1]) == 78
    with pytest.raises(ValueError, match="set `batch_size` to at most 20"):
        split_rows(40, FitSettings(num_probes=10, batch_size=32))
    assert len(split_rows(40, FitSettings(num_probes=10, batch_size=20))[0]) == 20


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"micro_batch_size": 2, "gradient_checkpointing": True, "device": "auto"},
        {"dtype": "bfloat16", "device": "auto"},
    ],
    ids=["cost", "bfloat16"],
)
def test_what_changes_the_cost_alone_gives_nearly_the_same(fitted, inputs, tmp_path, changes):
    found = fit({**inputs, "out": tmp_path / "selector"}, **changes)
    texts = Dataset.from_dict({"text": make_texts(200, seed=6)})
    one, two = (each.selector.score(texts).influence for each in (fitted, found))
    assert np.corrcoef(one, two)[0, 1] > (0.95 if "dtype" in changes else 0.999)
    if "dtype" not in changes:
        assert fit({**inputs, "out": tmp_path / "selector"}).about == found.about  # they may differ where it continues


@pytest.mark.slow
def test_a_small_pool_is_trained_on_several_times(tmp_path, inputs, caplog):
    texts = Dataset.from_dict({"text": make_texts(240)})
    given = {**inputs, "pool": texts, "out": tmp_path / "selector"}
    with caplog.at_level(logging.INFO):
        found = fit(given, num_probes=100, min_spearman=-1.0)
    assert found.about["num_trained"] == 120
    assert "several times" in caplog.text


# ---- real processes

RUN = """
import os, signal, sys
from mates_hf.training.fit import place, warm_up
where = sys.argv[1]

def dies(module, name, times):
    whole, calls = getattr(module, name), []
    def wrapped(*args, **kwargs):
        calls.append(0)
        if len(calls) == times:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*args, **kwargs)
    setattr(module, name, wrapped)

if where == "steps":  # behind the first checkpoint, amid the mean of the weights
    dies(warm_up.WeightAverage, "update", 5)
elif where == "probe":  # one of the shards is there
    from mates_hf.influence import shards
    dies(shards, "write_array", 2)
elif where == "write":
    dies(place, "sync_tree", 1)
from mates_hf.cli import main
sys.exit(main(sys.argv[2:]))
"""


def command(given: dict[str, Any], **changes: Any) -> list[str]:
    settings = {**QUICK, "warm_steps": 50, "num_probes": 600, "pool_rows": 1300, **changes}
    options = {**given, **{name.replace("_", "-"): value for name, value in settings.items()}}
    return ["fit", *(f"--{name}={value}" for name, value in options.items()), "--quiet", "--json"]


def ended(arguments: list[str], size: int = 1) -> tuple[list[int], list[str]]:
    """Exit codes and errors of processes that were started with these arguments."""
    processes = start_processes(arguments, size, free_port() if size > 1 else "")
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], errors


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """What a fit in a process of its own gives that is not stopped."""
    folder = tmp_path_factory.mktemp("whole")
    given = write_all(folder, num_texts=1300)
    (folder / "run.py").write_text(RUN, encoding="utf-8")
    codes, errors = ended([str(folder / "run.py"), "nowhere", *command(given)])
    assert codes == [0], errors
    return given, folder


def model_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("where", ["steps", "probe", "write"])
def test_a_fit_that_is_killed_continues_with_the_same_selector(whole, tmp_path, where):
    given, folder = whole
    out = tmp_path / "selector"
    arguments = command({**given, "out": str(out)})
    codes, errors = ended([str(folder / "run.py"), where, *arguments])
    assert codes == [-signal.SIGKILL], errors
    assert not out.exists()
    work = tmp_path / "selector.fit"
    kept = {path: path.stat().st_mtime_ns for path in (work / "probe").rglob("*") if path.is_file()}
    if where == "steps":
        assert [path.name for path in (work / "warm-up").glob("checkpoint-*")] == ["checkpoint-25"]
    elif where == "probe":
        assert work / "probe/probe_shards/0.npy" in kept
    codes, errors = ended(["-c", WATCHED, str(tmp_path / "seen.json"), *arguments, "--keep-work"])
    assert codes == [0], errors
    assert model_of(out) == model_of(folder / "selector")
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert seen["steps"] == {"steps": 25}.get(where, 0)  # of the warm-up, which 25 were done of
    assert seen["shards"] == {"steps": 2, "probe": 1}.get(where, 0)
    if where == "write":
        assert all(path.stat().st_mtime_ns == when for path, when in kept.items())


WATCHED = """
import json, sys
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.training.fit import warm_up
seen = {"steps": 0, "shards": 0}

def counts(kind, name, key):
    whole = getattr(kind, name)
    def wrapped(self, *args, **kwargs):
        if key == "steps" or len(args[2]) > 64:
            seen[key] += 1
        return whole(self, *args, **kwargs)
    setattr(kind, name, wrapped)

counts(warm_up._WarmUp, "on_step_end", "steps")
counts(DirectionalProbe, "directional_derivatives", "shards")
from mates_hf.cli import main
code = main(sys.argv[2:])
open(sys.argv[1], "w").write(json.dumps(seen))
sys.exit(code)
"""


@pytest.mark.slow
def test_two_processes_fit_the_selector_of_one(whole, tmp_path):
    given, folder = whole
    out = tmp_path / "selector"
    codes, errors = ended([str(folder / "run.py"), "nowhere", *command({**given, "out": str(out)})], size=2)
    assert codes == [0, 0], errors
    one, two = (json.loads((path / ABOUT_FILE).read_text()) for path in (folder / "selector", out))
    assert two["num_processes"] == 2
    assert two["reference_loss"] == pytest.approx(one["reference_loss"], rel=1e-4)
    assert two["fit"]["spearman"] == pytest.approx(one["fit"]["spearman"], abs=5e-3)
    texts = Dataset.from_dict({"text": make_texts(400, seed=6)})
    first, second = (MatesSelector.from_pretrained(path).score(texts).influence for path in (folder / "selector", out))
    np.testing.assert_allclose(first, second, atol=1e-2 * np.abs(first).max())
    assert share_of_good(MatesSelector.from_pretrained(out)) > 0.9


@pytest.mark.slow
def test_an_error_in_one_process_ends_all_by_name(whole, tmp_path):
    given, _ = whole
    broken = RUN.replace(
        "from mates_hf.cli import main",
        "if os.environ['RANK'] == '1':\n"
        "    sys.argv = [one.replace('passages.jsonl', 'none.jsonl') for one in sys.argv]\n"
        "from mates_hf.cli import main",
    )
    (tmp_path / "run.py").write_text(broken, encoding="utf-8")
    arguments = [str(tmp_path / "run.py"), "nowhere", *command({**given, "out": str(tmp_path / "selector")})]
    codes, errors = ended(arguments, size=2)
    assert 0 not in codes, errors
    assert "`reference` must be files that are there" in errors[1]
    assert re.search(r"Process 1 of 2 .*`reference` must be files that are there", errors[0])
    assert not (tmp_path / "selector").exists()


def test_without_a_model_it_is_a_filter_by_words(inputs, tmp_path, capsys, caplog) -> None:
    given = {**inputs, "model": None, "tokenizer": inputs["model"], "out": str(tmp_path / "filter"), "progress": False}
    found = fit_selector(**given, max_length=32, distil=True, device="cpu")
    assert share_of_good(found.selector) == 1
    assert (
        MatesSelector.from_pretrained(tmp_path / "filter-text")
        .filter(Dataset.from_dict({"text": make_texts(200, seed=5)}), ratio=0.25)
        .num_rows
        == 50
    )
    assert found.flops == 0 < found.seconds
    with pytest.raises(MatesError, match="has no labels to predict"):
        _ = found.report
    lines = "\n".join(found.lines())
    assert "model: none, a filter by words" in lines
    assert re.search(r"ranks above a row of the pool in (8|9)\d% of pairs", lines)  # a fourth of them is as good
    assert not (tmp_path / "filter.fit").exists()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "filter").rglob("*")}
    assert fit_selector(**given, max_length=32).to_dict()["separation"] == found.about["separation"]  # nothing anew
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "filter").rglob("*")} == times
    with pytest.raises(MatesError, match="holds the selector of another fit; they differ in `seed`"):
        fit_selector(**given, max_length=32, seed=1)
    arguments = [
        "fit", "--tokenizer", inputs["model"], "--pool", inputs["pool"], "--reference", inputs["reference"], "--out",
        str(tmp_path / "other"), "--max-length", "32", "--quiet",
    ]  # fmt: skip
    assert main(arguments) == 0
    assert "a filter by words" in capsys.readouterr().out
    ours, theirs = (MatesSelector.from_pretrained(tmp_path / name) for name in ("filter", "other"))
    texts = Dataset.from_dict({"text": make_texts(50, seed=6)})
    assert np.array_equal(ours.score(texts).influence, theirs.score(texts).influence)


def test_without_a_model_what_means_nothing_is_refused(inputs, tmp_path, capsys) -> None:
    given = {**inputs, "model": None, "out": str(tmp_path / "filter"), "progress": False}
    with pytest.raises(ValueError, match="`tokenizer` must be named where no model is"):
        fit_selector(**given)
    given["tokenizer"] = inputs["model"]
    with pytest.raises(ValueError, match="`warm_steps`, `num_probes` mean nothing where no model is asked"):
        fit_selector(**given, warm_steps=3, num_probes=50)
    with pytest.raises(ValueError, match="cannot be read"):
        fit_selector(**{**given, "tokenizer": str(tmp_path / "none")})
    with pytest.raises(ValueError, match="must not be text of the pool"):
        fit_selector(**{**given, "reference": given["pool"]})
    tokens = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 30})
    with pytest.raises(ValueError, match="`distil` must have a pool of texts"):
        fit_selector(**{**given, "pool": tokens}, distil=True)
    assert list(tmp_path.iterdir()) == []
    command = ["fit", "--pool", inputs["pool"], "--reference", inputs["reference"], "--out", str(tmp_path / "z")]
    assert main([*command, "--quiet"]) == 1
    assert "`tokenizer` must be named where no model is" in capsys.readouterr().err


@pytest.mark.slow
def test_two_processes_write_one_filter_by_words(tmp_path) -> None:
    given = write_all(tmp_path)
    tokenizer_of = given.pop("model")
    (tmp_path / "run.py").write_text(RUN, encoding="utf-8")
    options = {**given, "tokenizer": tokenizer_of, "max-length": 32, "device": "cpu"}
    arguments = ["fit", *(f"--{name}={value}" for name, value in options.items()), "--quiet", "--json"]
    codes, errors = ended([str(tmp_path / "run.py"), "nowhere", *arguments], size=2)
    assert codes == [0, 0], errors
    assert share_of_good(MatesSelector.from_pretrained(given["out"])) == 1
    assert not Path(given["out"] + ".fit").exists()
