# /// script
# requires-python = ">=3.10"
# dependencies = ["mates-hf"]
# ///
"""How fast `DirectionalProbe` is against `OneStepProbe` and two plain forward passes, and what memory it takes.

    python benchmarks/probe_speed.py            # writes benchmarks/results/probe_speed.{json,md}
    python benchmarks/probe_speed.py --quick    # prints, writes nothing unless --out is given

Arms take turns within one process, and figures are medians over the turns of ratios within a turn, so they do not
depend on how fast the machine is. `callback_cost.py` and `fit_and_score.py` use the helpers in the first half.

Trade-off: a model of 1.3 M parameters and 2 cores, so that anyone can repeat it; larger models spend a smaller share
of their time outside of matrix products, which favours every ratio here.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from torch.nn import functional
from tqdm.auto import tqdm

from mates_hf.data.corpus import builtin_corpus
from mates_hf.data.reference import ReferenceTask
from mates_hf.data.rows import TokenRows
from mates_hf.influence.difference import choose_epsilon
from mates_hf.influence.passes import mean_loss
from mates_hf.influence.probe_directional import DirectionalProbe
from mates_hf.influence.probe_one_step import OneStepProbe

RESULTS = Path(__file__).parent / "results"
VOCAB = 4096
LENGTH = 256
NUM_REFERENCE = 64
# Every large block comes from the heap and stays there: otherwise each logits tensor is page-faulted in anew, in
# either arm, by an amount that depends on its size rather than on the work.
_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**26),
}


def start(description: str) -> argparse.Namespace:
    """Read `--quick`, `--threads` and `--out`; start the process again with steady memory; set the threads."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less than 40 s on 2 cores; too short to report")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of torch")
    parser.add_argument(
        "--out", type=Path, default=None, help="folder of the results; a quick run has none of its own"
    )
    arguments = parser.parse_args()
    if not _MALLOC.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **_MALLOC})
    torch.set_num_threads(arguments.threads)
    if arguments.out is None and not arguments.quick:
        arguments.out = RESULTS
    return arguments


def hardware(threads: int) -> dict[str, Any]:
    """What the figures were measured on."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
    }


def alternate(arms: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each arm in each of `repeats` turns; every other turn goes through the arms backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    bar = tqdm(total=repeats * len(arms), desc="turns", unit="arm", leave=False, disable=None)
    for turn in range(repeats):
        for name in list(arms)[:: -1 if turn % 2 else 1]:
            begin = time.perf_counter()
            arms[name]()
            seconds[name].append(time.perf_counter() - begin)
            bar.update()
    bar.close()
    return seconds


def median_ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median over turns of a / b."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def figure(
    what: str, value: float, unit: str, *, least: float | None = None, most: float | None = None
) -> dict[str, Any]:
    """One line of a result, with its target where it has one."""
    met = None if least is None and most is None else (value >= least if least is not None else value <= (most or 0.0))
    return {"what": what, "value": value, "unit": unit, "least": least, "most": most, "met": met}


def write_results(
    name: str,
    arguments: argparse.Namespace,
    settings: Mapping[str, Any],
    figures: Sequence[Mapping[str, Any]],
    raw: Any,
) -> None:
    """Print the table, and write `<name>.json` and `<name>.md` where there is a folder for them."""
    payload = {
        "quick": arguments.quick, "hardware": hardware(arguments.threads), "settings": settings, "figures": figures,
        "raw": raw,
    }  # fmt: skip
    text = page_of(name, payload)
    print(text)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / f"{name}.json").write_text(json.dumps(payload, indent=1) + "\n", encoding="utf-8")
        (arguments.out / f"{name}.md").write_text(text, encoding="utf-8")


def page_of(name: str, payload: Mapping[str, Any]) -> str:
    """The page of a result, from what its JSON holds."""
    lines = [f"# {name}{' (quick, not to be reported)' if payload['quick'] else ''}", ""]
    lines += [", ".join(f"{key} {value}" for key, value in payload["hardware"].items()) + ".", ""]
    lines += ["Settings: " + ", ".join(f"{key} {value}" for key, value in payload["settings"].items()) + ".", ""]
    lines += ["| what | measured | target | met |", "|---|---|---|---|"]
    for line in payload["figures"]:
        goal = (
            f"≥ {line['least']:g}"
            if line["least"] is not None
            else ""
            if line["most"] is None
            else f"≤ {line['most']:g}"
        )
        met = "" if line["met"] is None else "yes" if line["met"] else "**no**"
        lines.append(f"| {line['what']} | {line['value']:.4g} {line['unit']} | {goal} | {met} |")
    return "\n".join(lines) + "\n"


def text_rows(length: int = LENGTH) -> tuple[TokenRows, TokenRows]:
    """The built-in corpus in a byte-level BPE of its own, cut to rows of one length: candidates, reference rows."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    corpus = builtin_corpus(seed=0)
    texts = [row["text"] for row in corpus.pool]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=VOCAB, initial_alphabet=alphabet, show_progress=False)
    )

    def cut(parts: list[str]) -> TokenRows:
        ids = np.concatenate([np.asarray(found.ids, np.int32) for found in tokenizer.encode_batch(parts)])
        num = len(ids) // length
        return TokenRows(values=ids[: num * length], offsets=np.arange(num + 1, dtype=np.int64) * length)

    return cut(texts), cut(corpus.reference)


def as_reference(rows: TokenRows, num: int = NUM_REFERENCE) -> ReferenceTask:
    """The first `num` rows as a reference task."""
    lists = [rows.row(i)[0].tolist() for i in range(num)]
    return ReferenceTask.from_dataset(Dataset.from_dict({"input_ids": lists}), input_ids_column="input_ids")


def trainer_arguments(folder: str, steps: int, batch: int) -> Any:
    """`TrainingArguments` of a quiet run at a constant rate, without checkpoints, on the CPU."""
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=10**6,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )


def make_model(*, width: int = 128, layers: int = 4, vocab: int = VOCAB) -> Any:
    """A Llama with tied embeddings: 1.3 M parameters as it stands."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def train_some(model: Any, rows: TokenRows, num_steps: int, batch: int = 8) -> torch.optim.Optimizer:
    """AdamW after `num_steps` steps on the rows, so that its state is a real one."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    length = int(rows.lengths[0])
    ids = torch.from_numpy(rows.values.astype(np.int64)).view(-1, length)
    for step in range(num_steps):
        chosen = ids[step * batch : (step + 1) * batch]
        model(input_ids=chosen, labels=chosen, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def probe_arms(model: Any, optimizer: Any, reference: ReferenceTask, rows: TokenRows) -> dict[str, Callable[[], Any]]:
    """The parts of `DirectionalProbe.measure`: what is paid once a round, and what is paid for each candidate."""
    probe = DirectionalProbe()
    direction = probe.compute_direction(model, optimizer, reference, rows)

    def either_side(part: TokenRows, epsilon: float) -> Any:
        return probe.directional_derivatives(model, direction, part, epsilon)

    return {
        "direction": lambda: probe.compute_direction(model, optimizer, reference, rows),
        "epsilon": lambda: choose_epsilon(model, direction, rows, either_side, seed=0),
        "derivatives": lambda: either_side(rows, 1e-3),
    }


def plain_pass(model: Any, ids: torch.Tensor, batch: int) -> torch.Tensor:
    """Loss of every token by a plain loop, the quickest that is still plain: no cache, no copy of the logits."""
    labels = functional.pad(ids[:, 1:], (0, 1), value=-100)
    losses = []
    with torch.no_grad():
        for i in range(0, len(ids), batch):
            logits = model(input_ids=ids[i : i + batch], use_cache=False).logits
            losses.append(
                functional.cross_entropy(logits.flatten(0, 1), labels[i : i + batch].flatten(), reduction="none")
            )
    return torch.cat(losses)


def best_batch(model: Any, ids: torch.Tensor, repeats: int) -> tuple[int, dict[int, float]]:
    """The batch size at which `plain_pass` is quickest, and seconds a row for each that was tried."""
    sizes = (1, 2, 4, 8, 16, 32)
    arms = {str(size): functools.partial(plain_pass, model, ids, size) for size in sizes}
    found = {int(size): min(seconds) / len(ids) for size, seconds in alternate(arms, repeats).items()}
    return min(found, key=lambda size: found[size]), found


def peak_bytes(work: Callable[[], Any]) -> int:
    """Most bytes of tensor memory that `work` held at once, beyond what was there; temporaries of kernels included."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return int(np.cumsum([change for _, change in changes]).max())


def measure_memory(quick: bool) -> dict[str, float]:
    """Peak extra memory of the probe in units of the parameters' bytes, on a model whose parameters dominate."""
    length, rows_per_batch = 32, 2
    model = make_model(width=256 if quick else 512, layers=6, vocab=1024)
    rng = np.random.default_rng(0)

    def random_rows(num: int) -> TokenRows:
        ids = rng.integers(0, 1024, num * length)
        return TokenRows(values=ids, offsets=np.arange(num + 1, dtype=np.int64) * length)

    rows, reference_rows = random_rows(16), random_rows(8)
    optimizer = train_some(model, rows, 2, rows_per_batch)
    reference = as_reference(reference_rows, 8)
    parameter_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    probe = DirectionalProbe(tokens_per_batch=rows_per_batch * length)
    whole = peak_bytes(lambda: probe.measure(model, optimizer, reference, rows))

    # One micro-batch as a training step accumulates it: the gradients it is added to are there already.
    ids = torch.from_numpy(reference_rows.values).view(-1, length)[:rows_per_batch]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    micro = peak_bytes(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss.backward())
    return {
        "parameter_bytes": parameter_bytes,
        "peak": whole / parameter_bytes,
        "micro_batch": micro / parameter_bytes,
        "extra": (whole - micro) / parameter_bytes,
    }


def main() -> None:
    """Measure, print and write."""
    arguments = start(__doc__ or "")
    num_candidates, num_oracle, repeats = (64, 2, 2) if arguments.quick else (512, 6, 3)
    memory = measure_memory(arguments.quick)
    pool, reference_rows = text_rows()
    reference = as_reference(reference_rows)
    model = make_model()
    optimizer = train_some(model, pool, 4 if arguments.quick else 20)
    model.eval()
    rows = pool.take(np.arange(200, 200 + num_candidates))
    few = rows.take(np.arange(num_oracle))
    ids = torch.from_numpy(rows.values.astype(np.int64)).view(-1, LENGTH)
    plain_pass(model, ids[:32], 8)
    batch, tried = best_batch(model, ids[:32], 1 if arguments.quick else 3)
    arms = probe_arms(model, optimizer, reference, rows)
    arms["measure"] = lambda: DirectionalProbe().measure(model, optimizer, reference, rows)
    arms["one_step"] = lambda: OneStepProbe().measure(model, optimizer, reference, few)
    arms["reference_loss"] = lambda: mean_loss(model, reference.rows)
    arms["plain_twice"] = lambda: (plain_pass(model, ids, batch), plain_pass(model, ids, batch))
    seconds = {name: np.array(values) for name, values in alternate(arms, repeats).items()}

    # The oracle's reading of the reference after the null step is paid once a round; without it, its rate is that of
    # many candidates.
    oracle = (seconds["one_step"] - seconds["reference_loss"]) / num_oracle
    once = seconds["direction"] + seconds["epsilon"]
    each = seconds["derivatives"] / num_candidates

    def times_oracle(cost: npt.NDArray[np.float64]) -> float:
        return float(np.median(oracle / cost))

    allowed = (3 * LENGTH + NUM_REFERENCE * LENGTH) / (2 * LENGTH)
    spread = {num: once / num + each for num in (512, 2000)}
    plain = seconds["plain_twice"] / num_candidates
    whole = seconds["measure"] / num_candidates
    goal = None if arguments.quick else 20.0  # 60 % of what FLOPs allow
    against = "candidates/s, DirectionalProbe / OneStepProbe"
    passes = "tokens/s of DirectionalProbe / two plain forward passes"
    figures = [
        figure(f"{against}, each candidate alone", times_oracle(each), "x"),
        figure(f"{against}, `measure` of {num_candidates} (all included)", times_oracle(whole), "x", least=goal),
        *(
            figure(f"{against}, from parts: gradient and ε spread over {num:,}", times_oracle(cost), "x", least=20.0)
            for num, cost in spread.items()
        ),
        figure(
            f"share of the {allowed:.1f} x that FLOPs allow each candidate",
            times_oracle(each) / allowed,
            "",
            least=0.6,
        ),
        figure(f"{passes}, without reference gradient and ε", float(np.median(plain / each)), "x", least=0.8),
        *(
            figure(f"{passes}, gradient and ε spread over {num:,}", float(np.median(plain / cost)), "x")
            for num, cost in spread.items()
        ),
        figure(
            "`measure` / the sum of its parts, seconds", float(np.median(whole / (once / num_candidates + each))), "x"
        ),
        figure("tokens/s of DirectionalProbe, each candidate alone", LENGTH / float(np.median(each)), ""),
        figure(
            "peak extra memory / trainable parameters' bytes, less one micro-batch", memory["extra"], "x", most=2.2
        ),
        figure("peak extra memory / trainable parameters' bytes, all of it", memory["peak"], "x"),
    ]
    settings = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "candidates": num_candidates,
        "oracle candidates": num_oracle,
        "tokens each": LENGTH,
        "reference": f"{NUM_REFERENCE} x {LENGTH}",
        "turns": repeats,
        "plain batch": f"{batch} rows (best of {sorted(tried)})",
        "memory model": f"{memory['parameter_bytes'] / 2**20:.0f} MiB",
    }
    raw = {"seconds": {name: list(values) for name, values in seconds.items()}, "plain": tried, "memory": memory}
    write_results("probe_speed", arguments, settings, figures, raw)


if __name__ == "__main__":
    main()
