"""What the stages accept, checked where a user hands it over: which object was given, and how to make the right one.

Where it is used: `measure` and `fit` call it first, and `MatesCallback` and `MatesSelector` check a probe and an
influence model with it. Trade-off: only mistakes that people make are looked for (a dataset for a task, an array
for labels, a class for an instance, two arguments swapped); anything else with the right methods passes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from mates_hf.data.pool import CandidatePool
from mates_hf.data.reference import ReferenceTask
from mates_hf.data.rows import TokenRows
from mates_hf.display import call, interval
from mates_hf.records import FitReport, InfluenceLabels

_MEASURE = "`labels = DirectionalProbe().measure(model, optimizer, reference, candidates)`"


def described(value: Any) -> str:
    """What an object is, in a message: its type, and the shape of an array."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    shape = getattr(value, "shape", None)
    of_shape = f" of shape {tuple(shape)}" if isinstance(shape, tuple) else ""
    return f"the text {value[:40]!r}" if isinstance(value, str) else f"{type(value).__name__}{of_shape}"


def check_measure(model: Any, optimizer: Any, reference: Any, candidates: Any) -> None:
    """Refuse what `measure` cannot work with.

    Args:
        model: The model as it was passed.
        optimizer: The optimizer as it was passed.
        reference: The reference task as it was passed.
        candidates: The candidates as they were passed.

    Raises:
        TypeError: One of them is something else, or two are swapped; says how to make it.
    """
    from torch import nn  # whoever has no model to check needs no torch

    if isinstance(optimizer, nn.Module) or hasattr(model, "param_groups"):
        raise TypeError("`model` must come before `optimizer`, got them swapped: `measure(model, optimizer, ...)`.")
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be the live model (a torch.nn.Module), got {described(model)}.")
    if isinstance(optimizer, type) or optimizer is None:
        raise TypeError(
            f"`optimizer` must be the run's optimizer after at least one step, got {described(optimizer)}. Pass the "
            "instance that trains the model."
        )
    if not isinstance(reference, ReferenceTask):
        if isinstance(candidates, ReferenceTask):
            raise TypeError("`reference` must come before `candidates`, got them swapped.")
        raise TypeError(
            f"`reference` must be a ReferenceTask, got {described(reference)}. Make one with "
            '`ReferenceTask.from_dataset(dataset, tokenizer, text_column="text")` or '
            '`ReferenceTask.from_lm_eval("lambada_openai", tokenizer)`.'
        )
    check_candidates(candidates)


def check_candidates(candidates: Any) -> None:
    """Refuse objects that hold tokens or texts in a form that is no dataset; what a dataset holds is checked later.

    Args:
        candidates: The candidates as they were passed to `measure` or `fit`.

    Raises:
        TypeError: They are a tensor, a dataloader, a path, lists of ids or texts, or another table; says how to pass
            them.
    """
    way_out = _way_out(candidates)
    if way_out is not None:
        raise TypeError(
            "`candidates` must be a dataset whose rows are dicts with `input_ids` (a `datasets.Dataset`, a list of "
            f"dicts, or `TokenRows`), got {described(candidates)}. {way_out}"
        )


def _way_out(candidates: Any) -> str | None:
    """How to pass these candidates, or None where nothing speaks against them."""
    if isinstance(candidates, (CandidatePool, TokenRows)):
        return None
    if isinstance(candidates, type):
        return "Pass an instance."
    if isinstance(candidates, (str, bytes)) or hasattr(candidates, "__fspath__"):
        return "Load it first: `datasets.load_dataset(...)`, and tokenise it."
    if isinstance(candidates, ReferenceTask):
        return "Pass `task.rows` to measure passages of a reference task as candidates."
    if isinstance(candidates, InfluenceLabels):
        return "Candidates come before labels: `fit(candidates, labels)`."
    if hasattr(candidates, "batch_sampler") and hasattr(candidates, "dataset"):
        return "Pass the dataset of the dataloader, `dataloader.dataset`, with its rows unbatched."
    if hasattr(candidates, "ndim") and hasattr(candidates, "tolist"):
        return 'Rows of token ids go in as `[{"input_ids": row} for row in array]`.'
    if hasattr(candidates, "iloc"):
        return "`datasets.Dataset.from_pandas(table)` makes one."
    if isinstance(candidates, (list, tuple)) and candidates and not isinstance(candidates[0], Mapping):
        if isinstance(candidates[0], str):
            return 'Tokenise the texts: `[{"input_ids": tokenizer(text)["input_ids"]} for text in texts]`.'
        return 'Rows of token ids go in as `[{"input_ids": row} for row in lists]`.'
    return "Pass a dataset." if candidates is None else None


def check_fit(candidates: Any, labels: Any) -> None:
    """Refuse what cannot be fitted on: other objects than labels, labels that rank nothing, rows not measured.

    Args:
        candidates: The candidates as they were passed.
        labels: The labels as they were passed.

    Raises:
        TypeError: One of them is something else, or they are swapped; says how to make it.
        ValueError: Labels are of rows that the candidates do not have.
        InfluenceError: Labels are non-finite, all zero or all equal.
    """
    if not isinstance(labels, InfluenceLabels):
        if isinstance(candidates, InfluenceLabels):
            raise TypeError("`candidates` must come before `labels`, got them swapped: `fit(candidates, labels)`.")
        hint = (
            " Pass all of `labels`, not a column of it: it also says which candidates were measured."
            if hasattr(labels, "ndim") or isinstance(labels, (list, tuple))
            else ""
        )
        raise TypeError(
            f"`labels` must be the InfluenceLabels that a probe measured, got {described(labels)}.{hint} Make them "
            f"with {_MEASURE}."
        )
    if not isinstance(candidates, (list, tuple)):  # lists of texts are for influence models that read texts
        check_candidates(candidates)
    labels.check()
    # A view of a pool counts in the rows of the whole pool.
    whole = candidates.dataset if isinstance(candidates, CandidatePool) else candidates
    num = len(whole) if hasattr(whole, "__len__") else None
    if num is not None and int(labels.candidate_id.max()) >= num:
        raise ValueError(
            f"`candidates` must be those that were measured, got {num} rows for labels of rows up to "
            f"{int(labels.candidate_id.max())}. Pass the dataset that `measure` was given, whole and in its order; "
            "`labels.take(index)` fits on some of the labels only."
        )


def check_probe(probe: Any) -> None:
    """Refuse what is no probe.

    Args:
        probe: The probe as it was passed.

    Raises:
        TypeError: It is a class, a name, or lacks `measure` or `for_run`.
    """
    _check_parts(
        "probe", probe, ("measure", "for_run"), "`DirectionalProbe()`, `LossReductionProbe()` or `OneStepProbe()`"
    )


def check_influence_model(model: Any, *needed: str) -> None:
    """Refuse what is no influence model.

    Args:
        model: The model as it was passed.
        *needed: Methods it must have.

    Raises:
        TypeError: It is a class, a name, lacks one of the methods, or is a filter where a run would fit it to labels.
    """
    _check_parts("influence_model", model, needed or ("predict",), "`NgramInfluenceModel()`")
    if "fit" in needed and not getattr(model, "fits_labels", True):
        raise TypeError(
            f"`influence_model` must be fitted to labels, and {type(model).__name__} is a filter that knows none. "
            "Choose rows by it before the run (`MatesSelector(model, tokenizer).filter`), or write its scores into a "
            "column and name that: `score_column`."
        )


def _check_parts(name: str, value: Any, needed: tuple[str, ...], example: str) -> None:
    """Raise where an argument is a class or lacks a method."""
    if isinstance(value, type):
        raise TypeError(f"`{name}` must be an instance, got {described(value)}. Call it: `{value.__name__}()`.")
    missing = [method for method in needed if not callable(getattr(value, method, None))]
    if missing:
        raise TypeError(
            f"`{name}` must have {' and '.join(f'`{method}`' for method in missing)}, such as {example}, got "
            f"{described(value)}."
        )


def fitted_repr(self: Any) -> str:
    """The `repr` of an influence model: the arguments that differ from the defaults, and how well it is fitted."""
    given = {}
    for name, parameter in inspect.signature(type(self)).parameters.items():
        value = getattr(self, name, parameter.default)
        if type(value) is not type(parameter.default) or value != parameter.default:
            given[name] = value
    report: FitReport | None = getattr(self, "_report", None)
    if report is None:
        return f"{call(type(self).__name__, given)}\n  not fitted"
    signal = f"held-out Spearman {report.spearman:.3f} {interval(report.interval)}"
    return f"{call(type(self).__name__, given)}\n  fitted on {report.num_labels:,} labels, {signal}"
