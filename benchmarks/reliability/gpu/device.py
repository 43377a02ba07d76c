"""The card: where work runs, how seconds on it are taken, the models of the kit, and what a part is told."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.lab.corpus import Lab, load_lab
from benchmarks.lab.models import llama
from benchmarks.lab.statistics import FloatArray as FloatArray

TRAIN_TOKENS = 16_384  # padded tokens of a micro-batch on a card


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """A model of the kit, and what it is trained on."""

    width: int
    layers: int
    heads: int
    vocab: int
    row_tokens: int
    batch_rows: int

    def build(self) -> Any:
        """The model with fresh weights, on the card."""
        return llama(
            self.vocab, width=self.width, layers=self.layers, heads=self.heads, length=2 * self.row_tokens
        ).to(device())

    def about(self) -> str:
        """In words."""
        return (
            f"Llama, width {self.width}, {self.layers} layers, vocabulary {self.vocab:,}, batches of "
            f"{self.batch_rows} x {self.row_tokens} tokens"
        )


MODELS = {
    "tiny": Size(width=32, layers=1, heads=2, vocab=512, row_tokens=32, batch_rows=4),
    "30M": Size(width=512, layers=9, heads=8, vocab=4096, row_tokens=256, batch_rows=64),
    "125M": Size(width=768, layers=17, heads=12, vocab=4096, row_tokens=256, batch_rows=64),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What a part is told; plain JSON values."""

    part: str
    size: str  # of the model
    seconds: float  # that it may take
    quick: bool
    data: str
    work: str
    steps: int  # of `training`, over all calls
    threads: int
    begun: float = dataclasses.field(default_factory=time.time)

    @property
    def least_seconds(self) -> float:
        """Below this nothing is begun: torch and the model take as long to start."""
        return 0.0 if self.quick else 25.0

    @property
    def model(self) -> Size:
        """The model."""
        return MODELS[self.size]

    def lab(self) -> Lab:
        """Rows and passages, tokenised once."""
        return load_lab(
            Path(self.data), Path(self.work, "cache"), vocab_size=self.model.vocab, row_tokens=self.model.row_tokens,
            num_documents=400 if self.quick else None, num_reference=24 if self.quick else 256,
            num_development=24 if self.quick else 256,
        )  # fmt: skip


def seconds_left(task: Task) -> float:
    """Until the part should have ended."""
    return task.begun + task.seconds - time.time()


def device() -> torch.device:
    """The card, or the processor."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def card() -> str:
    """Its name."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none: a processor at tiny sizes"


def bf16() -> contextlib.AbstractContextManager[Any]:
    """The precision that is measured."""
    return torch.autocast(device().type, torch.bfloat16)


def device_seconds(work: Callable[[], Any]) -> float:
    """Seconds of the device between the begin and the end of a call, by events; of a processor by its clock."""
    if device().type != "cuda":
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin
    torch.cuda.synchronize()
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    work()
    after.record()
    torch.cuda.synchronize()
    return float(before.elapsed_time(after)) / 1e3


def peak_bytes(work: Callable[[], Any]) -> int | None:
    """Most bytes of the card that were allocated at once, beyond what was there; None on a processor."""
    if device().type != "cuda":
        work()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)
