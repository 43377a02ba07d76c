"""The stage for NeMo Curator, which is not installed here: run by a copy of its contract reduced to what it calls."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import pickle
import sys
import types
from collections.abc import Iterator
from typing import Any, Generic, TypeVar, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mates_hf import MatesSelector
from tests.integrations.corpus import Corpus, make_corpus

MODULE = "mates_hf.integrations.nemo_curator"
COLUMNS = ["influence", "num_targets", "content_hash"]
X, Y = TypeVar("X"), TypeVar("Y")


@dataclasses.dataclass
class DocumentBatch:
    """`nemo_curator.tasks.DocumentBatch` of version 1.3: what a stage reads of a batch and makes it with."""

    dataset_name: str
    data: Any
    _stage_perf: list[Any] = dataclasses.field(default_factory=list)
    _metadata: dict[str, Any] = dataclasses.field(default_factory=dict)
    task_id: str = dataclasses.field(init=False, default="")

    def get_columns(self) -> list[str]:
        return self.data.column_names if isinstance(self.data, pa.Table) else list(self.data.columns)


class ProcessingStage(Generic[X, Y]):
    """`nemo_curator.stages.base.ProcessingStage` of version 1.3: its rules for a subclass, and what it calls."""

    name = "ProcessingStage"
    resources = None
    batch_size = 1
    runtime_env = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        assert not {"_name", "_resources", "_batch_size"} & set(cls.__dict__)
        for name in ("name", "resources", "batch_size", "runtime_env"):
            assert not isinstance(cls.__dict__.get(name), property)
        assert "num_workers" not in cls.__dict__

    def with_(self, **changes: Any) -> Any:
        changed = copy.deepcopy(self)
        vars(changed).update(changes)
        return changed

    def process_batch(self, tasks: list[Any]) -> list[Any]:
        attributes, columns = self.inputs()
        for task in tasks:
            assert all(hasattr(task, name) for name in attributes)
            if not set(columns) <= set(task.get_columns()):
                raise ValueError(f"Task {task!s} failed validation for stage {self}")
        return [self.process(task) for task in tasks]


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`MatesScoreStage` on the reduced contract."""
    for name in ("nemo_curator", "nemo_curator.stages"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    base, tasks = types.ModuleType("nemo_curator.stages.base"), types.ModuleType("nemo_curator.tasks")
    base.ProcessingStage, tasks.DocumentBatch = ProcessingStage, DocumentBatch  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.setitem(sys.modules, tasks.__name__, tasks)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield importlib.import_module(MODULE).MatesScoreStage
    sys.modules.pop(MODULE, None)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("curator"), tiny_tokenizer, num_rows=200)


def run(stage: Any, *batches: DocumentBatch) -> list[DocumentBatch]:
    """A pipeline's calls: once a node, then once a worker, of what was sent to each."""
    on_node, in_worker = pickle.loads(pickle.dumps(stage)), pickle.loads(pickle.dumps(stage))
    on_node.setup_on_node(None, None)
    in_worker.setup(None)
    found = in_worker.process_batch(list(batches))
    assert all(set(in_worker.outputs()[1]) <= set(one.get_columns()) for one in found)
    return found


def test_a_batch_gets_its_scores_in_arrow_and_in_pandas(stage: Any, corpus: Corpus) -> None:
    made = stage(str(corpus.selector)).with_(name="mine", batch_size=4)
    table = pq.read_table(corpus.files)
    frame = table.to_pandas().set_index("id", drop=False)
    want = MatesSelector.from_pretrained(corpus.selector).score(corpus.dataset)
    batches = [DocumentBatch("d", data, ["perf"], {"source": "x"}) for data in (table, frame, table.slice(0, 0))]
    arrow, pandas, empty = run(made, *batches)
    assert arrow.data.column_names == ["id", "text", *COLUMNS]
    assert np.array_equal(arrow.data["influence"].to_numpy(), want.influence)
    assert np.array_equal(arrow.data["num_targets"].to_numpy(), want.num_targets)
    assert pandas.data.index.equals(frame.index)
    for name in COLUMNS:
        assert np.array_equal(pandas.data[name].to_numpy(), arrow.data[name].to_numpy())
    assert empty.data.schema == arrow.data.schema
    assert (arrow.dataset_name, arrow._metadata, arrow._stage_perf) == ("d", {"source": "x"}, ["perf"])
    assert list(frame.columns) == ["id", "text"]  # the caller's own is not changed


def test_tokens_next_to_their_labels(stage: Any, corpus: Corpus) -> None:
    table = pa.table({"input_ids": [[7, 7, 9], [9, 9, 9]], "labels": [[-100, 7, -100], [-100, 9, 9]], "id": [1, 2]})
    want = MatesSelector.from_pretrained(corpus.selector).score(corpus.dataset.from_dict(table.to_pydict()))
    for data in (table, table.to_pandas()):
        (found,) = run(stage(str(corpus.selector), column="input_ids"), DocumentBatch("d", data))
        assert list(found.data["num_targets"].to_numpy()) == [1, 2]
        assert np.array_equal(found.data["influence"].to_numpy(), want.influence)


def test_what_the_pipeline_asks_of_a_stage(stage: Any, corpus: Corpus) -> None:
    made = stage(str(corpus.selector), column="meta.text")
    assert made.inputs() == (["data"], ["meta"])
    assert made.ray_stage_spec() == {"is_actor_stage": True}
    assert get_type_hints(stage.process)["return"] is DocumentBatch  # no list: one batch makes one
    with pytest.raises(ValueError, match="failed validation"):
        run(made, DocumentBatch("d", pa.table({"text": ["w5"]})))
    with pytest.raises(TypeError, match="got MatesSelector"):
        stage(MatesSelector.from_pretrained(corpus.selector))
    scored = stage(str(corpus.selector))
    scored.process(DocumentBatch("d", pa.table({"text": ["w5 w6"]})))
    assert len(pickle.dumps(scored)) < 2_000


def test_without_the_engine_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for engine, line in (
        ("nemo_curator", "it: `pip install nemo-curator`"),
        ("datatrove", r"datatrove: `pip install mates-hf\[datatrove\]`"),
    ):
        name = f"mates_hf.integrations.{engine}"
        monkeypatch.setitem(sys.modules, engine, None)
        for part in [part for part in sys.modules if part.startswith(f"{engine}.")]:
            monkeypatch.setitem(sys.modules, part, None)
        monkeypatch.delitem(sys.modules, name, raising=False)
        with pytest.raises(ImportError, match=f"`{name}` needs {line}.$"):
            importlib.import_module(name)
