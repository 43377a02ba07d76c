from __future__ import annotations

import copy
import dataclasses
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mates_hf.data.arrow import ListColumn
from mates_hf.data.rows import IGNORED, Piece, TokenRows, TokenSpans
from mates_hf.data.scored_column import Conversations, ScoredColumn, Texts, TokenIds, find_column, tokenizer_digest
from mates_hf.errors import InfluenceError, MatesError
from mates_hf.prediction import threads
from mates_hf.prediction.artifacts import load_influence_model, model_digest
from mates_hf.prediction.ngram import kernels
from mates_hf.prediction.ngram_model import NgramInfluenceModel
from mates_hf.prediction.score import Predictions, Scorer
from mates_hf.selection.selector import MatesSelector
from tests.selection.selector_kit import MeanId, fit_model, make_lists, with_template

NO_STRING_VIEWS = pytest.mark.skipif(not hasattr(pa, "string_view"), reason="this pyarrow has no string views")
TABLES = tuple(np.random.default_rng(0).normal(size=size).astype(np.float32) for size in (50, 50, 2**8))


@pytest.fixture(scope="module")
def fitted() -> NgramInfluenceModel:
    return fit_model()


def tokens(model: Any, tokenizer: Any = None) -> Scorer:
    return Scorer(model, TokenIds("input_ids", ("input_ids",), tokenizer))


def texts_of(model: Any, tokenizer: Any, max_length: int | None = None) -> Scorer:
    return Scorer(model, Texts("text", ("text",), tokenizer, max_length))


def predicted(scorer: Scorer, table: pa.Table, first_row: int = 0) -> Predictions:
    return scorer.predict_rows(scorer.column.open_table(table, first_row), 0, table.num_rows)


def alone(model: Any, lists: list[list[int]]) -> np.ndarray:
    """Each row predicted by itself."""
    return np.concatenate([model.predict(TokenRows.from_lists([ids])) for ids in lists])


# --- the kernel over rows where they lie ---


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_spans_are_scored_like_rows(data: st.DataObject) -> None:
    lists = data.draw(st.lists(st.lists(st.integers(0, 60), max_size=9), min_size=1, max_size=12))
    kind = data.draw(st.sampled_from([pa.int8(), pa.int32(), pa.int64(), pa.uint16()]))
    list_type = data.draw(st.sampled_from([pa.list_, pa.large_list]))
    cut = data.draw(st.integers(0, len(lists)))
    offset = data.draw(st.integers(0, 2))
    padded = [[1, 2, 3]] * offset + lists  # a slice begins inside its buffer
    array = pa.array(padded, list_type(kind)).slice(offset)
    column = ListColumn(pa.chunked_array([array.slice(0, cut), array.slice(cut)]), "input_ids")
    ids = np.array(data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=15)), np.int64)
    rows = TokenRows.from_lists([lists[i] for i in ids])
    expected = kernels.score_rows(rows.values, rows.offsets, None, TABLES, parallel=False)
    spans = column.spans(ids)
    assert np.array_equal(kernels.score_spans(spans, TABLES), expected)
    assert np.array_equal(spans.num_targets, rows.num_targets)


def test_tokens_are_not_copied() -> None:
    values = pa.array(np.arange(20, dtype=np.int32))
    array = pa.ListArray.from_arrays(pa.array([0, 5, 12, 20], pa.int32()), values)
    spans = ListColumn(pa.chunked_array([array.slice(1)]), "input_ids").spans(np.array([1, 0]))
    (piece,) = spans.pieces
    assert piece.values.ctypes.data == values.buffers()[1].address
    assert piece.starts.tolist() == [12, 5]
    assert piece.lengths.tolist() == [8, 7]


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_any_number_of_threads_gives_the_same_bits(num_threads: int) -> None:
    rng = np.random.default_rng(1)
    lengths = rng.integers(0, 900, 900)
    values = rng.integers(0, 60, lengths.sum()).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    assert len(values) >= 2**18  # enough for threads
    expected = kernels.score_rows(values, offsets, None, TABLES, parallel=False)
    order = rng.permutation(900)
    halves = [np.sort(order[:300]), order[300:]]
    pieces = tuple(Piece(values, offsets[rows], lengths[rows], rows) for rows in halves)
    with threads.at_most_threads(num_threads):
        found = kernels.score_spans(TokenSpans(pieces=pieces, num_rows=900), TABLES)
    assert np.array_equal(found, expected)
    assert found.std() > 0


def test_a_limit_of_threads_holds_for_what_sets_none() -> None:
    with threads.at_most_threads(1), threads.at_most_threads(None):
        assert threads.num_threads() == 1
    with threads.at_most_threads(1), threads.at_most_threads(3):
        assert threads.num_threads() == 3


def test_impossible_spans_and_ids_are_refused() -> None:
    values = np.array([1, 2, 3, 49], np.int32)

    def spans(start: int, length: int, **more: Any) -> TokenSpans:
        piece = Piece(values, np.array([start]), np.array([length]), np.array([0]))
        return TokenSpans(pieces=(piece,), num_rows=1, **more)

    for start, length in ((-1, 2), (3, 2), (0, -1)):
        with pytest.raises(ValueError, match="within their buffer"):
            kernels.score_spans(spans(start, length), TABLES)
    assert np.isfinite(kernels.score_spans(spans(0, 4, vocab_size=50), TABLES)).all()
    with pytest.raises(ValueError, match="below the tokenizer's 49, got 49 in row 12.*another tokenizer"):
        kernels.score_spans(spans(0, 4, vocab_size=49, first_row=12), TABLES)
    assert np.isfinite(kernels.score_spans(spans(0, 3, vocab_size=49), TABLES)).all()
    labels = np.array([0, -5, 3])
    with pytest.raises(ValueError, match="except -100.*row 0 holds -5"):
        kernels.score_rows(np.array([1, 2, 3]), np.array([0, 3]), labels, TABLES)


# --- a scorer ---


def test_columns_beside_the_tokens_count_as_in_training(fitted: NgramInfluenceModel) -> None:
    """Labels and padding masks give what the model predicts of the dataset; a mask without holes changes nothing."""
    lists = make_lists(20, seed=3)
    labels = [[IGNORED if i % 3 else token for i, token in enumerate(ids)] for ids in lists]
    table = pa.table({"input_ids": lists, "labels": labels})
    scorer = tokens(fitted)
    dataset = datasets.Dataset.from_dict({"input_ids": lists, "labels": labels})
    found = predicted(scorer, table)
    assert np.array_equal(found.influence, fitted.predict(dataset))
    assert found.num_targets.tolist() == [sum(label != IGNORED for label in row[1:]) for row in labels]
    plain = predicted(scorer, table.select(["input_ids"])).influence
    assert not np.array_equal(found.influence, plain)
    full = pa.table({"input_ids": lists, "attention_mask": [[1] * len(ids) for ids in lists]})
    assert np.array_equal(predicted(scorer, full).influence, plain)
    padded = pa.table(
        {
            "input_ids": [[0, 0, *ids] for ids in lists],
            "attention_mask": [[0, 0] + [1] * len(ids) for ids in lists],
        }
    )
    assert np.array_equal(predicted(scorer, padded).influence, plain)
    cut = pa.table({"input_ids": lists, "attention_mask": [[1]] * len(lists)})
    with pytest.raises(ValueError, match="`attention_mask` must be as long as `input_ids`.*row 5"):
        predicted(scorer, cut, first_row=5)
    batch = {"input_ids": lists, "labels": labels}
    assert np.array_equal(scorer.predict_batch(batch).influence, found.influence)


def test_a_model_of_rows_gets_rows(tiny_tokenizer: Any) -> None:
    lists = [[3, 4, 5], [], [9]]
    scorer = tokens(MeanId(), tiny_tokenizer)
    assert predicted(scorer, pa.table({"input_ids": [*lists, None]})).influence.tolist() == [4.0, 0.0, 9.0, 0.0]
    for wrong in ([[3, 64]], [[3, -1]]):
        with pytest.raises(ValueError, match="from 0 to below 64, got .* in row 1"):
            predicted(scorer, pa.table({"input_ids": [[], *wrong]}))


def test_a_text_is_exactly_its_tokens_truncated(fitted: NgramInfluenceModel, tiny_tokenizer: Any) -> None:
    texts = ["w3 w7 w9 w40", "", None, "w7 nothing w7", " ".join(["w7", "w9"] * 30)]
    scorer = texts_of(fitted, tiny_tokenizer, 6)
    expected = [tiny_tokenizer(text or "", truncation=True, max_length=6)["input_ids"] for text in texts]
    found = predicted(scorer, pa.table({"text": texts}))
    assert np.array_equal(found.influence, alone(fitted, expected))
    assert found.num_targets.tolist() == [3, 0, 0, 2, 5]
    whole = predicted(texts_of(fitted, tiny_tokenizer), pa.table({"text": texts}))
    assert whole.num_targets[-1] == 59


def test_what_is_not_finite_is_no_prediction() -> None:
    class Broken(MeanId):
        def predict(self, rows: TokenRows) -> np.ndarray:
            return np.where(np.arange(len(rows)) == 2, np.nan, 1.0)

    with pytest.raises(InfluenceError, match="1 of 4 rows is not, first row 12"):
        tokens(Broken()).predict(TokenRows.from_lists([[1, 2]] * 4), first_row=10)


@pytest.mark.parametrize(
    ("columns", "column", "expected"),
    [
        ({"text": ["a"], "input_ids": [[1]]}, None, ("input_ids", TokenIds)),
        ({"text": ["a"]}, None, ("text", Texts)),
        ({"body": pa.array(["a"], pa.large_string())}, "body", ("body", Texts)),
        ({"body": pa.array(["a"]).dictionary_encode()}, "body", ("body", Texts)),
        ({"ids": pa.array([[1, 2]], pa.list_(pa.uint16(), 2))}, "ids", ("ids", TokenIds)),
        ({"input_ids": [[], None]}, None, ("input_ids", TokenIds)),
        ({"input_ids": [None], "text": ["a"]}, None, ("input_ids", TokenIds)),
        ({"text": [None]}, None, ("text", Texts)),
        ({"body": [None]}, "body", (TypeError, "or token ids .*got null")),
        ({"ids": [[1]], "labels": [0.5]}, "ids", ("ids", TokenIds)),
        ({"input_ids": [[1]], "labels": [[0.5]]}, None, (ValueError, "`labels` must be one whole.*lists of floats")),
        ({"input_ids": [[1]], "attention_mask": ["a"]}, None, (ValueError, "`attention_mask` must be 0 or 1 a token")),
        ({"body": ["a"]}, None, (ValueError, r"`input_ids`, `text` or `messages`.*got the columns \['body'\]")),
        ({"text": ["a"]}, "body", (ValueError, r"column `body` to score, got the columns \['text'\]")),
        ({"input_ids": [[0.5]]}, None, (TypeError, "a list of integers.*got list<.*double")),
        ({"n": [1]}, "n", (TypeError, r"got int64.*the columns are \['n'\]")),
    ],
)
def test_which_column_is_scored(
    columns: dict[str, Any], column: str | None, expected: tuple[Any, Any], tiny_tokenizer: Any
) -> None:
    schema = pa.table(columns).schema
    if isinstance(expected[0], str):
        found = find_column(schema, column, tiny_tokenizer)
        assert (found.name, type(found)) == expected
    else:
        with pytest.raises(expected[0], match=expected[1]):
            find_column(schema, column)


@pytest.mark.parametrize(
    "kind", ["string", "large_string", pytest.param("string_view", marks=NO_STRING_VIEWS), "dictionary"]
)
def test_every_type_of_texts_is_scored(kind: str, tiny_tokenizer: Any) -> None:
    """As a table, by rows of a dataset in any order, inside `map`, by `filter`, and on a stream."""
    texts = ["w3 w7 w9", None, "", "w4 w4", "w60"]
    plain = pa.array(texts)
    array = plain.dictionary_encode() if kind == "dictionary" else plain.cast(getattr(pa, kind)())
    table = pa.table({"text": array})
    assert type(find_column(table.schema, None, tiny_tokenizer)) is Texts
    expected = [19 / 3, 0.0, 0.0, 4.0, 60.0]
    assert predicted(texts_of(MeanId(), tiny_tokenizer), table).influence == pytest.approx(expected)
    if kind == "dictionary":
        return  # `datasets` has no such column
    dataset = datasets.Dataset(table)
    assert dataset.data.schema.field("text").type == array.type
    selector = MatesSelector(MeanId(), tiny_tokenizer)  # type: ignore[arg-type]
    assert selector.score(dataset).influence == pytest.approx(expected)
    moved = dataset.select([4, 0, 3])
    assert selector.score(moved).influence == pytest.approx([60.0, 19 / 3, 4.0])
    assert selector.map(moved)["influence"][:] == pytest.approx([60.0, 19 / 3, 4.0])
    assert selector.filter(dataset, threshold=5.0)["text"][:] == ["w3 w7 w9", "w60"]
    assert [row["influence"] for row in selector.map(dataset.to_iterable_dataset())] == pytest.approx(expected)


def test_padding_is_not_scored_whatever_a_mask_is_made_of() -> None:
    """A mask of booleans or floats was left out without a word, and the padding scored."""
    ids = [[5, 7, 9, 0, 0, 0], [8, 8, 8, 8, 0, 0]]
    selector = MatesSelector(MeanId())  # type: ignore[arg-type]
    for kind in (int, bool, float):
        mask = [[kind(i > 0) for i in row] for row in ids]
        dataset = datasets.Dataset.from_dict({"input_ids": ids, "attention_mask": mask})
        found = selector.score(dataset)
        assert (found.influence.tolist(), found.num_targets.tolist()) == ([7.0, 8.0], [2, 3])
        assert [row["influence"] for row in selector.map(dataset.to_iterable_dataset())] == [7.0, 8.0]
        assert len(selector.select(dataset, num_tokens=3)) == 1
        fitted = MatesSelector(fit_model())  # which reads rows where they lie
        stripped = fitted.influence_model.predict(TokenRows.from_lists([[5, 7, 9], [8, 8, 8, 8]]))
        assert np.array_equal(fitted.score(dataset).influence, stripped)


# --- digests ---


def test_a_digest_follows_the_weights_and_nothing_else(tmp_path: Any, tiny_tokenizer: Any) -> None:
    fitted = fit_model()
    fitted.save_pretrained(tmp_path)
    loaded = load_influence_model(tmp_path)
    assert isinstance(loaded, NgramInfluenceModel)
    assert model_digest(loaded) == model_digest(fitted) == model_digest(fit_model())
    assert model_digest(fit_model(seed=1)) != model_digest(fitted)
    scorer = texts_of(loaded, tiny_tokenizer, 8)
    before = scorer.digest()
    tiny_tokenizer(["w3 w4"], truncation=True, max_length=1, padding="max_length")
    assert scorer.digest() == before
    assert loaded._tables is not None
    loaded._tables.token[5] += np.float32(1e-3)
    assert scorer.digest() != before

    def digest(column: ScoredColumn) -> str:
        return Scorer(loaded, column).digest()

    for change in ({"max_length": 9}, {"name": "body"}, {"tokenizer": None}):
        assert digest(dataclasses.replace(scorer.column, **change)) != scorer.digest()
    path = ("text",)
    kinds = [kind("text", path, tiny_tokenizer, 8) for kind in (Texts, TokenIds)]
    kinds += [Conversations("text", path, with_template(tiny_tokenizer, template), 8) for template in ("a", "b")]
    assert len({digest(column) for column in kinds}) == 4
    more = copy.deepcopy(tiny_tokenizer)
    more.add_tokens(["w64"])
    for one in kinds[:2]:  # an id that one tokenizer has and the other has not
        assert digest(dataclasses.replace(one, tokenizer=more)) != digest(one)

    class Depends(MeanId):
        def digest(self) -> str:
            return "of my own"

    assert model_digest(Depends()) == "of my own"


def test_a_digest_follows_the_module_that_reads_candidates(tiny_model: Any) -> None:
    import torch

    class Reads(MeanId):
        model = tiny_model

    before = model_digest(Reads())
    assert model_digest(Reads()) == before != model_digest(MeanId())
    with torch.no_grad():
        next(tiny_model.parameters()).flatten()[3] += 1e-3
    assert model_digest(Reads()) != before


def test_a_tokenizer_digest_survives_saving(tmp_path: Any, tiny_tokenizer: Any) -> None:
    from transformers import AutoTokenizer

    tiny_tokenizer.save_pretrained(tmp_path)
    assert tokenizer_digest(AutoTokenizer.from_pretrained(tmp_path)) == tokenizer_digest(tiny_tokenizer)
    other = AutoTokenizer.from_pretrained(tmp_path)
    other.add_tokens(["w99"])
    assert tokenizer_digest(other) != tokenizer_digest(tiny_tokenizer)


def test_only_known_kinds_are_loaded(tmp_path: Any) -> None:
    with pytest.raises(FileNotFoundError, match="holds no influence model"):
        load_influence_model(tmp_path)
    (tmp_path / "config.json").write_text('{"kind": "os.system"}')
    with pytest.raises(ValueError, match="must hold one of NgramInfluenceModel.*got 'os.system'"):
        load_influence_model(tmp_path)
    (tmp_path / "config.json").write_text('{"kind": 3}')
    with pytest.raises(MatesError, match="must say a `kind`"):
        load_influence_model(tmp_path)


class Bounded(MeanId):
    """Notes how many tokens it is given at once."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def predict(self, rows: TokenRows) -> np.ndarray:
        self.most = max(self.most, len(rows.values))
        return super().predict(rows)


def test_long_rows_are_read_so_many_tokens_at_a_time(
    fitted: NgramInfluenceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    lists = [*make_lists(50), [], list(range(200, 260))]
    lists[7] = [3, -1]
    for model in (Bounded(), fitted):
        dataset = datasets.Dataset.from_dict({"input_ids": [*lists[:7], *lists[8:]]})
        whole = opened(model, dataset)
        monkeypatch.setattr("mates_hf.data.token_columns._TOKENS_AT_ONCE", 45)
        if isinstance(model, Bounded):
            model.most = 0
        found = opened(model, dataset)
        monkeypatch.undo()
        for name, expected in whole._asdict().items():
            np.testing.assert_array_equal(getattr(found, name), expected)
        if isinstance(model, Bounded):
            assert model.most == 60  # the last row is more alone
    monkeypatch.setattr("mates_hf.data.token_columns._TOKENS_AT_ONCE", 45)
    wrong = datasets.Dataset.from_dict({"input_ids": lists})
    with pytest.raises(ValueError, match="in row 107"):
        predicted(tokens(Bounded()), wrong.data.table, 100)


def opened(model: Any, dataset: datasets.Dataset) -> Predictions:
    scorer = tokens(model)
    return scorer.predict_rows(scorer.column.open(dataset), 0, len(dataset))
