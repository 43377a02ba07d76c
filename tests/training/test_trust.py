"""Rounds that find their length: the rule, a pool on which a round of a fixed length fails, records, resumes."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainerCallback

from mates_hf import DirectionalProbe, MatesCallback, MatesConfig, NgramInfluenceModel, ReferenceTask, load_round
from mates_hf.disk import read_json, write_array
from mates_hf.errors import WeakSignalError
from mates_hf.records import InfluenceLabels
from mates_hf.reporting.lines import round_line
from mates_hf.round_record import round_facts
from mates_hf.selection.ledger import Ledger
from mates_hf.selection.plan import RunPlan, num_candidates
from mates_hf.training import rounds
from mates_hf.training.trust import GAP_FILE, longest_steps, measure_gap, round_steps
from mates_hf.training.verify import verify_run
from tests.training.kit import DIGITS, LENGTH, Result, make_arguments, make_pool, make_reference, run, small_config
from tests.training.test_guard import Changed
from tests.training.test_loop import Training, assert_same_weights, make_rounds
from tests.training.test_verify import forge

# --- the rule ---

SELECT, OWN = {"decision": "select", "reversed": False}, {"decision": "own_order", "reversed": False}


@pytest.mark.parametrize(
    ("last", "decided", "guard", "gap", "longest", "expected"),
    [
        (None, None, SELECT, None, 25, 25),  # the first round, whatever its guard says
        (None, None, OWN, None, 25, 25),
        (25, "select", SELECT, 0.1, 50, 50),
        (50, "keep_previous", {**SELECT, "decision": "keep_previous"}, 2.0, 100, 100),
        (60, "select", SELECT, 0.1, 100, 100),  # at most `update_steps`
        (100, "select", SELECT, 0.1, 100, 100),
        (100, "select", OWN, -0.1, 100, 50),
        (100, "select", SELECT, 0.0, 100, 50),  # `on_weak_signal="select"` follows the labels, for a short round
        (40, "select", OWN, -0.1, 80, 25),  # at least `first_round_steps`
        (50, "select", {**SELECT, "decision": "keep_previous", "reversed": True}, 0.1, 100, 25),
        (50, "own_order", SELECT, None, 50, 50),  # nothing was bought that could have held or not
        (50, "own_order", OWN, None, 50, 50),
        (50, "select", OWN, 0.3, 100, 50),  # another reason than the gap
        (50, "select", OWN, None, 100, 50),  # labels that rank nothing
    ],
)
def test_a_round_doubles_while_the_gap_is_above_zero_and_halves_where_it_is_not(
    last, decided, guard, gap, longest, expected
):
    config = MatesConfig(update_steps=100, first_round_steps=25)
    assert longest_steps(config, last, decided) == longest
    assert round_steps(config, last, decided, guard, gap) == expected
    assert round_steps(MatesConfig(update_steps=100, first_round_steps=None), last, decided, guard, gap) == 100


def labels_of(influence: Any, num_tokens: Any) -> InfluenceLabels:
    values = np.asarray(influence, np.float32)
    return InfluenceLabels(
        candidate_id=np.arange(len(values)), influence=values, influence_per_token=values,
        loss=np.ones_like(values), num_tokens=np.asarray(num_tokens, np.int32), probe=np.array(["p"] * len(values)),
        step_size=1.0, info={},
    )  # fmt: skip


def test_the_gap_is_worth_of_what_was_bought_minus_the_rest_in_standard_deviations():
    rng = np.random.default_rng(0)
    kind = np.arange(200) % 5 == 0  # a fifth, two units above the rest
    labels = labels_of(rng.normal(size=200) + 2 * kind, np.full(200, 7))
    found = measure_gap(kind + 0.1 * rng.random(200), labels, 0.2)
    values = labels.influence_per_token / labels.influence_per_token.std()
    low, high = values[~kind], values[kind]
    assert found is not None
    assert found.gap == pytest.approx(high.mean() - low.mean(), rel=1e-5)
    half = 1.96 * np.sqrt(high.var(ddof=1) / 40 + low.var(ddof=1) / 160)
    assert found.interval == pytest.approx((found.gap - half, found.gap + half), rel=1e-4)
    turned = measure_gap(kind + 0.1 * rng.random(200), labels_of(-labels.influence, np.full(200, 7)), 0.2)
    assert turned is not None
    assert turned.gap == pytest.approx(-found.gap, rel=1e-5)
    # Rows are bought by their worth: one of two tokens that is as good a token is worth a third of one of six.
    tokens = np.where(kind, 6, 2)
    by_worth = measure_gap(np.ones(200) + 0.01 * kind, labels_of(np.where(kind, 1.0, -1.0), tokens), 0.2)
    assert by_worth is not None
    assert by_worth.gap > 2
    assert measure_gap(values, labels, 1.0) is None
    assert measure_gap(np.ones(40), labels_of(np.ones(40), np.full(40, 7)), 0.2) is None  # nothing differs


# --- the plan ---

growing = st.builds(
    lambda first, more, lead, **values: MatesConfig(
        first_round_steps=first, update_steps=first + more, switch_lead_steps=min(lead, first), **values
    ),
    st.integers(1, 5),
    st.integers(0, 20),
    st.integers(1, 5),
    selection_ratio=st.sampled_from([0.3, 0.5, 0.9]),
    num_probes=st.integers(10, 20),
    max_passes=st.sampled_from([1, 2, 3, None]),
    candidate_scope=st.sampled_from(["slice", "pool"]),
)


@settings(max_examples=40, deadline=None)
@given(growing, st.integers(60, 900), st.integers(1, 4), st.integers(20, 140), st.randoms(use_true_random=False))
def test_what_fits_never_runs_out_however_rounds_grow_and_each_row_is_drawn_once(
    config, num_rows, batch_rows, max_steps, random
):
    plan = RunPlan(num_rows=num_rows, batch_rows=batch_rows, max_steps=max_steps, config=config)
    plan = dataclasses.replace(plan, max_steps=min(max_steps, plan.max_steps_that_fit))
    plan.check()
    own = np.array(random.sample(range(num_rows), num_rows))
    ledger = Ledger(num_rows, 0)
    ledger.mark_trained(own[: plan.rows_before])
    last, decided, at, steps = None, None, plan.first_boundary_step, []
    number = config.random_rounds
    while (longest := plan.round_at(number, at, longest_steps(config, last, decided))) is not None:
        ledger.make_room(longest.num_rows, config)
        ratio = config.selection_ratio
        drawn = ledger.draw(
            round_number=number, num_selected=longest.num_rows, selection_ratio=ratio,
            candidate_scope=config.candidate_scope, num_probes=config.num_probes,
        )  # fmt: skip
        gap = None if last is None or decided == "own_order" else random.choice([0.5, 0.5, -0.5])
        decided_now = "own_order" if gap == -0.5 or random.random() < 0.2 else "select"
        length = round_steps(config, last, decided, {"decision": decided_now}, gap)
        planned = plan.round_at(number, at, length)
        narrow = ledger.narrowed(drawn, planned.num_rows, config)
        assert narrow.probes.tolist() == drawn.probes.tolist()
        if config.candidate_scope == "slice":
            assert len(narrow.candidates) == num_candidates(planned.num_rows, ratio)
            assert narrow.candidates.tolist() == drawn.candidates[: len(narrow.candidates)].tolist()
        else:
            assert narrow.candidates.tolist() == drawn.candidates.tolist()
        if decided_now == "select":
            chosen = np.array(random.sample(narrow.candidates.tolist(), planned.num_rows))
            ledger.cursor = narrow.cursor_after
        else:
            chosen = ledger.own_order(own, planned.num_rows, drawn.probes)
        ledger.mark_trained(chosen)
        steps += range(planned.from_step, planned.to_step)
        last, decided, at, number = length, decided_now, at + length, number + 1
    assert steps == list(range(plan.first_from_step, plan.max_steps))
    assert ledger.pass_number <= config.most_passes


def test_a_pool_too_small_for_a_round_that_may_come_is_refused_before_the_run():
    # Rounds of 4, 8, 16 and 15 steps where they grow at once. One that is delayed may have 16 up to the run's end.
    sizes = {"switch_lead_steps": 1, "selection_ratio": 0.5, "num_probes": 10, "max_passes": 1}
    config = MatesConfig(update_steps=16, first_round_steps=4, **sizes)
    plan = RunPlan(num_rows=86, batch_rows=1, max_steps=60, config=config)
    assert [planned.to_step - planned.from_step for planned in plan.rounds] == [4, 8, 16, 15]
    plan.check()
    with pytest.raises(ValueError, match=r"\(steps 44 to 60\) must choose 16 rows from 32 .* 41 are unused by then"):
        dataclasses.replace(plan, num_rows=85).check()


# --- a pool on which a round of a fixed length fails ---


def two_styles(rows: int, backwards: float) -> list[list[int]]:
    """Rows that count up, and a share that counts down with the same tokens: what one teaches, the other unlearns."""
    rng = np.random.default_rng(0)
    steps = np.where(rng.random(rows) < backwards, -1, 1)[:, None] * np.arange(LENGTH - 2)
    bodies = 32 + (rng.integers(0, 8, (rows, 1)) + steps) % 8
    return [[i // DIGITS, i % DIGITS, *body] for i, body in enumerate(bodies.tolist())]


def learn_to_count_up(trainer: Any) -> None:
    """The warm start: the model knows one of the two."""
    optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=3e-3)
    rows = torch.tensor(two_styles(480, 0.0))
    for ids in rows.split(8):
        trainer.model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.slow
def test_labels_that_turn_within_a_round_are_left_where_rounds_find_their_length(tmp_path, monkeypatch):
    passages = [(32 + (i + (-1) ** i * np.arange(LENGTH)) % 8).tolist() for i in range(32)]
    reference = ReferenceTask.from_dataset(Dataset.from_dict({"input_ids": passages}), input_ids_column="input_ids")
    rows = two_styles(1_000, 0.3)
    pool = Dataset.from_dict({"input_ids": rows, "labels": rows})
    sizes = {"update_steps": 12, "switch_lead_steps": 1, "average_steps": 1, "num_probes": 200}

    def train(folder: Path, **config: Any) -> float:
        given_ = small_config(**sizes, selection_ratio=0.25, on_weak_signal="own_order", **config)
        callback = MatesCallback(reference, given_, influence_model=NgramInfluenceModel(num_buckets=256))
        args = make_arguments(folder, max_steps=40, lr_scheduler_type="constant", logging_steps=100)
        result = run(args, [callback], pool, prepare=learn_to_count_up)
        ids = torch.tensor(passages)
        with torch.no_grad():
            return result.trainer.model.eval()(input_ids=ids, labels=ids).loss.item()

    with monkeypatch.context() as before:  # rounds of one length, and a guard that does not look at the loss
        before.setattr(rounds, "measure_rise", lambda *args: None)
        fixed = train(tmp_path / "fixed")
    found = train(tmp_path / "found", first_round_steps=3)
    seen = train(tmp_path / "seen")  # rounds of one length, and the guard
    assert "loss_rose" in [info["guard"]["failed"] for info in infos(tmp_path / "seen")]
    assert seen < fixed
    whole, short = infos(tmp_path / "fixed"), infos(tmp_path / "found")
    # The long round is over before anything is known: what was bought is then far worth less than the rest.
    bought = [info for info in whole[:-1] if info["guard"]["decision"] != "own_order"]
    assert any(later["gap"]["interval"][1] < -1 for later in whole[1:] if later["gap"]), [i["gap"] for i in whole]
    assert bought
    assert {info["round_steps"] for info in whole} == {12}
    used_up = [info for info in short if info["guard"]["failed"] == "used_up"]
    assert used_up
    assert used_up[0]["step"] < 24
    assert all(info["guard"]["decision"] == "own_order" and info["gap"]["gap"] < 0 for info in used_up)
    assert all(info["round_steps"] == 3 for info in used_up)
    assert verify_run(tmp_path / "seen").problem is None
    assert found < fixed - 0.3, (found, fixed)
    assert verify_run(tmp_path / "found").problem is None


# --- records, metrics, verify ---


def infos(path: Path) -> list[dict[str, Any]]:
    return [dict(load_round(folder).info) for folder in sorted((path / "_mates").glob("round-????"))]


class SaveAt(TrainerCallback):
    def __init__(self, steps: tuple[int, ...]) -> None:
        self.steps = steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step in self.steps


SAVED = (
    8,
    13,
    17,
    20,
    22,
    26,
)  # in the lead, inside short rounds, before the labels turn, after it, in the next round


def as_killed(path: Path, copied: Path, step: int) -> Path:
    """A copy of a run without the rounds that were not there at a step."""
    shutil.copytree(path, copied)
    for info in infos(path):
        if info["step"] > step:
            shutil.rmtree(copied / f"_mates/round-{info['number']:04d}")
    return copied


def train(
    path: Path,
    resume: int | None = None,
    max_steps: int = 40,
    num_rows: int = 700,
    turn: int = 18,
    save: tuple[int, ...] | None = None,
    **config: Any,
) -> Result:
    """Rounds from step 12 on, of 3, 6 and 12 steps while prices hold; labels turn at a step, inside the second one."""
    sizes = {"update_steps": 12, "first_round_steps": 3, "switch_lead_steps": 2, "average_steps": 1}
    more = {"selection_ratio": 0.5, "num_probes": 160, "on_weak_signal": "own_order", "held_out_fraction": 0.4}
    callback = MatesCallback(
        make_reference(),
        small_config(**{**sizes, **more, **config}),
        probe=Changed(DirectionalProbe(), turn, "negative"),
        influence_model=NgramInfluenceModel(num_buckets=256),
    )
    checkpoint = None if resume is None else str(path / f"checkpoint-{resume}")
    callbacks = [SaveAt(SAVED if save is None else save), callback]
    return run(make_arguments(path, max_steps=max_steps), callbacks, make_pool(num_rows), resume=checkpoint)


@pytest.fixture(scope="module")
def turned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    path = tmp_path_factory.mktemp("turned")
    return path, train(path)


def test_lengths_double_halve_and_double_again_and_each_row_is_trained_once_in_order(turned):
    path, result = turned
    found = infos(path)
    assert [(info["step"], info["round_steps"]) for info in found[:4]] == [(12, 3), (15, 6), (21, 3), (24, 3)]
    assert [info["guard"]["failed"] for info in found[:3]] == [None, None, "used_up"]
    assert [info["guard"]["decision"] for info in found[:3]] == ["select", "select", "own_order"]
    assert found[-1]["round_steps"] > 3  # labels are followed again, and hold
    for before, info in zip(found, found[1:], strict=False):
        assert info["step"] == before["step"] + before["round_steps"]
        gap, longer = info["gap"], info["round_steps"] / before["round_steps"]
        assert (gap is None) == (before["guard"]["decision"] == "own_order")
        assert longer == (
            1.0 if gap is None or info["guard"]["failed"] == "min_spearman" else 2.0 if gap["gap"] > 0 else 0.5
        )
        assert info.get("last_round_steps") == (before["round_steps"] if longer != 1 else None)
    third = found[2]
    assert third["gap"]["interval"][0] < third["gap"]["gap"] < third["gap"]["interval"][1] < 0
    assert third["guard"]["reversed"]
    assert [info.get("num_rows_drawn_for") for info in found[:4]] == [None, None, 48, None]
    assert third["num_rows"] == 12
    assert all(info["beside_training"] for info in found)  # the lengths as well are found while training goes on
    rows: list[int] = []
    for info in found:
        folder = path / f"_mates/round-{info['number']:04d}"
        name = "own_order.npy" if info["guard"]["decision"] == "own_order" else "selection.npy"
        rows += np.load(folder / name).tolist()
    assert result.rows[14 * 4 :] == rows
    assert len(set(result.rows)) == len(result.rows) == 160
    logged = [entry for entry in result.trainer.state.log_history if "mates/round" in entry]
    assert [entry["mates/round_steps"] for entry in logged] == [info["round_steps"] for info in found]
    assert [entry.get("mates/gap") for entry in logged] == [(info["gap"] or {}).get("gap") for info in found]
    assert verify_run(path).problem is None


def test_the_line_of_a_round_tells_of_a_length_where_it_changes_and_of_what_is_used_up(turned):
    lines = [round_line(info) for info in infos(turned[0])]
    assert [" steps long after " in line for line in lines[:4]] == [False, True, True, False]
    assert "6 steps long after 3" in lines[1]
    assert "what was chosen last is used up (gap -" in lines[2]
    signal = round_facts(load_round(turned[0] / "_mates/round-0003"))["signal"]
    assert "the last choice against the rest -" in signal


@pytest.mark.quick("20")
@pytest.mark.parametrize("step", SAVED)
def test_a_run_killed_inside_short_rounds_goes_on_exactly(turned, tmp_path, step):
    path, whole = turned
    copied = as_killed(path, tmp_path / "run", step)
    if step == 20:  # killed beside training, in round 3: the labels and the fit are there
        partial = copied / "_mates/round-0003.partial"
        shutil.copytree(path / "_mates/round-0003", partial)
        for name in ("round.json", "SHA256SUMS", "own_order.npy", "selection.json"):
            (partial / name).unlink()
    rest = train(copied, resume=step)
    assert rest.rows == whole.rows[step * 4 :]
    assert all(torch.equal(value, rest.weights[name]) for name, value in whole.weights.items())
    expected, found = infos(path), infos(copied)
    for name in ("round_steps", "gap", "guard", "order_sha256", "step", "to_step", "cursor"):
        assert [info[name] for info in found] == [info[name] for info in expected], name
    assert verify_run(copied).problem is None


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guard that is ignored: the round is short, and of the rows that the labels prefer."""
    path = tmp_path_factory.mktemp("followed")
    train(path, max_steps=27, on_weak_signal="select")
    return path


def test_a_guard_that_is_ignored_follows_the_labels_for_a_short_round(followed):
    third = infos(followed)[2]
    assert (third["guard"]["decision"], third["guard"]["failed"], third["round_steps"]) == ("select", "used_up", 3)
    assert (third["num_rows"], third["num_candidates"], third["num_rows_drawn_for"]) == (12, 24, 16)  # the end cuts it
    assert verify_run(followed).problem is None
    with pytest.raises(WeakSignalError, match="worth no more than the rest by now"):
        train(followed.parent / "error", on_weak_signal="error")


def change(info: dict[str, Any], path: Path, case: str) -> dict[str, Any]:
    """Tamper with a round so that only recomputing it can tell."""
    if case == "round_steps":
        return {"round_steps": 6}
    if case == "last_round_steps":
        return {"last_round_steps": 12}
    if case == "num_rows_drawn_for":
        return {"num_rows_drawn_for": 40}
    if case == "gap":
        return {"gap": {**info["gap"], "gap": -info["gap"]["gap"]}}
    if case == "no gap":
        (path / GAP_FILE).unlink()
        return {"gap": None}
    if case == "candidates":  # a longer slice than the round's
        taken = [np.load(path / "candidates.npy"), load_round(path).labels.candidate_id]
        used = np.unpackbits(np.load(path / "consumed.npy"), count=700)
        more = np.setdiff1d(np.flatnonzero(used == 0), np.concatenate(taken))[:1]
        write_array(path / "candidates.npy", np.concatenate([np.load(path / "candidates.npy"), more]))
        for name in ("scores.npy", "num_targets.npy", "hashes.npy"):
            write_array(path / name, np.concatenate([np.load(path / name), np.load(path / name)[:1]]))
        return {"num_candidates": 25}
    turned = -np.load(path / GAP_FILE)  # predictions that go with the labels, and the gap that they give
    write_array(path / GAP_FILE, turned)
    gap = measure_gap(turned, load_round(path).labels, 0.5)
    assert gap is not None
    return {"gap": gap.to_dict()}


@pytest.mark.parametrize(
    ("case", "file", "expected"),
    [
        ("round_steps", "round.json", "`round_steps` 3, which the gap and 6 steps of the round before give"),
        ("last_round_steps", "round.json", "`last_round_steps` 6"),
        ("num_rows_drawn_for", "probes.parquet", "what ledger and seed draw"),
        ("gap", "round.json", "`gap` {'gap': -"),
        ("no gap", GAP_FILE, "a file, as round 2 decided select"),
        ("candidates", "candidates.npy", "24 rows, what ledger and seed draw"),
        ("predictions", "round.json", "`failed` of `guard` not 'used_up', as the gap is "),
    ],
)
def test_what_was_changed_of_a_length_is_found_and_named(followed, tmp_path, case, file, expected):
    shutil.copytree(followed / "_mates", tmp_path / "_mates")
    path = tmp_path / "_mates/round-0003"
    changes = change(read_json(path / "round.json"), path, case)
    forge(path, **changes)
    problem = verify_run(tmp_path).problem
    assert problem is not None
    assert (problem.round, problem.file) == ("round-0003", file), problem
    assert expected in problem.expected


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [{"candidate_scope": "pool"}, {"keep_rounds": 2}, {"random_share": 0.25}, {"max_passes": 3, "num_rows": 320}],
    ids=["pool", "pruned", "random-share", "passes"],
)
def test_other_settings_verify_with_lengths_that_change(tmp_path, config):
    train(tmp_path, **config)
    assert len({info["round_steps"] for info in infos(tmp_path)}) > 1
    assert ("max_passes" in config) is (infos(tmp_path)[-1]["pass"] > 1)
    assert verify_run(tmp_path).problem is None


@pytest.mark.slow
def test_a_loop_of_ones_own_has_the_rows_and_weights_of_the_trainer(tmp_path):
    config = small_config(update_steps=6, first_round_steps=2, switch_lead_steps=1)
    training = Training(tmp_path / "loop")
    training.train(make_rounds(tmp_path / "loop", config=config))
    trained = run(make_arguments(tmp_path / "trainer"), [MatesCallback(make_reference(), config)])
    assert training.rows == trained.rows
    assert [info["order_sha256"] for info in infos(tmp_path / "loop")] == [
        info["order_sha256"] for info in infos(tmp_path / "trainer")
    ]
    assert len({info["round_steps"] for info in infos(tmp_path / "loop")}) > 1
    assert_same_weights(training.model, trained.trainer.model)


@pytest.mark.slow
@pytest.mark.parametrize("first", [3, None])
def test_a_run_that_is_made_longer_goes_on_from_the_length_that_it_had(tmp_path, first):
    config = {"first_round_steps": first, "update_steps": 12 if first else 6}
    stop, steps = (22, [(12, 3), (15, 6)]) if first else (13, [(6, 6)])
    train(tmp_path, max_steps=stop, **config)
    assert [(info["step"], info["round_steps"]) for info in infos(tmp_path)] == steps
    # The boundaries at steps 21 and 12 had nothing to select for; what follows has the next number, so none lacks.
    train(tmp_path, resume=stop, max_steps=40, **config)
    after = infos(tmp_path)[len(steps)]
    assert (after["number"], after["step"]) == ((3, 27) if first else (2, 18))
    assert after.get("last_round_steps") == (6 if first else None)
    assert verify_run(tmp_path).problem is None
