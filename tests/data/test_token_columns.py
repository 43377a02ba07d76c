"""Whatever way a dataset comes in, the same columns count as ids, labels and mask, and the same ones are refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import default_data_collator

from mates_hf.data.arrow import _NUM_CONVERTED, ListColumn
from mates_hf.data.collated import read_row
from mates_hf.data.column_types import counts, holds_texts, holds_tokens
from mates_hf.data.pool import CandidatePool
from mates_hf.data.rows import IGNORED, TokenRows
from mates_hf.data.token_columns import TokenColumns, read_batch
from mates_hf.selection.selector import MatesSelector
from tests.selection.selector_kit import fit_model

IDS = [[5, 7, 9, 0, 0, 0], [8, 8, 8, 8, 0, 0], [3, 4, 6, 1, 2, 9]]
MASK = [[int(i > 0) for i in row] for row in IDS]
LABELS = [[IGNORED, 7, IGNORED, 9, 1, 2], [8, 8, IGNORED, 8, 8, 8], [3, 4, 6, 1, IGNORED, 9]]


class OfAllThatCounts:
    """An influence model that tells any two of these rows apart, by ids, labels and where they stand."""

    report = None

    def __init__(self) -> None:
        self.seen: list[float] = []

    def predict(self, rows: TokenRows) -> np.ndarray:
        def number(ids: np.ndarray, labels: np.ndarray) -> int:
            at = np.arange(1, len(ids) + 1)
            return int(7 * ids @ at + labels @ at**2)

        found = np.array([number(*rows.row(i)) for i in range(len(rows))], np.float32)
        self.seen += found.tolist()
        return found

    def digest(self) -> str:
        return "all that counts"


SELECTOR = MatesSelector(OfAllThatCounts())  # type: ignore[arg-type]


def of_rows(rows: TokenRows) -> tuple[list[float], list[int]]:
    return OfAllThatCounts().predict(rows).tolist(), rows.num_targets.tolist()


def untyped(dataset: Dataset) -> IterableDataset:
    """A stream that says nothing of its columns; rows leave out what they have not."""

    def rows() -> Iterator[dict[str, Any]]:
        for row in dataset:
            yield {name: value for name, value in row.items() if value is not None or name == "input_ids"}

    stream = IterableDataset.from_generator(rows)
    assert stream.features is None
    return stream


def scored(dataset: Dataset) -> tuple[list[float], list[int]]:
    found = SELECTOR.score(dataset, shard_rows=2)
    return found.influence.tolist(), found.num_targets.tolist()


def mapped(dataset: Dataset | IterableDataset) -> tuple[list[float], None]:
    return [row["influence"] for row in SELECTOR.map(dataset, batch_size=2)], None


def kept(dataset: Dataset | IterableDataset) -> tuple[list[float], None]:
    """What a filter that lets all through asks of its model."""
    model = OfAllThatCounts()
    selector = MatesSelector(model)  # type: ignore[arg-type]
    assert len(list(selector.filter(dataset, threshold=-1e9, batch_size=2))) == len(IDS)
    return model.seen, None


# Every way by which a dataset comes in: what is read of each row, as a number, and how many tokens of it are trained.
WAYS: dict[str, Callable[[Dataset], tuple[list[float], list[int] | None]]] = {
    "pool": lambda dataset: of_rows(CandidatePool(dataset).token_rows()),
    "pool with a transform": lambda dataset: of_rows(CandidatePool(dataset.with_transform(lambda x: x)).token_rows()),
    "pool of a list": lambda dataset: of_rows(CandidatePool(list(dataset)).token_rows()),
    "pool of torch rows": lambda dataset: of_rows(CandidatePool(list(dataset.with_format("torch"))).token_rows()),
    "collator": lambda dataset: of_rows(CandidatePool(dataset, default_data_collator).token_rows()),
    "score": scored,
    "map": mapped,
    "filter": kept,
    "stream": lambda dataset: mapped(dataset.to_iterable_dataset()),
    "filtered stream": lambda dataset: kept(dataset.to_iterable_dataset()),
    "untyped stream": lambda dataset: mapped(untyped(dataset)),
    "filtered untyped stream": lambda dataset: kept(untyped(dataset)),
}


def dataset_of(**columns: Any) -> Dataset:
    """A dataset with `input_ids`, and columns of exactly the types given as (values, type)."""
    made = {"input_ids": pa.array(IDS), **{name: pa.array(*given) for name, given in columns.items()}}
    dataset = Dataset(pa.table(made))
    assert [dataset.data.schema.field(name).type for name in columns] == [given[1] for given in columns.values()]
    return dataset


def right(labels: list[Any] | None, mask: list[Any] | None) -> tuple[list[float], list[int]]:
    """What is read of `IDS` with these, worked out row by row."""
    rows, trained = [], []
    for i, ids in enumerate(IDS):
        there = [j for j in range(len(ids)) if mask is None or mask[i] is None or mask[i][j]]
        own = ids if labels is None or labels[i] is None else labels[i]
        rows.append([ids[j] for j in there])
        trained.append([own[j] for j in there])
    return of_rows(TokenRows.from_lists(rows, trained))


INTEGERS = (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())
LISTS = (pa.list_, pa.large_list, lambda kind: pa.list_(kind, 6))

Column = tuple[list[Any], Any]


def casts(values: list[Any], kind: pa.DataType) -> list[Any]:
    """The values as Python has them of that type."""
    cast: Any = bool if pa.types.is_boolean(kind) else float if pa.types.is_floating(kind) else int
    cast = np.float16 if pa.types.is_float16(kind) else cast  # pyarrow 15 takes no other number for one
    return [None if row is None else [cast(value) for value in row] for row in values]


def good_cases() -> Iterator[tuple[str, dict[str, Column], list[Any] | None, list[Any] | None]]:
    """What counts: name, columns, and the labels and masks they stand for."""
    for kind in (*INTEGERS, pa.bool_(), pa.float16(), pa.float32(), pa.float64()):
        yield f"mask of {kind}", {"attention_mask": (casts(MASK, kind), pa.list_(kind))}, None, MASK
    for container in LISTS:
        for kind in (pa.bool_(), pa.float32(), pa.int8()):
            column = (casts(MASK, kind), container(kind))
            yield f"mask in {column[1]}", {"attention_mask": column}, None, MASK
        yield f"labels in {container(pa.int16())}", {"labels": (LABELS, container(pa.int16()))}, LABELS, None
    both: dict[str, Column] = {
        "labels": (LABELS, pa.list_(pa.int32())),
        "attention_mask": (casts(MASK, pa.bool_()), pa.list_(pa.bool_())),
    }
    yield "labels and mask", both, LABELS, MASK
    for where in (0, 1):
        labels, mask = [*LABELS], [*MASK]
        labels[where] = mask[where] = None
        yield f"null labels {where}", {"labels": (labels, pa.list_(pa.int64()))}, labels, None
        yield f"null labels {where} of a fixed size", {"labels": (labels, pa.list_(pa.int64(), 6))}, labels, None
        for kind in (pa.int64(), pa.bool_(), pa.float32()):
            column = (casts(mask, kind), pa.list_(kind))
            yield f"null mask {where} of {kind}", {"attention_mask": column}, None, mask
    yield "labels all null", {"labels": ([None] * 3, pa.null())}, None, None
    yield "labels null lists", {"labels": ([None] * 3, pa.list_(pa.null()))}, None, None
    yield "mask all null", {"attention_mask": ([None] * 3, pa.null())}, None, None


GOOD = {name: rest for name, *rest in good_cases()}


@pytest.mark.parametrize("case", GOOD)
def test_every_way_reads_the_same(case: str) -> None:
    columns, labels, mask = GOOD[case]
    dataset = dataset_of(**columns)
    expected = right(labels, mask)
    assert (expected == right(None, None)) == ("all null" in case or "null lists" in case)
    for way, read in WAYS.items():
        # torch's collator has no answer to a row that is null; rows of torch have none either
        if "null" in case and way in ("collator", "pool of torch rows"):
            continue
        influence, num_targets = read(dataset)
        assert influence == expected[0], way
        assert num_targets is None or num_targets == expected[1], way
    moved = dataset.select([2, 0, 1])  # through an indices mapping, and from the middle of a chunk
    assert scored(moved)[0] == [expected[0][i] for i in (2, 0, 1)]
    assert of_rows(CandidatePool(dataset).token_rows([1, 1, 2]))[0] == [expected[0][i] for i in (1, 1, 2)]


WHOLE, ZERO_ONE = "must be one whole number a token", "must be 0 or 1 a token"
HALF = [[1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 0.5, 1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]]
NULLED = [[1, 1, 1, 1, 1, 1], [1, 1, None, 1, 1, 1], [1, 1, 1, 1, 1, 1]]
NULLED_MASK = [[None if value is None else True for value in row] for row in NULLED]
SHORT = [[1, 1, 1, 1, 1, 1], [1, 1, 1], [1, 1, 1, 1, 1, 1]]
TEXTS, FLOATS = [["a"] * 6] * 3, [[0.25] * 6] * 3
OF_TYPE, OF_ROW = "all rows", "row 1"  # whether what is wrong is so of every row, or only of row 1

BAD: dict[str, tuple[str, Column, str, str]] = {
    "labels of floats": ("labels", (FLOATS, pa.list_(pa.float64())), f"{WHOLE}, got lists of floats", OF_TYPE),
    "whole labels as floats": (
        "labels", ([[1.0] * 6] * 3, pa.list_(pa.float32())), f"{WHOLE}, got lists of floats", OF_TYPE,
    ),
    "labels of booleans": ("labels", ([[True] * 6] * 3, pa.list_(pa.bool_())), f"{WHOLE}, got lists of bool", OF_TYPE),
    "labels of texts": ("labels", (TEXTS, pa.list_(pa.string())), f"{WHOLE}, got lists of texts", OF_TYPE),
    "a class a row": ("labels", ([0, 1, 2], pa.int64()), rf"{WHOLE}, got one value a row \(integers\)", OF_TYPE),
    "a score a row": ("labels", ([0.5, 1, 2], pa.float64()), rf"{WHOLE}, got one value a row \(floats\)", OF_TYPE),
    "a name a row": ("labels", (["a", "b", "c"], pa.string()), rf"{WHOLE}, got one value a row \(texts\)", OF_TYPE),
    "labels of lists": (
        "labels", ([[[1]] * 6] * 3, pa.list_(pa.list_(pa.int64()))), f"{WHOLE}, got lists of lists", OF_TYPE,
    ),
    "ragged masks": (
        "attention_mask", ([[[1], [1, 0]]] * 3, pa.list_(pa.list_(pa.int64()))), f"{ZERO_ONE}, got lists of lists",
        OF_TYPE,
    ),
    "masks of texts": ("attention_mask", (TEXTS, pa.list_(pa.string())), f"{ZERO_ONE}, got lists of texts", OF_TYPE),
    "a mask a row": (
        "attention_mask", ([True, False, True], pa.bool_()), rf"{ZERO_ONE}, got one value a row \(booleans\)", OF_TYPE,
    ),
    "half a mask": ("attention_mask", (HALF, pa.list_(pa.float32())), f"{ZERO_ONE}, got 0.5", OF_ROW),
    "null label": ("labels", (NULLED, pa.list_(pa.int64())), "must not be null at a token", OF_ROW),
    "null mask": ("attention_mask", (NULLED_MASK, pa.list_(pa.bool_())), "must not be null at a token", OF_ROW),
    "null float mask": ("attention_mask", (NULLED, pa.list_(pa.float64())), "must not be null at a token", OF_ROW),
    "short labels": ("labels", (SHORT, pa.list_(pa.int32())), "must be as long as .* has 3 and 6", OF_ROW),
    "short mask": ("attention_mask", (SHORT, pa.list_(pa.int32())), "must be as long as .* has 3 and 6", OF_ROW),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_every_way_refuses_the_same(case: str) -> None:
    name, column, message, where = BAD[case]
    values, kind = column
    dataset = dataset_of(**{name: (values, kind)})
    # What torch makes no tensor of, torch's collator and format refuse in their own words or leave out.
    no_tensor = any(word in case for word in ("text", "name", "ragged", "null"))
    for way, read in WAYS.items():
        if no_tensor and way in ("collator", "pool of torch rows"):
            continue
        if case == "labels of lists" and way == "collator":
            continue  # a batch of another shape: what a collator makes is refused as such
        with pytest.raises(ValueError, match=f"`{name}` {message}") as caught:
            read(dataset)
        assert type(caught.value) is ValueError, way
        assert "null" in case or f"`dataset.remove_columns('{name}')`" in str(caught.value), way
        if where == OF_ROW:
            assert "row 1" in str(caught.value), way  # of the dataset; of a batch, which is of two rows


@pytest.mark.parametrize("name", ["labels", "attention_mask", "input_ids"])
def test_rows_with_nulls_that_are_not_read_refuse_nothing(name: str) -> None:
    """A filter leaves the table as it was, so what it took out is still in its columns."""
    columns = {"input_ids": IDS, name: NULLED}
    dataset = Dataset.from_dict(columns)
    cleaned = dataset.filter(lambda row: None not in row[name])
    assert cleaned._indices is not None
    assert len(scored(cleaned)[0]) == len(CandidatePool(cleaned).token_rows()) == 2
    with pytest.raises(ValueError, match=rf"`{name}` must not be null at a token.*\(row 1\)"):
        SELECTOR.score(dataset)
    with pytest.raises(ValueError, match=rf"`{name}` must not be null at a token.*\(pool row 1\)"):
        CandidatePool(dataset).token_rows([2, 0, 1])


def test_columns_of_other_names_and_beside_other_tokens_do_not_count() -> None:
    """Only beside `input_ids` do the two names mean anything."""
    dataset = Dataset.from_dict({"ids": IDS, "labels": ["a", "b", "c"], "attention_mask": [0.5, 1, 2]})
    expected = right(None, None)
    assert SELECTOR.score(dataset, column="ids").influence.tolist() == expected[0]
    for stream in (dataset.to_iterable_dataset(), untyped(dataset)):
        assert [row["influence"] for row in SELECTOR.map(stream, column="ids")] == expected[0]
    renamed = Dataset.from_dict({"input_ids": IDS, "class": ["a", "b", "c"]})
    for way, read in WAYS.items():
        if way != "pool of torch rows":
            assert read(renamed)[0] == expected[0], way


def test_a_stream_of_rows_of_which_only_some_have_labels() -> None:
    """The first has none, so what the stream looks like at its head says nothing of them."""

    def rows() -> Iterator[dict[str, Any]]:
        for i, ids in enumerate(IDS):
            yield {"input_ids": ids, **({"labels": LABELS[i]} if i == 1 else {})}

    found = SELECTOR.map(IterableDataset.from_generator(rows), batch_size=3)
    assert [row["influence"] for row in found] == right([None, LABELS[1], None], None)[0]


def test_a_stream_whose_rows_are_arrays_tensors_or_of_mixed_kinds() -> None:
    import torch

    kinds: list[Callable[[Any], Any]] = [np.asarray, torch.tensor, tuple]

    def rows() -> Iterator[dict[str, Any]]:
        for make, ids, mask in zip(kinds, IDS, MASK, strict=True):
            yield {"input_ids": make(ids), "attention_mask": make([float(value) for value in mask])}

    stream = IterableDataset.from_generator(rows)
    assert [row["influence"] for row in SELECTOR.map(stream)] == right(None, MASK)[0]
    noisy = MatesSelector(fit_model()).filter(stream, ratio=1.0, temperature=0.5)  # noise is drawn of a row's ids
    assert len(list(noisy)) == 3

    def mixed() -> Iterator[dict[str, Any]]:
        yield {"input_ids": IDS[0], "labels": LABELS[0]}
        yield {"input_ids": IDS[1], "labels": 3}

    with pytest.raises(ValueError, match=r"`labels` must be one whole .* one value a row \(integers\) \(row 1 of a"):
        list(SELECTOR.map(IterableDataset.from_generator(mixed)))


# --- Arrow types that datasets does not make, but tables may have ---


LIST_TYPES = [pa.list_, pa.large_list]
LIST_TYPES += [getattr(pa, name) for name in ("list_view", "large_list_view") if hasattr(pa, name)]


@pytest.mark.parametrize("container", LIST_TYPES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_rows_of_any_list(container: Any, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from([pa.int16(), pa.uint32(), pa.bool_(), pa.float64()]))
    high = 60 if pa.types.is_integer(kind) else 1
    value = st.integers(0, high).map(bool if pa.types.is_boolean(kind) else int)
    lists = data.draw(st.lists(st.none() | st.lists(value, max_size=5), min_size=1, max_size=9))
    offset = data.draw(st.integers(0, 2))
    cut = data.draw(st.integers(0, len(lists)))
    array = pa.array([[1, 0]] * offset if not pa.types.is_boolean(kind) else [[True, False]] * offset, container(kind))
    array = pa.array(array.to_pylist() + lists, container(kind)).slice(offset)  # a slice begins inside its buffer
    column = ListColumn(pa.chunked_array([array.slice(0, cut), array.slice(cut)]), "attention_mask")
    ids = np.array(data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=12)), np.int64)
    found = column.read(ids)
    cuts = np.split(found.values, found.offsets[1:-1]) if len(ids) else []
    assert [row.tolist() for row in cuts] == [[int(item) for item in lists[i] or []] for i in ids]
    valid = [True] * len(ids) if found.valid is None else found.valid.tolist()
    assert valid == [lists[i] is not None for i in ids]
    assert column.first_unfit(ids) is None
    assert np.array_equal(column.lengths(ids), np.diff(found.offsets))
    assert counts("attention_mask", array.type)
    assert holds_tokens(array.type) == pa.types.is_integer(kind)


@pytest.mark.skipif(not hasattr(pa, "list_view"), reason="this pyarrow has no list views")
def test_list_views_may_lie_in_any_order() -> None:
    values = pa.array([1, 2, 3, 4, 5, 6], pa.int32())
    array = pa.ListViewArray.from_arrays(pa.array([3, 0, 1], pa.int32()), pa.array([3, 2, 2], pa.int32()), values)
    columns = TokenColumns(pa.table({"input_ids": array}), "input_ids")
    for ids in ([0, 1, 2], [2, 0]):
        wanted = [[[4, 5, 6], [1, 2], [2, 3]][i] for i in ids]
        rows, spans = columns.rows(np.array(ids)), columns.spans(np.array(ids))
        assert [rows.row(i)[0].tolist() for i in range(len(ids))] == wanted
        assert spans is not None
        (piece,) = spans.pieces
        assert [piece.values[a : a + n].tolist() for a, n in zip(piece.starts, piece.lengths, strict=True)] == wanted


def test_the_first_value_that_is_no_mask_is_named_whatever_the_order() -> None:
    rows = [[1.0, 0.0], [1.0, float("nan")], None, [0.0, 0.25], [1.0, None]]
    column = ListColumn(pa.chunked_array([pa.array(rows[:2]), pa.array(rows[2:])]), "attention_mask")
    assert column.first_unfit(np.array([0, 2])) is None
    assert column.first_unfit(np.array([0, 3, 4])) == (1, 0.25)
    assert column.first_unfit(np.array([2, 4, 3])) == (1, None)
    assert str(column.first_unfit(np.array([3, 1])[::-1])) == "(0, nan)"


@pytest.mark.parametrize("kind", [pa.int32(), pa.bool_(), pa.float32()])
def test_what_lies_under_null_rows_and_outside_a_slice_is_not_looked_at(kind: pa.DataType) -> None:
    """A slice of a table shares all of its values, and a null row may have some; both may be anything."""
    values = pa.array([None, None, True, False, True, None, None]).cast(kind)
    edges, missing = pa.array([0, 2, 2, 4, 5, 6, 6, 7], pa.int32()), [True, False, False, False, True, False, True]
    array = pa.ListArray.from_arrays(edges, values, mask=pa.array(missing))
    for begin in (0, 1, 2):
        column = ListColumn(pa.chunked_array([array.slice(begin)]), "attention_mask")
        ids = np.arange(len(array) - begin)
        assert column.first_unfit(ids) is None
        assert column.read(ids).values.tolist() == [1, 0, 1]
        assert column.read(ids[::-1]).values.tolist() == [1, 1, 0]
        assert column.read(ids).offsets.tolist() == [0, 0, 0, 2, 3, 3, 3, 3][begin:]
        assert all((piece.starts + piece.lengths <= len(piece.values)).all() for piece in column.spans(ids).pieces)
    alone = ListColumn(pa.chunked_array([array.slice(3, 1)]), "attention_mask")
    alone.read(np.array([0]))
    assert kind == pa.int32() or [len(chunk.values) for chunk in alone._converted.values()] == [1]


def test_converted_chunks_do_not_pile_up() -> None:
    """Booleans must be copied out of their bits; a corpus of them is not held in memory once it was read."""
    chunks = [pa.array([[True, i % 2 == 0]]) for i in range(3 * _NUM_CONVERTED)]
    column = ListColumn(pa.chunked_array(chunks), "attention_mask")
    ids = np.arange(len(chunks))
    assert column.read(ids).values[1::2].tolist() == [1 - i % 2 for i in ids]
    assert not column._opened
    assert len(column._converted) == _NUM_CONVERTED
    assert column.read(ids[:1]).values.tolist() == [1, 1]


def test_all_types_of_texts() -> None:
    kinds = [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())]
    kinds += [pa.dictionary(pa.int32(), pa.large_string())]
    kinds += [pa.string_view()] if hasattr(pa, "string_view") else []
    assert all(holds_texts(kind) for kind in kinds)
    for kind in (pa.binary(), pa.list_(pa.string()), pa.int64(), pa.dictionary(pa.int8(), pa.int64()), pa.null()):
        assert not holds_texts(kind)


def test_large_whole_numbers_and_empty_batches() -> None:
    assert len(read_batch({"input_ids": []}, "input_ids")) == 0
    assert read_batch({"input_ids": [None, [], [3]], "labels": [None, None, [4]]}, "input_ids").lengths.tolist() == [
        0, 0, 1,
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"`input_ids` must be one whole number.*int objects \(row 1 of a batch\)"):
        read_batch({"input_ids": [[1], [2**70]]}, "input_ids")


def test_what_a_collator_makes_is_read_by_the_same_rules() -> None:
    import torch

    row = {"input_ids": [3, 4, 5], "labels": 2}
    found = read_row(row, default_data_collator, "pool row 4", same_length=False)
    assert found.labels is not None
    assert found.labels.tolist() == [2]  # a class a row, for a model of those
    for labels, word in ((2, "integers"), (0.5, "floats")):
        with pytest.raises(ValueError, match=rf"`labels` must .* one value a row \({word}\) \(.*pool row 4\)"):
            read_row({**row, "labels": labels}, default_data_collator, "pool row 4", same_length=word == "integers")
    half = torch.tensor([[0, 1, 1]], dtype=torch.bfloat16)
    found = read_row(row, lambda rows: {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": half}, "pool row 0")
    assert found.attention_mask is not None
    assert found.attention_mask.tolist() == [0, 1, 1]
