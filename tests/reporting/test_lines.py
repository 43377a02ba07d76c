"""The line a run prints of a round, and strict JSON."""

from __future__ import annotations

import json
import logging

import pytest

from mates_hf.reporting.lines import finite, round_line, tell_round

INFO = {
    "number": 7,
    "step": 280,
    "from_step": 291,
    "to_step": 330,
    "num_rows": 640,
    "num_candidates": 3200,
    "num_probed": 400,
    "guard": {"decision": "select", "spearman": 0.6612, "interval": [0.494, 0.781]},
    "config": {"min_spearman": 0.1},
    "stages": {"probe": {"seconds": 3.0}, "fit": {"seconds": 0.75}},
}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {},
            "round 7 at step 280, 400 probed, held-out Spearman 0.66 [0.49, 0.78], selected 640 of 3,200 candidates "
            "for steps 291 to 330, 3.8 s",
        ),
        (
            {"guard": {"decision": "own_order", "spearman": 0.05, "interval": [-0.2, 0.3]}, "num_rows": 0},
            "round 7 at step 280, 400 probed, held-out Spearman 0.05 [-0.20, 0.30], signal too weak: the Trainer's "
            "own order until the next round, 3.8 s",
        ),
        (
            {"guard": {"decision": "keep_previous", "spearman": 0.05, "interval": [-0.2, 0.3]}},
            "round 7 at step 280, 400 probed, held-out Spearman 0.05 [-0.20, 0.30], selected 640 of 3,200 candidates "
            "for steps 291 to 330 (by the previous influence model), 3.8 s",
        ),
        (
            {"guard": {"decision": "select", "spearman": 0.5, "interval": [-0.2, 0.9]}},
            "round 7 at step 280, 400 probed, held-out Spearman 0.50 [-0.20, 0.90], selected 640 of 3,200 candidates "
            "for steps 291 to 330 (selected below the guard), 3.8 s",
        ),
        (
            {"num_passage_rows": 1024},
            "round 7 at step 280, 400 probed, held-out Spearman 0.66 [0.49, 0.78], selected 640 of 3,200 candidates "
            "for steps 291 to 330, 1,024 reference passages between them, 3.8 s",
        ),
        (
            {"num_passed_over": 1200, "reference_overlap": {"rows": 3, "share": 0.005, "ngram": 13}},
            "round 7 at step 280, 400 probed, held-out Spearman 0.66 [0.49, 0.78], selected 640 of 3,200 candidates "
            "for steps 291 to 330, 1,200 passed over as copies, 3 with 13 tokens of the reference, 3.8 s",
        ),
        (
            {"bought_most": [{"token_id": 7, "text": "court"}, {"token_id": 9, "text": "law"}]},
            "round 7 at step 280, 400 probed, held-out Spearman 0.66 [0.49, 0.78], selected 640 of 3,200 candidates "
            'for steps 291 to 330, above all rows with "court", "law", 3.8 s',
        ),
        (
            {"bought_most": [{"token_id": 7, "text": None}]},  # a run without a tokenizer
            "round 7 at step 280, 400 probed, held-out Spearman 0.66 [0.49, 0.78], selected 640 of 3,200 candidates "
            "for steps 291 to 330, 3.8 s",
        ),
        ({"bought_most": "damaged"}, None),
        (
            {"bought_most": [{"text": "longer than twenty characters"}, {"text": "\x1b[31mred"}, {"text": ""}, 5]},
            "round 7 at step 280, 400 probed, held-out Spearman 0.66 [0.49, 0.78], selected 640 of 3,200 candidates "
            'for steps 291 to 330, above all rows with "longer than twenty …", "?[31mred", 3.8 s',
        ),
        ({"guard": {"decision": "select", "spearman": float("nan"), "interval": [float("nan")] * 2}}, None),
        ({"guard": None, "stages": None, "config": None}, None),
    ],
)
def test_a_round_is_one_line(changes, line):
    found = round_line({**INFO, **changes})
    assert "\n" not in found
    assert line is None or found == line


@pytest.mark.parametrize("has_bars", [True, False])
@pytest.mark.parametrize("level", [None, "INFO", "WARNING", "ERROR"])
def test_a_round_is_told_once_and_where_it_is_seen(capsys, caplog, monkeypatch, has_bars, level):
    """With bars, or where nobody set logging up, it is printed; else it is for the log."""
    root = logging.getLogger("mates_hf")
    monkeypatch.setattr(root, "level", root.level)
    monkeypatch.setattr(logging.getLogger(), "level", logging.WARNING)  # as Python begins
    root.setLevel(level or logging.NOTSET)
    tell_round(INFO, has_bars=has_bars)
    printed = capsys.readouterr().out.count("round 7 at step 280, ")
    logged = caplog.text.count("round 7 at step 280, ")
    is_printed = has_bars or level in (None, "WARNING")
    assert (printed, logged) == (int(is_printed), int(not is_printed and level == "INFO"))


def test_a_round_of_which_little_is_known_is_still_a_line():
    assert round_line({}).startswith("round ? at step ?")


def test_json_has_no_number_that_strict_readers_refuse():
    value = finite({"a": [float("nan"), 1.5, (float("inf"), 2)], 3: {"b": -float("inf")}})
    assert json.loads(json.dumps(value, allow_nan=False)) == {"a": [None, 1.5, [None, 2]], "3": {"b": None}}
