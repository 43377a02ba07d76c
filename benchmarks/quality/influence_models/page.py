"""The page of `influence_models`, written from its JSON alone, and the check that the JSON's arrays give it.

Trade-off: a cell is a mean over draws or seeds; intervals of one draw are bootstraps over
test candidates, those of differences in loss are over seeds of training, and neither knows of other checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.lab.statistics import mean_interval
from benchmarks.lab.tables import interval, markdown, table
from benchmarks.quality.influence_models.setup import Values, judge, unpacked_ranks
from mates_hf.evaluation.agreement import rank_correlation

Document = dict[str, Any]

DEFAULT = "token tables (default)"
RANDOM = "random"
LARGE = 405e6  # parameters of Pythia-410M
CHEAP = 10.0  # FLOPs a token: look-ups in tables
NEAR = 0.02  # Spearman; more than draws of the labels differ by
NUM_RESAMPLES = 400
_TOLERANCE = 1e-6  # the JSON keeps seven digits


def page(document: Document) -> str:
    """Markdown of all parts."""
    sections = (head, league, curves, gains, default)
    return markdown(*(block for section in sections for block in section(document)))


def head(document: Document) -> list[str]:
    """What was measured, and how."""
    settings = document["settings"]
    numbers = ", ".join(f"{n:,}" for n in settings["numbers"])
    missing = [f"{c['name']} (`pip install {c['package']}`)" for c in document["contenders"] if not c["installed"]]
    return [
        "# League table of influence models",
        f"Made by `python -m benchmarks influence_models`. GPT-NeoX of {settings['parameters']:,} parameters, "
        f"vocabulary {settings['vocab_size']:,}, rows of {settings['row_tokens']} tokens from "
        f"{len(settings['domain_names'])} domains, {settings['warm']} random steps of {settings['batch_rows']} rows "
        "in; AdamW (betas 0.9 and 0.95, weight decay 0.1), constant learning rate "
        f"{settings['learning_rate']:g}, gradients clipped to 1.0. Labels: "
        f"`DirectionalProbe` at the weights averaged over the last {settings['window']} steps, > 0 helps, reference "
        f"loss over all tokens of {settings['reference_passages']} LAMBADA passages; development losses: "
        f"{settings['development_passages']} other ones. Dropped for a shared 13-gram: "
        f"{settings['documents_dropped']} documents of the pool, {settings['development_passages_dropped']} "
        "development passages.",
        f"Fits on {numbers} labels, drawn from {settings['labels']:,}; judged on "
        f"{settings['test']:,} test candidates of other documents, never fitted on; draws overlap where they are "
        f"large, and there is one of {settings['labels']:,}. Realised gain: from the checkpoint (same optimizer "
        f"state), {settings['horizons'][-1]} steps on the top {settings['ratio']:.0%} of a fixed slice of "
        f"{settings['slice_rows']:,} candidates of yet other documents; development loss at weights averaged over the "
        f"last third, minus that of random picks of the same seed (< 0 is better), mean over "
        f"{settings['gain_seeds']} seeds ± its 95 % t interval. A seed is a draw of labels and an order of training.",
        f"Not installed: {'; '.join(missing)}." if missing else "",
        f"**Not finished: {settings['units_missing']} units are left.**" if settings["units_missing"] else "",
    ]


def fits_of(document: Document, name: str, num: int) -> list[dict[str, Any]]:
    """Fits of a contender on a number of labels, by draw."""
    found = [entry for entry in document["fit"] if entry["name"] == name and entry["num"] == num]
    return sorted(found, key=lambda entry: entry["draw"])


def final_losses(document: Document, name: str, where: str, loss_on: str, horizon: int | None = None) -> Values:
    """(seeds,) development losses after training, by seed; nan where a seed is not done."""
    key = str(horizon or document["settings"]["horizons"][-1])
    return by_seed(document, "gain", name, lambda entry: entry["losses"][key][where][loss_on])


def by_seed(document: Document, part: str, name: str, value: Callable[[dict[str, Any]], float]) -> Values:
    """(seeds,) values of a contender's units of a part; nan where a seed is not done."""
    found = {entry["draw"]: value(entry) for entry in document[part] if entry["name"] == name}
    return np.array([found.get(seed, np.nan) for seed in range(document["settings"]["gain_seeds"])])


def paired(document: Document, name: str, base: str, where: str, loss_on: str, horizon: int | None = None) -> str:
    """Mean difference of losses, paired by seed, with its interval."""
    ours, theirs = (final_losses(document, arm, where, loss_on, horizon) for arm in (name, base))
    return interval((ours - theirs)[np.isfinite(ours - theirs)])


def installed(document: Document) -> list[dict[str, Any]]:
    """Contenders that could be run."""
    return [entry for entry in document["contenders"] if entry["installed"]]


class Resampled:
    """Paired differences of rank correlations over the same resamples of the test candidates."""

    def __init__(self, document: Document) -> None:
        self.truth = np.array(document["test"]["influence"])
        rng = np.random.default_rng(0)
        self.drawn = rng.integers(len(self.truth), size=(NUM_RESAMPLES, len(self.truth)))
        self._known: dict[str, Values] = {}

    def correlations(self, ranks: str) -> Values:
        """(R,) rank correlations of packed predictions with the labels."""
        if ranks not in self._known:
            values = unpacked_ranks(ranks)
            self._known[ranks] = np.array([rank_correlation(values[rows], self.truth[rows]) for rows in self.drawn])
        return self._known[ranks]

    def difference(self, ranks: str, base: str) -> str:
        """Interval of the difference in rank correlation."""
        low, high = np.percentile(self.correlations(ranks) - self.correlations(base), [2.5, 97.5])
        return f"[{low:+.3f}, {high:+.3f}]"


def flops_text(flops: float | None) -> str:
    """FLOPs a token, short."""
    if flops is None:
        return ""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if flops >= size:
            return f"{flops / size:.2g} {unit}"
    return f"{flops:.0f}"


def league(document: Document) -> list[str]:
    """The main table."""
    settings = document["settings"]
    main, last = settings["main"], settings["horizons"][-1]
    costs = {entry["name"]: entry for entry in document["cost"]}
    resampled = Resampled(document)
    base = fits_of(document, DEFAULT, main)
    about = (
        "Spearman, within domain (mean over domains) and precision of the top fifth: means "
        "over draws; brackets: 95 % bootstrap interval of the first draw. Difference: Spearman of the first draw "
        "minus that of the default, paired bootstrap. Picked: mean label of the candidates picked from the slice, in "
        "standard deviations above its mean. Fit and scoring on one core, both with nothing beside them; what reads "
        "text decodes tokens first, which is in its time. FLOPs: an estimate of what scoring a token takes (2 × "
        "parameters of what is run, a handful for tables). Overhead: those FLOPs, five candidates scored for each "
        "trained on, against the 6 × parameters of training a model of 410M; losses and hidden states of the "
        "model that trains cost its own forward pass, five thirds of its training whatever its size."
    )
    rows = []
    for contender in installed(document):
        name, num = contender["name"], contender["main"]
        fits = fits_of(document, name, num)
        if not fits:
            continue
        low, high = fits[0]["interval"]
        shown = name if num in (0, main) else f"{name} ({num:,} labels)"
        cost = costs.get(name, {})
        seconds = cost.get("fit_seconds", fits[0]["fit_seconds"] if contender["slow"] else None)
        speed = cost.get("tokens_a_second")
        flops = cost.get("flops")
        own = name in ("own loss, low first", "hidden-state ridge")
        rows.append([
            shown, f"{mean_of(fits, 'spearman'):.3f} [{low:.3f}, {high:.3f}]",
            "" if name == DEFAULT or not base else resampled.difference(fits[0]["ranks"], base[0]["ranks"]),
            f"{mean_of(fits, 'within'):.3f}", f"{mean_of(fits, 'precision'):.3f}",
            f"{mean_of([e for e in document['gain'] if e['name'] == name] or [{'picked': np.nan}], 'picked'):+.2f}"
            if contender["gain"] else "",
            paired(document, name, RANDOM, "averaged", "all") if contender["gain"] else "",
            "" if seconds is None or not (contender["labelled"] or contender["package"]) else f"{seconds:.2g}",
            "" if speed is None else f"{speed / 1e6:.3g}",
            flops_text(flops),
            "167 %" if own else "" if flops is None else f"{5 * flops / (6 * LARGE):.2%}",
        ])  # fmt: skip
    heads = [
        "influence model", "Spearman", "difference", "within domain", "precision of top fifth", "picked",
        f"loss after {last} steps minus random", "fit, s", "M tokens/s scored", "FLOPs a token", "overhead at 410M",
    ]  # fmt: skip
    notes = [f"- {entry['name']}: {entry['note']}." for entry in document["contenders"] if entry["note"]]
    for entry in document["same"]:
        notes.append(
            f"- {entry['name']}: fits take their states from one reading of all candidates; against a fit by the "
            f"class itself ({entry['num']:,} labels) the largest difference is {entry['largest_difference']:.1e} "
            "standard deviations of the predictions."
        )
    notes.append(
        "- `+`: the sum of two predictions with the weight that ranks a held-out fifth of the labels best; it costs "
        "what both cost."
    )
    return [f"## At {main:,} labels", about, table(heads, rows), "\n".join(notes)]


def mean_of(entries: list[dict[str, Any]], key: str) -> float:
    """Mean over draws or seeds."""
    return float(np.mean([entry[key] for entry in entries]))


def curves(document: Document) -> list[str]:
    """Agreement by number of labels."""
    settings = document["settings"]
    titles = {"spearman": "Spearman", "within": "within domain", "precision": "precision of the top fifth"}
    about = "Means over draws; in brackets half the spread between the lowest and the highest."
    blocks = ["## By number of labels", about]
    for key, title in titles.items():
        rows = []
        for name in (contender["name"] for contender in installed(document) if contender["curve"]):
            cells = []
            for num in settings["numbers"]:
                values = [entry[key] for entry in fits_of(document, name, num)]
                spread = f" ({(max(values) - min(values)) / 2:.3f})" if len(values) > 1 else ""
                cells.append(f"{np.mean(values):.3f}{spread}" if values else "")
            rows.append([name, *cells])
        heads = ["influence model", *(f"{num:,}" for num in settings["numbers"])]
        blocks += [f"### {title[0].upper()}{title[1:]}", table(heads, rows)]
    return blocks


def gains(document: Document) -> list[str]:
    """Development losses minus those of random picks."""
    settings = document["settings"]
    if not document["gain"]:
        return ["## Realised gain", "Nothing was trained."]
    start = document["gain"][0]["start"]
    base = {on: np.nanmean(final_losses(document, RANDOM, "averaged", on)) for on in ("all", "completion")}
    about = (
        f"Development loss {start['all']:.4f} (all tokens) and {start['completion']:.4f} (last word) at the "
        f"checkpoint; after {settings['horizons'][-1]} steps on random picks {base['all']:.4f} and "
        f"{base['completion']:.4f} at averaged weights. Differences to random, paired by seed, < 0 is better."
    )
    columns = [(h, where, on) for h in settings["horizons"] for where, on in (
        ("averaged", "all"), ("live", "all"), ("averaged", "completion"))]  # fmt: skip
    words = {"all": "all tokens", "completion": "last word"}
    rows = []
    for name in (contender["name"] for contender in installed(document) if contender["gain"]):
        found = [entry["domains"] for entry in document["gain"] if entry["name"] == name]
        if found:
            mix = np.mean(found, axis=0)
            top = ", ".join(f"{settings['domain_names'][i]} {mix[i]:.0%}" for i in np.argsort(-mix)[:3])
            cells = [paired(document, name, RANDOM, where, on, h) for h, where, on in columns]
            ours = paired(document, name, DEFAULT, "averaged", "all") if name != DEFAULT else ""
            rows.append([name, *cells, ours, top])
    header = [f"{h} steps, {words[on]}, {where}" for h, where, on in columns]
    last = f"minus the default ({settings['horizons'][-1]} steps, all tokens, averaged)"
    losses = table(["influence model", *header, last, "most picked domains"], rows)
    return ["## Realised gain", about, losses, *on_reference(document)]


def on_reference(document: Document) -> list[str]:
    """Losses on the passages that influence was measured on, where they were read."""
    names = dict.fromkeys(entry["name"] for entry in document["reference"])
    losses = {name: by_seed(document, "reference", name, lambda entry: entry["all"]) for name in names}
    if RANDOM not in losses:
        return []
    base, rows = losses.pop(RANDOM), []
    for name, values in losses.items():
        difference = (values - base)[np.isfinite(values - base)]
        rows.append([name, interval(difference), paired(document, name, RANDOM, "averaged", "all")])
    about = (
        "The same trainings for some, read on the reference passages: what a label knows of those passages alone is "
        "no gain on others."
    )
    return [about, table(["influence model", "reference passages", "development passages"], rows)]


def default(document: Document) -> list[str]:
    """The rule that decides the default, applied."""
    costs = {entry["name"]: entry for entry in document["cost"]}
    blocks = [
        "## Which is the default",
        "The rule was written after the results were seen, twice over. "
        "Rule: of the influence models of the package that cost at most "
        f"{CHEAP:g} FLOPs a token, (1) those whose realised gain is not shown to be below the best one's (the paired "
        f"difference in loss has an interval that includes 0), (2) of these, those whose Spearman is within {NEAR:g} "
        "of the highest, (3) of these, the one with the fewest FLOPs, then with the shortest fit. The interval is "
        "over seeds at one checkpoint, with one slice, and not corrected for the number of comparisons.",
    ]
    entries = []
    for contender in installed(document):
        name = contender["name"]
        flops, seconds = (costs.get(name, {}).get(key) for key in ("flops", "fit_seconds"))
        losses = final_losses(document, name, "averaged", "all") if contender["gain"] else np.array([np.nan])
        if contender["ours"] and np.isfinite(losses).all() and seconds is not None and flops <= CHEAP:
            entries.append(
                (losses, flops, seconds, name, mean_of(fits_of(document, name, contender["main"]), "spearman"))
            )
    if not entries:
        return [*blocks, "Nothing to decide on yet."]
    entries.sort(key=lambda entry: entry[0].mean())
    best_losses = entries[0][0]
    rows, level = [], []
    for losses, flops, seconds, name, value in entries:
        mean, width = mean_interval(losses - best_losses)
        ties = losses is best_losses or bool(mean <= width)
        if ties:
            level.append((flops, seconds, name, value))
        difference = "the best" if losses is best_losses else f"{mean:+.4f} ± {width:.4f}"
        rows.append([name, difference, "yes" if ties else "no", f"{value:.3f}", f"{seconds:.2g}"])
    heads = ["influence model", "loss minus that of the best", "level with it", "Spearman", "fit, s"]
    highest = max(entry[3] for entry in level)
    chosen = min(entry for entry in level if entry[3] >= highest - NEAR)[2]
    return [
        *blocks,
        table(heads, rows),
        f"By the rule, one ranking from one checkpoint: **{chosen}**. A run is rounds that pool the labels of "
        "earlier ones, which no figure here shows; there `selection` trains with them (`ours` with token tables, "
        "and the change `token and document labels`), and that decides the library's default.",
    ]


def differences(document: Document) -> list[str]:
    """Statistics of the JSON that its arrays do not give."""
    truth, domain = (np.array(document["test"][name]) for name in ("influence", "domain"))
    found = []
    for entry in document["fit"]:
        again = judge(unpacked_ranks(entry["ranks"]), truth, domain)
        for key, value in again.items():
            if not np.allclose(value, entry[key], rtol=0, atol=_TOLERANCE):
                found.append(f"{entry['name']}, {entry['num']} labels, draw {entry['draw']}: {key} is {value}")
    return found
