"""The model card of a published influence model, made from its fit.

Place in the flow: `MatesSelector.save_pretrained` writes it as `README.md`. Trade-off: it says only what was recorded,
so that a card never claims more than the fit shows; what is not known is said not to be.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from mates_hf.display import interval, number
from mates_hf.prediction.artifacts import model_digest
from mates_hf.records import FitReport

logger = logging.getLogger(__name__)

TAGS = ["data-selection", "mates", "pretraining"]
_UNKNOWN = "not recorded"
_UNITS = {
    "step": "nats/token of reference loss that one optimizer step on the row takes off; > 0 helps, higher is better",
    "order": "path labels give an order: higher is better, and zero and scale are not those of a step",
}


def write_card(kind: str, report: FitReport | None, origin: Mapping[str, Any], tokenizer_name: str | None) -> str:
    """The text of the card.

    Args:
        kind: class name of the influence model.
        report: Report of its fit, or None where the model keeps none.
        origin: where the fit comes from, as `round_origin` gives it or as passed to `MatesSelector`.
        tokenizer_name: Name of the tokenizer saved with it, or None without one.

    Returns:
        Markdown with the metadata of the Hub in front.
    """
    head = {"library_name": "mates_hf", "tags": TAGS}
    facts = [
        ("Influence model", f"`{kind}`"),
        ("Reference task", _reference(origin.get("reference"))),
        ("Base model", _named(origin.get("model"))),
        ("Optimizer steps at the fit", _number(origin.get("step"))),
        ("Candidates probed", _number(origin.get("num_probed"))),
        ("Labels", _UNITS.get(str(origin.get("label_unit")), _UNKNOWN)),
        ("Probe against real steps", _fidelity(origin.get("fidelity"))),
        ("Tokenizer", _UNKNOWN if tokenizer_name is None else f"`{tokenizer_name}` (in `tokenizer/`)"),
        *_fit(report),
    ]
    lines = ["---", *(f"{name}: {json.dumps(value)}" for name, value in head.items()), "---", ""]
    lines += ["# Data influence model", "", _INTRODUCTION, "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in facts]
    return "\n".join([*lines, "", _USE])


def selector_facts(selector: Any) -> dict[str, str]:
    """What is printed of a `MatesSelector`, by name.

    Args:
        selector: the selector.

    Returns:
        One short text for each; what is not known is left out or said not to be.
    """
    model, tokenizer, origin = selector.influence_model, selector.tokenizer, selector.origin
    report = getattr(model, "report", None)
    facts = {"influence model": type(model).__name__}
    try:
        facts["digest"] = f"{model_digest(model)[:12]} (of the influence model)"
    except Exception as error:  # `save_pretrained` or `digest` of a user's class
        logger.debug("The influence model has no digest (%s).", error)
    if isinstance(report, FitReport):
        facts["held-out Spearman"] = (
            f"{report.spearman:.2f} {interval(report.interval)}, {report.num_labels} labels fitted, "
            f"{report.num_held_out} held out"
        )
    if tokenizer is None:
        facts["tokenizer"] = "none: token columns only"
    else:
        chat = "with" if getattr(tokenizer, "chat_template", None) else "without"
        facts["tokenizer"] = f"{type(tokenizer).__name__}, {len(tokenizer):,} ids, {chat} chat template"
    facts["max_length"] = "texts are whole" if selector.max_length is None else f"{selector.max_length:,} tokens"
    made = [f"{name} {number(origin[name])}" for name in ("round", "step", "num_probed") if name in origin]
    if made:
        facts["fitted at"] = ", ".join(made)
    if origin.get("reference"):
        facts["reference"] = _reference(origin["reference"]).replace("`", "")
    facts["influence"] = _UNITS.get(str(origin.get("label_unit")), "in the unit of the labels; higher is better")
    return facts


def _fit(report: FitReport | None) -> list[tuple[str, str]]:
    if report is None:
        return [("Labels fitted", _UNKNOWN), ("Held-out Spearman", _UNKNOWN)]
    low, high = report.interval
    within = _UNKNOWN if report.spearman_within_group is None else f"{report.spearman_within_group:.3f}"
    return [
        ("Labels fitted / held out", f"{report.num_labels} / {report.num_held_out}"),
        ("Held-out Spearman", f"{report.spearman:.3f} (95 % interval {low:.3f} to {high:.3f})"),
        ("Held-out Spearman within group", within),
        ("Share of the best fifth found", f"{report.top_fifth_overlap:.2f} (0.20 is chance)"),
        ("Slope of label on prediction", f"{report.slope:.2f} (1 is calibrated)"),
        ("Standard deviation of the labels", f"{report.label_std:.3g} nats/token"),
    ]


def _reference(value: Any) -> str:
    if not isinstance(value, Mapping):
        return _named(value)
    said = {name: found for name, found in value.items() if name != "digest" and isinstance(found, (str, int, float))}
    return ", ".join(f"{name} {_cell(found)}" for name, found in said.items()) or _UNKNOWN


def _named(value: Any) -> str:
    if isinstance(value, Mapping):
        value = value.get("name") or value.get("name_or_path") or value.get("class")
    return _UNKNOWN if value in (None, "") else f"`{_cell(value)}`"


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else _UNKNOWN


def _fidelity(value: Any) -> str:
    if not isinstance(value, Mapping) or not isinstance(value.get("spearman"), (int, float)):
        return _UNKNOWN
    bounds = value.get("interval")
    interval = f" (95 % interval {bounds[0]:.2f} to {bounds[1]:.2f})" if isinstance(bounds, list) else ""
    return f"Spearman {value['spearman']:.3f}{interval}, truth: {_cell(value.get('truth', _UNKNOWN))}"


def _cell(value: Any) -> str:
    """A value that breaks neither the table nor the metadata."""
    return str(value).replace("|", "\\|").replace("\n", " ").replace("`", "'")


_INTRODUCTION = """\
It predicts how much one pretraining candidate helps one model, at one moment of its training, on one reference task:
**data influence, higher is better.** The row "Labels" says whether it prices an optimizer step or gives an order. Only
what prices a step can be compared with a `threshold`."""

_USE = """\
## Use

```python
from mates_hf import MatesSelector

selector = MatesSelector.from_pretrained("<this repository>")
scored = selector.map(dataset)                # adds a float32 `influence` column
kept = selector.filter(dataset, ratio=0.2)    # the fifth that helps most
```

Intended use: to choose what the base model is trained on next, near the step it was fitted at.

## Limits

- Influence follows the model. It was measured at one step of one run, and says less the further a model is from it.
- It is about the reference task alone. What it ranks high need not help other tasks, and can hurt them.
- It is no judgement of quality, truth, safety or licence of a text, and no filter for any of these.
- The held-out Spearman above is agreement with measured labels, not the gain of a training run.
- Tokens that none of the labelled candidates had add nothing; an empty document gets the intercept.
- An n-gram model holds counts of the token pairs in the candidates it was fitted on: publish it only if those may be
  published.

## Citation

The method is MATES:

```bibtex
@inproceedings{yu2024mates,
  title = {{MATES}: Model-Aware Data Selection for Efficient Pretraining with Data Influence Models},
  author = {Yu, Zichun and Das, Spandan and Xiong, Chenyan},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024},
  note = {arXiv:2406.06046}
}
```
"""
