"""What is refused before the first step: tasks and tokenizers for which lm-eval's number says nothing of the model.

Where it is used: `evaluator` asks here when it is made, when tasks are loaded, and when their requests are tokenised.

Trade-off: every number is lm-eval's own. Where that number says nothing of the model (an end token is scored in the
answer's place, choices cannot be told apart), a number of another kind would not compare with published ones, so there
is an error instead.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Hashable, Sequence
from typing import Any

from mates_hf.data.harness import name_of
from mates_hf.errors import EvaluationError

logger = logging.getLogger(__name__)

_PROBES = ("a", "the 1", "A.")
_LARGEST_SHARE = 0.5  # of a task's items that say nothing; above it, its accuracy is mostly theirs


def check_tokenizer(tokenizer: Any) -> None:
    """Raise a `ValueError` where a tokenizer is none, has no end token, or puts special tokens behind a text.

    Args:
        tokenizer: the one to evaluate with.
    """
    if not callable(tokenizer) or not hasattr(tokenizer, "encode"):
        raise ValueError(f"`tokenizer` must be the model's tokenizer, got {type(tokenizer).__name__}.")
    if getattr(tokenizer, "eos_token_id", None) is None:
        raise ValueError(
            "`tokenizer` must have an end token, because lm-eval puts it where an item has no context, got one "
            "without (`eos_token` is None). Set `tokenizer.eos_token`."
        )
    for text in _PROBES:
        trailing = _trailing_specials(tokenizer, text)
        if trailing:
            name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
            told = ", ".join(repr(tokenizer.decode([token]) or f"token {token}") for token in trailing)
            raise ValueError(
                f"`tokenizer` must add no special token behind a text, but `{name}` encodes {text!r} with {told} at "
                "the end. lm-eval scores what stands behind the context, so these tokens would be scored in place of "
                "the answer's first ones, and its own accuracy with this tokenizer means nothing. Pass a tokenizer "
                "that adds none: load it with `add_eos_token=False` where it knows that, or set "
                "`tokenizer.backend_tokenizer.post_processor = "
                'tokenizers.processors.TemplateProcessing(single="$A", pair="$A $B")`.'
            )


def _trailing_specials(tokenizer: Any, text: str) -> list[int]:
    """Tokens that a tokenizer puts behind a text by itself."""
    try:
        ids = list(tokenizer.encode(text))
        bare = list(tokenizer.encode(text, add_special_tokens=False))
    except Exception:  # a vocabulary without this text; what the tasks hold is encoded, and may fail, soon enough
        return []
    ends = {tokenizer.eos_token_id, getattr(tokenizer, "sep_token_id", None)}
    ends.discard(getattr(tokenizer, "unk_token_id", None))  # which the text itself may be
    for start in range(len(ids) - len(bare) + 1) if bare else ():
        if ids[start : start + len(bare)] == bare:
            # Behind the text there may be any token, and at the text's own end one that is added whatever is asked.
            return ids[start + len(bare) :] or [token for token in bare[-1:] if token in ends]
    ends.discard(getattr(tokenizer, "bos_token_id", None))
    return [token for token in ids[-1:] if token in ends]


def own_copy(task: Any) -> Any:
    """A task, group or config of the caller's whose changes stay here.

    How a task builds its requests, its seed and its number of examples are set; documents are shared.

    Args:
        task: an lm-eval task or group, or a config.

    Returns:
        The copy.
    """
    if isinstance(task, dict):
        return copy.deepcopy(task)
    twin = copy.copy(task)
    if hasattr(twin, "get_all_tasks"):
        twin._children = {name: own_copy(child) for name, child in twin._children.items()}
    for part in ("_config", "sampler"):
        if hasattr(twin, part):
            setattr(twin, part, copy.copy(getattr(twin, part)))
    return twin


def check_task(task: Any) -> None:
    """Raise an `EvaluationError` where a task's answers are not scored by likelihood, or need more than text.

    Args:
        task: an lm-eval task.
    """
    if task.OUTPUT_TYPE == "generate_until":
        raise EvaluationError(
            f"Tasks must be scored by likelihood, but the answers of `{name_of(task)}` are generated. "
            "Evaluate it on a checkpoint with the command `lm_eval`."
        )
    for attribute, what in (("UNSAFE_CODE", "runs code that the model writes"), ("MULTIMODAL", "has more than text")):
        if getattr(task, attribute, False):
            raise EvaluationError(
                f"Tasks must be texts to be scored by likelihood, but `{name_of(task)}` {what}. Evaluate it on a "
                "checkpoint with the command `lm_eval`."
            )


def check_requests(task: Any) -> None:
    """Raise an `EvaluationError` where a task asks for anything else than likelihoods, whatever type it gives itself.

    Args:
        task: an lm-eval task whose requests are built.
    """
    for request in task.instances:
        if request.request_type not in ("loglikelihood", "loglikelihood_rolling"):
            raise EvaluationError(
                f"Tasks must be scored by likelihood, but `{name_of(task)}` asks for `{request.request_type}`. "
                "Evaluate it on a checkpoint with the command `lm_eval`."
            )


def warn_of_redraws(task: Any, limit: int | None) -> None:
    """Warn where a task's documents are others each time they are read, so that labels are not those of the requests.

    lm-eval reads the documents once to ask, and once more to judge. It is followed there, but its number means little.

    Args:
        task: an lm-eval task whose requests are built.
        limit: first documents only.
    """
    asked = {request.doc_id: request.doc for request in task.instances}
    again = dict(task.doc_iterator(rank=0, limit=limit, world_size=1))
    changed = sum(_differ(doc, again.get(doc_id)) for doc_id, doc in asked.items())
    if changed:
        logger.warning(
            "Task `%s`: %d of %d documents are others each time they are read (its `process_docs` draws at random). "
            "lm-eval asks about one reading and judges by the labels of the next, and so does this evaluation: the "
            "number means little. Let `datasets` cache the processed split, or draw from a generator that is seeded "
            "by the document.",
            name_of(task),
            changed,
            len(asked),
        )


def _differ(doc: Any, other: Any) -> bool:
    try:
        return bool(doc != other)
    except ValueError:  # arrays inside; what cannot be compared is not accused
        return False


def check_labels(task: Any) -> None:
    """Raise, or warn, where the label of items is none of their choices, as in test splits whose labels are secret.

    lm-eval counts each of them as wrong. Tasks that judge by a function of their own are not looked at.

    Args:
        task: an lm-eval task whose requests are built.

    Raises:
        EvaluationError: it is so in more than half of the items.
    """
    config = getattr(task, "config", None)
    if task.OUTPUT_TYPE != "multiple_choice" or getattr(config, "doc_to_choice", None) is None:
        return
    if getattr(config, "process_results", None) is not None:
        return
    label_of = task.doc_to_text if getattr(task, "multiple_input", 0) else task.doc_to_target
    docs = {request.doc_id: request.doc for request in task.instances}
    labels = {doc_id: label_of(doc) for doc_id, doc in docs.items()}
    wrong = [doc_id for doc_id, doc in docs.items() if not _is_choice(labels[doc_id], task.doc_to_choice(doc))]
    if not wrong:
        return
    told = f"{len(wrong)} of {len(docs)} items of `{name_of(task)}` have a label that is none of their choices"
    told = f"{told} (item {wrong[0]}: {labels[wrong[0]]!r})"
    if len(wrong) > _LARGEST_SHARE * len(docs):
        raise EvaluationError(
            f"Labels must be choices, but {told}. lm-eval counts these as wrong whatever the model says. Evaluate a "
            "split that has labels, or leave the task out."
        )
    logger.warning("%s, and count as wrong, as lm-eval counts them.", told)


def _is_choice(label: Any, choices: Sequence[str]) -> bool:
    if isinstance(label, list):
        return any(_is_choice(one, choices) for one in label)
    if isinstance(label, str):
        return label in choices
    return isinstance(label, int) and 0 <= label < len(choices)


def check_ties(task: Any, tokens: Sequence[Hashable]) -> None:
    """Raise, or warn, where choices of different texts are the same tokens, so that no model can tell them apart.

    Args:
        task: an lm-eval task whose requests are built.
        tokens: what the model will read of each request, in their order.

    Raises:
        EvaluationError: it is so in more than half of the items.
    """
    if task.OUTPUT_TYPE != "multiple_choice":
        return
    items: dict[Any, tuple[set[Any], set[Hashable]]] = {}
    for request, read in zip(task.instances, tokens, strict=True):
        texts, seen = items.setdefault(request.doc_id, (set(), set()))
        texts.add(request.args)
        seen.add(read)
    tied = [doc_id for doc_id, (texts, seen) in items.items() if len(seen) < len(texts)]
    if not tied:
        return
    example = sorted({request.args[1] for request in task.instances if request.doc_id == tied[0]})
    told = (
        f"{len(tied)} of {len(items)} items of `{name_of(task)}` have choices of different texts that are the same "
        f"tokens to the model (item {tied[0]}: {example[:4]})"
    )
    if len(tied) > _LARGEST_SHARE * len(items):
        raise EvaluationError(
            f"Choices must differ in tokens, but {told}. They hold unknown words, or they were cut away with the "
            "context, and accuracy says nothing. Use another tokenizer or a longer context, or leave the task out."
        )
    logger.warning("%s: unknown words, or cut away with the context. They are judged as lm-eval judges them.", told)
