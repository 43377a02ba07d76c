"""The page of `fidelity`, written from its JSON alone: it derives nothing that the JSON's arrays do not hold."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import zscore

from benchmarks.lab.statistics import spearman
from benchmarks.lab.tables import markdown, table

Units = dict[str, dict[str, Any]]
REFERENCES = {"all": "all tokens", "completion": "last word"}


def page(document: dict[str, Any]) -> str:
    """Markdown of all parts, from the JSON document of a run."""
    settings, units = document["settings"], document["units"]
    parts: dict[str, Units] = {}
    for name, unit in units.items():
        parts.setdefault(name.split("/")[0], {})[name] = unit
    head = (
        f"Made by `python -m benchmarks fidelity`. GPT-NeoX of {settings['parameters']:,} parameters, vocabulary "
        f"{settings['vocab_size']:,}, {settings['pool_rows']:,} rows of {settings['row_tokens']} tokens from "
        f"{len(settings['domains'])} domains, AdamW (betas 0.9 and 0.95, weight decay 0.1), batch "
        f"{settings['batch_rows']} rows, constant learning rate {settings['learning_rate']:g} after 20 warm-up steps, "
        f"gradients clipped to 1.0; what differs is said. Reference: {settings['reference_passages']} LAMBADA "
        f"passages, cut to their last 128 tokens; development losses: {settings['development_passages']} other ones. "
        f"Dropped for a shared 13-gram: {settings['documents_dropped']} documents of the pool, "
        f"{settings['development_passages_dropped']} development passages. Brackets are 95 % bootstrap intervals over "
        "candidates. Influence > 0 helps."
    )
    missing = f"**Not finished: {settings['missing']} units are left.**" if settings["missing"] else ""
    sections = {
        "in_batch": in_batch_section, "cost": cost_section, "horizon": horizon_section, "rounds": steadiness_section,
        "fit": fit_section,
    }  # fmt: skip
    blocks = [block for name, write in sections.items() if name in parts for block in write(parts[name], settings)]
    return markdown("# Fidelity of influence labels", head, missing, *blocks)


def with_interval(entry: dict[str, Any]) -> str:
    """A rank correlation and its interval."""
    low, high = entry["interval"]
    return f"{entry['spearman']:.3f} [{low:.3f}, {high:.3f}]"


def in_batch_section(units: Units, settings: dict[str, Any]) -> list[str]:
    """Agreement with the in-batch truth, one table a reference loss, one column a configuration."""
    about = (
        "Truth: reference loss after a real optimizer step on a batch minus the loss after the same step with the "
        f"candidate in the place of one row, mean over {settings['truth_batches']} batches, "
        f"{settings['truth_passages']} reference passages. Cells: Spearman over all candidates / on what is left "
        "after domain means are taken off both (pooled residuals). Of rows of many lengths, n tokens each, a label is "
        "the `mean` over tokens, its `sum` (n × mean), or `worth` (n × (mean − pool mean)); unless said, the "
        "mean. `one_step` is the paper's oracle; `perplexity difference` what ten steps on the reference passages "
        "take off the candidate's loss. All labels but the candidate's own loss predict a decrease. In bf16 labels "
        "are measured under autocast, against the float32 truth."
    )
    configurations = [
        [name.split("/")[1], str(unit["steps"]), str(unit["beta2"]), str(unit["clip"] or "off"),
         "12 to 64" if unit["many_lengths"] else "64", str(unit["batch_rows"]), f"{unit['learning_rate']:g}",
         f"{unit['family']}, {unit['parameters'] / 1e6:.2f} M", str(unit["seed"]), str(len(unit["candidate"])),
         " / ".join(f"{unit['truth_between_batches'][loss_on]:.3f}" for loss_on in REFERENCES)]
        for name, unit in units.items()
    ]  # fmt: skip
    heads = [
        "configuration", "steps before", "β2", "clipping", "tokens in a row", "batch rows", "learning rate", "model",
        "seed", "candidates", "truth of one batch against another's (all tokens / last word)",
    ]  # fmt: skip
    blocks = ["## One step: agreement with the in-batch truth", about, table(heads, configurations)]
    for loss_on, title in REFERENCES.items():
        labels = list(dict.fromkeys(label for unit in units.values() for label in unit["labels"][loss_on]))
        rows = []
        for label in labels:
            entries = [unit["agreement"][loss_on].get(label) for unit in units.values()]
            cells = ["" if e is None else f"{e['spearman']:.3f} / {e['within']['spearman']:.3f}" for e in entries]
            rows.append([label, *cells])
        configured = table(["label", *(name.split("/")[1] for name in units)], rows)
        blocks += [f"### Reference loss: {title}", configured]
    if "in_batch/late" not in units:
        return blocks
    main = units["in_batch/late"]["agreement"]
    heads = ["label", "all tokens", "all tokens, within domain", "last word", "last word, within domain"]
    rows = []
    for label in main["all"]:
        entries = [main[loss_on][label] for loss_on in REFERENCES]
        rows.append([label, *(with_interval(found) for entry in entries for found in (entry, entry["within"]))])
    return [*blocks, "Intervals at the configuration `late`:", table(heads, rows)]


def cost_section(units: Units, settings: dict[str, Any]) -> list[str]:
    """Seconds of each kind of label, and how often as fast as the oracle it is."""
    blocks = []
    for unit in units.values():
        nums, turns = unit["num_candidates"], unit["turns"]
        each = {name: np.array(seconds) / nums[name] for name, seconds in turns.items()}
        few = nums["one_step"]
        about = (
            f"One thread, {settings['warm']} steps in, candidates of {unit['row_tokens']} tokens, all "
            f"{unit['passages']} reference passages; reading those is included. Medians of "
            f"{len(next(iter(turns.values())))} turns, ratios within a turn. The oracle reads the passages again for "
            f"each candidate: it was given {few}, the others {max(nums.values()):,}."
        )
        rows = [
            [name, f"{1_000 * np.median(seconds):.1f}", f"{np.median(each['one_step'] / seconds):.0f} ×"]
            for name, seconds in each.items()
        ]
        speeds = table(["label", "seconds", "as fast as the oracle"], rows)
        blocks += ["## Seconds for 1,000 candidates", about, speeds]
    return blocks


def horizon_section(units: Units, settings: dict[str, Any]) -> list[str]:
    """Losses after training on sets of rows."""
    start = next(iter(units.values()))["start"]
    about = (
        f"From one checkpoint after {settings['warm']} random steps (learning rate {settings['learning_rate']:g}, "
        f"seed 0, development loss {start['all']:.4f} all tokens, {start['completion']:.4f} last word): "
        f"{settings['set_probes']:,} candidates are labelled, the n-gram influence model predicts the remaining pool, "
        "and training goes on from the same state on one set of rows at a time. Spearman: predicted mean of the ten "
        "tenths of the pool against the decrease of development loss at the live weights (ten sets, no row "
        "repeated)."
    )
    tenths = []
    for unit in (unit for unit in units.values() if unit["which"] == "deciles"):
        for h in unit["sets"][0]["loss"]:
            predicted = [entry["predicted_mean"][h] for entry in unit["sets"]]
            cells = []
            for loss_on in REFERENCES:
                after = [entry["loss"][h]["live"][loss_on] for entry in unit["sets"]]
                cells += [with_interval(spearman(predicted, [start[loss_on] - value for value in after])),
                          f"{after[0]:.3f} … {after[4]:.3f} … {after[-1]:.3f}"]  # fmt: skip
            tenths.append([unit["kind"], h, f"{unit['held_out_spearman']:.3f}", *cells])
    rows = []
    for unit in (unit for unit in units.values() if unit["which"] != "deciles"):
        entry = unit["sets"][0]
        for h, losses in entry["loss"].items():
            cells = [f"{losses[where][loss_on]:.3f}" for loss_on in REFERENCES for where in ("live", "averaged")]
            rows.append([unit["kind"], str(entry["set"]), h, f"{entry['predicted_mean'][h]:+.2f}", *cells])
    rows.sort(key=lambda row: int(row[2]))
    tenth_heads = [
        "label", "steps", "held-out Spearman of the fit", "Spearman, all tokens", "loss of first … fifth … last",
        "Spearman, last word", "loss of first … fifth … last",
    ]  # fmt: skip
    heads = [
        "label", "set", "steps", "predicted mean (label standard deviations)", "all tokens, live",
        "all tokens, averaged", "last word, live", "last word, averaged",
    ]  # fmt: skip
    return [
        "## 10 to 1,000 steps: training on what a label prefers",
        about,
        table(tenth_heads, tenths),
        "The best, middle and worst rows, as many as the longest training needs; no row repeats:",
        table(heads, rows),
    ]


def steadiness_section(units: Units, settings: dict[str, Any]) -> list[str]:
    """Rank correlation of the labels of fixed candidates from one boundary to the next, and one domain's mean."""
    about = (
        f"The same {settings['fixed']} candidates are labelled (all "
        f"tokens) at each of {settings['rounds']} boundaries, {settings['round_steps']} steps apart, at the live "
        f"weights and at the mean over the last {settings['window']} steps; learning rate "
        f"{settings['learning_rate']:g}, seed 0. The domain is the one with the highest mean label at averaged "
        "weights over all rounds."
    )
    rows = []
    for unit in units.values():
        domain = np.array(unit["fixed_domain"])
        labels = {where: np.array([entry[where] for entry in unit["fixed"]]) for where in ("live", "averaged")}
        scaled = {where: zscore(values, axis=1) for where, values in labels.items()}
        present = np.unique(domain)
        best = int(present[np.argmax([scaled["averaged"][:, domain == k].mean() for k in present])])
        for where, values in labels.items():
            steps = [spearman(a, b)["spearman"] for a, b in zip(values, values[1:], strict=False)]
            rows.append([
                unit["arm"], where, ", ".join(f"{value:.3f}" for value in steps), settings["domains"][best],
                ", ".join(f"{value:+.2f}" for value in scaled[where][:, domain == best].mean(1)),
            ])  # fmt: skip
    heads = ["rows selected by", "labelled at", "Spearman with the next boundary's labels", "best domain",
              "its mean label by boundary (standard deviations)"]  # fmt: skip
    return ["## Steadiness of labels from round to round", about, table(heads, rows)]


def fit_section(units: Units, settings: dict[str, Any]) -> list[str]:
    """Held-out rank correlation by kind and number of labels."""
    blocks = []
    for unit in units.values():
        about = (
            f"{unit['kind']}, learning rate {unit['learning_rate']:g}, "
            f"{unit['num_test']} held-out candidates of other documents; mean over draws of the labels, interval of "
            "the first draw."
        )
        rows = []
        for kind in ("token", "document", "both"):
            for num in dict.fromkeys(entry["num_labels"] for entry in unit["fits"]):
                chosen = [e for e in unit["fits"] if e["num_labels"] == num and e["labels"] == kind]
                cells = []
                for entries in (chosen, [entry["within"] for entry in chosen]):
                    cells.append(with_interval({**entries[0], "spearman": np.mean([e["spearman"] for e in entries])}))
                rows.append([kind, str(num), *cells])
        found = table(["labels", "number", "Spearman", "within domain"], rows)
        blocks += ["## Labels the n-gram influence model needs", about, found]
    return blocks
