"""What `MatesSelector` is given: columns of any kind, sizes, names, what is no dataset; and what it leaves behind."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, DatasetDict, IterableDataset, load_from_disk

from mates_hf.prediction.artifacts import model_digest
from mates_hf.selection.selector import MatesSelector
from tests.selection.selector_kit import DigestedMeanId, MeanId, NoDigest, fit_model, make_lists, with_template

LISTS = make_lists(30, seed=5, longest=12)
TEXTS = [" ".join(f"w{i}" for i in ids) for ids in LISTS]
TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} <eos> {% endfor %}"


@pytest.fixture(scope="module", autouse=True)
def _quiet() -> Any:
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return Dataset.from_dict({"input_ids": LISTS, "id": list(range(len(LISTS)))})


@pytest.fixture(scope="module")
def tokens() -> MatesSelector:
    return MatesSelector(DigestedMeanId())


@pytest.fixture
def chat_tokenizer(tiny_tokenizer: Any) -> Any:
    return with_template(tiny_tokenizer, TEMPLATE)


# --- columns to remove ---


def test_a_stream_removes_the_columns_that_a_dataset_removes(tokens: MatesSelector) -> None:
    given = {"input_ids": [[5, 7, 9]], "id": ["a"], "label": [1], "label_text": ["x"], "influence": [3.0]}
    dataset = Dataset.from_dict(given)
    for removed in ("label_text", "input_ids", ["label"], ["id", "label_text"], "influence", [], None):
        expected = tokens.map(dataset, remove_columns=removed).column_names
        stream = tokens.map(dataset.to_iterable_dataset(), remove_columns=removed)
        assert stream.column_names == list(stream.features)
        assert sorted(next(iter(stream))) == sorted(stream.column_names) == sorted(expected)
        assert next(iter(stream))["influence"] == 7.0
    for wrong in ("labl", ["label", "labl"]):
        for source in (dataset, dataset.to_iterable_dataset()):
            with pytest.raises(ValueError, match=r"`remove_columns` must be columns.*got \['labl'\]"):
                tokens.map(source, remove_columns=wrong)


# --- sizes, seeds, names ---


CALLS: dict[str, Callable[..., Any]] = {
    "map": lambda selector, data, **more: selector.map(data, **more),
    "filter": lambda selector, data, **more: selector.filter(data, ratio=0.5, **more),
    "select": lambda selector, data, **more: selector.select(data, ratio=0.5, **more),
    "score": lambda selector, data, **more: selector.score(data, **more),
}


@pytest.mark.parametrize("how", CALLS)
def test_sizes_are_refused_alike_everywhere(how: str, tokens: MatesSelector, dataset: Dataset) -> None:
    sources: list[Any] = [dataset]
    if how != "score":
        sources += [dataset.to_iterable_dataset(), DatasetDict(a=dataset)]
    for source in sources:
        for wrong in (None, -1, 0, 2.5, True):
            with pytest.raises(ValueError, match="`batch_size` must be a whole number of at least 1, got"):
                CALLS[how](tokens, source, batch_size=wrong)
        for wrong in (0, -1):
            with pytest.raises(ValueError, match="`num_proc` must be a whole number of at least 1, got"):
                CALLS[how](tokens, source, num_proc=wrong)


def test_seeds_are_refused_alike_everywhere(dataset: Dataset) -> None:
    selector = MatesSelector(fit_model())
    for source in (dataset, dataset.to_iterable_dataset()):
        for wrong in (-1, 2**64, "a"):
            for temperature in (0.0, 0.5):
                with pytest.raises(ValueError, match="`seed` must be a whole number from 0 to below"):
                    selector.filter(source, ratio=0.5, temperature=temperature, seed=wrong)
        kept = [row["id"] for row in selector.filter(source, ratio=0.5, temperature=0.5, seed=2**64 - 1)]
        assert 0 < len(kept) < len(dataset)


@pytest.mark.parametrize("how", CALLS)
def test_text_column_is_another_name_for_column(how: str, dataset: Dataset) -> None:
    selector = MatesSelector(DigestedMeanId())
    renamed = dataset.rename_column("input_ids", "tokens")
    found = CALLS[how](selector, renamed, text_column="tokens")
    expected = CALLS[how](selector, renamed, column="tokens")
    if how in ("map", "filter"):
        assert found.to_dict() == expected.to_dict()
    else:
        assert np.array_equal(found.influence, expected.influence)
    with pytest.raises(ValueError, match="`column` and `text_column` are two names for one argument"):
        CALLS[how](selector, renamed, column="tokens", text_column="tokens")
    with pytest.raises(TypeError, match=r"`column` must be the name of one column, got \['tokens'\]"):
        CALLS[how](selector, renamed, column=["tokens"])


def test_each_split_has_its_cache_file(tokens: MatesSelector, dataset: Dataset, tmp_path: Path) -> None:
    splits = DatasetDict(a=dataset, b=dataset.select(range(5)))
    mapped = tokens.map(splits, cache_file_names={"a": str(tmp_path / "a.arrow"), "b": None})
    assert [path.name for path in tmp_path.iterdir()] == ["a.arrow"]
    assert mapped["a"]["influence"][:5] == mapped["b"]["influence"][:]
    with pytest.raises(ValueError, match=r"`cache_file_names` must be a dict of files by split .*'c'"):
        tokens.map(splits, cache_file_names={"c": "x"})
    with pytest.raises(TypeError, match="`cache_file_names` cannot be given: this is no dict of splits"):
        tokens.map(dataset, cache_file_names={"a": "x"})
    with pytest.raises(TypeError, match="`text_colum` cannot be given: neither"):
        tokens.map(dataset, text_colum="x")


def test_all_splits_are_decided_on_before_one_is_scored(dataset: Dataset, tmp_path: Path) -> None:
    model = DigestedMeanId()
    selector = MatesSelector(model)
    without = dataset.rename_column("input_ids", "ids")
    calls: list[Callable[..., Any]] = [CALLS["filter"], CALLS["map"]]
    for splits in (DatasetDict(a=dataset, b=without), {"a": dataset, "b": without.to_iterable_dataset()}):
        for call in calls:
            with pytest.raises(ValueError, match=r"column `input_ids`.*got the columns \['ids', 'id'\]"):
                call(selector, splits)
    with pytest.raises(ValueError, match=r"`remove_columns` must be columns.*got \['x'\]"):
        selector.map(DatasetDict(a=dataset.add_column("x", LISTS), b=dataset), remove_columns="x")
    assert model.num_calls == 0


@pytest.mark.parametrize(
    ("given", "way_in"),
    [
        ([{"text": "w3"}], r"got list\. Pass `Dataset\.from_list\(rows\)`"),
        (["w3"], r'Pass `Dataset\.from_dict\(\{"text": texts\}\)`'),
        ({"text": ["w3"]}, r"a dict of columns\. Pass `Dataset\.from_dict\(columns\)`"),
        (pa.table({"text": ["w3"]}), r"got Table\. Pass `Dataset\(table\)`"),
        ("data/a.parquet", r'got str\. Pass `load_dataset\("parquet", data_files="data/a\.parquet"'),
        (Path("a.jsonl.gz"), r'load_dataset\("json", data_files="a\.jsonl\.gz"'),
        ("me/data", r'Pass `load_dataset\("me/data", split="train"\)`'),
        ((row for row in ()), r"Pass `Dataset\.from_generator\(function\)`"),
        (None, "got NoneType. Make one with"),
        ({"train": None}, "Split 'train': .*got NoneType"),
    ],
)
def test_what_is_no_dataset_is_told_the_way_in(given: Any, way_in: str, tokens: MatesSelector, tmp_path: Path) -> None:
    for call in CALLS.values():
        with pytest.raises(TypeError, match=way_in):
            call(tokens, given)


def test_frames_and_saved_datasets_are_told_the_way_in(
    tokens: MatesSelector, dataset: Dataset, tmp_path: Path
) -> None:
    pandas = pytest.importorskip("pandas")
    with pytest.raises(TypeError, match=r"got DataFrame\. Pass `Dataset\.from_pandas\(frame\)`"):
        tokens.map(pandas.DataFrame({"text": ["w3"]}))
    dataset.save_to_disk(tmp_path / "data")
    with pytest.raises(TypeError, match=r"Pass `datasets\.load_from_disk\("):
        tokens.filter(str(tmp_path / "data"), k=1)


# --- what is left behind ---


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_filter_select_and_score_leave_no_file(tokens: MatesSelector, dataset: Dataset, tmp_path: Path) -> None:
    dataset.save_to_disk(tmp_path)
    before = set(os.listdir(tmp_path))
    for num_proc in (None, 2):
        stored = load_from_disk(str(tmp_path))
        expected = tokens.score(stored, num_proc=num_proc).influence
        shuffled = tokens.score(stored.shuffle(seed=0, keep_in_memory=True), num_proc=num_proc).influence
        assert np.array_equal(np.sort(shuffled), np.sort(expected))
        fresh = MatesSelector(DigestedMeanId())
        fresh.filter(stored, k=1, num_proc=num_proc)
        assert len(fresh.select(stored, ratio=0.5, num_proc=num_proc).selected) == 15
        assert set(os.listdir(tmp_path)) == before


def test_a_finished_map_is_not_lost_to_its_own_log(tokens: MatesSelector, caplog: pytest.LogCaptureFixture) -> None:
    model = DigestedMeanId()
    with caplog.at_level(logging.INFO):
        found = MatesSelector(model).map(Dataset.from_dict({"input_ids": [[5, 7], [8, 8]]}))
    assert found["influence"][:] == [6.0, 8.0]
    assert model.num_calls == 1
    assert "no trained token" not in caplog.text


# --- conversations and nested columns ---


def conversation(text: str) -> list[dict[str, Any]]:
    return [{"role": "w3", "content": text}, {"role": "w4", "content": "w5"}]


def test_conversations_are_scored_as_their_template_writes_them(chat_tokenizer: Any) -> None:
    selector = MatesSelector(fit_model(), chat_tokenizer)
    given = [conversation(text) for text in TEXTS]
    expected = selector.score(Dataset.from_dict({"text": [f"w3 {text} <eos> w4 w5 <eos> " for text in TEXTS]}))
    chats = Dataset.from_dict({"messages": [*given, None, []]})
    scored = selector.map(chats)
    found = np.array(scored["influence"][:], np.float32)
    assert np.array_equal(found[:-2], expected.influence)
    assert found[-1] == found[-2]
    assert selector.score(chats, column="messages").num_targets.tolist() == [*expected.num_targets.tolist(), 0, 0]
    stream = list(selector.map(chats.to_iterable_dataset(), batch_size=7))
    assert np.array_equal(np.array([row["influence"] for row in stream], np.float32), found)
    unknown = IterableDataset.from_generator(lambda: iter([{"messages": one} for one in given]))
    hot = [row["messages"] for row in selector.filter(unknown, ratio=0.5, temperature=1.0)]
    assert 0 < len(hot) < len(given)

    as_lists = {"role": [["w3", "w4"] for _ in TEXTS], "content": [[text, "w5"] for text in TEXTS]}
    columns = pa.StructArray.from_arrays([pa.array(values) for values in as_lists.values()], list(as_lists))
    assert np.array_equal(selector.score(Dataset(pa.table({"messages": columns}))).influence, expected.influence)
    nested = Dataset.from_dict({"row": [{"chat": one} for one in given]})
    assert np.array_equal(selector.score(nested, column="row.chat").influence, expected.influence)
    spans = selector.select(chats, k=1).explain(0)["spans"]
    assert spans[0]["text"].startswith("w3 w")


def test_messages_of_several_types_and_what_arrow_fills_up(chat_tokenizer: Any) -> None:
    chat_tokenizer.chat_template = (
        "{% for m in messages %}{% if m['content'] is string %}{{ m['content'] }} {% else %}{% for part in "
        "m['content'] %}{{ part['text'] }} {% endfor %}{% endif %}{% for call in m['tool_calls'] or [] %}"
        "{% for name in call['arguments'] %}{{ name }} {% endfor %}{% endfor %}{% endfor %}"
    )
    selector = MatesSelector(fit_model(), chat_tokenizer)
    calls = [{"role": "a", "content": "w7", "tool_calls": [{"arguments": {name: 1}}]} for name in ("w8", "w9")]
    plain = Dataset.from_dict({"messages": [[call] for call in calls]})  # each has a null for the other's argument
    assert selector.score(plain).num_targets.tolist() == [1, 1]
    mixed = [[{"role": "a", "content": "w5 w7"}, {"role": "b", "content": [{"text": "w9"}]}]]
    try:
        given = Dataset.from_dict({"messages": mixed}, on_mixed_types="use_json")
    except TypeError:
        pytest.skip("this version of datasets has no JSON columns")
    expected = selector.score(Dataset.from_dict({"text": ["w5 w7 w9"]})).influence
    assert np.array_equal(selector.score(given).influence, expected)
    assert [row["influence"] for row in selector.map(given.to_iterable_dataset())] == expected.tolist()
    assert selector.map(given)["influence"][:] == expected.tolist()


def test_special_tokens_of_a_template_are_not_doubled(tiny_tokenizer: Any) -> None:
    asked: list[dict[str, Any]] = []

    class Tokenizer:
        chat_template, model_max_length = "x", 10**30

        def __len__(self) -> int:
            return 64

        def get_vocab(self) -> dict[str, int]:
            return {}

        all_special_ids: tuple[int, ...] = ()

        def apply_chat_template(self, messages: list[dict[str, Any]], tokenize: bool) -> str:
            assert not tokenize
            asked.append({"messages": messages})
            return "w5"

        def __call__(self, texts: list[str], **options: Any) -> dict[str, Any]:
            asked.append(options)
            return {"input_ids": [[5, 6] for _ in texts]}

    rows = [[{"role": "user", "content": None, "tool_calls": "x"}], [{"role": "user", "content": "a"}]]
    MatesSelector(DigestedMeanId(), Tokenizer()).score(Dataset.from_dict({"messages": rows}))
    assert asked[-1]["add_special_tokens"] is False
    # What Arrow filled up with a null is gone, a missing content stays.
    assert asked[0]["messages"] == [{"role": "user", "content": None, "tool_calls": "x"}]
    assert asked[1]["messages"] == [{"role": "user", "content": "a"}]


def test_what_conversations_lack_is_named(chat_tokenizer: Any, tiny_tokenizer: Any) -> None:
    chats = Dataset.from_dict({"messages": [conversation("w6"), conversation("w7")]})
    for source in (chats, chats.to_iterable_dataset()):
        with pytest.raises(ValueError, match="Column `messages` holds conversations, and no tokenizer is recorded"):
            MatesSelector(fit_model()).map(source)
        with pytest.raises(ValueError, match="must have a chat template, which .* has not"):
            MatesSelector(fit_model(), tiny_tokenizer).map(source)
    chat_tokenizer.chat_template = "{% if 'w7' in messages[0]['content'] %}{{ raise_exception('no w7') }}{% endif %}"
    with pytest.raises(ValueError, match="Column `messages` must hold conversations .* row 1 is not one .*no w7"):
        MatesSelector(fit_model(), chat_tokenizer).score(chats, batch_size=1)
    with pytest.raises(TypeError, match="or conversations"):
        MatesSelector(fit_model(), chat_tokenizer).map(Dataset.from_dict({"messages": [[{"from": "a"}]]}))


def test_columns_inside_of_structs(tiny_tokenizer: Any) -> None:
    selector = MatesSelector(fit_model(), tiny_tokenizer)
    expected = selector.score(Dataset.from_dict({"text": TEXTS}))
    rows = [{"meta": {"text": text, "deep": {"ids": ids}}} for text, ids in zip(TEXTS, LISTS, strict=True)]
    nested = Dataset.from_list([*rows, {"meta": None}])
    for column in ("meta.text", "meta.deep.ids"):
        for source in (nested, nested.select(range(30, -1, -1))):
            found = selector.score(source, column=column)
            ordered = found.influence[::-1] if source is not nested else found.influence
            assert np.array_equal(ordered[:-1], expected.influence)
            assert np.array_equal(np.array(selector.map(source, column=column)["influence"][:], "f"), found.influence)
        stream = selector.map(nested.to_iterable_dataset(), column=column)
        assert np.array_equal(np.array([row["influence"] for row in stream], np.float32)[:-1], expected.influence)
        kept = selector.filter(nested, k=5, column=column)
        streamed = [row["meta"] for row in selector.filter(nested.to_iterable_dataset(), ratio=5 / 31, column=column)]
        assert kept["meta"][:] == streamed
    flat = nested.flatten()
    assert np.array_equal(selector.score(flat, column="meta.text").influence[:-1], expected.influence)
    for wrong in ("meta.body", "meta.text.x", "meta", "meta."):
        with pytest.raises((ValueError, TypeError), match=rf"`{wrong}`"):
            selector.map(nested, column=wrong)


# --- what is printed ---


def test_a_selector_and_its_selections_print_short(chat_tokenizer: Any, dataset: Dataset) -> None:
    origin = {"round": 3, "step": 1200, "num_probed": 2000, "reference": {"task": "<b>x</b>" * 50}}
    selector = MatesSelector(fit_model(), chat_tokenizer, origin=origin)
    wide = dataset.add_column("<i>" + "x" * 200, dataset["id"][:])
    printed = [selector, MatesSelector(MeanId()), selector.select(wide, ratio=0.2), selector.select(wide, k=0)]
    printed.append(selector.select(dataset.to_iterable_dataset(), ratio=0.2))
    for value in printed:
        lines = repr(value).splitlines()
        assert 1 < len(lines) <= 10
        assert max(map(len, lines)) <= 100
        html = value._repr_html_()
        assert html.startswith("<table>")
        assert "<b>x" not in html
        assert "<i>" not in html
        assert len(html) < 4000
    assert "NgramInfluenceModel" in repr(selector)
    assert "with chat template" in repr(selector)
    assert f"digest             {model_digest(selector.influence_model)[:12]} (of the" in repr(selector)
    assert "digest" not in repr(MatesSelector(NoDigest()))
    assert "round 3, step 1,200" in repr(selector)
    assert repr(printed[2]).startswith("Selection: 6 of 30 rows (20.0%)")
    assert "ratio=0.2" in repr(printed[2])
