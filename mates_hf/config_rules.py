"""What values the fields of `MatesConfig` may have, alone and beside one another.

Where it is used: when a config is made. Trade-off: rules of our own. `huggingface_hub.dataclasses.strict` checks in
`__setattr__`, which a frozen dataclass never calls while it is made, so there it would check nothing (0.34 to 2.4).
Unfrozen, it raises an error that is no `ValueError` and puts a line of its own before ours. It refuses 1 as a float,
and has no place for rules between two fields.
"""

from __future__ import annotations

import sys
from typing import Any

from mates_hf.allow import RULE, parse_allow


def require_valid(config: Any) -> None:
    """Hold a config against its rules.

    Args:
        config: a `MatesConfig` that is being made.

    Raises:
        ValueError: a value is outside its range; the message names the field, the value and the range.
    """

    def require(ok: bool, name: str, rule: str) -> None:
        if not ok:
            raise ValueError(f"`{name}` must be {rule}, got {getattr(config, name)!r}.")

    def whole(name: str, least: int) -> bool:
        value = getattr(config, name)
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    def number(name: str) -> bool:
        value = getattr(config, name)
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max

    require(whole("update_steps", 1), "update_steps", "a whole number of at least 1")
    require(
        config.first_round_steps is None or whole("first_round_steps", 1),
        "first_round_steps",
        "None or a whole number of at least 1",
    )
    require(number("selection_ratio") and 0 < config.selection_ratio <= 1, "selection_ratio", "in (0, 1]")
    require(config.max_passes is None or whole("max_passes", 1), "max_passes", "None or a whole number of at least 1")
    require(config.candidate_scope in ("slice", "pool"), "candidate_scope", "'slice' or 'pool'")
    require(number("random_share") and 0 <= config.random_share < 1, "random_share", "in [0, 1)")
    require(whole("reference_passes", 0), "reference_passes", "a whole number of at least 0")
    require(number("temperature") and config.temperature >= 0, "temperature", "a finite number of at least 0")
    require(config.max_copies is None or whole("max_copies", 1), "max_copies", "None or a whole number of at least 1")
    require(whole("num_probes", 10), "num_probes", "a whole number of at least 10")
    require(number("held_out_fraction") and 0 < config.held_out_fraction < 1, "held_out_fraction", "in (0, 1)")
    require(number("min_spearman") and -1 <= config.min_spearman <= 1, "min_spearman", "in [-1, 1]")
    require(
        config.on_weak_signal in ("own_order", "select", "error"),
        "on_weak_signal",
        "'own_order', 'select' or 'error'",
    )
    require(whole("random_rounds", 1), "random_rounds", "a whole number of at least 1")
    for name, least in (("switch_lead_steps", 1), ("average_steps", 0)):
        require(
            getattr(config, name) is None or (whole(name, least) and getattr(config, name) <= config.update_steps),
            name,
            f"None or a whole number from {least} to `update_steps` ({config.update_steps})",
        )
    require(
        config.drift_check_steps is None or whole("drift_check_steps", 1),
        "drift_check_steps",
        "None or a whole number of at least 1",
    )
    require(
        config.drift_check_steps is None or config.window_steps <= config.drift_check_steps < config.update_steps,
        "drift_check_steps",
        f"None or a whole number from `average_steps` ({config.window_steps}) up to, without it, `update_steps` "
        f"({config.update_steps})",
    )
    require(number("drift_spearman") and -1 <= config.drift_spearman <= 1, "drift_spearman", "in [-1, 1]")
    require(whole("probe_tokens_per_batch", 1), "probe_tokens_per_batch", "a whole number of at least 1")
    require(whole("selection_seed", 0), "selection_seed", "a whole number of at least 0")
    require(
        config.rounds_dir is None or (isinstance(config.rounds_dir, str) and config.rounds_dir != ""),
        "rounds_dir",
        "None or a path as a non-empty str",
    )
    for name in ("document_column", "group_column", "score_column"):
        value = getattr(config, name)
        ok = value is None or (isinstance(value, str) and value != "")
        require(ok, name, "None or the name of a column as a non-empty str")
    most, bounded = config.max_group_boost, config.group_column is not None
    rule = "None without `group_column`" if not bounded else "None or a finite number of at least 1"
    require(most is None or (bounded and number("max_group_boost") and most >= 1), "max_group_boost", rule)
    rule = "in [0, 1]" if bounded else "0 without `group_column`"
    ok = number("min_group_boost") and (0 <= config.min_group_boost <= 1 if bounded else config.min_group_boost == 0)
    require(ok, "min_group_boost", rule)
    require(_is_allow(config.allow), "allow", RULE)
    require(whole("alert_weak_rounds", 1), "alert_weak_rounds", "a whole number of at least 1")
    for name in ("alert_idle_share", "alert_reference_overlap", "alert_group_boost"):
        value = getattr(config, name)
        require(value is None or (number(name) and value > 0), name, "None or a finite number above 0")
    require(config.keep_rounds is None or whole("keep_rounds", 2), "keep_rounds", "None or at least 2")
    pages = ("texts", "images", "redacted", "none")
    require(config.round_page in pages, "round_page", "'texts', 'images', 'redacted' or 'none'")


def _is_allow(value: Any) -> bool:
    """Whether a value says which rows are allowed."""
    try:
        parse_allow(value)
    except ValueError:
        return False
    return True
