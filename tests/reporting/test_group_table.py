"""Who gains and who pays: changes of loss against those of all other groups, with the right sign and interval."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mates_hf.disk import write_json
from mates_hf.errors import MatesError
from mates_hf.reporting.group_table import group_lines, group_table, run_groups


def facts(loss: float, error: float | None = 0.01, *, chosen: int = 10, candidates: int = 50, tokens: int = 100):
    told = {"probes": 20, "tokens": tokens, "loss": loss, "loss_error": error}
    return told | ({"chosen": chosen, "candidates": candidates} if candidates else {})


ROUNDS = [
    {"groups": {"code": facts(4.0, chosen=30), "news": facts(5.0, chosen=0), "web": facts(6.0, candidates=100)}},
    {"groups": {"web": {"candidates": 10, "chosen": 1}}},  # no probe of it, and of the others neither
    {"groups": {"code": facts(3.0, chosen=30), "news": facts(5.2, chosen=0), "web": facts(5.6, candidates=100)}},
]


def test_changes_are_against_all_other_groups() -> None:
    found = {one.name: one for one in group_table(ROUNDS)}
    assert {name: one.verdict for name, one in found.items()} == {"code": "gains", "news": "pays", "web": "unclear"}
    code = found["code"]
    assert code.change is not None
    assert code.beyond is not None
    assert code.change.value == pytest.approx(-1.0)
    assert code.change.interval == pytest.approx((-1 - 1.96 * np.sqrt(2) * 0.01, -1 + 1.96 * np.sqrt(2) * 0.01))
    assert code.beyond.value == pytest.approx(-1.0 - ((5.2 + 5.6) / 2 - (5.0 + 6.0) / 2))
    assert found["web"].beyond is not None
    assert found["web"].beyond.value == pytest.approx(-0.4 - ((3.0 + 5.2) - (4.0 + 5.0)) / 2)
    assert code.boost == pytest.approx((60 / 81) / (100 / 410))
    assert [one.name for one in group_table(ROUNDS)] == ["code", "web", "news"]
    lines = list(group_lines(group_table(ROUNDS)))
    assert lines[1].split()[0] == "code"
    assert "-1.000 [-1.028, -0.972]" in lines[1]
    assert lines[1].endswith("gains")


def test_larger_groups_count_by_their_tokens() -> None:
    rounds = [
        {"groups": {"a": facts(4.0), "b": facts(5.0, tokens=300), "c": facts(7.0)}},
        {"groups": {"a": facts(4.0), "b": facts(4.0, tokens=300), "c": facts(7.0)}},
    ]
    one = next(one for one in group_table(rounds) if one.name == "a")
    assert one.beyond is not None
    assert one.beyond.value == pytest.approx(0.75)
    assert one.verdict == "pays"


def test_intervals_are_of_the_rows_that_were_drawn() -> None:
    """Of groups whose loss does not change, about one in twenty is told to."""
    from mates_hf.training.groups import _loss

    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(400):
        rounds = [
            {"groups": {name: {"probes": 40, **_loss(rng.normal(4, 1, 40), rng.integers(5, 90, 40) * 1.0)}
                        for name in "ab"}}
            for _ in range(2)
        ]  # fmt: skip
        wrong += group_table(rounds)[0].verdict != "unclear"
    assert 4 <= wrong <= 45


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    one = group_table(ROUNDS[:1])[0]
    assert one.change is None
    assert one.verdict == "unclear"
    old = [{"groups": {"a": {"loss": 4.0, "probes": 3}}}, {"groups": {"a": {"loss": 3.0, "probes": 3}}}]
    (course,) = group_table(old)  # of an earlier version
    assert course.change is not None
    assert (course.change.value, course.change.interval, course.beyond) == (-1.0, None, None)
    assert course.to_dict()["verdict"] == "unclear"
    assert group_table([{}]) == []
    with pytest.raises(FileNotFoundError, match="must hold finished rounds, and has none"):
        run_groups(tmp_path)
    (tmp_path / "round-0001").mkdir()
    write_json(tmp_path / "round-0001" / "round.json", {"number": 1})
    with pytest.raises(MatesError, match="say nothing of groups: set `MatesConfig"):
        run_groups(tmp_path)
