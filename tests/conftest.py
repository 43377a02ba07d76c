"""Shared by all tests: no network, one thread, and a tokenizer and models built in code."""

from __future__ import annotations

import os

# Before transformers, datasets or tokenizers are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable, Iterator  # noqa: E402
from fnmatch import fnmatch  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

os.fsync = lambda handle: None  # tests kill processes, not machines; real flushes take a tenth of their time
torch.set_num_threads(1)  # the tensors are tiny: threads cost more than they bring, and sums keep one order

TINY_VOCAB_SIZE = 64
# Files of few but long tests. Where files are shared among processes, one that is begun last keeps the others waiting.
LONG_FILES = (
    "test_kill.py", "test_benchmarks.py", "test_deepspeed.py", "test_model_kinds.py", "test_full_disk.py",
    "test_resume.py", "test_stream.py", "test_examples.py", "test_release.py",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before `-m` is applied
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The marker `quick`: all but some cases of a parametrised test are slow. Files of long tests come first."""
    for item in items:
        marker = item.get_closest_marker("quick")
        if marker is not None and not any(fnmatch(item.callspec.id, pattern) for pattern in marker.args):
            item.add_marker(pytest.mark.slow)
    places = {name: place for place, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is flushed is read back from memory here; that it is flushed is a test of its own."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(autouse=True)
def settings_of_accelerate_end_with_the_test() -> Iterator[None]:
    """`TrainingArguments(bf16=True)` of transformers before 5 leaves a variable that the next arguments read."""
    before = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    yield
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A fast word-level tokenizer of 64 ids: `<pad>` 0, `<unk>` 1, `<eos>` 2, then `w3` to `w63`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = {"<pad>": 0, "<unk>": 1, "<eos>": 2}
    vocabulary = {**specials, **{f"w{i}": i for i in range(len(specials), TINY_VOCAB_SIZE)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", model_max_length=64
    )


@pytest.fixture(scope="session")
def make_tiny_model() -> Callable[..., Any]:
    """A function that builds a Llama of 2 layers and width 32; arguments: `seed` and fields of its config."""

    def build(seed: int = 0, **overrides: Any) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        settings: dict[str, Any] = {
            "vocab_size": TINY_VOCAB_SIZE,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "bos_token_id": None,
            "eos_token_id": 2,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(**{**settings, **overrides}))

    return build


@pytest.fixture
def tiny_model(make_tiny_model: Callable[..., Any]) -> Any:
    """One `make_tiny_model()`, fresh for each test."""
    return make_tiny_model()
