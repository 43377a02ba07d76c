"""Trainers whose loss is not that of a text: preference and reward training, and training on what a model samples.

Where it is used: `MatesCallback.on_train_begin` asks before any other check, so that such a Trainer is refused by its
name and not by the shape of its batch. Trade-off: they are told by the names of their classes and collators, without
an import of TRL; a Trainer of that kind under another name is refused later, by its batch or its loss.
"""

from __future__ import annotations

from typing import Any

_PREFERENCE = "is over chosen and rejected answers"
_JUDGED = "is over single answers that are marked as wanted or not"
_REWARD = "trains a score of answers"
_SAMPLED = "is over answers that the model samples while it trains"
_DISTILLED = "is over what a teacher model says of sampled answers"

# By the beginning of a class name, after `Async`, `Online` and the like were taken off.
_TRAINERS = {
    "DPO": _PREFERENCE, "ORPO": _PREFERENCE, "CPO": _PREFERENCE, "TPO": _PREFERENCE, "SimPO": _PREFERENCE,
    "IPO": _PREFERENCE, "KTO": _JUDGED, "BCO": _JUDGED, "Reward": _REWARD, "PRM": _REWARD,
    "OnlineDPO": _SAMPLED, "XPO": _SAMPLED, "NashMD": _SAMPLED, "GRPO": _SAMPLED, "GMPO": _SAMPLED, "RLOO": _SAMPLED,
    "PPO": _SAMPLED, "PPOv2": _SAMPLED, "A2PO": _SAMPLED, "SDPO": _SAMPLED, "SDFT": _SAMPLED,
    "GKD": _DISTILLED, "GOLD": _DISTILLED, "MiniLLM": _DISTILLED, "IWOPD": _DISTILLED, "Distillation": _DISTILLED,
    "ServerDistillation": _DISTILLED,
}  # fmt: skip
_COLLATORS = {
    "DataCollatorForPreference": _PREFERENCE,
    "DataCollatorForVisionPreference": _PREFERENCE,
    "DataCollatorForTriplePreference": _PREFERENCE,
    "DPODataCollatorWithPadding": _PREFERENCE,
    "PreferenceCollator": _PREFERENCE,
    "DataCollatorForUnpairedPreference": _JUDGED,
    "DataCollatorForVisionUnpairedPreference": _JUDGED,
    "RewardDataCollatorWithPadding": _REWARD,
    "DataCollatorForRollout": _SAMPLED,
    "_DistillationCollator": _DISTILLED,
}
_PREFIXES = ("Async", "Iterative", "Vision", "Custom")


def preference_refusal(trainer: Any | None, collate_fn: Any) -> str | None:
    """Why a run of preference, reward or sampling training cannot select its data here.

    Args:
        trainer: The Trainer, where it is known (`attach`), or None.
        collate_fn: The collator of its training dataloader, wrapped by the Trainer or not.

    Returns:
        A sentence that names the Trainer or collator, what its loss is over, and what to do instead; None for a
        Trainer of texts.
    """
    found = None if trainer is None else _trainer_kind(type(trainer))
    if found is None:
        found = _collator_kind(collate_fn)
    if found is None:
        return None
    name, why = found
    return (
        f"{name} {why}, and influence is measured on the likelihood of one text, so there is no way to select its "
        "data in the run: train it without MatesCallback. Select for the pretraining or SFT stage before it, or "
        "filter its prompts with `MatesSelector.filter` before training"
    )


def _trainer_kind(kind: type) -> tuple[str, str] | None:
    """The Trainer's own name, and what its loss or that of a class it derives from is over."""
    for base in kind.__mro__:
        name = base.__name__.lstrip("_").removesuffix("Trainer")
        if name == base.__name__.lstrip("_"):
            continue  # no Trainer: a mixin that happens to begin alike
        for prefix in _PREFIXES:
            name = name.removeprefix(prefix)
        if name in _TRAINERS:
            derived = "" if base is kind else f" (a `{base.__name__}`)"
            return f"`{kind.__name__}`{derived}", _loss(_TRAINERS[name])
    return None


def _collator_kind(collate_fn: Any) -> tuple[str, str] | None:
    """The same of a collator; one that removes columns first has it inside, and a method belongs to its object."""
    inner = getattr(collate_fn, "data_collator", None) or getattr(collate_fn, "__self__", None) or collate_fn
    for base in type(inner).__mro__:
        if base.__name__ in _COLLATORS:
            return f"`{type(inner).__name__}`", _of_collator(_COLLATORS[base.__name__])
    return None


def _loss(why: str) -> str:
    """As the rest of a sentence about a Trainer."""
    return why if why == _REWARD else f"has a loss that {why}"


def _of_collator(why: str) -> str:
    """As the rest of a sentence about a collator."""
    return "makes batches for training a score of answers" if why == _REWARD else f"belongs to a loss that {why}"
