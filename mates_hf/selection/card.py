"""The model card of a published influence model, made from its fit.

`MatesSelector.save_pretrained` writes it as `README.md`. Trade-off: it says only what was recorded, so that a card
never claims more than the fit shows; what is not known is reported as not known. Names come from anywhere: in front
they go through the Hub's own `ModelCardData`, and in the text they stand as code, where neither HTML nor a link means
anything.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from mates_hf.display import cut, interval, number
from mates_hf.prediction.artifacts import model_digest
from mates_hf.records import LOSS_REDUCTION, PATH_LABELS, FitReport

logger = logging.getLogger(__name__)

TAGS = ("data-selection", "mates", "pretraining")
_UNKNOWN = "not recorded"
_MAX_NAME = 200  # characters of a name in the text
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")  # identifiers of the Hub; anything else is `other` there

LOG_ODDS = "log_odds"  # `label_unit` of a filter, which asks no model
_UNITS = {  # what predictions are, by `label_unit`
    "step": "nats/token of reference loss that one optimizer step on the row takes off; > 0 helps, higher is better",
    LOG_ODDS: "nats/token by which the reference's words are likelier than the pool's; > 0 is more like the reference",
    "order": "path labels give an order: higher is better, and zero and scale are not those of a step",
}
_MEASURED_BY = {  # by `FitReport.probe`
    PATH_LABELS: "`DirectionalProbe` along a path",
    "directional": "`DirectionalProbe` at one point",
    "one_step": "`OneStepProbe`",
    LOSS_REDUCTION: "`LossReductionProbe`",
}


def write_card(kind: str, report: FitReport | None, origin: Mapping[str, Any], tokenizer_name: str | None) -> str:
    """The text of the card.

    Args:
        kind: Class name of the influence model.
        report: Of its fit, or None where the model keeps none.
        origin: Where the fit comes from, as `round_origin` gives it or as passed to `MatesSelector`.
        tokenizer_name: Class of the tokenizer saved with it, or None without one.

    Returns:
        Markdown with the metadata of the Hub in front.
    """
    found = label_unit(report, origin)
    asked = found != LOG_ODDS  # whether a model was
    of_probe = [
        ("Labels measured by", _measured_by(report)),
        ("Base model", _named(origin.get("model"))),
        ("Optimizer steps at the fit", _number(origin.get("step"))),
        ("Candidates probed", _number(origin.get("num_probed"))),
        ("Probe against real steps", _fidelity(origin.get("fidelity"))),
    ]
    facts = [
        ("Influence model", _code(kind)),
        ("Labels" if asked else "Scores", _unit_of(found, report, _UNKNOWN)),
        ("Reference task", _reference(origin.get("reference"))),
        ("Tokenizer", _UNKNOWN if tokenizer_name is None else f"{_code(tokenizer_name)} (in `tokenizer/`)"),
        *(of_probe if asked else []),
        *(_fit(report) if asked else []),
    ]
    lines = ["---", _metadata(kind, report, origin).to_yaml(), "---", ""]
    title, introduction = ("Data influence model", _INTRODUCTION) if asked else ("Filter by words", _FILTER)
    lines += [f"# {title}", "", introduction, "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in facts]
    return (
        "\n".join([*lines, "", _USE, _LIMITS if asked else _FILTER_LIMITS, _CITATION if asked else ""]).rstrip() + "\n"
    )


def _metadata(kind: str, report: FitReport | None, origin: Mapping[str, Any]) -> ModelCardData:
    """What the Hub reads: only names that it can take for its own, and the held-out rank correlation."""
    base, datasets, terms = (origin.get(name) for name in ("model", "datasets", "license"))
    base = base.get("name") if isinstance(base, Mapping) else base
    datasets = [datasets] if isinstance(datasets, str) else datasets if isinstance(datasets, (list, tuple)) else []
    results = []
    if report is not None and math.isfinite(report.spearman):
        reference = ", ".join(_reference_names(origin.get("reference"))) or _UNKNOWN
        results.append(
            EvalResult(
                task_type="data-selection",
                dataset_type="held-out-labels",
                dataset_name=cut(f"{report.num_held_out} held-out labels, reference {reference}", _MAX_NAME),
                metric_type="spearmanr",
                metric_name="Held-out Spearman",
                metric_value=round(report.spearman, 4),
            )
        )
    return ModelCardData(
        library_name="mates_hf",
        tags=list(TAGS),
        # A bare name is the class of a model that came from a folder.
        base_model=base if _is_hub_name(base) and "/" in str(base) else None,
        datasets=[name for name in datasets if _is_hub_name(name)] or None,
        license=None if not isinstance(terms, str) else terms if _LICENSE.fullmatch(terms) else "other",
        metrics=[one.metric_type for one in results] or None,
        model_name=kind if results else None,
        eval_results=results or None,
    )


def _is_hub_name(name: Any) -> bool:
    return isinstance(name, str) and _HUB_NAME.fullmatch(name) is not None


def label_unit(report: Any, origin: Mapping[str, Any]) -> Any:
    """What the labels of a fit are: `"step"` where they price a step, `"order"` where they only rank.

    Args:
        report: Of the fit, or None. It counts where the origin says nothing: for a fit outside of a round.
        origin: Where the fit comes from.

    Returns:
        One of the two, `"log_odds"` of a filter that no model was asked for, or None where it is not known.
    """
    if origin.get("label_unit") is not None:
        return origin["label_unit"]
    kinds = set((getattr(report, "probe", None) or "").split(", "))
    if kinds & {PATH_LABELS, LOSS_REDUCTION}:
        return "order"
    return "step" if kinds <= {"directional", "one_step"} else None


def _unit_of(unit: Any, report: Any, unknown: str) -> str:
    """What predictions of a `label_unit` are, in words."""
    words = _UNITS.get(str(unit), unknown)
    return (
        words.replace("path labels", "loss reductions") if getattr(report, "probe", None) == LOSS_REDUCTION else words
    )


def _measured_by(report: FitReport | None) -> str:
    if report is None or report.probe is None:
        return f"probe {_UNKNOWN}"
    return ", ".join(_MEASURED_BY.get(name, _code(name)) for name in report.probe.split(", "))


def selector_facts(selector: Any) -> dict[str, str]:
    """What is printed of a `MatesSelector`, as a mapping from names to short texts.

    Args:
        selector: The selector.

    Returns:
        One short text for each name; what is not known is left out or reported as not known.
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
        facts["reference"] = ", ".join(_reference_names(origin["reference"]))
    unit = label_unit(report, origin)
    facts["influence"] = _unit_of(unit, report, "in the unit of the labels; higher is better (probe not recorded)")
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
    return ", ".join(map(_code, _reference_names(value))) or _UNKNOWN


def _reference_names(value: Any) -> list[str]:
    """What is known of a reference task, as it is."""
    if not isinstance(value, Mapping):
        return [] if value in (None, "") else [str(value)]
    said = {name: found for name, found in value.items() if name != "digest" and isinstance(found, (str, int, float))}
    return [f"{name}: {found}" for name, found in said.items()]


def _named(value: Any) -> str:
    if isinstance(value, Mapping):
        value = value.get("name") or value.get("name_or_path") or value.get("class")
    return _UNKNOWN if value in (None, "") else _code(value)


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else _UNKNOWN


def _fidelity(value: Any) -> str:
    if not isinstance(value, Mapping) or not isinstance(value.get("spearman"), (int, float)):
        return _UNKNOWN
    bounds = value.get("interval")
    ends = [end for end in bounds if isinstance(end, (int, float))] if isinstance(bounds, list) else []
    within = f" (95 % interval {ends[0]:.2f} to {ends[1]:.2f})" if len(ends) == 2 else ""
    return f"Spearman {value['spearman']:.3f}{within}, truth: {_code(value.get('truth', _UNKNOWN))}"


def _code(value: Any) -> str:
    """A name as code in a cell: one line, no backtick and no bare pipe, so that it ends neither."""
    line = cut(str(value), _MAX_NAME).replace("`", "'").replace("|", "\\|").strip()
    return f"`{line}`" if line else _UNKNOWN


_INTRODUCTION = """\
It predicts how much one pretraining candidate helps one model, at one moment of its training, on one reference task:
**data influence, higher is better.** The row "Labels" says whether it prices an optimizer step or gives an order. Only
what prices a step can be compared with a `threshold`."""

_FILTER = """\
It ranks texts by how much likelier their words are in a reference task than in the pool that they come from (the
difference of two cross-entropies, Moore and Lewis, 2010). **Higher is more like the reference.** It asks no model."""

_USE = """\
## Use

```python
from mates_hf import MatesSelector

selector = MatesSelector.from_pretrained("<this repository>")
scored = selector.map(dataset)                # adds a float32 `influence` column
kept = selector.filter(dataset, ratio=0.2)    # the fifth that ranks highest
```
"""

_LIMITS = """\
Intended use: to choose what the base model is trained on next, near the step it was fitted at.

## Limits

- Influence follows the model. It was measured at one step of one run, and says less the further a model is from it.
- It is about the reference task alone. What it ranks high need not help other tasks, and can hurt them.
- It is no judgement of quality, truth, safety or licence of a text, and no filter for any of these.
- The held-out Spearman above is agreement with measured labels, not the gain of a training run.
- Tokens that none of the labelled candidates had add nothing; an empty document gets the intercept.
- An n-gram model holds counts of the token pairs in the candidates it was fitted on: publish it only if those may be
  published.
"""

_FILTER_LIMITS = """\
Intended use: to choose what a model is trained on that should get better at texts like the reference. Random rows
mixed in (`random_share`) keep it from forgetting the rest.

## Limits

- It counts words and pairs of them. It knows nothing of what a model knows already, or learns from a text.
- It is about the reference task alone. What it ranks high need not help other tasks, and can hurt them.
- It is no judgement of quality, truth, safety or licence of a text, and no filter for any of these.
- Which tokens the reference has can be read off its tables: publish it only if that may be known.
"""

_CITATION = """\
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
