"""What came of a fit, in ten lines: what was read, how good the selector is, what it cost, and how to use it.

Where it is used: `fit_selector` returns it, `mates-hf fit` prints it. Trade-off: it holds plain numbers; the selector
itself is read from its folder when it is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mates_hf.display import card, html_card, interval, number
from mates_hf.errors import MatesError
from mates_hf.records import FitReport
from mates_hf.reporting.lines import finite


@dataclasses.dataclass(frozen=True)
class SelectorFit:
    """A selector that was fitted without a training run.

    Attributes:
        out: Its folder.
        about: What was read and measured, JSON values, as `fit_selector.json` in the folder holds it.
        text_out: Folder of the selector that was distilled from it; None where there is none.
    """

    out: Path
    about: Mapping[str, Any]
    text_out: Path | None = None

    @property
    def selector(self) -> Any:
        """The `MatesSelector`, read from its folder."""
        from mates_hf.selection.selector import MatesSelector

        return MatesSelector.from_pretrained(self.out)

    @property
    def report(self) -> FitReport:
        """How well held-out labels were predicted.

        Raises:
            MatesError: no model was asked, so that there are no labels; `about["separation"]` says what is known.
        """
        if "fit" not in self.about:
            raise MatesError(
                "A filter by words has no labels to predict. `about['separation']` is how often a passage that was "
                "not counted ranks above a row of the pool."
            )
        return FitReport.from_dict(self.about["fit"])

    @property
    def seconds(self) -> float:
        """Wall-clock of all stages, without reading the pool; of a part that was killed, what came to its end."""
        return float(sum(self.about["seconds"].values()))

    @property
    def flops(self) -> float:
        """FLOPs of all stages, by the rule of `mates_hf.flops`; those of the warm-up by the mean length of rows."""
        return float(sum(self.about["flops"].values()))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        text = None if self.text_out is None else str(self.text_out)
        found: dict[str, Any] = finite(
            {"out": str(self.out), "text_out": text, "total_seconds": self.seconds, "total_flops": self.flops}
            | dict(self.about)
        )
        return found

    def lines(self) -> Iterator[str]:
        """Ten lines for a person, or one more where a second selector was distilled."""
        about, read, seconds = self.about, self.about["read"], self.about["seconds"]
        yield f"selector: {self.out} ({about['max_length']:,} tokens of a text)"
        model, asked = about.get("model"), "none, a filter by words"
        if model:
            asked = f"{model['name']}, {model['num_parameters']:,} parameters, {about['step']:,} steps of warm-up"
        yield f"model: {asked}"
        yield f"pool: {read['pool']}, column `{read['column']}`{_left_out(read)}"
        yield from self._of_labels() if model else self._of_counts()
        parts = ", ".join(f"{name.replace('_', '-')} {value:,.0f} s" for name, value in seconds.items())
        yield f"cost: {self.seconds:,.0f} s ({parts}), {self.flops:.1e} FLOPs"
        if self.text_out is not None:
            yield f"without a tokenizer: {self.text_out}"
        yield f"score: mates-hf score {self.out} 'corpus/*.parquet' --out scored/ --ratio 0.2"
        yield f"Python: MatesSelector.from_pretrained({str(self.out)!r}).filter(dataset, ratio=0.2)"

    def _of_labels(self) -> Iterator[str]:
        """What the model was asked, and how well its answers are predicted."""
        about, report = self.about, self.report
        loss = number(about["reference_loss"])
        yield f"reference: {about['reference']['name']}, {about['num_passages']:,} passages, loss {loss} nats/token"
        held_out = f"{report.num_held_out:,} of {about['num_probed']:,} probed rows"
        yield f"signal: held-out Spearman {report.spearman:.2f} {interval(report.interval)} on {held_out}: passes"
        yield f"best fifth: {number(report.top_fifth_overlap)} of it found (0.2 is chance)"
        yield f"probe: {_fidelity(about['fidelity'])}"

    def _of_counts(self) -> Iterator[str]:
        """What was counted, and how well that separates passages from the pool."""
        yield f"reference: {self.about['reference']['name']}, {self.about['num_passages']:,} passages"
        found = self.about["separation"]
        if found is None:
            yield "signal: too few passages to judge the filter by"
        else:
            yield f"signal: a passage that was not counted ranks above a row of the pool in {found:.0%} of pairs"

    def __repr__(self) -> str:
        return card("SelectorFit", self._facts())

    def _repr_html_(self) -> str:
        return html_card("SelectorFit", self._facts())

    def _facts(self) -> dict[str, str]:
        facts = dict(line.split(": ", 1) for line in self.lines())
        return {name: text for name, text in facts.items() if name not in ("score", "Python")}


def _left_out(read: Mapping[str, Any]) -> str:
    """How many rows were not used, and why."""
    why = {"num_empty": "empty", "num_shared": "that share text with the reference"}
    parts = [f"{read[key]:,} {what}" for key, what in why.items() if read[key]]
    return f"; left out: {' and '.join(parts)}" if parts else ""


def _fidelity(found: Mapping[str, Any]) -> str:
    """How far derivatives agree with real steps."""
    if not isinstance(found.get("spearman"), (int, float)):
        return "not compared with real steps"
    return f"{found['num_candidates']} real steps agree at {found['spearman']:.2f} {interval(found.get('interval'))}"
