"""A Hugging Face encoder that reads documents of any length: folded into chunks, run, and pooled into one state.

Where it is used: inside `encoder.EncoderInfluenceModel`, without labels. Trade-off: tokens of different chunks do not
see each other; in exchange a document costs as much as its tokens, and none is padded to the maximum.

A document of n tokens becomes the fewest chunks that hold it, of equal length up to one token, each between the
special tokens that the encoder's tokenizer puts around a text. So the paper's 1,024 tokens are 2 x 512, and 600 are
2 x 300 and not 510 and a rest of 90 that would be padded to 510. The state is the mean over the tokens of all chunks.
"""

from __future__ import annotations

import copy
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mates_hf.engine.model_traits import vocabulary_size
from mates_hf.prediction.pooling import collect, fitting_precision, length_buckets, mean_states, own_streams
from mates_hf.records import IntArray

_BLOCK = 1_000  # texts tokenised at once: their ids are Python integers for a moment
_UNUSED = "pooler."  # weights beside the states, which some checkpoints have and others do not
# What a tokenizer is made of, as a name that cannot leave its directory.
_TOKENIZER_FILE = re.compile(r"\w[\w-]*(\.[\w-]+)*\.(json|txt|model)")


class FoldingEncoder:
    """An encoder, its tokenizer, and how documents are folded for it.

    Args:
        module: gives `last_hidden_state` of `input_ids` and `attention_mask`; float32, on the CPU.
        tokenizer: the encoder's own.
        max_tokens: tokens of a document that are read, special ones included.
        chunk_tokens: tokens of a chunk at most, special ones included.

    Raises:
        ValueError: the encoder cannot read that many tokens at once, or knows fewer than its tokenizer makes.
        TypeError: it is no encoder of transformers that can be rebuilt from its config.
    """

    def __init__(self, module: Any, tokenizer: Any, *, max_tokens: int, chunk_tokens: int) -> None:
        _require_rebuildable(module)
        self.module = module
        self.tokenizer = tokenizer
        self.before, self.after = _wrapping(tokenizer)
        self.max_tokens, self.chunk_tokens = max_tokens, chunk_tokens
        special = len(self.before) + len(self.after)
        self._chunk_content = chunk_tokens - special
        self._max_content = max_tokens - special * -(-max_tokens // chunk_tokens)
        if min(self._chunk_content, self._max_content) < 1:
            raise ValueError(
                f"`chunk_tokens` and `max_tokens` must leave room beside {special} special tokens, got {chunk_tokens} "
                f"and {max_tokens}."
            )
        longest = min(getattr(module.config, "max_position_embeddings", None) or chunk_tokens, _longest(tokenizer))
        if chunk_tokens > longest:
            raise ValueError(
                f"`chunk_tokens` must be at most the {longest} tokens that the encoder reads at once, got "
                f"{chunk_tokens}. Longer documents are folded."
            )
        known = vocabulary_size(module)
        if known is not None and len(tokenizer) > known:
            raise ValueError(
                f"The encoder must know every token of its tokenizer ({len(tokenizer)}), and knows {known}. Pass the "
                "tokenizer that belongs to it."
            )
        self._padding = int(tokenizer.pad_token_id or 0)

    def __deepcopy__(self, memo: dict[int, Any]) -> FoldingEncoder:
        """Itself: it is never written to. `trainable` gives a copy that may be."""
        return self

    def trainable(self, weights: FoldingEncoder | None = None) -> FoldingEncoder:
        """A copy that may be written to, with the weights of another fit of this encoder where one is given."""
        twin = copy.copy(self)
        twin.module = copy.deepcopy((weights or self).module)
        return twin

    def shapes(self) -> dict[str, torch.Size]:
        """Names and shapes of the weights, by which two fits of one encoder are known."""
        return {name: parameter.shape for name, parameter in self.module.named_parameters()}

    @property
    def width(self) -> int:
        """D, the width of a state."""
        return int(self.module.config.hidden_size)

    def read(self, texts: Iterable[str]) -> list[IntArray]:
        """Token ids of each text, without special tokens, as many as are read; a text may have none."""
        texts, found = list(texts), []
        for start in range(0, len(texts), _BLOCK):
            encoded = self.tokenizer(
                texts[start : start + _BLOCK],
                add_special_tokens=False,
                truncation=True,
                max_length=self._max_content,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            found += [np.asarray(ids, np.int64) for ids in encoded["input_ids"]]
        return found

    def num_tokens(self, documents: Sequence[IntArray]) -> int:
        """Tokens that go through the encoder for these documents, special ones included, padding not."""
        lengths = np.array([len(ids) for ids in documents], np.int64)
        chunks = -(-lengths // self._chunk_content)
        return int(lengths.sum() + chunks.sum() * (len(self.before) + len(self.after)))

    def batches(self, documents: Sequence[IntArray], tokens_per_batch: int) -> list[IntArray]:
        """Which documents, all with tokens, go through the encoder together: (B,) numbers for each pass."""
        num_tokens = np.array([len(ids) for ids in documents], np.int64)
        counts = -(-num_tokens // self._chunk_content)
        lengths = -(-num_tokens // np.maximum(counts, 1)) + len(self.before) + len(self.after)
        return length_buckets(lengths, counts, tokens_per_batch)

    def pooled(self, documents: Sequence[IntArray]) -> Tensor:
        """(B, D) float32 mean state over all tokens of each document, with gradient; one pass."""
        chunks, owner = [], []
        for number, ids in enumerate(documents):
            parts = np.array_split(ids, -(-len(ids) // self._chunk_content))
            chunks += [np.concatenate([self.before, part, self.after]) for part in parts]
            owner += [number] * len(parts)
        device = self.module.device
        here = np.arange(max(map(len, chunks))) < np.array([len(chunk) for chunk in chunks])[:, None]
        ids_BL = np.full(here.shape, self._padding, np.int64)
        ids_BL[here] = np.concatenate(chunks)
        counted = torch.from_numpy(here).to(device)
        with fitting_precision(device):
            output = self.module(input_ids=torch.from_numpy(ids_BL).to(device), attention_mask=counted.long())
        return mean_states(output[0], counted, torch.tensor(owner, device=device), len(documents))

    def states(
        self, documents: Sequence[IntArray], tokens_per_batch: int, of: Any = None, *, progress: bool = False
    ) -> npt.NDArray[Any]:
        """Pooled states of documents that have tokens, without gradient.

        Args:
            documents: token ids of N documents.
            tokens_per_batch: padded tokens in one pass.
            of: what to keep of (B, D) states, one number a document; None keeps the states.
            progress: show a progress bar.

        Returns:
            (N, D) float32, or (N,) float64 of `of`.
        """
        keep = {"width": self.width} if of is None else {"width": None, "of": of}
        return collect(
            self.batches(documents, tokens_per_batch),
            lambda batch: self.pooled([documents[i] for i in batch]),
            progress=progress,
            **keep,
        )

    def config(self) -> dict[str, Any]:
        """What `rebuild` needs beside the tensors, as plain JSON values."""
        config: dict[str, Any] = json.loads(self.module.config.to_json_string(use_diff=False))
        config.pop("_name_or_path", None)  # may be a path of this machine
        return config

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """Weights, as float32, and tokenizer, by name."""
        weights = {name: tensor for name, tensor in self.module.state_dict().items() if not name.startswith(_UNUSED)}
        return {f"encoder.{name}": tensor.float().cpu().numpy() for name, tensor in weights.items()} | pack_tokenizer(
            self.tokenizer, "encoder_tokenizer"
        )


def load_encoder(encoder: Any, *, max_tokens: int, chunk_tokens: int) -> FoldingEncoder:
    """An encoder from the Hub, a directory, or memory; a copy, so that the caller's stays as it is.

    Args:
        encoder: Hub id, path, (model, tokenizer), or a model that knows where its tokenizer is (`name_or_path`).
        max_tokens: Most tokens of a document that are read, as in `FoldingEncoder`.
        chunk_tokens: Tokens of a chunk, as in `FoldingEncoder`.

    Returns:
        The encoder, float32, on the CPU, in eval mode.

    Raises:
        ValueError: its tokenizer is missing, or what `FoldingEncoder` refuses.
        TypeError: what it is not.
        OSError: the Hub id or path holds none.
    """
    from transformers import AutoModel, AutoTokenizer

    module: Any
    tokenizer: Any
    if isinstance(encoder, (str, os.PathLike)):
        tokenizer = AutoTokenizer.from_pretrained(encoder)
        with own_streams(0, torch.device("cpu")):  # weights that a checkpoint lacks are drawn
            module = AutoModel.from_pretrained(encoder, dtype=torch.float32)
    else:
        module, tokenizer = encoder if isinstance(encoder, (tuple, list)) and len(encoder) == 2 else (encoder, None)
        if not isinstance(module, nn.Module):
            raise TypeError(
                "`encoder` must be a Hub id, a path, a model of transformers or a (model, tokenizer) pair, got "
                f"{type(module).__name__}."
            )
        if tokenizer is None:
            where = getattr(module, "name_or_path", "")
            if not where:
                raise ValueError(
                    f"`encoder` must come with its tokenizer, got a {type(module).__name__} alone that was not loaded "
                    "from anywhere. Pass a (model, tokenizer) pair."
                )
            tokenizer = AutoTokenizer.from_pretrained(where)
        tokenizer = copy.deepcopy(tokenizer)  # truncation is a setting of the object
        module = copy.deepcopy(getattr(module, "base_model", module)).cpu().float()
    return FoldingEncoder(module.eval(), tokenizer, max_tokens=max_tokens, chunk_tokens=chunk_tokens)


def rebuild(
    config: Mapping[str, Any], tensors: Mapping[str, npt.NDArray[Any]], *, max_tokens: int, chunk_tokens: int
) -> FoldingEncoder:
    """The encoder of `config()` and `tensors()`; no code of a repository is run, nothing is unpickled.

    Args:
        config: Config of the encoder.
        tensors: weights and tokenizer, among others.
        max_tokens: Most tokens of a document that are read, as in `FoldingEncoder`.
        chunk_tokens: Tokens of a chunk, as in `FoldingEncoder`.

    Returns:
        The encoder.

    Raises:
        ValueError: the config is of no encoder, or weights or tokenizer are missing, foreign, or do not fit it.
    """
    from transformers import AutoConfig, AutoModel

    settings = {name: value for name, value in config.items() if name not in ("model_type", "auto_map")}
    weights = {
        name.removeprefix("encoder."): torch.from_numpy(np.array(tensor))
        for name, tensor in tensors.items()
        if name.startswith("encoder.")
    }
    with own_streams(0, torch.device("cpu")):
        try:
            module = AutoModel.from_config(AutoConfig.for_model(str(config.get("model_type")), **settings)).float()
            missing, unexpected = module.load_state_dict(weights, strict=False)
        except (AttributeError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"config and weights of the encoder must fit, and do not ({error})") from error
    missing = [name for name in missing if not name.startswith(_UNUSED)]
    if missing or unexpected:
        raise ValueError(
            f"the encoder's weights must be complete, lacks {missing[:3]}, does not know {unexpected[:3]}"
        )
    tokenizer = unpack_tokenizer(tensors, "encoder_tokenizer")
    if tokenizer is None:
        raise ValueError("the encoder's tokenizer must be among the arrays, and is not")
    return FoldingEncoder(module.eval(), tokenizer, max_tokens=max_tokens, chunk_tokens=chunk_tokens)


def pack_tokenizer(tokenizer: Any, name: str) -> dict[str, npt.NDArray[np.uint8]]:
    """The files of a tokenizer as arrays of bytes, `<name>/<file>`."""
    with tempfile.TemporaryDirectory() as directory:
        tokenizer.save_pretrained(directory)
        files = sorted(path for path in Path(directory).iterdir() if _TOKENIZER_FILE.fullmatch(path.name))
        return {f"{name}/{path.name}": np.frombuffer(path.read_bytes(), np.uint8) for path in files}


def unpack_tokenizer(tensors: Mapping[str, npt.NDArray[Any]], name: str) -> Any:
    """The tokenizer that `pack_tokenizer` packed.

    Args:
        tensors: arrays by name, its files among them.
        name: Name of the tokenizer.

    Returns:
        The tokenizer, or None where there is none.

    Raises:
        ValueError: a file has a foreign name or type, or they are no tokenizer.
    """
    from transformers import AutoTokenizer

    files = {key.removeprefix(f"{name}/"): data for key, data in tensors.items() if key.startswith(f"{name}/")}
    if not files:
        return None
    with tempfile.TemporaryDirectory() as directory:
        for file, data in files.items():
            if not _TOKENIZER_FILE.fullmatch(file) or data.dtype != np.uint8:
                raise ValueError(f"`{name}` must be made of files of a tokenizer, got {file!r}")
            (Path(directory) / file).write_bytes(data.tobytes())
        try:
            return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # each kind of tokenizer fails in its own way
            raise ValueError(f"`{name}` must be a whole tokenizer, and is not ({error})") from error


def _wrapping(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens before and after a single text."""
    for text in ("a", "the", "0", "."):
        inside, whole = (tokenizer(text, add_special_tokens=special)["input_ids"] for special in (False, True))
        for start in range(len(whole) - len(inside) + 1):
            if inside and whole[start : start + len(inside)] == inside:
                return list(whole[:start]), list(whole[start + len(inside) :])
    raise ValueError(
        f"The encoder's tokenizer must put special tokens around a text, {type(tokenizer).__name__} does not."
    )


def _longest(tokenizer: Any) -> int:
    """Tokens that the encoder can read, as its tokenizer says; a huge number where it says nothing."""
    return int(getattr(tokenizer, "model_max_length", None) or 10**30)


def _require_rebuildable(module: Any) -> None:
    """Raise for what `AutoModel.from_config` would not build again, or what is no encoder."""
    from transformers import MODEL_MAPPING

    config: Any = getattr(module, "config", None)
    classes: Any = MODEL_MAPPING[type(config)] if type(config) in MODEL_MAPPING else ()
    if type(module) not in (classes if isinstance(classes, tuple) else (classes,)):
        raise TypeError(
            f"`encoder` must be a model that `AutoModel` can build, got {type(module).__name__}, which could not be "
            "saved and loaded again."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise TypeError(f"`encoder` must be an encoder alone, got {type(module).__name__}, which has a decoder too.")
