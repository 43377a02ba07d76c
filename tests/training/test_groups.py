"""Runs whose pool has groups: bounds on what each gets, shares and losses in the record, replayed by `verify`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from datasets import Dataset

from mates_hf import MatesCallback, ReferenceTask, load_round
from mates_hf.cli import main
from mates_hf.data.corpus import builtin_corpus
from mates_hf.disk import write_array, write_json
from mates_hf.errors import RoundMismatchError
from mates_hf.reporting.lines import round_line, round_lines
from mates_hf.training.verify import verify_run
from tests.training.kit import Stop, make_arguments, make_pool, make_reference, run, small_config
from tests.training.settings import proves

NAMES = np.array(["web", "news", "code"])


def sources(pool):
    """Groups by the first tokens of a row, so that labels differ between them."""
    first = np.array([row[2] for row in pool["input_ids"]])
    return NAMES[np.searchsorted(np.quantile(first, [0.6, 0.9]), first)]


def grouped(num=400):
    pool = make_pool(num)
    return pool.add_column("source", sources(pool).tolist())


def collate(rows):
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids}


def train(folder, *, stop=None, resume=None, **changes):
    config = small_config(**{"group_column": "source", **changes})
    more = [] if stop is None else [Stop(stop)]
    return run(
        make_arguments(folder, remove_unused_columns=False, save_strategy="steps", save_steps=8),
        [MatesCallback(make_reference(), config), *more], grouped(), collator=collate, resume=resume,
    )  # fmt: skip


def rounds(folder):
    return [load_round(path) for path in sorted((folder / "_mates").glob("round-????"))]


def counted(record):
    names = np.array(grouped()["source"])
    return {name: (names[record.candidates] == name).sum() for name in NAMES}, {
        name: (names[record.selection] == name).sum() for name in NAMES
    }


@proves(
    "`group_column`, `max_group_boost`, `min_group_boost`",
    "no group gets more or less than its bounds; shares and losses by group are recorded; verifies; resumes exactly",
    note="docs/train.md",
)
def test_no_group_gets_more_or_less_than_its_bounds(tmp_path):
    plain = train(tmp_path / "plain")
    bounded = train(tmp_path / "bounded", max_group_boost=1.0, min_group_boost=1.0, random_share=0.25)
    assert plain.rows != bounded.rows
    for folder in ("plain", "bounded"):
        records = rounds(tmp_path / folder)
        assert len(records) >= 2
        for record in records:
            candidates, chosen = counted(record)
            facts = record.info["groups"]
            assert {name: facts[name]["candidates"] for name in NAMES} == candidates
            assert {name: facts[name]["chosen"] for name in NAMES} == chosen
            assert sum(facts[name]["probes"] for name in NAMES if "probes" in facts[name]) == len(record.labels)
            if folder == "bounded":
                for name in NAMES:
                    fair = candidates[name] * len(record.selection) / len(record.candidates)
                    assert np.floor(fair) <= chosen[name] <= np.ceil(fair)
        assert verify_run(tmp_path / folder).problem is None
    free = [counted(record) for record in rounds(tmp_path / "plain")]
    assert any(
        got[name] > 1.2 * num[name] * sum(got.values()) / sum(num.values()) for num, got in free for name in NAMES
    )


def test_losses_by_group_are_those_of_the_probes(tmp_path):
    train(tmp_path)
    names = np.array(grouped()["source"])
    for record in rounds(tmp_path):
        labels, facts = record.labels, record.info["groups"]
        for name in np.unique(names[labels.candidate_id]):
            mine = names[labels.candidate_id] == name
            loss = np.average(labels.loss[mine], weights=labels.num_tokens[mine])
            assert facts[name]["loss"] == pytest.approx(loss, rel=1e-6)
            assert facts[name]["tokens"] == labels.num_tokens[mine].sum()
            if np.ptp(labels.num_tokens[mine]) == 0 and mine.sum() > 1:  # then it is that of a plain mean
                error = labels.loss[mine].std(ddof=1) / np.sqrt(mine.sum())
                assert facts[name]["loss_error"] == pytest.approx(error, rel=1e-4)
            assert facts[name]["influence"] == pytest.approx(labels.influence[mine].mean(), rel=1e-5, abs=1e-12)
    line = round_line(record.info)
    assert "their share" in line
    assert any(f"{name} {boost}" in line for name in NAMES for boost in ("0.", "1.", "2."))
    assert "their share" in list(round_lines(record))[-1]


def test_each_group_has_its_share_of_the_probes(tmp_path):
    train(tmp_path, num_probes=40)
    names = np.array(grouped()["source"])
    for record in rounds(tmp_path):
        codes, told = np.load(record.path / "probe_groups.npy"), record.info["strata"]
        drawn = np.concatenate([record.labels.candidate_id, record.labels.info.get("skipped", [])]).astype(int)
        assert told == sorted(set(names.tolist()))
        for code, name in enumerate(told):
            fair = len(drawn) * np.mean(codes == code)
            assert np.floor(fair - 1e-9) <= (names[drawn] == name).sum() <= np.ceil(fair + 1e-9)
    assert verify_run(tmp_path).problem is None
    codes[:] = np.roll(codes, 1)
    write_array(record.path / "probe_groups.npy", codes)
    assert "probe_groups.npy" in str(verify_run(tmp_path).problem)
    resealed(record.path, "probe_groups.npy")
    assert "what ledger and seed draw" in str(verify_run(tmp_path).problem)


def test_the_groups_of_a_run_are_printed(tmp_path, capsys):
    train(tmp_path, max_group_boost=1.5)
    assert main(["groups", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in NAMES)
    assert "beyond the others" in printed
    assert main(["groups", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    records = rounds(tmp_path)
    for name in NAMES:
        first, last = (record.info["groups"][name] for record in (records[0], records[-1]))
        assert told[name]["change"]["value"] == pytest.approx(last["loss"] - first["loss"])
        low, high = told[name]["change"]["interval"]
        assert high - low == pytest.approx(2 * 1.96 * np.hypot(first["loss_error"], last["loss_error"]))


def test_a_run_with_bounds_resumes_exactly_and_not_with_others(tmp_path):
    whole = train(tmp_path / "whole", max_group_boost=1.25)
    train(tmp_path / "stopped", max_group_boost=1.25, stop=15)
    checkpoint = str(tmp_path / "stopped" / "checkpoint-8")
    resumed = train(tmp_path / "stopped", max_group_boost=1.25, resume=checkpoint)
    assert resumed.rows == whole.rows[-len(resumed.rows) :]
    with pytest.raises(RoundMismatchError, match="max_group_boost: checkpoint 1.25, this run 1.5"):
        train(tmp_path / "stopped", max_group_boost=1.5, resume=checkpoint)


def test_an_own_order_records_losses_and_no_choice(tmp_path):
    train(tmp_path, on_weak_signal="own_order", min_spearman=1.0)
    for record in rounds(tmp_path):
        assert record.selection is None
        assert all("chosen" not in facts and facts["probes"] for facts in record.info["groups"].values())
        assert "their share" not in round_line(record.info)
    assert verify_run(tmp_path).problem is None


def resealed(path, name):
    """The round with a file's checksum made right again, as a tamperer would."""
    from mates_hf.disk import sha256_of

    sums = path / "SHA256SUMS"
    lines = [line for line in sums.read_text().splitlines() if not line.endswith(f"  {name}")]
    sums.write_text("\n".join([*lines, f"{sha256_of(path / name)}  {name}"]) + "\n")


def test_verify_finds_groups_that_were_changed(tmp_path):
    train(tmp_path, max_group_boost=1.0)
    path = rounds(tmp_path)[0].path
    codes, info = np.load(path / "groups.npy"), json.loads((path / "round.json").read_text())
    write_array(path / "groups.npy", np.roll(codes, 1))
    assert "groups.npy" in str(verify_run(tmp_path).problem)
    resealed(path, "groups.npy")
    assert verify_run(tmp_path).problem is not None
    write_array(path / "groups.npy", codes)
    resealed(path, "groups.npy")
    assert verify_run(tmp_path).problem is None
    info["groups"]["web"]["chosen"] += 1
    write_json(path / "round.json", info)
    resealed(path, "round.json")
    assert "round.json" in str(verify_run(tmp_path).problem)
    for wrong in (2**31 - 1, -1):
        write_array(path / "groups.npy", np.full_like(codes, wrong))
        resealed(path, "groups.npy")
        assert "expected groups below 3, as round.json names" in str(verify_run(tmp_path).problem)


def test_a_column_that_the_trainer_removes_is_named_before_the_first_step(tmp_path):
    callback = MatesCallback(make_reference(), small_config(group_column="source"))
    with pytest.raises(
        ValueError, match="`group_column` must be a column of the pool, got 'source'.*remove_unused_col"
    ):
        run(make_arguments(tmp_path), [callback], grouped())
    assert not (tmp_path / "_mates").exists()


def test_groups_of_the_demo_stay_within_their_boosts(tmp_path):
    """The demo's pool: its kinds of text are the groups, and the manual, which the reference is of, is wanted most."""
    corpus = builtin_corpus(max_rows_per_kind=100)

    def tokens(text: str) -> list[int]:
        return [byte % 64 for byte in text.encode()[:30].ljust(30)]

    ids = [tokens(row["text"]) for row in corpus.pool]
    pool = Dataset.from_dict({"input_ids": ids, "kind": [row["kind"] for row in corpus.pool]})
    passages = [tokens(text) for text in corpus.reference[:40]]
    reference = ReferenceTask.from_dataset(Dataset.from_dict({"input_ids": passages}), input_ids_column="input_ids")
    boosts = {}
    for name, bounds in (("free", {}), ("bounded", {"max_group_boost": 1.5, "min_group_boost": 0.5})):
        config = small_config(group_column="kind", num_probes=80, selection_ratio=0.3, **bounds)
        args = make_arguments(tmp_path / name, remove_unused_columns=False, learning_rate=1e-2)
        run(args, [MatesCallback(reference, config)], pool, collator=collate)
        boosts[name] = []
        for record in rounds(tmp_path / name):
            share = len(record.selection) / len(record.candidates)
            for facts in record.info["groups"].values():
                fair = facts["candidates"] * share
                boosts[name].append((facts["chosen"], fair))
        assert verify_run(tmp_path / name).problem is None
    assert all(np.floor(0.5 * fair) <= chosen <= np.ceil(1.5 * fair) for chosen, fair in boosts["bounded"])
    assert any(chosen > np.ceil(1.5 * fair) or chosen < np.floor(0.5 * fair) for chosen, fair in boosts["free"])
