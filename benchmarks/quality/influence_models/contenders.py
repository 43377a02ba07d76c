"""The contenders of `influence_models`: everything that can rank candidates, behind one interface.

Each contender is fitted on a draw of labelled candidates (or on none, where it needs no labels) and gives a function
from rows to values, higher is better. Trade-off: what does not depend on the fit (states of a frozen encoder, the
losses of the probe) is taken from the bench by `rank`, so that only `fit` and the scorer it returns are timed.

Contenders that read text decode the rows first; what they cost includes that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas

from benchmarks.lab import rivals
from benchmarks.lab.models import TOKENS_PER_BATCH, row_losses
from benchmarks.lab.statistics import Ids
from benchmarks.quality.influence_models.setup import Labelled, Values
from benchmarks.quality.influence_models.trigrams import NgramRidge, TrigramTables
from mates_hf.data.rows import TokenRows
from mates_hf.data.texts import decode_rows
from mates_hf.disk import write_array
from mates_hf.evaluation.agreement import rank_correlation
from mates_hf.prediction.encoder.folding import FoldingEncoder
from mates_hf.prediction.hidden_states import HiddenStateInfluenceModel
from mates_hf.prediction.judge import split_held_out
from mates_hf.prediction.ngram_model import NgramInfluenceModel
from mates_hf.prediction.ridge import FitTarget, fit_ridge

Scorer = Callable[[TokenRows], Values]

WEIGHTS = tuple(np.linspace(0, 1, 21))  # of the second of two predictions
PIECE = 64  # tokens of a piece of a reference passage, as long as a candidate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contender(rivals.NeedsPackage):
    """A way to rank candidates."""

    name: str  # in the tables
    # (bench, number of labels, draw) to a scorer; None where nothing is to be timed
    fit: Callable[[Labelled, int, int], Scorer] | None = None
    # (bench, number of labels, draw) to (E,) values of the evaluated candidates; None fits and scores
    rank: Callable[[Labelled, int, int], Values] | None = None
    labelled: bool = True  # whether it is fitted on labels
    flops: Callable[[Labelled], float] = lambda bench: 0.0  # (bench) to FLOPs a scored token
    package: str | None = None  # what must be installed
    numbers: tuple[int, ...] | None = None  # of labels that it is fitted on; None is all
    draws: int | None = None  # of the labels at most
    gain: bool = True  # whether it is trained on what it picks
    slow: bool = False  # a fit takes minutes, so it is timed where it is fitted
    curve: bool = True  # whether it has a row by number of labels
    ours: bool = False  # whether it is an influence model of the package
    note: str = ""  # what a reader must know

    def label_numbers(self, bench: Labelled) -> tuple[int, ...]:
        """Numbers of labels to fit on; 0 where it needs none."""
        if not self.labelled:
            return (0,)
        return tuple(n for n in bench.sizes.numbers if self.numbers is None or n in self.numbers)

    def main(self, bench: Labelled) -> int:
        """The number of labels of the main table: the run's, or the largest it is fitted on; 0 where it needs none."""
        numbers = self.label_numbers(bench)
        return bench.sizes.main if bench.sizes.main in numbers else numbers[-1]


# --- without a fit ---


def _pieces(bench: Labelled) -> TokenRows:
    return rivals.pieces_of(bench.lab.reference["all"].rows, PIECE)


def _domain_means(bench: Labelled, num: int, draw: int) -> Values:
    """The mean label of each domain; the mean of all where a domain has none."""
    chosen = bench.draw(num, draw)
    influence = pandas.Series(bench.labels.influence[chosen].astype(np.float64))
    means = influence.groupby(bench.domain[chosen]).mean()
    return means.reindex(bench.domain[bench.evaluated], fill_value=influence.mean()).to_numpy()


def _own_loss(bench: Labelled, num: int, draw: int) -> Scorer:
    model = averaged_model(bench)
    return lambda rows: -row_losses(model, rows)


def _characters(bench: Labelled, num: int, draw: int) -> Scorer:
    return lambda rows: np.array([float(len(text)) for text in rivals.texts_of(rows, bench.lab.tokenizer)])


def _static(rank: str) -> Callable[[Labelled, int, int], Scorer]:
    """A filter of the reference passages against the candidates to fit on: all of them, or as many as passages."""

    def fit(bench: Labelled, num: int, draw: int) -> Scorer:
        against = bench.rows.take(np.arange(bench.sizes.labels))
        return rivals.text_ranking(rank, "common", bench.lab.tokenizer, against, _pieces(bench), draw)

    return fit


# --- fitted on labels ---


def _fitted(make: Callable[..., Any]) -> Callable[[Labelled, int, int], Scorer]:
    """Fit an influence model on a draw of labels."""
    return lambda bench, num, draw: _predictor(make, bench, bench.draw(num, draw), draw)


def _predictor(make: Callable[..., Any], bench: Labelled, fitted: Ids, draw: int) -> Scorer:
    """The predictions of an influence model that is fitted on candidates at these positions, as a user would."""
    model = make(bench, draw, len(fitted)).fit(bench.rows.take(fitted), bench.labels_of(fitted))
    return model.predict  # type: ignore[no-any-return]


def _tables(labels: Any, num_buckets: int = 2**20) -> Callable[[Labelled, int, int], Scorer]:
    return _fitted(lambda bench, draw, num: NgramInfluenceModel(labels=labels, num_buckets=num_buckets, seed=draw))


def _default(bench: Labelled, draw: int, num: int) -> NgramInfluenceModel:
    return NgramInfluenceModel(labels="token", seed=draw)


def averaged_model(bench: Labelled) -> Any:
    """The model that trains, at the weights that were probed."""
    point = bench.point()
    with point.weights(averaged=True):
        state = {name: value.clone() for name, value in point.model.state_dict().items()}
    point.model.load_state_dict(state)
    return point.model


def _hidden(bench: Labelled, draw: int, num: int) -> HiddenStateInfluenceModel:
    return HiddenStateInfluenceModel(averaged_model(bench), tokens_per_batch=TOKENS_PER_BATCH, seed=draw)


def _encoder(settings: Callable[[int], dict[str, Any]]) -> Callable[[Labelled, int, int], Scorer]:
    return _fitted(lambda bench, draw, num: rivals.encoder_model(bench.lab.tokenizer, draw, **settings(num)))


def encoder_states(bench: Labelled, encoder: FoldingEncoder, rows: TokenRows) -> np.ndarray:
    """(N, D) float32 pooled states of rows; nan where a row has no text."""
    return rivals.states_of(encoder, decode_rows(rows, bench.lab.tokenizer))


def kept_states(bench: Labelled) -> np.ndarray:
    """(P, D) float32 states of all candidates, read by the first fit that needs them and kept for all others."""
    path = bench.paths.work / "states.npy"
    if not path.exists():
        write_array(path, encoder_states(bench, rivals.folding_encoder(), bench.rows))
    return np.load(path)


Part = Callable[[Labelled, Ids, Ids, int], Values]


def _frozen_part(bench: Labelled, fitted: Ids, asked: Ids, draw: int) -> Values:
    """What `EncoderInfluenceModel(head_only=True)` predicts, from states that are read once for all fits."""
    labels, states = bench.labels_of(fitted), kept_states(bench)
    found = np.isfinite(states[:, 0])
    target = FitTarget.of(labels, found[fitted], groups=None, held_out_fraction=0.1, seed=draw)
    line = fit_ridge(states[fitted[found[fitted]]], target.values).in_units_of(target)
    found, states = found[asked], states[asked]
    return line.step_size * line.per_token(line.z_scores(states[found]), found)


def _part(make: Callable[..., Any]) -> Part:
    return lambda bench, fitted, asked, draw: _predictor(make, bench, fitted, draw)(bench.rows.take(asked))


def _frozen_rank(bench: Labelled, num: int, draw: int) -> Values:
    return _frozen_part(bench, bench.draw(num, draw), bench.evaluated, draw)


def _sum(first: Part, second: Part) -> Callable[[Labelled, int, int], Values]:
    """Two predictions with the weight that ranks a held-out fifth of the labels best, then both fitted on all."""

    def rank(bench: Labelled, num: int, draw: int) -> Values:
        chosen = bench.draw(num, draw)
        held_out = split_held_out(num, 0.2, draw)
        a, b = (part(bench, chosen[~held_out], chosen[held_out], draw) for part in (first, second))
        truth = bench.labels.influence[chosen[held_out]]
        weight = max(WEIGHTS, key=lambda weight: rank_correlation((1 - weight) * a + weight * b, truth))
        a, b = (part(bench, chosen, bench.evaluated, draw) for part in (first, second))
        return (1 - weight) * a + weight * b

    return rank


def _similarity_rank(bench: Labelled, num: int, draw: int) -> Values:
    reference = rivals.mean_direction(encoder_states(bench, rivals.folding_encoder(), _pieces(bench)))
    return rivals.nearest(kept_states(bench)[bench.evaluated], reference)


def _scored(fit: Callable[[Labelled, int, int], Scorer]) -> Callable[[Labelled, int, int], Values]:
    return lambda bench, num, draw: fit(bench, num, draw)(bench.rows.take(bench.evaluated))


def _model_flops(bench: Labelled, head: bool = True) -> float:
    """2 × parameters that multiply: all of a tied model with its head, the blocks alone without."""
    model = bench.point().model
    total = sum(p.numel() for p in model.parameters())
    return 2.0 * (total if head else total - model.get_input_embeddings().weight.numel())


def encoder_flops(bench: Labelled) -> float:
    """What the encoder takes to read what a token of the training tokenizer is decoded to."""
    rows = bench.rows.take(bench.evaluated[:500])
    return rivals.encoder_flops(decode_rows(rows, bench.lab.tokenizer)) / len(rows.values)


def contenders(sizes: Any) -> Sequence[Contender]:
    """All rows of the table, in its order."""
    few = tuple(n for n in sizes.numbers if n <= 1_000)
    ridge = {
        order: _fitted(lambda bench, draw, num, order=order: NgramRidge(order=order, seed=draw)) for order in (1, 2, 3)
    }
    token, hidden = _tables("token"), _fitted(_hidden)
    minilm = rivals.MINILM
    return (
        Contender(name="oracle: the labels themselves", labelled=False,
                  rank=lambda bench, num, draw: bench.labels.influence[bench.evaluated]),
        Contender(name="constant", labelled=False, gain=False, rank=lambda bench, num, draw: np.zeros(
            len(bench.evaluated)), note="its realised gain is that of random"),
        Contender(name="domain mean (told the domain)", rank=_domain_means),
        Contender(name="own loss, low first", labelled=False, fit=_own_loss, flops=_model_flops,
                  rank=lambda bench, num, draw: -bench.labels.loss[bench.evaluated]),
        Contender(name="length in characters, long first", labelled=False, fit=_characters,
                  note="all candidates have 64 tokens"),
        Contender(name="DSIR", labelled=False, fit=_static("DSIR"), package="data_selection", flops=lambda bench: 2.0),
        Contender(name="fastText", labelled=False, fit=_static("fastText"), package="fasttext", draws=3,
                  flops=lambda bench: 2.0 * rivals.FASTTEXT["dim"], note="draws differ in the candidates against the "
                  "reference"),
        Contender(name="similarity to the reference, frozen encoder", labelled=False, package=minilm,
                  fit=_static("similarity"), rank=_similarity_rank, flops=encoder_flops),
        Contender(name="n-gram ridge, 1", fit=ridge[1], flops=lambda bench: 2.0, gain=False),
        Contender(name="n-gram ridge, 1 and 2", fit=ridge[2], flops=lambda bench: 4.0, gain=False),
        Contender(name="n-gram ridge, 1 to 3", fit=ridge[3], flops=lambda bench: 6.0),
        Contender(name="document tables", ours=True, fit=_tables("document"), flops=lambda bench: 3.0),
        Contender(name="token tables (default)", ours=True, fit=token, flops=lambda bench: 3.0),
        *(Contender(name=f"token tables, 2^{bits} buckets", fit=_tables("token", 2**bits), gain=False,
                    flops=lambda bench: 3.0) for bits in (8, 12, 16)),
        Contender(name="token tables and trigrams", flops=lambda bench: 4.0,
                  fit=_fitted(lambda bench, draw, num: TrigramTables(vocab_size=bench.lab.vocab_size, seed=draw))),
        Contender(name="token and document tables", ours=True, fit=_tables("both"), flops=lambda bench: 3.0),
        Contender(name="hidden-state ridge", ours=True, fit=hidden,
                  flops=lambda bench: _model_flops(bench, head=False)),
        Contender(name="frozen encoder, ridge", ours=True, package=minilm, rank=_frozen_rank, flops=encoder_flops,
                  fit=_encoder(lambda num: {"head_only": True})),
        Contender(name="fine-tuned encoder", ours=True, package=minilm, flops=encoder_flops, numbers=few, draws=1,
                  slow=True, fit=_encoder(lambda num: {"num_epochs": 4 if num >= 1_000 else 5}),
                  note="the paper's settings (learning rate 5e-5, batch 32, 5 epochs); for budget 1,000 labels at "
                  "most, there 4 epochs, and one draw"),
        Contender(name="token tables + hidden-state ridge", rank=_sum(_part(_default), _part(_hidden)),
                  flops=lambda bench: _model_flops(bench, head=False)),
        Contender(name="token tables + frozen encoder", package=minilm, rank=_sum(_part(_default), _frozen_part),
                  flops=encoder_flops),
        Contender(name="token tables, fewest labels", rank=_scored(token), numbers=sizes.numbers[:1], curve=False),
        Contender(name="token tables, all labels", rank=_scored(token), numbers=sizes.numbers[-1:], curve=False),
        Contender(name="frozen encoder, all labels", package=minilm, rank=_frozen_rank, numbers=sizes.numbers[-1:],
                  curve=False),
    )  # fmt: skip
