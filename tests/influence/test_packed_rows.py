"""Labels of packed rows are those of their documents, added up, where the run keeps these apart; else of blocks."""

from __future__ import annotations

import copy
import functools
from importlib.metadata import version
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from packaging.version import Version
from scipy.stats import spearmanr
from transformers import (
    DataCollatorWithFlattening,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    default_data_collator,
)

from mates_hf import DirectionalProbe, ReferenceTask
from mates_hf.data.pool import CandidatePool
from mates_hf.data.rows import TokenRows
from mates_hf.errors import UnsupportedSettingError
from mates_hf.influence.passes import mean_loss_gradient
from mates_hf.influence.reading import find_reading
from mates_hf.prediction.hidden_states import _mean_over_targets

VOCAB, BLOCK = 64, 24
RNG = np.random.default_rng(0)
DOCS = [RNG.integers(5, VOCAB, size).tolist() for size in RNG.integers(3, 40, 40)]
REFERENCE = ReferenceTask.from_dataset(
    Dataset.from_dict({"ids": [RNG.integers(5, VOCAB, 12).tolist() for _ in range(6)]}), input_ids_column="ids"
)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PROBE = DirectionalProbe(epsilon=1e-3)
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@functools.cache
def trained(kind: str = "llama", attention: str = "sdpa", use_cache: bool = False) -> tuple[Any, Any]:
    """A small model with an optimizer that has taken two steps."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "mamba":
            model: Any = MambaForCausalLM(MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1))
        elif kind == "gpt2":
            config = GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=2, n_positions=128)
            model = GPT2LMHeadModel._from_config(config, attn_implementation=attention)
        else:
            config = LlamaConfig(vocab_size=VOCAB, intermediate_size=32, **SIZES)
            model = LlamaForCausalLM._from_config(config, attn_implementation=attention)
    model.config.use_cache = use_cache
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for doc in DOCS[:2] if attention != "flex_attention" else ():  # which has no backward pass on a CPU
        ids = torch.tensor([doc])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), optimizer


def sums(labels: Any) -> np.ndarray:
    return labels.influence_per_token.astype(np.float64) * labels.num_tokens


def measure(candidates: Any, *which: Any) -> Any:
    return PROBE.measure(*trained(*which), REFERENCE, candidates)


def packed_by_trl(strategy: str) -> tuple[Dataset, Any]:
    """A dataset as TRL packs it, and the collator that its SFTTrainer then makes."""
    pytest.importorskip("trl")
    from trl.data_utils import pack_dataset
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as Trl

    try:
        rows = pack_dataset(Dataset.from_dict({"input_ids": DOCS}), BLOCK, strategy)
    except ValueError as error:
        pytest.skip(str(error))
    return rows.with_format(None), Trl(pad_token_id=0, padding_free=strategy != "wrapped")


def assert_added_up(candidates: Any, lists: list[list[list[int]]], *which: Any) -> Any:
    """Labels of rows equal those of their documents measured alone, one row a document, and added up."""
    labels = measure(candidates, *which)
    assert labels.info["reading"]["fed"] == "padded"
    alone = measure(TokenRows.from_lists([doc for row in lists for doc in row if len(doc) > 1]), *which)
    owners = np.repeat(np.arange(len(lists)), [sum(len(doc) > 1 for doc in row) for row in lists])
    added = np.bincount(owners, weights=sums(alone), minlength=len(lists))[labels.candidate_id]
    assert np.allclose(sums(labels), added, **TOLERANCE)
    tokens = np.bincount(owners, weights=alone.num_tokens, minlength=len(lists))[labels.candidate_id]
    assert labels.num_tokens.tolist() == tokens.tolist()
    assert np.allclose(labels.token_derivatives, alone.token_derivatives, **TOLERANCE)
    return labels


def documents_of(rows: Dataset) -> list[list[list[int]]]:
    return [
        [part.tolist() for part in np.split(np.array(ids), np.cumsum(lengths)[:-1])]
        for ids, lengths in zip(rows["input_ids"], rows["seq_lengths"], strict=True)
    ]


@pytest.mark.parametrize("strategy", ["bfd", pytest.param("bfd_split", marks=pytest.mark.slow)])
def test_trl_packing(strategy):
    rows, collator = packed_by_trl(strategy)
    lists = documents_of(rows)
    assert any(len(row) > 1 for row in lists)
    if Version(version("trl")) < Version("0.24"):  # which trains the first token of a document behind another one
        with pytest.raises(UnsupportedSettingError, match=r"TRL's own collator does so from 0\.24 on"):
            measure(CandidatePool(rows, collator))
        return
    labels = assert_added_up(CandidatePool(rows, collator), lists)
    assert labels.info["reading"]["documents"] == "apart"
    # The stages alone, without a collator: the column says it.
    again = assert_added_up(CandidatePool(rows), lists)
    assert np.allclose(sums(labels), sums(again), **TOLERANCE)


def test_wrapped_blocks_are_rows():
    rows, collator = packed_by_trl("wrapped")
    labels = measure(CandidatePool(rows, collator))
    blocks = measure(TokenRows.from_lists(rows["input_ids"]))
    assert np.allclose(sums(labels), sums(blocks), **TOLERANCE)
    assert "documents" not in labels.info["reading"]


@pytest.mark.parametrize(
    "which",
    [
        pytest.param(("llama", "eager"), marks=pytest.mark.slow),
        ("llama", "sdpa"),
        ("gpt2", "sdpa"),
    ],
)
def test_flattened_rows(which):
    pool = CandidatePool(Dataset.from_dict({"input_ids": DOCS}), DataCollatorWithFlattening())
    assert_added_up(pool, [[doc] for doc in DOCS], *which)


@pytest.mark.slow
def test_flex_attention_keeps_documents_apart():
    """Its forward passes alone: packed rows have the losses that their documents have, padded."""
    model, _ = trained("llama", "flex_attention")
    flattened = CandidatePool(Dataset.from_dict({"input_ids": DOCS[:8]}), DataCollatorWithFlattening())
    for pool in (flattened, CandidatePool(OWN_ROWS[:4], Packer("position_ids"))):
        try:
            reading = find_reading(model, pool)
        except (ImportError, NotImplementedError) as error:
            pytest.skip(str(error))
        assert (reading.packed, reading.feed) == ("apart", "plain")


class Packer:
    """An own packer: four documents a row, which it tells as asked."""

    def __init__(self, *keys: str, trains_first: bool = False, padded: bool = False) -> None:
        self.keys, self.trains_first, self.padded = keys, trains_first, padded

    def __call__(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        batches = [self.one(row["docs"]) for row in rows]
        size = max(batch["input_ids"].shape[1] for batch in batches)
        fill = {"labels": -100}
        found = {
            key: torch.cat(
                [torch.nn.functional.pad(b[key], (0, size - b[key].shape[1]), value=fill.get(key, 0)) for b in batches]
            )
            for key in batches[0]
            if not key.startswith("cu_")
        }
        return found if len(rows) > 1 else batches[0]

    def one(self, docs: list[list[int]]) -> dict[str, torch.Tensor]:
        lengths = [len(doc) for doc in docs]
        ids = torch.tensor([[token for doc in docs for token in doc]])
        labels = ids.clone()
        if not self.trains_first:
            labels[0, np.cumsum([0, *lengths[:-1]])] = -100
        says = {
            "position_ids": torch.cat([torch.arange(size) for size in lengths])[None],
            "cu_seq_lens_q": torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32),
            "seq_idx": torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None],
        }
        mask = {"attention_mask": torch.ones_like(ids)} if self.padded else {}
        return {"input_ids": ids, "labels": labels, **mask, **{key: says[key] for key in self.keys}}


FOURS = [DOCS[i : i + 4] for i in range(0, len(DOCS), 4)]
OWN_ROWS = [{"docs": four} for four in FOURS]


def test_own_packer():
    labels = assert_added_up(CandidatePool(OWN_ROWS, Packer("position_ids", "seq_idx")), FOURS)
    assert labels.info["reading"]["documents"] == "apart"


def test_a_packer_that_trains_first_tokens_is_followed():
    labels = measure(CandidatePool(OWN_ROWS, Packer("position_ids", trains_first=True)))
    assert labels.num_tokens.tolist() == [sum(map(len, four)) - 1 for four in FOURS]
    assert labels.info["reading"]["fed"] == "padded"
    model, _ = trained()
    batch = Packer("position_ids", trains_first=True)(OWN_ROWS[:1])
    with torch.no_grad():
        assert labels.loss[0] == pytest.approx(float(model(**batch).loss), rel=1e-3)


@pytest.mark.parametrize(
    ("packer", "which"),
    [
        (Packer("position_ids", padded=True), ("llama", "sdpa")),  # a mask hides from transformers where they begin
        (Packer("position_ids"), ("llama", "sdpa", True)),  # with a cache it does not look
        (Packer("cu_seq_lens_q"), ("llama", "sdpa")),  # this kernel does not know them
        pytest.param(Packer("seq_idx"), ("mamba", "sdpa"), marks=pytest.mark.slow),
    ],
)
def test_documents_that_see_each_other_are_one_block(packer, which, caplog):
    """A model that does not keep documents apart is trained on the block, and measured on it, with all its inputs."""
    pool = CandidatePool(OWN_ROWS, packer)
    labels = measure(pool, *which)
    assert labels.info["reading"]["documents"] == "together"
    assert "lets a document see the ones in front" in caplog.text
    assert labels.info["reading"]["fed"] == "collated, a row at a time"
    model, _ = trained(*which)
    with torch.no_grad():
        own = [float(model(**packer([row])).loss) for row in OWN_ROWS]
    assert np.allclose(labels.loss, own, rtol=1e-3)
    assert pool.token_rows().segments is None  # an influence model reads a block as one text, too


@pytest.mark.parametrize(
    ("collator", "which", "match"),
    [
        (DataCollatorWithFlattening(), ("mamba", "sdpa"), "MambaForCausalLM.*lets a row see.*collator that pads"),
        (DataCollatorWithFlattening(), ("llama", "sdpa", True), "`model.config.use_cache = False`"),
        (
            DataCollatorWithFlattening(return_position_ids=False, return_seq_idx=True),
            ("llama", "sdpa"),
            "see the ones",
        ),
        (DataCollatorWithFlattening(separator_id=2), ("llama", "sdpa"), "`separator_id` at -100"),
    ],
)
def test_flattened_rows_that_meet_are_refused(collator, which, match):
    dataset = Dataset.from_dict({"input_ids": DOCS})
    with pytest.raises(UnsupportedSettingError, match=match):
        find_reading(trained(*which)[0], CandidatePool(dataset, collator))
    # Each advice works.
    if "use_cache" in match:
        assert find_reading(trained()[0], CandidatePool(dataset, collator)).packed == "apart"
    elif "separator" in match:
        assert find_reading(trained()[0], CandidatePool(dataset, DataCollatorWithFlattening())).packed == "apart"
    else:
        even = Dataset.from_dict({"input_ids": [doc[:3] for doc in DOCS], "labels": [doc[:3] for doc in DOCS]})
        assert find_reading(trained(*which)[0], CandidatePool(even, default_data_collator)).packed is None


def flat_with_a_mask(rows: list[Any]) -> dict[str, torch.Tensor]:
    batch = DataCollatorWithFlattening()(rows)
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


def test_what_keeps_rows_apart_is_named_where_it_is_known():
    pool = CandidatePool(Dataset.from_dict({"input_ids": DOCS}), flat_with_a_mask)
    with pytest.raises(UnsupportedSettingError, match="Leave `attention_mask` out of the batch"):
        find_reading(trained()[0], pool)


def test_a_step_on_a_flattened_batch_agrees_with_the_label():
    """Rows in place of one of a batch: the loss of the reference task after a real step ranks as the labels do."""
    model = copy.deepcopy(trained()[0]).double()
    pool = CandidatePool(Dataset.from_dict({"input_ids": DOCS}), DataCollatorWithFlattening())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    labels = PROBE.measure(model, optimizer, REFERENCE, pool)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    gains = []
    for i in range(24):
        batch = pool.collate_fn([pool.dataset[j] for j in (i, 30, 31, 32)])
        assert batch["input_ids"].shape[0] == 1
        num_targets = int((batch["labels"][:, 1:] != -100).sum())
        (model(**batch).loss * num_targets / 100).backward()  # the sum, so that the others weigh the same in each
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            ids = torch.from_numpy(REFERENCE.rows.padded()[0])
            logits = model(input_ids=ids).logits[:, :-1]  # the model's own loss would be rounded to float32
            gains.append(-float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())))
        model.load_state_dict(weights)
    assert spearmanr(gains, sums(labels)[:24]).statistic > 0.999


def test_row_sums_of_a_gradient_are_by_row():
    model, _ = trained()
    rows = TokenRows.from_lists(
        [sum(four, []) for four in FOURS], seq_lengths=[[len(d) for d in four] for four in FOURS]
    )
    found, alone = np.zeros(len(rows)), np.zeros(len(DOCS))
    mean = mean_loss_gradient(model, rows, row_sums=found)
    assert mean == pytest.approx(mean_loss_gradient(model, rows.unpacked(), row_sums=alone))
    assert np.allclose(found, alone.reshape(-1, 4).sum(1))
    model.zero_grad()


def test_hidden_states_of_a_packed_row_are_those_of_its_documents():
    module = trained()[0].base_model
    rows = TokenRows.from_lists(
        [sum(four, []) for four in FOURS], seq_lengths=[[len(doc) for doc in four] for four in FOURS]
    )
    apart = rows.unpacked()
    with torch.no_grad():
        found, alone = (_mean_over_targets(module, [0, -1], some).numpy() for some in (rows, apart))
    sums = np.add.reduceat(alone * apart.num_targets[:, None], np.arange(0, len(apart), 4))
    assert np.allclose(found, sums / rows.num_targets[:, None], atol=1e-6)


def test_a_pool_without_packing_is_read_as_before():
    tokens = Dataset.from_dict({"input_ids": [doc[:3] for doc in DOCS], "labels": [doc[:3] for doc in DOCS]})
    reading = find_reading(trained()[0], CandidatePool(tokens, default_data_collator))
    assert reading.packed is None
    assert reading.feed == "plain"
    assert "documents" not in reading.to_dict()
