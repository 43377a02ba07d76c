"""Is the cost ledger right, what does selection cost a small run, and what would it cost Pythia models?

Measured: a real `Trainer` with `MatesCallback`, once for each of two models under torch's `FlopCounterMode`, stage by
stage, and once without it for seconds; the ledger of `mates-hf cost` stands beside both. Predicted, and only that: the
overhead at the paper's schedule (arXiv:2406.06046), ours and the paper's own way, from `mates_hf.reporting.forecast`.

Trade-off: the runs are small, so that anyone can repeat them, and their rounds are close together, which makes every
share look large. Shares of wall-clock in the predicted table rest on speeds measured at small size
(`probe_speed`, `fit_and_score`) and on the devices' speeds that the table states.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.lab.corpus import VOCAB, as_dataset, as_reference, text_rows
from benchmarks.lab.harness import Bench, newest
from benchmarks.lab.machine import temporary_folder
from benchmarks.lab.models import build_model, llama, trainer_of
from benchmarks.lab.tables import figure, figures_page, markdown, table
from mates_hf.config import MatesConfig
from mates_hf.data.reference import ReferenceTask
from mates_hf.influence.probe import count_multiplied_parameters, count_parameters
from mates_hf.reporting.cost import RunCost, run_cost
from mates_hf.reporting.forecast import Encoder, PredictedCost, RunSize, predict_cost
from mates_hf.training.callback import MatesCallback
from mates_hf.training.run import Stages

LENGTH = 64
# All parameters and those of the input embedding, of GPT-NeoX models with these vocabularies, untied.
PYTHIA = {
    "Pythia-410M": (405_334_016, 50_304 * 1024),
    "Pythia-1B": (1_011_781_632, 50_304 * 2048),
    "Pythia-6.9B": (6_857_302_016, 50_432 * 4096),
}
REPORTED = {"Pythia-410M": 0.22, "Pythia-1B": 0.115}  # overhead that the paper states, of all FLOPs
# Training FLOPs a second over all devices. The first is what 8 A6000 reach if a 410M run takes the two days that the
# paper's authors state, the second 8 H100 at 40 % of their peak.
DEVICES = {"3.2e14 FLOP/s": 3.2e14, "3.2e15 FLOP/s": 3.2e15}
MOST_FLOPS, MOST_SECONDS = 0.01, 0.03  # what rounds may take, relative to training


MODELS: dict[str, Callable[[], Any]] = {
    "Llama, tied": lambda: llama(width=64, layers=2, heads=2),
    "GPT-NeoX, untied": lambda: build_model(VOCAB, width=64, tied=False),
}


@contextlib.contextmanager
def counted_stages() -> Iterator[dict[str, int]]:
    """FLOPs of each stage of the rounds run inside, by torch's counter."""
    counts: dict[str, int] = {}
    timed = Stages.timed

    @contextlib.contextmanager
    def counted(self: Stages, name: str) -> Iterator[dict[str, float]]:
        with FlopCounterMode(display=False) as counter, timed(self, name) as cost:
            yield cost
        counts[name] = counts.get(name, 0) + counter.get_total_flops()

    with mock.patch.object(Stages, "timed", counted):
        yield counts


def measure(
    make: Callable[[], Any], rows: Dataset, reference: ReferenceTask, config: MatesConfig, steps: int
) -> dict[str, Any]:
    """The ledger of one run, and torch's counts of its twin."""

    def train() -> RunCost:
        model = make()
        model.set_attn_implementation("eager")  # the counter does not know the CPU's fused attention
        with temporary_folder(None) as folder:
            trainer = trainer_of(model, rows, folder, steps, 8, [MatesCallback(reference, config)])
            trainer.train()
            trainer.save_state()
            return dataclasses.replace(run_cost(str(folder)), run_dir="")

    with FlopCounterMode(display=False) as whole, counted_stages() as counts:
        train()
    ledger, model = train(), make()
    training = whole.get_total_flops() - sum(counts.values())
    return {
        "parameters": count_parameters(model),
        "multiplied": count_multiplied_parameters(model),
        "trainer": model.num_parameters(exclude_embeddings=True),
        "counted": {"training": training, **counts},
        "ledger": ledger.to_dict(),
    }


def measured_figures(name: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """Ledger over counter, stage by stage, and shares of the run."""
    ledger, counted = found["ledger"], found["counted"]
    recorded = {"training": ledger["training"]["flops"]}
    recorded.update({stage: cost["flops"] for stage, cost in ledger["stages"].items() if cost["flops"] is not None})
    figures = [
        figure(f"{name}: FLOPs of {stage}, ledger / counted", flops / counted[stage], "x", least=0.8)
        for stage, flops in recorded.items()
        if counted.get(stage)  # tables are fitted and looked up without torch
    ]
    probing = sum(flops for stage, flops in counted.items() if stage != "training")
    share = probing / counted["training"]
    # All parameters against the Trainer's, which leave a tied head out: the two counts that would be at hand.
    mixed = ledger["mates"]["share_of_training_flops"] * found["parameters"] / found["trainer"]
    return [
        *figures,
        figure(f"{name}: FLOPs of rounds / of training, counted", 100 * share, "%"),
        figure(f"{name}: the same, ledger", 100 * ledger["mates"]["share_of_training_flops"], "%"),
        figure(f"{name}: by all parameters / `total_flos`", 100 * mixed, "%"),
        figure(f"{name}: seconds of rounds, of the run", 100 * ledger["mates"]["share_of_seconds"], "%"),
        figure(f"{name}: devices idle in rounds, of the run, at most", 100 * ledger["idle_share"], "%"),
    ]


# --- predicted ---


def speeds() -> dict[str, float]:
    """What the wall-clock of the prediction assumes, from the committed results of two other benchmarks."""

    def value(name: str, what: str) -> float:
        found = newest(name)["figures"]
        (line,) = [line for line in found if line["what"] == what]
        return float(line["value"])

    passes = "tokens/s of DirectionalProbe / two plain forward passes, gradient and ε spread over 2,000"
    column = "M tokens/s, Arrow column through CandidatePool and `predict`, 2 threads"
    return {
        "relative_utilisation": value("probe_speed", passes),
        "score_tokens_per_second": 1e6 * value("fit_and_score", column),
        "fit_tokens_per_second": 1e6 * value("fit_and_score", "M labelled tokens/s, fitting many candidates"),
    }


def size_of(model: str) -> RunSize:
    """A Pythia model at the paper's schedule, LAMBADA as the reference."""
    parameters, looked_up = PYTHIA[model]
    return RunSize(
        num_parameters=parameters, num_looked_up=looked_up, tokens_per_row=1024, batch_rows=512, max_steps=50_000,
        num_passages=1024, tokens_per_passage=90,
    )  # fmt: skip


def ours(model: str, num_probes: int, update_steps: int = 10_000) -> PredictedCost:
    """The directional probe and the n-gram model."""
    return predict_cost(size_of(model), MatesConfig(update_steps=update_steps, num_probes=num_probes))


def theirs(model: str, num_probes: int = 80_000) -> PredictedCost:
    """The one-step probe, which reads the reference for each candidate, and bert-base."""
    config = MatesConfig.paper(num_probes=num_probes)
    return predict_cost(size_of(model), config, probe="one_step", encoder=Encoder())


def ways(model: str) -> dict[str, PredictedCost]:
    """The rows of the table for one model."""
    default, steps = MatesConfig().num_probes, MatesConfig().update_steps
    return {
        "ours, 80,000 probes a round": ours(model, 80_000),
        f"ours, {default:,} probes a round (default)": ours(model, default),
        f"ours, {default:,} probes, a round each {steps:,} steps (all defaults)": ours(model, default, steps),
        "the paper's way": theirs(model),
    }


def seconds_share(cost: PredictedCost, flops_per_second: float, assumed: dict[str, float]) -> dict[str, float]:
    """Seconds of rounds relative to those of training: on the devices, idle, together."""
    tokens_per_second = flops_per_second * cost.trained_tokens / cost.training_flops
    device = cost.device_seconds_share(assumed["relative_utilisation"])
    idle = cost.idle_seconds_share(
        training_tokens_per_second=tokens_per_second,
        **{name: value for name, value in assumed.items() if name != "relative_utilisation"},
    )
    return {"device": device, "idle": idle, "together": device + idle}


def most_probes(fits: Callable[[int], bool], most: int = 10**7) -> int:
    """The largest number of probes a round that fits, as more cost more; 0 where ten do not."""
    num_fitting = bisect.bisect_left(range(10, most + 1), True, key=lambda num: not fits(num))
    return 9 + num_fitting if num_fitting else 0


def predict(assumed: dict[str, float]) -> dict[str, Any]:
    """All rows of the table."""
    return {
        model: {
            way: {
                **dataclasses.asdict(cost),
                "share_of_training": cost.share_of_training,
                "share_of_all": cost.share_of_all,
                "seconds": {name: seconds_share(cost, rate, assumed) for name, rate in DEVICES.items()}
                if way.startswith("ours")
                else None,
            }
            for way, cost in ways(model).items()
        }
        for model in PYTHIA
    }


def predicted_figures(assumed: dict[str, float]) -> list[dict[str, Any]]:
    """The targets at 410M, and where they are met."""
    model = "Pythia-410M"
    figures = []

    def add(of: str, where: str, share: Callable[[PredictedCost], float], most: float) -> None:
        """What 80,000 probes a round take of what training takes, and how many take no more than the target."""
        what = f"predicted, {model}, ours, 80,000 probes a round: {of} of rounds / of training{where}"
        figures.append(figure(what, 100 * share(ours(model, 80_000)), "%", most=100 * most))
        fits = most_probes(lambda num: share(ours(model, num)) <= most)
        figures.append(figure(f"predicted, {model}: most probes a round within {most:.0%} of {of}{where}", fits))

    add("FLOPs", "", lambda cost: cost.share_of_training, MOST_FLOPS)
    for name, rate in DEVICES.items():
        add(
            "seconds",
            f", {name}",
            lambda cost, rate=rate: seconds_share(cost, rate, assumed)["together"],
            MOST_SECONDS,
        )
    for name, reported in REPORTED.items():
        cost = theirs(name)
        what = f"predicted, {name}, the paper's way"
        score = cost.stages["score"] / (cost.training_flops + sum(cost.stages.values()))
        figures.append(figure(f"{what}: of all FLOPs (the paper: {reported:.1%})", 100 * cost.share_of_all, "%"))
        figures.append(figure(f"{what}: scoring by bert-base alone, of all FLOPs", 100 * score, "%"))
    return figures


def predicted_section(predicted: dict[str, Any], assumed: dict[str, float]) -> list[str]:
    """The prediction."""
    about = [
        "## Predicted at the paper's schedule, not measured",
        "50,000 steps of 512 x 1,024 tokens, the first 10,000 in the Trainer's own order, then a round each 10,000 "
        "steps; 1,024 passages of 90 tokens; each round scores five times the rows that it selects. FLOPs: 2 a "
        "multiplied parameter and token forward, 6 with backward; the input embedding is looked up and does not "
        "count. Attention scores are left out on both sides.",
        f"Seconds, assumed: rounds reach {assumed['relative_utilisation']:.2f} of the FLOPs a second of training on "
        "the same devices (tokens a second of the probe over two plain forward passes, a model of 1.3 M parameters on "
        f"2 cores); fitting {assumed['fit_tokens_per_second'] / 1e6:.2f} M and scoring "
        f"{assumed['score_tokens_per_second'] / 1e6:.0f} M tokens a second on 2 cores, while the devices wait. "
        "Training at 3.2e14 FLOP/s over all devices (8 A6000, if 410M takes two days) or 3.2e15 (8 H100 at 40 %).",
    ]
    heads = [
        "model", "way", "rounds", "FLOPs of rounds / training", "probes", "fit, score", "of all FLOPs",
        "paper reports", *(f"seconds / training at {name} (idle)" for name in DEVICES),
    ]  # fmt: skip
    found = []
    for model, rows in predicted.items():
        for way, cost in rows.items():
            flops = {name: value / cost["training_flops"] for name, value in cost["stages"].items()}
            model_part = flops["fit"] + flops["score"]
            probes = sum(flops.values()) - model_part
            reported = REPORTED.get(model) if cost["seconds"] is None else None
            seconds = [
                "" if cost["seconds"] is None else f"{of['together']:.2%} ({of['idle']:.2%})"
                for of in (cost["seconds"] or dict.fromkeys(DEVICES)).values()
            ]
            found.append([
                model, way, str(cost["num_rounds"]), f"{cost['share_of_training']:.3%}", f"{probes:.3%}",
                f"{model_part:.2g}" if model_part < 1e-5 else f"{model_part:.2%}", f"{cost['share_of_all']:.3%}",
                "" if reported is None else f"{reported:.1%}", *seconds,
            ])  # fmt: skip
    return [*about, table(heads, found)]


def page(document: dict[str, Any]) -> str:
    """Figures, then the prediction."""
    raw = document["raw"]
    return markdown(figures_page("overhead", document), *predicted_section(raw["predicted"], raw["assumed"]))


def run(bench: Bench) -> dict[str, Any]:
    """Measure and predict."""
    torch.set_num_threads(bench.options.threads)
    pool, reference_rows = text_rows(LENGTH)
    rows, reference = as_dataset(pool), as_reference(reference_rows, 4 if bench.quick else 16)
    config = MatesConfig(
        update_steps=8 if bench.quick else 24, num_probes=20 if bench.quick else 40, selection_ratio=0.25,
        average_steps=0, on_weak_signal="select",
    )  # fmt: skip
    steps = 14 if bench.quick else 40
    found = {name: measure(make, rows, reference, config, steps) for name, make in MODELS.items()}
    assumed = speeds()
    figures = [line for name, run in found.items() for line in measured_figures(name, run)]
    settings = {
        "runs": f"{steps} steps of 8 x {LENGTH} tokens, eager attention", "update_steps": config.update_steps,
        "num_probes": config.num_probes, "selection_ratio": config.selection_ratio,
        "reference": f"{len(reference)} x {LENGTH}",
        **{f"parameters of {name}": run["parameters"] for name, run in found.items()},
        **{f"of these multiplied, {name}": run["multiplied"] for name, run in found.items()},
    }  # fmt: skip
    raw = {"runs": found, "assumed": assumed, "devices": DEVICES, "reported": REPORTED, "predicted": predict(assumed)}
    return bench.figures(settings, [*figures, *predicted_figures(assumed)], raw)
