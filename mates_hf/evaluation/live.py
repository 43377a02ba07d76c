"""A model that is training, as lm-eval sees it: text in, log-likelihoods out.

Where it is used: between lm-eval, which brings requests as texts and makes metrics of the answers, and
`continuations`, which runs the model.

Trade-off: tasks whose answers are generated are refused. Requests are tokenised once and kept, because a run evaluates
the same ones again and again. This module imports lm-eval.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import nn

from mates_hf.engine.model_traits import context_length
from mates_hf.engine.processes import ALONE, Processes
from mates_hf.errors import EvaluationError
from mates_hf.evaluation.continuations import Continuations, answer

_CONFIGURED = ("n_positions", "max_position_embeddings", "n_ctx")  # where lm-eval looks, in its order
_UNSET = int(1e30)  # a tokenizer's longest input where it knows none
_WHERE_NONE_IS_KNOWN = 2048  # lm-eval's longest input of a model that says nothing

Pair = tuple[list[int], list[int]]  # token ids of a context and of its continuation


def longest_input(model: nn.Module, tokenizer: Any) -> int:
    """Tokens that lm-eval gives a model at most: contexts are cut to it, and long texts fall into windows of it.

    Args:
        model: the live model, unwrapped.
        tokenizer: asked where the model's config says nothing.

    Returns:
        The config's number, else the tokenizer's, else 2,048; never more than the model is known to take.
    """
    config = getattr(model, "config", None)
    part = getattr(config, "text_config", None) or config
    for name in _CONFIGURED:
        value = getattr(part, name, None)
        if isinstance(value, int) and value > 0:
            return value
    told = getattr(tokenizer, "model_max_length", None)
    known = int(told) if told is not None and told != _UNSET else _WHERE_NONE_IS_KNOWN
    limit = context_length(model)  # under a name that lm-eval does not know
    return known if limit is None else min(known, limit)


class LiveModel(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """An lm-eval model around one that lives in this process.

    Args:
        tokenizer: the model's; encoded with, never changed.
        batch_rows: rows of a micro-batch of the longest texts; of shorter ones as many as have as many tokens.
        max_tokens: Most tokens the model takes; longer contexts are cut from the left. None cuts nothing.
        progress: show progress bars.
        processes: those that answer together.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        batch_rows: int = 8,
        max_tokens: int | None = None,
        progress: bool = False,
        processes: Processes = ALONE,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.batch_rows = batch_rows
        self.max_tokens = max_tokens
        self.progress = progress
        self.processes = processes
        self.model: nn.Module | None = None  # set for the time of an evaluation
        self.num_tokens = 0  # run through the model so far
        self.made_up = False  # answers are drawn, to try what lm-eval makes of them
        self._pairs: dict[tuple[str, ...], list[Pair]] = {}
        self._encoded = functools.lru_cache(maxsize=64)(self._encode)  # the choices of an item share its context
        self._prefix_text = tokenizer.decode([self.prefix_token_id])

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's end token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What an empty context becomes: the beginning token, or the end token where there is none."""
        begin = self.tokenizer.bos_token_id
        return int(begin) if begin is not None else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids of a text; special tokens as the tokenizer adds them, but none twice at the beginning."""
        if add_special_tokens is None and string.startswith(self._prefix_text):
            add_special_tokens = False
        return list(self._encoded(string, add_special_tokens))

    def _encode(self, string: str, add_special_tokens: bool | None) -> tuple[int, ...]:
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return tuple(self.tokenizer.encode(string, **special))

    def pairs_of(self, request: Any) -> list[Pair]:
        """What a request asks for, in tokens: one pair, or the windows of a text that is scored as a whole.

        Args:
            request: an lm-eval `Instance`.

        Returns:
            Contexts and continuations.

        Raises:
            EvaluationError: a continuation is without tokens.
        """
        key = request.args
        if key not in self._pairs:
            self._pairs[key] = [self._pair(*key)] if len(key) == 2 else self._windows(key[0])
        return self._pairs[key]

    def as_read(self, pairs: Sequence[Pair]) -> tuple[tuple[int, ...], ...]:
        """What the model reads of a request, and what it is asked for: tokens after the cut to `max_tokens`."""
        requests = Continuations.from_pairs(pairs, self.max_tokens)
        ends = requests.offsets
        return tuple(tuple(requests.values[a:b].tolist()) for a, b in zip(ends[:-1], ends[1:], strict=True))

    def _pair(self, context: str, continuation: str) -> Pair:
        if context:
            ids, targets = self._encode_pair(context, continuation)
        else:
            targets = self.tok_encode(continuation, add_special_tokens=False)
            ids = [self.prefix_token_id]
            if targets[:1] == ids:
                targets = targets[1:]
        if not targets or not ids:
            raise EvaluationError(
                f"Context and continuation of an item must have tokens, got {len(ids)} and {len(targets)} for "
                f"{context[-40:]!r} and {continuation[:40]!r}. Leave the task out, or use another tokenizer."
            )
        return list(ids), list(targets)

    def _windows(self, text: str) -> list[Pair]:
        ids = self.tok_encode(text)
        windows = get_rolling_token_windows(
            token_list=ids,
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_tokens or max(len(ids), 1),
            context_len=1,
        )
        return [(list(context), list(targets)) for context, targets in map(make_disjoint_window, windows)]

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation (nats, summed), and whether greedy decoding gives it."""
        sums, greedy = self._answer([pair for request in requests for pair in self.pairs_of(request)])
        return [(float(total), bool(flag)) for total, flag in zip(sums, greedy, strict=True)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, nats."""
        windows = [self.pairs_of(request) for request in requests]
        sums, _ = self._answer([pair for pairs in windows for pair in pairs])
        ends = np.cumsum([0, *map(len, windows)])
        return [float(sums[start:end].sum()) for start, end in zip(ends[:-1], ends[1:], strict=True)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Refused: what a model that trains is asked must be answered by likelihood."""
        raise EvaluationError(
            "Tasks of `LmEvalCallback` must be scored by likelihood, got one whose answers are generated "
            f"({requests[0].task_name}). Evaluate it on a checkpoint with the command `lm_eval`."
        )

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
        raise NotImplementedError  # of TemplateLM; `loglikelihood` is answered without it

    def _answer(self, pairs: Sequence[Pair]) -> tuple[Any, Any]:
        if self.made_up:
            rng = np.random.default_rng(0)
            return -rng.gamma(2.0, 10.0, len(pairs)), rng.random(len(pairs)) < 0.5
        assert self.model is not None
        requests = Continuations.from_pairs(pairs, self.max_tokens)
        self.num_tokens += requests.num_input_tokens
        return answer(
            self.model, requests, batch_rows=self.batch_rows, progress=self.progress, processes=self.processes
        )
