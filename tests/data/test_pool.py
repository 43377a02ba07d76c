"""The candidate pool: every way to read it gives the rows that the Trainer would train on."""

# ruff: noqa: NPY002 - the global stream of numpy is what is tested

from __future__ import annotations

import random

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerFast,
    default_data_collator,
)

from mates_hf.data.collated import stack_rows
from mates_hf.data.pool import CandidatePool, read_candidates, rows_of
from mates_hf.data.rows import TokenRows
from mates_hf.errors import UnsupportedSettingError

EOS = 1
NUM_ROWS = 90


@pytest.fixture(scope="module")
def tokenizer():
    vocab = {"<unk>": 0, "<eos>": EOS, **{f"w{i}": i + 2 for i in range(60)}}
    backend = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")


@pytest.fixture
def lists():
    rng = np.random.default_rng(0)
    return [rng.integers(2, 60, size).tolist() for size in rng.integers(3, 12, NUM_ROWS)]


def dataset_of(lists, **columns):
    return datasets.Dataset.from_dict({"input_ids": lists, **columns})


def as_lists(rows):
    return [rows.row(i)[0].tolist() for i in range(len(rows))]


def labels_of(rows):
    return [rows.row(i)[1].tolist() for i in range(len(rows))]


def all_but_first(lists):
    return [[-100, *row[1:]] for row in lists]


def is_fast(pool):
    return pool._label_rule() is not None


def test_rows_are_the_dataset_rows(lists):
    pool = CandidatePool(dataset_of(lists))
    rows = pool.token_rows()
    assert is_fast(pool)
    assert as_lists(rows) == lists
    assert rows.labels is None
    assert rows.num_targets.tolist() == [len(row) - 1 for row in lists]
    assert pool.candidate_ids.tolist() == list(range(NUM_ROWS))


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.shuffle(seed=3),
        lambda d: d.shuffle(seed=3).select(range(5, 40)),
        lambda d: d.select(range(10, 50)),
        lambda d: d.select([7, 3, 3, 80]),
        lambda d: datasets.concatenate_datasets([d.select(range(4, 9)), d.shuffle(seed=1), d]),
        lambda d: datasets.concatenate_datasets([d, d]).shuffle(seed=0),
        lambda d: d.with_format("torch"),
        lambda d: d.with_format("numpy", columns=["input_ids"]),
        lambda d: d.cast_column("input_ids", datasets.LargeList(datasets.Value("int64"))),
        lambda d: d.cast_column("input_ids", datasets.Sequence(datasets.Value("uint16"))).shuffle(seed=2),
        lambda d: d.map(lambda row: {"input_ids": row["input_ids"][::-1]}, writer_batch_size=7),
    ],
)
def test_views_of_arrow_equal_row_by_row(lists, change):
    dataset = change(dataset_of(lists, kind=[0] * NUM_ROWS))
    pool = CandidatePool(dataset)
    assert is_fast(pool)
    expected = [np.asarray(dataset[i]["input_ids"]).tolist() for i in range(len(dataset))]
    assert as_lists(pool.token_rows()) == expected
    ids = np.random.default_rng(0).integers(0, len(dataset), 70)
    assert as_lists(pool.token_rows(ids)) == [expected[i] for i in ids]
    assert pool.token_rows().values.dtype in (np.int32, np.int64)


def test_fixed_size_lists_slices_and_nulls():
    fixed = pa.array([[1, 2], None, [5, 6], [7, 8]], pa.list_(pa.int32(), 2))
    large = pa.chunked_array(
        [pa.array([[1], None, []], pa.large_list(pa.int64())), pa.array([[2, 3]], pa.large_list(pa.int64()))]
    )
    plain = pa.chunked_array([pa.array([[9], [1, 2, 3], None, [4]], pa.list_(pa.int8())).slice(1)])
    for column, expected in [
        (fixed.slice(1), [[], [5, 6], [7, 8]]),
        (large, [[1], [], [], [2, 3]]),
        (plain, [[1, 2, 3], [], [4]]),
    ]:
        pool = CandidatePool(datasets.Dataset(pa.table({"input_ids": column})))
        assert is_fast(pool)
        assert as_lists(pool.token_rows()) == expected
        assert as_lists(pool.token_rows(np.arange(len(expected))[::-1])) == expected[::-1]


def test_null_tokens_are_refused():
    pool = CandidatePool(dataset_of([[1, 2], [3, None]]))
    with pytest.raises(ValueError, match="must not be null.*row 1"):
        pool.token_rows()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.lists(st.integers(0, 9), max_size=4)), min_size=1, max_size=30),
    st.integers(1, 9),
    st.sampled_from([pa.list_(pa.int32()), pa.large_list(pa.int16())]),
    st.data(),
)
def test_any_table_in_any_chunks(table, size, kind, data):
    chunks = [pa.array(table[i : i + size], kind) for i in range(0, len(table), size)]
    pool = CandidatePool(datasets.Dataset(pa.table({"input_ids": pa.chunked_array(chunks)})))
    ids = data.draw(st.lists(st.integers(0, len(table) - 1), max_size=40))
    assert as_lists(pool.token_rows(ids)) == [table[i] or [] for i in ids]


def test_labels_column_and_attention_mask(lists):
    lists = [[5, 6, 7, 8], [9, 10, 11], [12, 13]]
    labels = [[-100, -100, 7, 8], [9, -100, 11], [-100, 13]]
    rows = CandidatePool(dataset_of(lists, labels=labels)).token_rows()
    assert labels_of(rows) == [[-100, -100, 7, 8], [-100, -100, 11], [-100, 13]]
    assert rows.num_targets.tolist() == [2, 1, 1]
    assert CandidatePool(dataset_of(lists, labels=lists)).token_rows().labels is None  # says nothing: collapsed

    mask = [[0, 1, 1, 1], [1, 1, 0], [1, 1]]
    for dataset in (dataset_of(lists, attention_mask=mask), dataset_of(lists, attention_mask=mask).to_list()):
        assert as_lists(CandidatePool(dataset).token_rows()) == [[6, 7, 8], [9, 10], [12, 13]]
    with pytest.raises(UnsupportedSettingError, match="unbroken"):
        CandidatePool(dataset_of([[1, 2, 3]], attention_mask=[[1, 0, 1]])).token_rows()
    with pytest.raises(ValueError, match="as long as `input_ids`.*pool row 1"):
        CandidatePool(dataset_of(lists, labels=[[-100, -100, 7, 8], [9], [-100, 13]])).token_rows()


def test_labels_hidden_by_the_format_are_not_read():
    dataset = dataset_of([[5, 6, 7]], labels=[[-100, -100, 7]]).with_format("torch", columns=["input_ids"])
    assert CandidatePool(dataset).token_rows().labels is None


class Plain(torch.utils.data.Dataset):
    """A torch dataset of tensors."""

    def __init__(self, lists):
        self.lists = lists

    def __len__(self):
        return len(self.lists)

    def __getitem__(self, i):
        return {"input_ids": torch.tensor(self.lists[i])}


def test_torch_datasets_and_subsets(lists):
    dataset = Plain(lists)
    assert as_lists(CandidatePool(dataset).token_rows()) == lists
    assert as_lists(CandidatePool(torch.utils.data.Subset(dataset, [4, 2])).token_rows()) == [lists[4], lists[2]]
    assert as_lists(read_candidates([{"input_ids": row} for row in lists])[1]) == lists


def test_set_transform_in_place_after_the_pool_was_made(lists):
    dataset = dataset_of(lists)
    pool = CandidatePool(dataset)
    assert as_lists(pool.token_rows([0])) == [lists[0]]
    dataset.set_transform(lambda batch: {"input_ids": [row[:2] for row in batch["input_ids"]]})
    assert as_lists(pool.token_rows([0, 5])) == [lists[0][:2], lists[5][:2]]


def test_text_pool_with_a_tokenising_collator(tokenizer):
    def collate(rows):
        batch = tokenizer([row["text"] for row in rows], padding="max_length", max_length=9, return_tensors="pt")
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return batch

    texts = ["w1 w2 w3", "w4", "w5 w6 w7 w8"]
    rows = CandidatePool(datasets.Dataset.from_dict({"text": texts}), collate).token_rows()
    assert as_lists(rows) == [tokenizer(text)["input_ids"] for text in texts]
    assert rows.labels is None
    tokenizer.padding_side = "left"
    try:
        assert as_lists(CandidatePool(datasets.Dataset.from_dict({"text": texts}), collate).token_rows()) == as_lists(
            rows
        )
    finally:
        tokenizer.padding_side = "right"


def slow(pool):
    """The pool read row by row, which is the truth that the fast path must equal."""
    return stack_rows(pool._read_rows(pool.candidate_ids))


@pytest.mark.parametrize("rare", [False, True])
def test_language_modelling_collator_with_pad_as_eos(tokenizer, lists, rare):
    # With pad == eos the collator drops the label of every eos. `rare`: none is in the rows that are looked at.
    rows = [list(row) for row in lists * 40]
    rows += [[2] * 14] * 20
    if rare:
        plain = CandidatePool(dataset_of(rows))
        looked_at = set(plain._columns._rows_to_check().tolist())
        where = [next(i for i in range(len(rows)) if i not in looked_at)]
    else:
        where = range(len(rows))
    for i in where:
        rows[i][1] = EOS
    pool = CandidatePool(dataset_of(rows), DataCollatorForLanguageModeling(tokenizer, mlm=False))
    assert pool._label_rule() == EOS
    found, truth = pool.token_rows(), slow(pool)
    assert labels_of(found) == labels_of(truth)
    assert as_lists(found) == rows
    assert labels_of(found)[where[0]][1] == -100
    assert found.num_targets[where[0]] == len(rows[where[0]]) - 2


def test_default_collator_follows_the_labels_column(lists):
    labels = [list(row) for row in lists]
    labels[50][1] = -100
    pool = CandidatePool(dataset_of(lists, labels=labels), default_data_collator)
    assert pool._label_rule() == "column"
    assert labels_of(pool.token_rows([50, 0])) == [[-100, -100, *lists[50][2:]], [-100, *lists[0][1:]]]


def test_collator_that_overwrites_the_labels_column(tokenizer, lists):
    # Here the column says the same in every row but one, so only a made-up row tells that it is not read.
    labels = [list(row) for row in lists * 30]
    labels[1234][1] = -100
    pool = CandidatePool(dataset_of(lists * 30, labels=labels), DataCollatorForLanguageModeling(tokenizer, mlm=False))
    assert labels_of(pool.token_rows([1234])) == labels_of(slow(pool.select([1234])))
    assert labels_of(pool.token_rows([1234])) == all_but_first([(lists * 30)[1234]])


def tensors(ids, **more):
    return {"input_ids": torch.tensor([ids]), **{key: torch.tensor([value]) for key, value in more.items()}}


COLLATORS = {
    "truncates": lambda rows: tensors(rows[0]["input_ids"][:11]),
    "appends": lambda rows: tensors([*rows[0]["input_ids"], EOS]),
    "draws from python": lambda rows: tensors([random.randrange(60), *rows[0]["input_ids"]]),
    "draws from numpy": lambda rows: tensors(
        rows[0]["input_ids"] if np.random.rand() < 0.99 else rows[0]["input_ids"][:1]
    ),
    "draws from torch": lambda rows: tensors(
        rows[0]["input_ids"],
        labels=rows[0]["input_ids"] if torch.rand(()) < 0.999 else [-100] * len(rows[0]["input_ids"]),
    ),
    "masks a prompt": lambda rows: tensors(rows[0]["input_ids"], labels=[-100, -100, *rows[0]["input_ids"][2:]]),
    "cuts at eos": lambda rows: tensors(
        rows[0]["input_ids"][: rows[0]["input_ids"].index(EOS)]
        if EOS in rows[0]["input_ids"]
        else rows[0]["input_ids"]
    ),
}


@pytest.mark.parametrize("name", list(COLLATORS))
def test_collators_that_do_more_are_read_row_by_row(name):
    # One row of 1,000 is long enough to show the truncation.
    lists = [[3 + i % 40] * (5 + i % 6) for i in range(1000)]
    lists[777] = [4] * 12
    lists[500][-1] = EOS

    class Collator:
        pad_token_id = EOS

        def __call__(self, rows):
            return COLLATORS[name](rows)

    pool = CandidatePool(dataset_of(lists), Collator())
    assert not is_fast(pool)
    ids = [777, 500, 0]
    view = pool.select(ids)
    assert as_lists(pool.token_rows(ids)) == as_lists(slow(view))
    assert labels_of(pool.token_rows(ids)) == labels_of(slow(view))


def test_random_collator_is_repeatable_and_leaves_the_streams_alone(lists):
    def collate(rows):
        noise = [random.randrange(60), int(np.random.randint(60)), int(torch.randint(60, ()))]
        return tensors([*noise, *rows[0]["input_ids"]])

    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    expected = [random.random(), np.random.rand(), torch.rand(()).item()]
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    pool = CandidatePool(dataset_of(lists), collate)
    first, again = pool.token_rows(), pool.token_rows(np.arange(NUM_ROWS)[::-1])
    identity = pool.identity()
    assert as_lists(first) == as_lists(again)[::-1]  # by row, whatever was read before it
    assert len({tuple(row[:3]) for row in as_lists(first)}) > NUM_ROWS // 2
    assert identity == pool.identity()

    def broken(rows):
        random.random()
        raise KeyError("no")

    with pytest.raises(KeyError):
        CandidatePool(dataset_of(lists), broken).token_rows([0])
    assert [random.random(), np.random.rand(), torch.rand(()).item()] == expected


def test_odd_collators_and_positions_are_refused(lists):
    dataset = dataset_of(lists)
    with pytest.raises(UnsupportedSettingError, match="`position_ids` must count up.*the dataset"):
        CandidatePool(dataset_of(lists, position_ids=lists))
    with pytest.raises(UnsupportedSettingError, match=r"shape \(1, length\), got \(2, 2\)"):
        CandidatePool(dataset, lambda rows: {"input_ids": torch.zeros(2, 2, dtype=torch.long)}).token_rows()
    with pytest.raises(UnsupportedSettingError, match=r"must have `input_ids`, got the columns \['x'\].*lambda"):
        CandidatePool(dataset, lambda rows: {"x": torch.zeros(1, 2)}).token_rows()
    with pytest.raises(ValueError, match="`input_ids` must be one whole number.*floats.*pool row 0"):
        CandidatePool(dataset, lambda rows: {"input_ids": torch.zeros(1, 2)}).token_rows()
    with pytest.raises(ValueError, match="`labels` must be as long"):
        CandidatePool(dataset, lambda rows: tensors([1, 2], labels=[1])).token_rows()


def test_wrong_pools_say_what_to_do(lists):
    with pytest.raises(ValueError, match=r"column `input_ids`, got the columns \['text'\]"):
        CandidatePool(datasets.Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(ValueError, match=r"must have `input_ids`, got the columns \['text'\]"):
        CandidatePool([{"text": "a"}]).token_rows()
    with pytest.raises(ValueError, match="must have rows"):
        CandidatePool([])
    with pytest.raises(TypeError, match="split"):
        CandidatePool(datasets.DatasetDict(train=dataset_of(lists)))
    with pytest.raises(TypeError, match="dict with `input_ids`, got list"):
        CandidatePool(lists).token_rows()
    with pytest.raises(ValueError, match="whole number a token, got a ragged list|whole number a token"):
        CandidatePool(dataset_of([[[1], [2, 3]]])).token_rows()
    pool = CandidatePool(dataset_of(lists))
    for ids in ([NUM_ROWS], [-1], [0.5], [[1]]):
        with pytest.raises(ValueError, match="`ids`"):
            pool.token_rows(ids)


def test_streams_are_refused(lists):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([])

        def __len__(self):
            return 3

    for stream in (dataset_of(lists).to_iterable_dataset(), Stream()):
        with pytest.raises(UnsupportedSettingError, match=r"MatesSelector\.filter"):
            CandidatePool(stream)


def test_views_and_chunks(lists):
    pool = CandidatePool(dataset_of(lists))
    view = pool.select([8, 2, 5])
    assert (len(view), len(pool)) == (3, NUM_ROWS)
    assert view.candidate_ids.tolist() == [8, 2, 5]
    assert as_lists(view.token_rows()) == [lists[8], lists[2], lists[5]]
    assert as_lists(view.select([80]).token_rows()) == [lists[80]]  # rows of the pool, not of the view
    assert len(pool.select([]).token_rows()) == 0
    order = np.random.default_rng(0).permutation(NUM_ROWS)
    pieces = list(pool.chunks(order, 32))
    assert [len(piece) for piece in pieces] == [32, 32, 26]
    assert [row for piece in pieces for row in as_lists(piece)] == [lists[i] for i in order]
    assert as_lists(next(view.chunks(None, 2))) == [lists[8], lists[2]]


class Stacks:
    """A collator that does more than its columns say, so rows are read one by one."""

    def __call__(self, rows):
        return {"input_ids": [[*row["input_ids"], 5] for row in rows]}


@pytest.mark.parametrize("one_by_one", [False, True])
def test_chunks_hold_at_most_so_many_tokens_and_rows(lists, one_by_one):
    collate = Stacks() if one_by_one else None
    pool = CandidatePool(dataset_of(lists), collate)
    order = np.random.default_rng(0).permutation(NUM_ROWS)
    whole = as_lists(pool.token_rows(order))
    longest = max(map(len, whole))
    for size, max_tokens in ((32, 40), (7, 10**6), (NUM_ROWS, longest), (NUM_ROWS, 1), (1, 10**6)):
        pieces = list(pool.chunks(order, size, max_tokens=max_tokens))
        assert [row for piece in pieces for row in as_lists(piece)] == whole
        for piece in pieces:
            assert 0 < len(piece) <= size
            assert len(piece.values) <= max_tokens or len(piece) == 1
        if max_tokens == 40:  # as full as they can be
            sums = [len(piece.values) + len(after.values) for piece, after in zip(pieces, pieces[1:], strict=False)]
            assert np.mean(sums) > 40
    for size, max_tokens in ((0, 5), (5, 0)):
        with pytest.raises(ValueError, match="`size` and `max_tokens` must be at least 1"):
            pool.chunks(order, size, max_tokens=max_tokens)


def test_indices_of_a_shuffled_dataset_are_held_once_and_not_copied(lists):
    shuffled = dataset_of(lists).shuffle(seed=1)
    pool = CandidatePool(shuffled)
    expected = [shuffled[i]["input_ids"] for i in range(NUM_ROWS)]
    assert as_lists(pool.token_rows()) == expected
    opened = pool._columns._opened
    held = {id(column._indices) for column in opened.values()}
    assert len(held) == 1
    mapped = shuffled._indices.column(0).chunks[0].to_numpy()
    assert np.shares_memory(pool._columns._physical_rows(), mapped)
    in_pieces = datasets.concatenate_datasets([shuffled, shuffled.select([3, 1])])
    assert as_lists(CandidatePool(in_pieces).token_rows()) == [*expected, expected[3], expected[1]]


def test_read_candidates_and_rows_of_agree_over_all_kinds(lists):
    dataset = dataset_of(lists)
    kinds = [dataset, CandidatePool(dataset), TokenRows.from_lists(lists), Plain(lists), dataset.to_list()]
    for kind in kinds:
        ids, rows = read_candidates(kind)
        assert ids.dtype == np.int64
        assert ids.tolist() == list(range(NUM_ROWS))
        assert as_lists(rows) == lists
        assert as_lists(rows_of(kind, [40, 3])) == [lists[40], lists[3]]
        with pytest.raises(ValueError, match=r"rows"):
            rows_of(kind, [NUM_ROWS])
    ids, rows = read_candidates(CandidatePool(dataset).select([40, 3]))
    assert ids.tolist() == [40, 3]
    assert as_lists(rows_of(CandidatePool(dataset).select([40, 3]), [5])) == [lists[5]]
    for empty in (TokenRows.from_lists([]), CandidatePool(dataset).select([])):
        with pytest.raises(ValueError, match="must have rows"):
            read_candidates(empty)


def test_identity_follows_the_content(tokenizer, lists):
    identity = CandidatePool(dataset_of(lists)).identity()
    assert set(identity) == {"num_rows", "features", "rows_sha256"}
    assert identity["num_rows"] == NUM_ROWS
    # Another fingerprint, other chunks and another way of reading, but the same content.
    same = dataset_of(lists).map(lambda row: {"input_ids": row["input_ids"]}, writer_batch_size=13)
    assert same._fingerprint != dataset_of(lists)._fingerprint
    assert CandidatePool(same.select(range(NUM_ROWS))).identity() == identity
    assert CandidatePool(dataset_of(lists), default_data_collator).identity() == identity
    plain = CandidatePool(Plain(lists)).identity()
    assert plain["rows_sha256"] == identity["rows_sha256"]

    other = [list(row) for row in lists]
    other[7][1] += 1
    borders = [[*lists[0], lists[1][0]], lists[1][1:], *lists[2:]]
    masked = [list(row) for row in lists]
    masked[7][1] = -100
    for changed in (
        dataset_of(other),
        dataset_of(lists[:-1]),
        dataset_of(lists[::-1]),
        dataset_of(borders),
        dataset_of(lists, labels=masked),
    ):
        assert CandidatePool(changed).identity()["rows_sha256"] != identity["rows_sha256"]


def test_identity_of_a_large_pool_reads_1024_fixed_rows():
    class Counted(Plain):
        read: set = set()

        def __getitem__(self, i):
            self.read.add(i)
            return super().__getitem__(i)

    dataset = Counted([[i % 50, i % 7] for i in range(20_000)])
    first = CandidatePool(dataset).identity()
    where = set(dataset.read)
    assert 1000 < len(where) <= 1024 + 1  # the first row is read for its keys
    assert max(np.diff(sorted(where))) < 60  # all over the pool
    assert CandidatePool(dataset).identity() == first
    assert dataset.read == where


def test_reading_leaves_the_dataset_as_found(lists):
    dataset = dataset_of(lists).with_format("torch")
    before = (dataset.format, dataset._fingerprint)
    CandidatePool(dataset, default_data_collator).token_rows()
    assert (dataset.format, dataset._fingerprint) == before
