"""The configuration: any values give a config or a `ValueError`, and it parses next to `TrainingArguments`."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mates_hf.config import MatesConfig

NAMES = [field.name for field in dataclasses.fields(MatesConfig)]

wild = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 40),
    st.just(10**400),
    st.floats(),
    st.floats(0, 1),
    st.text(max_size=8),
    st.sampled_from(["slice", "pool", "own_order", "select", "error", "", "1"]),
    st.binary(max_size=3),
    st.lists(st.integers(), max_size=2),
    st.dictionaries(st.text(max_size=1), st.integers(), max_size=1),
    st.just(Path("runs")),
    st.complex_numbers(),
)


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.sampled_from(NAMES), wild, max_size=4))
def test_any_values_give_a_working_config_or_a_value_error_that_names_its_field(values):
    try:
        config = MatesConfig(**values)
    except ValueError as error:
        name, value = str(error).split("`")[1], str(error).rsplit("got ", 1)[1]
        assert name in values  # never a default: a short round shortens the default lead and window
        assert value == f"{values[name]!r}."
        return
    assert 1 <= config.lead_steps <= config.update_steps
    assert 0 <= config.window_steps <= config.update_steps
    assert 0 < config.selection_ratio <= 1
    assert math.isfinite(float(config.temperature))
    assert config.temperature >= 0
    for name, value in values.items():
        assert getattr(config, name) == value  # nothing is corrected silently
    assert MatesConfig(**json.loads(json.dumps(config.to_dict()))) == config


# Per field: the values just outside and just inside its range.
EDGES = {
    "update_steps": ([0, -1, 1.0, True, "10", None], [1]),
    "first_round_steps": ([0, -1, 2.0, True, "5"], [None, 1, 1_000, 10**9]),
    "selection_ratio": ([0, 0.0, -0.1, 1.0001, math.nan, math.inf, True, "0.2", None], [1e-9, 1, 1.0]),
    "max_passes": ([0, -1, 1.0, True, "1"], [None, 1, 10**9]),
    "candidate_scope": (["all", "Slice", "", None, []], ["slice", "pool"]),
    "random_share": ([-1e-9, 1, 1.0, math.nan, True, "0.3", None], [0, 0.0, 0.3, 0.999]),
    "reference_passes": ([-1, 1.0, True, "4", None], [0, 4, 10**9]),
    "temperature": ([-1e-9, math.nan, math.inf, 10**400, False, "0", None], [0, 0.0, 5]),
    "max_copies": ([0, -1, 1.0, True, "1"], [None, 1, 3]),
    "num_probes": ([9, 10.0, None], [10]),
    "held_out_fraction": ([0, 1, 1.0, -0.2, math.nan, None], [1e-6, 0.999]),
    "document_column": (["", 1, b"url"], [None, "url"]),
    "group_column": (["", 1, b"source"], [None, "source"]),
    "score_column": (["", 1, b"score"], [None, "score"]),
    "max_group_boost": ([0, 0.5, 2.0, math.nan, "2"], [None]),  # needs `group_column`
    "min_group_boost": ([-0.1, 0.5, 1.1, math.nan, None, "0"], [0, 0.0]),
    "allow": (
        ["", "a", "a=", "=b", "a=b;a=c", {}, {"a": []}, {"a": "b"}, {1: ["b"]}, ["a=b"], 1],
        [None, "a=b,c;d=e"],
    ),
    "min_spearman": ([-1.01, 1.01, math.nan, None], [-1, 0, 1.0]),
    "on_weak_signal": (["own", "", None, 1], ["own_order", "select", "error"]),
    "random_rounds": ([0, -1, 1.5, None], [1, 10**9]),
    "switch_lead_steps": ([0, 1_001, 2.0, True, "1"], [None, 1, 1_000]),
    "average_steps": ([-1, 1_001, 2.0, False], [None, 0, 1_000]),
    "drift_check_steps": ([0, 1_000, 2.0, True, "1"], [None, 32, 999]),
    "drift_spearman": ([-1.01, 1.01, math.nan, None], [-1, 0, 1.0]),
    "probe_tokens_per_batch": ([0, 1e3, None], [1]),
    "selection_seed": ([-1, 0.0, None, True], [0, 2**40]),
    "rounds_dir": (["", 1, Path("runs"), b"runs"], [None, "runs/_mates"]),
    "keep_rounds": ([1, 0, 2.0, True], [None, 2]),
    "round_page": (["all", "", None, True, []], ["texts", "images", "redacted", "none"]),
    "alert_weak_rounds": ([0, -1, 1.0, True, None], [1, 10**9]),
    "alert_idle_share": ([0, -0.1, math.nan, True, "1"], [None, 1e-9, 2]),
    "alert_reference_overlap": ([0, -0.1, math.nan, True, "1"], [None, 1e-9, 2]),
    "alert_group_boost": ([0, -0.1, math.inf, True, "1"], [None, 1e-9, 2]),
}


def test_every_field_has_its_edges_tested_and_a_help_text():
    assert sorted(EDGES) == sorted(NAMES)
    for field in dataclasses.fields(MatesConfig):
        assert len(field.metadata["help"]) > 20, field.name


@pytest.mark.parametrize("name", EDGES)
def test_values_outside_the_range_are_refused_by_name_and_those_at_its_edge_are_taken(name):
    refused, taken = EDGES[name]
    for value in refused:
        with pytest.raises(ValueError, match=rf"^`{name}` must be .+, got ") as caught:
            MatesConfig(**{name: value})
        assert str(caught.value).endswith(f"got {value!r}.")
    for value in taken:
        assert getattr(MatesConfig(**{name: value}), name) == value


def test_bounds_on_groups_need_groups_and_a_choice():
    for name, refused, taken in (
        ("max_group_boost", [0.99, 0, math.inf, True], [None, 1, 1.5]),
        ("min_group_boost", [-0.01, 1.01, math.nan, None], [0, 0.5, 1]),
    ):
        for value in refused:
            with pytest.raises(ValueError, match=f"^`{name}` must be .+, got {value!r}"):
                MatesConfig(group_column="source", **{name: value})
        for value in taken:
            assert getattr(MatesConfig(group_column="source", **{name: value}), name) == value
    with pytest.raises(ValueError, match="`max_group_boost` must be None without `group_column`, got 2"):
        MatesConfig(max_group_boost=2)


def test_it_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MatesConfig().update_steps = 5
    with pytest.raises(TypeError):
        MatesConfig(5)
    with pytest.raises(TypeError, match="selection_ration"):
        MatesConfig(selection_ration=0.2)


@pytest.mark.parametrize(
    ("update_steps", "lead", "window"),
    [(1, 1, 0), (3, 1, 1), (4, 1, 2), (7, 1, 3), (8, 2, 4), (128, 32, 32), (10_000, 32, 32)],
)
def test_lead_and_window_follow_from_the_round_length_unless_given(update_steps, lead, window):
    config = MatesConfig(update_steps=update_steps, first_round_steps=None)
    assert (config.lead_steps, config.window_steps) == (lead, window)
    given_ = MatesConfig(update_steps=update_steps, switch_lead_steps=update_steps, average_steps=0)
    assert (given_.lead_steps, given_.window_steps) == (update_steps, 0)


def test_lead_and_window_follow_from_the_shortest_round_and_must_fit_into_it():
    config = MatesConfig(update_steps=1_000, first_round_steps=20)
    assert (config.first_steps, config.lead_steps, config.window_steps) == (20, 10, 10)
    assert (MatesConfig().first_steps, MatesConfig().lead_steps, MatesConfig().window_steps) == (50, 25, 25)
    for name in ("switch_lead_steps", "average_steps"):
        assert MatesConfig(first_round_steps=20, **{name: 20}).first_steps == 20
        assert MatesConfig(first_round_steps=20, **{name: 21}).first_steps == 21
        with pytest.raises(ValueError, match=rf"`{name}` must be None .* to `update_steps` \(1000\), got 1001"):
            MatesConfig(first_round_steps=20, **{name: 1_001})
    assert MatesConfig(first_round_steps=20, drift_check_steps=4).window_steps == 4
    with pytest.raises(ValueError, match=r"`drift_check_steps` must be .* from `average_steps` \(8\)"):
        MatesConfig(first_round_steps=20, average_steps=8, drift_check_steps=7)


@pytest.mark.parametrize(
    "settings",
    [{"first_round_steps": None}, {"update_steps": 50}, {"update_steps": 6}, {"selection_ratio": 1.0},
     {"update_steps": 64, "switch_lead_steps": 64}],
)  # fmt: skip
def test_rounds_have_one_length_where_they_cannot_grow(settings):
    config = MatesConfig(**settings)
    assert config.first_steps is None
    assert config.shortest_steps == config.longest_steps(None) == config.longest_steps(3) == config.update_steps


def test_paper_settings_are_those_of_the_paper_and_can_be_overridden():
    paper = MatesConfig.paper()
    assert (paper.update_steps, paper.num_probes, paper.selection_ratio) == (10_000, 80_000, 0.2)
    assert (paper.candidate_scope, paper.temperature, paper.held_out_fraction) == ("slice", 1.0, 0.1)
    assert (paper.window_steps, paper.first_steps, paper.random_share) == (0, None, 0.0)
    assert paper.max_copies is None  # its code knows no copies
    assert paper.on_weak_signal == "select"
    released = MatesConfig.paper(temperature=0.5)
    assert dataclasses.replace(released, temperature=1.0) == paper
    with pytest.raises(ValueError, match="`temperature`"):
        MatesConfig.paper(temperature=-1)


def test_no_field_shares_a_name_with_training_arguments():
    from transformers import TrainingArguments

    assert not set(NAMES) & {field.name for field in dataclasses.fields(TrainingArguments)}


def test_it_parses_next_to_training_arguments(tmp_path):
    from transformers import HfArgumentParser, TrainingArguments

    parser = HfArgumentParser((TrainingArguments, MatesConfig))
    given_ = MatesConfig(
        update_steps=50,
        selection_ratio=0.25,
        candidate_scope="pool",
        random_share=0.25,
        reference_passes=4,
        temperature=0.5,
        max_copies=3,
        num_probes=77,
        held_out_fraction=0.3,
        document_column="url",
        group_column="source",
        score_column="quality",
        max_group_boost=2.0,
        min_group_boost=0.5,
        max_passes=3,
        allow="licence=cc-by,cc0;consent=yes",
        min_spearman=-0.5,
        on_weak_signal="error",
        random_rounds=2,
        switch_lead_steps=3,
        average_steps=0,
        first_round_steps=5,
        drift_check_steps=20,
        drift_spearman=0.25,
        probe_tokens_per_batch=100,
        selection_seed=9,
        rounds_dir="elsewhere",
        keep_rounds=2,
        round_page="redacted",
        alert_weak_rounds=1,
        alert_idle_share=0.5,
        alert_reference_overlap=0.5,
        alert_group_boost=3.0,
    )
    as_given = {f.name for f in dataclasses.fields(MatesConfig) if getattr(given_, f.name) == f.default}
    assert as_given == set()
    words = [f"--{name}={value}" for name, value in given_.to_dict().items() if value is not None]
    assert parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), *words])[1] == given_
    words = [
        word for name, value in given_.to_dict().items() for word in (f"--{name}", str(value)) if value is not None
    ]
    arguments, config = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--max_steps", "7", *words])
    assert (arguments.max_steps, config) == (7, given_)
    assert parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path)])[1] == MatesConfig()
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--candidate_scope", "everything"])


def test_annotations_resolve_for_parsers():
    hints = typing.get_type_hints(MatesConfig)
    assert set(NAMES) <= set(hints)
