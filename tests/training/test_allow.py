"""`allow`: rows without an allowed entry are neither probed, drawn nor trained on, and every file says so."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import default_data_collator

from mates_hf import MatesCallback, MatesRounds, MatesStream, NgramInfluenceModel, load_round
from mates_hf.allow import parse_allow
from mates_hf.answering.forget import forget_rows
from mates_hf.answering.where import where_rows
from mates_hf.cli import main
from mates_hf.data.allowed import allowed_part, allowed_rows
from mates_hf.disk import read_json, write_array
from mates_hf.errors import RoundMismatchError, UnsupportedSettingError
from mates_hf.training.verify import verify_run
from tests.training.kit import (
    OLD_DATASETS,
    Stop,
    make_arguments,
    make_model,
    make_pool,
    make_reference,
    run,
    small_config,
)
from tests.training.settings import proves

ROWS = 400
ENTRIES = ["cc-by", "cc0", "all rights reserved", None]
KEEPS = {"remove_unused_columns": False}


def collate(rows):
    return default_data_collator([{name: row[name] for name in ("input_ids", "labels")} for row in rows])


def licensed(num_rows: int = ROWS) -> Dataset:
    return make_pool(num_rows).add_column("licence", [ENTRIES[(i * 7) % 4] for i in range(num_rows)])


def allowed(num_rows: int = ROWS) -> set[int]:
    return {i for i, entry in enumerate(licensed(num_rows)["licence"]) if entry in ("cc-by", "cc0")}


def callback(**config) -> MatesCallback:
    settings = {"allow": "licence=cc-by,cc0", "num_probes": 20, **config}
    return MatesCallback(
        make_reference(), small_config(**settings), influence_model=NgramInfluenceModel(num_buckets=64)
    )


def train(path, callbacks, pool=None, *, resume=None, **settings):
    args = make_arguments(path, **KEEPS, **settings)
    return run(args, callbacks, licensed() if pool is None else pool, collator=collate, resume=resume)


@proves(
    "`allow`", "no other row is probed, drawn or trained on; verifies; resumes exactly", note="docs/answer_for_data.md"
)
@pytest.mark.parametrize(
    "config",
    [
        {}, {"candidate_scope": "pool"}, {"on_weak_signal": "own_order", "min_spearman": 1.0},
        {"allow": {"licence": ["cc0", "cc-by"]}},
    ],
    ids=["slice", "pool", "own-order", "dict"],
)  # fmt: skip
def test_nothing_else_is_probed_drawn_or_trained_on(tmp_path, config):
    result = train(tmp_path, [callback(**config)])
    assert set(result.rows) <= allowed()
    assert len(set(result.rows)) == len(result.rows) == 80  # each once, also in the own order
    found = 0
    for path in sorted((tmp_path / "_mates").glob("round-*")):
        record = load_round(path)
        seen = [record.labels.candidate_id, *([] if record.candidates is None else [record.candidates])]
        assert set(np.concatenate(seen).tolist()) <= allowed()
        assert record.info["allowed"]["num_rows"] == len(allowed())
        found += 1
    assert found == 3
    assert verify_run(tmp_path).problem is None
    uses = [use.row for use in where_rows(tmp_path, np.arange(ROWS)).uses]
    assert sorted(uses) == sorted(result.rows)


def test_the_plan_counts_the_allowed_rows_alone(tmp_path):
    with pytest.raises(ValueError, match=r"of the 200 rows in the pool"):
        train(tmp_path, [callback(num_probes=150)])


def test_a_run_too_short_to_select_keeps_to_the_allowed_rows(tmp_path):
    result = train(tmp_path, [callback()], max_steps=4)
    assert set(result.rows) <= allowed()


def test_epochs_go_through_the_allowed_rows_again_and_again(tmp_path):
    result = train(tmp_path, [callback(max_passes=None)], licensed(120), max_steps=-1, num_train_epochs=2)
    assert set(result.rows) <= allowed(120)
    assert len(result.rows) == 240
    assert verify_run(tmp_path).problem is None


@proves(
    "`allow`", "no other row is probed, drawn or trained on; verifies; resumes exactly", note="docs/answer_for_data.md"
)
def test_it_resumes_exactly_and_refuses_other_entries(tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 3}
    whole = train(tmp_path, [callback()], **saves)
    rest = train(tmp_path, [callback(), Stop(20)], resume=str(tmp_path / "checkpoint-9"), **saves)
    assert rest.rows == whole.rows[9 * 4 :]
    other = licensed().remove_columns("licence").add_column("licence", ["cc0"] * ROWS)
    with pytest.raises(RoundMismatchError, match="must have the (allowed|pool)"):
        train(tmp_path, [callback()], other, resume=str(tmp_path / "checkpoint-9"), **saves)
    with pytest.raises(RoundMismatchError, match="must have the config"):
        train(tmp_path, [callback(allow="licence=cc0")], resume=str(tmp_path / "checkpoint-9"), **saves)


@pytest.mark.parametrize(
    ("allow", "message"),
    [
        ("license=cc0", r"`allow` must be a column of the pool, got 'license'; it has .*'licence'"),
        (
            "licence=mit",
            r"none has mit in `licence`; the entries .* are \(missing\), all rights reserved, cc-by, cc0",
        ),
        ("input_ids=1", r"one text or number a row, got list in `input_ids`"),
    ],
)
def test_what_cannot_be_allowed_is_refused_before_the_first_step(tmp_path, allow, message):
    with pytest.raises(ValueError, match=message) as caught:
        train(tmp_path, [callback(allow=allow)])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "_mates").exists()


@pytest.mark.skipif(OLD_DATASETS, reason="streams need datasets 4.0")
def test_a_stream_is_refused_with_its_own_filter_as_the_way_out(tmp_path):
    stream = MatesStream(licensed().to_iterable_dataset(), buffer_rows=64)
    with pytest.raises(UnsupportedSettingError, match=r"filter the stream itself"):
        train(tmp_path, [callback()], stream)


def test_a_loop_of_ones_own(tmp_path):
    config = small_config(allow="licence=cc-by,cc0", num_probes=20)
    rounds = MatesRounds(
        make_reference(), licensed(), config, output_dir=tmp_path, collate_fn=collate,
        influence_model=NgramInfluenceModel(num_buckets=64),
    )  # fmt: skip
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    seen = []
    for _, rows in rounds.order(model, optimizer, batch_size=4, max_steps=20):
        seen += rows.tolist()
        model(**collate([rounds.dataset[i] for i in rows.tolist()])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert set(seen) <= allowed()
    assert len(set(seen)) == 80
    assert verify_run(tmp_path).problem is None


def test_rows_that_are_removed_from_the_allowed_ones(tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 1}
    train(tmp_path, [callback(), Stop(10)], **saves)
    rows = np.array(sorted(allowed())[::3])
    forget_rows(tmp_path, rows)
    assert verify_run(tmp_path).problem is None
    rest = train(tmp_path, [callback()], resume=True, **saves)
    assert set(rest.rows) <= allowed() - set(rows.tolist())
    assert verify_run(tmp_path).problem is None


def test_verify_finds_a_changed_mask_and_a_round_that_denies_it(tmp_path, capsys):
    train(tmp_path, [callback()])
    rounds = tmp_path / "_mates"
    bits = np.load(rounds / "allowed.npy")
    write_array(rounds / "allowed.npy", np.bitwise_xor(bits, np.uint8(1)))
    assert main(["verify", str(tmp_path)]) == 1
    assert "allowed.npy: expected the rows that may be used" in capsys.readouterr().err
    write_array(rounds / "allowed.npy", bits)
    assert main(["verify", str(tmp_path)]) == 0
    info = read_json(rounds / "round-0001" / "round.json")
    (rounds / "round-0001" / "round.json").write_text(json.dumps({k: v for k, v in info.items() if k != "allowed"}))
    assert main(["verify", str(tmp_path)]) == 1


def test_the_rule_as_text_and_as_a_mapping():
    expected = {"consent": ["yes"], "licence": ["cc-by", "cc0"]}
    assert parse_allow("licence=cc0,cc-by;consent=yes") == expected
    assert parse_allow({"licence": ("cc0", "cc-by", "cc0"), "consent": ["yes"]}) == expected
    assert parse_allow(None) is None
    for wrong in ("licence", "=a", "a=", "a=b;a=c", {}, {"a": []}, {"a": "b"}, 3):
        with pytest.raises(ValueError, match="^`allow` must be "):
            parse_allow(wrong)


def test_numbers_truth_values_and_missing_entries():
    dataset = Dataset.from_dict({"year": [1999, 2001, None, 1999], "ok": [True, None, True, False]})
    assert allowed_rows(dataset, {"year": ["1999"]}).tolist() == [True, False, False, True]
    assert allowed_rows(dataset, {"year": ["1999"], "ok": ["True"]}).tolist() == [True, False, False, False]
    scores = Dataset.from_dict({"x": [float("nan"), 1.5]})
    assert allowed_rows(scores, {"x": ["nan", "1.5"]}).tolist() == [False, True]
    stream = allowed_part(dataset.to_iterable_dataset(), "year=1999")
    assert [row["ok"] for row in stream] == [True, False]
    with pytest.raises(ValueError, match="column of the stream, got 'month'"):
        allowed_part(dataset.to_iterable_dataset(), "month=1")


def test_a_selector_keeps_allowed_rows_alone():
    from mates_hf import MatesSelector
    from tests.selection.selector_kit import fit_model, make_lists

    lists = make_lists(60, seed=3)
    dataset = Dataset.from_dict({"input_ids": lists, "licence": [ENTRIES[i % 4] for i in range(60)]})
    selector = MatesSelector(fit_model())
    found = selector.filter(dataset, ratio=0.5, allow="licence=cc-by,cc0")
    assert len(found) == 15
    assert set(found["licence"]) <= {"cc-by", "cc0"}
    alone = selector.filter(dataset.filter(lambda row: row["licence"] in ("cc-by", "cc0")), ratio=0.5)
    assert found["input_ids"] == alone["input_ids"]
    with pytest.raises(ValueError, match="none has mit in `licence`"):
        selector.filter(dataset, ratio=0.5, allow={"licence": ["mit"]})
    with pytest.raises(ValueError, match="^`allow` must be "):
        selector.filter(dataset, ratio=0.5, allow="licence")


def test_a_fit_reads_allowed_rows_alone():
    from mates_hf.training.fit.inputs import read_pool
    from mates_hf.training.fit.settings import FitSettings

    pool = Dataset.from_dict({"text": ["a", "b", "c", "d"], "licence": ["cc0", "x", None, "cc0"]})
    loaded, column = read_pool(pool, None, "train", FitSettings(), {"licence": ["cc0"]})
    assert (loaded.dataset["text"], column) == (["a", "d"], "text")
    assert "licence=cc0" in loaded.told
    with pytest.raises(ValueError, match="`allow` must name columns of the pool, got 'license'"):
        read_pool(pool, None, "train", FitSettings(), {"license": ["cc0"]})
