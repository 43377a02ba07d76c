from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value, concatenate_datasets

from mates_hf.data.groups import NO_GROUP, read_groups

SOURCES = ["web", "news", None, "web", "code"]


def test_groups_are_those_of_the_column_in_any_order_of_rows() -> None:
    dataset = Dataset.from_dict({"source": SOURCES, "x": [[1]] * 5})
    found = read_groups(dataset, "source")
    assert found.names == [NO_GROUP, "code", "news", "web"]
    assert [found.names[code] for code in found.codes] == ["web", "news", NO_GROUP, "web", "code"]
    assert found.codes.dtype == np.int32
    some = read_groups(dataset, "source", np.array([4, 0, 0]))
    assert [some.names[code] for code in some.codes] == ["code", "web", "web"]
    assert some.names == ["code", "web"]


@pytest.mark.parametrize(
    ("column", "names"),
    [
        ([3, 1, 3, 2, 1], ["1", "2", "3"]),
        ([True, False, None, True, True], ["(none)", "False", "True"]),
        ([0.5, 0.25, 0.5, 0.5, 0.5], ["0.25", "0.5"]),
        ([None] * 5, [NO_GROUP]),
    ],
)
def test_numbers_and_truth_values_are_groups_too(column: list[Any], names: list[str]) -> None:
    assert read_groups(Dataset.from_dict({"g": column}), "g").names == names


def test_joined_shuffled_formatted_and_plain_datasets() -> None:
    parts = [Dataset.from_dict({"source": [name] * 7, "n": list(range(7))}) for name in ("a", "b")]
    shuffled = concatenate_datasets(parts).shuffle(seed=1).with_format("numpy")
    found = read_groups(shuffled, "source")
    assert [found.names[code] for code in found.codes] == list(shuffled["source"])
    features = Features({"g": ClassLabel(names=["x", "y"]), "t": Value("string")})
    labelled = Dataset.from_dict({"g": [1, 0], "t": ["", ""]}, features=features)
    assert read_groups(labelled, "g").names == ["0", "1"]

    class Rows:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, i: int) -> dict[str, Any]:
            return {"source": "ab"[i % 2]}

    assert read_groups(Rows(), "source").codes.tolist() == [0, 1, 0]
    assert read_groups(Dataset.from_dict({"source": []}), "source").codes.tolist() == []


def test_what_is_no_group_is_refused() -> None:
    dataset = Dataset.from_dict({"tags": [["a"], ["b"]], "source": ["a", "b"]})
    with pytest.raises(
        ValueError, match=r"`group_column` must be a column of the pool, got 'kind'; it has \['source'"
    ):
        read_groups(dataset, "kind")
    with pytest.raises(ValueError, match="must hold one text or number a row, got list"):
        read_groups(dataset, "tags")
    many = Dataset.from_dict({"url": list(range(65_537))})
    with pytest.raises(ValueError, match="at most 65,536 groups, got 65,537 in `url`"):
        read_groups(many, "url")
