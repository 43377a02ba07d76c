"""What is reported of one item: accuracy, and the likelihood behind it, which moves where accuracy is still noise.

Where it is used: lm-eval calls these functions (`process_results` in the task files) with the log-likelihoods of one
document's requests and averages what they return over documents; a group is the mean over its tasks.

Metrics (all are means over items):
    acc: the choice of the highest log-likelihood is the right one.
    acc_norm: the same of log-likelihood per character, as lm-eval has it.
    accuracy: the one of them that the MATES paper's harness reports: acc_norm where there is one, else acc (BoolQ,
        WinoGrande, LAMBADA). Every task has it, so that a group can average it.
    choice_prob: probability of the right choice among the choices, the softmax of their log-likelihoods; in [0, 1],
        higher is better.
    nll_per_byte: negative log-likelihood of the right answer per byte of its text (UTF-8), nats/byte; lower is better.

Source of the last two: likelihood ranks corpora at sizes where accuracy does not yet (DataDecide, arXiv:2504.11393).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mates_hf.errors import EvaluationError

Result = tuple[
    float, bool
]  # log-likelihood (nats, summed over tokens), and whether greedy decoding gives these tokens


def of_choices(document: Mapping[str, Any], results: Sequence[Result]) -> dict[str, float]:
    """Metrics of an item whose choices are of different texts.

    Args:
        document: `choices` and `label`.
        results: The result of each choice after the prompt.

    Returns:
        Values by metric; `accuracy` is `acc_norm`.

    Raises:
        EvaluationError: a log-likelihood is not finite.
    """
    lengths = np.array([len(choice) for choice in document["choices"]], np.float64)
    log_likelihoods = _finite(results)
    acc_norm = float(np.argmax(log_likelihoods / lengths) == document["label"])
    answer = document["choices"][document["label"]]
    found = _likelihoods(log_likelihoods, document["label"], answer)
    return {**found, "acc_norm": acc_norm, "accuracy": acc_norm}


def of_plain_choices(document: Mapping[str, Any], results: Sequence[Result]) -> dict[str, float]:
    """Metrics of an item whose paper's harness does not divide by length (BoolQ, WinoGrande).

    Args:
        document: `choices` and `label`, and `continuation` where that is the text scored after each choice.
        results: The result of each choice.

    Returns:
        Values by metric; `accuracy` is `acc`.

    Raises:
        EvaluationError: a log-likelihood is not finite.
    """
    answer = document.get("continuation", document["choices"][document["label"]])
    found = _likelihoods(_finite(results), document["label"], answer)
    return {**found, "accuracy": found["acc"]}


def of_last_word(document: Mapping[str, Any], results: Sequence[Result]) -> dict[str, float]:
    """Metrics of LAMBADA's last word: greedy decoding gives it (`acc`), `perplexity`, and its `nll_per_byte`.

    Args:
        document: `target`, with the space before it.
        results: The one result, of the target after its context.

    Returns:
        Values by metric; lm-eval makes `perplexity` of the mean log-likelihood.

    Raises:
        EvaluationError: the log-likelihood is not finite.
    """
    (log_likelihood,) = _finite(results)
    acc = float(results[0][1])
    per_byte = -log_likelihood / len(document["target"].strip().encode())
    return {"acc": acc, "accuracy": acc, "perplexity": float(log_likelihood), "nll_per_byte": float(per_byte)}


def _likelihoods(log_likelihoods: npt.NDArray[np.float64], label: int, answer: str) -> dict[str, float]:
    weights = np.exp(log_likelihoods - log_likelihoods.max())
    return {
        "acc": float(np.argmax(log_likelihoods) == label),
        "choice_prob": float(weights[label] / weights.sum()),
        "nll_per_byte": float(-log_likelihoods[label] / len(answer.encode())),
    }


def _finite(results: Sequence[Result]) -> npt.NDArray[np.float64]:
    log_likelihoods = np.array([log_likelihood for log_likelihood, _ in results], np.float64)
    if not np.isfinite(log_likelihoods).all():
        raise EvaluationError(
            f"The log-likelihoods of an item must be finite, got {log_likelihoods.tolist()}: the model gives NaN or "
            "infinite logits. Look for a diverged run, or for 16-bit overflow (evaluate in float32 or bfloat16)."
        )
    return log_likelihoods
