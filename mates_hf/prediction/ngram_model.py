"""The default data influence model: additive n-gram tables over the training tokens.

Where it is used: between a probe and selection; `fit` takes its labels, `predict` ranks the pool. Trade-off: it sees
a token and the one before it, nothing longer. For that it needs no download and no GPU, is fitted in about a second,
reads the pool at memory speed, and says which n-grams raise and lower influence.

The room `ngram/` holds the parts, `judge` judges the fit. All tables are in units of `influence_per_token`;
`influence` is that times the labels' `step_size`. Shape suffix: N candidates.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mates_hf.data.arguments import check_fit, fitted_repr
from mates_hf.data.documents import document_codes
from mates_hf.data.pool import rows_to_predict
from mates_hf.data.rows import TokenRows, TokenSpans
from mates_hf.errors import MatesError
from mates_hf.flops import NGRAM_FIT_FLOPS, NGRAM_SCORE_FLOPS
from mates_hf.prediction import judge
from mates_hf.prediction.artifacts import damaged, read_artifact, told_text_only, write_artifact
from mates_hf.prediction.ngram.additive import Penalties, TokenDesign, calibration
from mates_hf.prediction.ngram.arguments import LabelKind, check_arguments, standardised_derivatives
from mates_hf.prediction.ngram.evidence import Passages, evidence_beside, log_odds, weighted_evidence
from mates_hf.prediction.ngram.explain import strongest_ngrams
from mates_hf.prediction.ngram.search import search_penalties
from mates_hf.prediction.ngram.tables import Statistics, Tables
from mates_hf.records import FitReport, FloatArray, InfluenceLabels

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)

_ARGUMENTS = ("num_buckets", "pool_decay", "seed", "labels")
_LATER = {"evidence_weight": 0.0, "text_only": False}  # arguments that older files do not name
_AUTO_KIND: LabelKind = "token"


class NgramInfluenceModel:
    """Predict a candidate's influence from shrunken effects of its tokens, the tokens before them and its bigrams.

    Args:
        num_buckets: hash buckets of the bigram table, a power of two; 4 bytes each in memory and on disk.
        pool_decay: weight of the previous round's token labels against this round's, compounding with age, in [0, 1];
            0 forgets earlier rounds. 0.9 was best over five rounds of 40 steps (benchmark `fidelity`). With document
            labels it only switches pooling on: earlier rounds weigh as the new labels' slope on their prediction.
        seed: Random seed of the held-out split and the folds.
        labels: what is fitted. `"token"`: the derivative at each token; `"document"`: each candidate's
            `influence_per_token`; `"both"`: token labels, then document labels on what is left over; `"auto"`:
            token labels where the probe measured derivatives, else document labels.
        evidence_weight: How much static evidence counts beside the labels in what is predicted, where a fit is given
            some: both in their standard deviations, and evidence times how well labels agree with it, or agreed in an
            earlier round (`ngram.evidence.evidence_beside`). At 0 effects shrink towards it and no more.
        text_only: Whether the text of rows is enough where they have other inputs, such as images, which are not read.

    Raises:
        ValueError: an argument outside its range.
    """

    __repr__ = fitted_repr
    runs_beside_training = True  # numpy and kernels on texts and labels: no model, no device, no random stream
    reads_spans = True  # `predict` scores rows in the buffers of others, without a copy

    def __init__(
        self,
        *,
        num_buckets: int = 2**20,
        pool_decay: float = 0.9,
        seed: int = 0,
        labels: LabelKind = "auto",
        evidence_weight: float = 1.0,
        text_only: bool = False,
    ) -> None:
        check_arguments(num_buckets, pool_decay, seed, labels, evidence_weight)
        self.num_buckets = num_buckets
        self.pool_decay = pool_decay
        self.seed = seed
        self.labels: LabelKind = labels
        self.evidence_weight = evidence_weight
        self.text_only = text_only
        self._tables: Tables | None = None  # float32, units of influence_per_token
        self._document: Tables | None = None  # float32, standardised: what document labels of later rounds build on
        self._statistics = Statistics.empty()
        self._intercept = 0.0
        self._step_size = 1.0
        self._penalties = Penalties()
        self._report: FitReport | None = None

    @property
    def report(self) -> FitReport:
        """Held-out agreement of the last fit, in the unit of `influence`.

        Raises:
            MatesError: the model is not fitted.
        """
        self._fitted()
        assert self._report is not None
        return self._report

    @property
    def vocab_size(self) -> int:
        """Ids of this and above were never seen and have no effect."""
        return len(self._fitted().token)

    def _fitted(self) -> Tables:
        if self._tables is None:
            raise MatesError("The influence model must be fitted first: call `fit(candidates, labels)`.")
        return self._tables

    def fit(
        self,
        candidates: Any,
        labels: InfluenceLabels,
        *,
        held_out_fraction: float = 0.2,
        groups: npt.NDArray[Any] | None = None,
        documents: npt.NDArray[Any] | None = None,
        previous: NgramInfluenceModel | None = None,
        seed: int | None = None,
        evidence: tuple[Tables, Tables] | None = None,
        evidence_weight: float | None = None,
    ) -> Self:
        """Fit on most candidates, report on the rest, then fit on all.

        Penalties and calibration come from folds within the fitted part, so the report has seen none of its labels.
        About a second for 2,000 candidates of 256 tokens, after compilation.

        Args:
            candidates: the candidate pool, or the rows the labels' `candidate_id` point into.
            labels: measured influence, > 0 helps.
            held_out_fraction: share of the candidates to report on, in (0, 1).
            groups: (N,) group of each label (domain, source), for the report only.
            documents: (N,) document of each label; split and bootstrap take whole ones. None: equal tokens are one.
            previous: the influence model of the round before, for its labels; not changed.
            seed: Random seed of the held-out split and the folds. Defaults to the constructor's seed.
            evidence: Static evidence (`ngram.evidence.log_odds`) that effects shrink towards, each part times the
                weight of at least 0 that the fitted labels give it. Used with token labels only.
            evidence_weight: How much it counts beside the labels. Defaults to the constructor's; a run whose pool has
                a `score_column` gives 0, because that column stands in its place.

        Returns:
            self, fitted.

        Raises:
            InfluenceError: labels are non-finite, all zero, all equal, or all of one document.
            ValueError: labels do not belong to the candidates, too few, or `previous` is of another kind.
        """
        started = time.perf_counter()
        check_fit(candidates, labels)
        seed = self.seed if seed is None else seed
        kind = self._kind_for(labels)
        labels, groups, documents = judge.usable_labels(labels, groups, documents, labels.num_tokens > 0)
        rows = judge.measured_rows(candidates, labels)
        documents = document_codes(rows) if documents is None else documents
        held_out = judge.split_held_out(len(labels), held_out_fraction, seed, documents)
        judge.tell_few(len(labels), int(held_out.sum()))

        per_token = labels.influence_per_token.astype(np.float64)
        centre, scale = judge.require_spread(per_token)
        derivatives = None if kind == "document" else standardised_derivatives(labels, scale)
        earlier, prior = self._earlier(previous, kind)
        standardised, offset, told = (per_token - centre) / scale, None, None
        fitted = ~held_out
        if evidence is not None and derivatives is not None:
            offset, told = weighted_evidence(evidence, rows.take(fitted), standardised[fitted])
        design = TokenDesign(
            rows, self.num_buckets, standardised, derivatives, earlier=earlier, prior=prior, document=kind != "token",
            offset=offset,
        )  # fmt: skip
        penalties = None
        if derivatives is not None:
            penalties = search_penalties(
                rows, self.num_buckets, standardised, derivatives, earlier, fitted, seed, offset
            )
        choice = design.choose(fitted, seed, penalties)
        beside, weight = None, None
        most = self.evidence_weight if evidence_weight is None else evidence_weight
        if evidence is not None and derivatives is not None and most:
            fits = standardised[fitted], choice.predicted[fitted]
            least = previous.report.evidence_weight if previous is not None and self.pool_decay else None
            found, weight = evidence_beside(evidence, rows.take(fitted), *fits, least or 0.0)
            beside = Tables.zeros(design.vocab_size, self.num_buckets).plus(found.resized(design.vocab_size), most)
            choice = dataclasses.replace(choice, predicted=choice.predicted + design.score(beside))
        token, document = design.solve(fitted, choice)
        score = design.score(Tables.sum_of(token, document, beside))
        slope = calibration(design.labels[fitted], choice.predicted[fitted], choice.fold[fitted])
        predicted = slope * (score - score[fitted].mean()) + design.labels[fitted].mean()
        unit = scale * labels.step_size
        report = judge.fit_report(
            unit * predicted[held_out] + centre * labels.step_size,
            labels.influence[held_out],
            groups=None if groups is None else groups[held_out],
            num_labels=int(fitted.sum()),
            seed=seed,
            label_std=float(labels.influence.std(dtype=np.float64)),
            num_tokens=labels.num_tokens[held_out],
            documents=documents[held_out],
            probe=labels.kind,
        )
        everyone = np.ones(len(labels), bool)
        token_part = np.where(held_out, design.score(token), choice.token_part)
        token, document = design.solve(everyone, dataclasses.replace(choice, token_part=token_part))
        both = Tables.sum_of(token, document, beside)
        slope = calibration(design.labels, np.where(held_out, score, choice.predicted), choice.fold)
        self._tables = both.scaled(slope * scale)
        self._document = None if document is None else document.scaled(1.0)
        self._intercept = centre - slope * scale * float(design.score(both).mean())
        self._statistics = design.statistics()
        self._step_size = float(labels.step_size)
        self._penalties = choice.penalties
        self._report = dataclasses.replace(
            report,
            seconds=time.perf_counter() - started,
            flops=NGRAM_FIT_FLOPS * float(labels.num_tokens.sum()),
            flops_per_token=NGRAM_SCORE_FLOPS,
            evidence=told,
            evidence_weight=weight,
        )
        logger.info(
            "Fitted an n-gram influence model on %d candidates (%d held out, %s labels) in %.1f s: Spearman %.3f.",
            len(labels), report.num_held_out, kind, self._report.seconds, report.spearman,
        )  # fmt: skip
        return self

    def count_evidence(self, reference: Passages, background: TokenRows) -> tuple[Tables, Tables]:
        """Log-odds of n-grams, the reference task against rows of the pool: what `fit` takes as `evidence`."""
        return log_odds(reference, background, self.num_buckets)

    def _kind_for(self, labels: InfluenceLabels) -> LabelKind:
        """What to fit on these labels."""
        if self.labels == "auto":
            return "document" if labels.token_derivatives is None else _AUTO_KIND
        if self.labels != "document" and labels.token_derivatives is None:
            raise ValueError(
                f"`labels={self.labels!r}` needs the derivative at each token, and the probe measured none. Use a "
                "probe that does (`DirectionalProbe`), or `labels='document'`."
            )
        return self.labels

    def _earlier(self, previous: NgramInfluenceModel | None, kind: LabelKind) -> tuple[Statistics, Tables | None]:
        """What earlier rounds contribute: decayed statistics, and the document tables to build on."""
        if previous is None or self.pool_decay == 0:
            return Statistics.empty(), None
        previous._fitted()
        if previous.num_buckets != self.num_buckets:
            raise ValueError(
                f"`previous` must have the same `num_buckets` ({self.num_buckets}), got {previous.num_buckets}."
            )
        found = previous._statistics
        if kind != "document" and not found.sums.any():
            found = Statistics.empty()  # fitted on document labels: counts without derivatives would count as zeros
        return found.times(np.float32(self.pool_decay)), previous._document

    def predict(self, dataset: Any) -> FloatArray:
        """Predicted `influence` of each row.

        Args:
            dataset: `TokenRows`, `TokenSpans`, a candidate pool, or a dataset with `input_ids` (and `labels`).

        Returns:
            (N,) float32, > 0 helps, higher is better, in the unit of the labels; the intercept where a row has no
            target. Labels of one step are nats/token of reference loss that a step on the row takes off. Of path
            labels (`DirectionalProbe(path_steps=...)`, the default of a run) and loss reductions only the order has a
            meaning.
        """
        return (self._score(dataset) * self._step_size).astype(np.float32)

    def predict_per_token(self, dataset: Any) -> FloatArray:
        """Predicted `influence_per_token` of each row, (N,) float32, > 0 helps; arguments as in `predict`."""
        return self._score(dataset).astype(np.float32)

    def _score(self, dataset: Any) -> npt.NDArray[np.float64]:
        rows = dataset if isinstance(dataset, TokenSpans) else rows_to_predict(dataset)
        return self._fitted().score(rows) + self._intercept

    def evaluate(
        self,
        candidates: Any,
        labels: InfluenceLabels,
        *,
        groups: npt.NDArray[Any] | None = None,
        documents: npt.NDArray[Any] | None = None,
        seed: int = 0,
    ) -> FitReport:
        """Compare predictions with labels of candidates the model was not fitted on.

        Args:
            candidates: the candidate pool, or the rows the labels' `candidate_id` point into.
            labels: fresh labels, of this round or a later one.
            groups: (N,) group of each label, or None.
            documents: (N,) document of each label, for the bootstrap; None: equal tokens are one.
            seed: Random seed of the bootstrap.

        Returns:
            The report, in the unit of `labels.influence`; `seconds` is the time this took.
        """
        rows = judge.measured_rows(candidates, labels)
        documents = document_codes(rows) if documents is None else documents
        return judge.fresh_report(
            lambda: self._score(rows), labels, self.report, groups=groups, documents=documents, seed=seed
        )

    def explain(self, k: int = 20, tokenizer: Any = None) -> dict[str, list[dict[str, Any]]]:
        """The n-grams that raise and lower predicted influence most.

        Args:
            k: entries in each list.
            tokenizer: decodes ids to text where given.

        Returns:
            `{"raises": [...], "lowers": [...]}`, strongest first. An entry has `kind` (`"token"`, `"previous"`: every
            target after this token, or `"bigram"`: on top of its two tokens), `ids`, `text` (None without tokenizer),
            `effect` (influence_per_token it adds at each such target, > 0 helps) and `count` (labelled targets,
            earlier rounds decayed). Of bigrams in one hash bucket the most frequent is named.
        """
        return strongest_ngrams(self._fitted(), self._statistics, k, tokenizer)

    def save_pretrained(self, path: str | os.PathLike[str]) -> None:
        """Write `config.json`, `model.safetensors` and `fit.json` into a directory.

        Args:
            path: created where missing. The bigrams of the labelled candidates are among what is written.
        """
        parts = {"tables": self._fitted(), "document": self._document, "statistics": self._statistics}
        tensors = {
            f"{name}.{field}": tensor
            for name, part in parts.items()
            if part is not None
            for field, tensor in vars(part).items()
        }
        settings = (
            {name: getattr(self, name) for name in _ARGUMENTS}
            | told_text_only(self)
            | {
                "evidence_weight": self.evidence_weight,
                "intercept": self._intercept,
                "step_size": self._step_size,
                "penalties": dataclasses.asdict(self._penalties),
            }
        )
        write_artifact(path, type(self).__name__, settings, tensors, self.report)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save_pretrained` wrote; predictions are equal to the bit. Nothing is unpickled.

        Args:
            path: the directory.

        Returns:
            The fitted model; later rounds can pool its statistics.

        Raises:
            FileNotFoundError: the directory holds no influence model.
            ValueError: it holds another kind of model, or was written in a newer format.
            MatesError: a file is damaged or was changed after it was written.
        """
        kept = (*_ARGUMENTS, "intercept", "step_size", "penalties")
        config, tensors, report = read_artifact(path, cls.__name__, kept)
        try:
            later = {name: config.get(name, default) for name, default in _LATER.items()}
            model = cls(**{name: config[name] for name in _ARGUMENTS}, **later)
            model._tables = Tables.read(tensors, "tables", model.num_buckets)
            if "document.token" in tensors:
                model._document = Tables.read(tensors, "document", model.num_buckets)
            model._statistics = Statistics.read(tensors, model.vocab_size)
            model._intercept, model._step_size = float(config["intercept"]), float(config["step_size"])
            if not np.isfinite([model._intercept, model._step_size]).all():
                raise ValueError("`intercept` and `step_size` must be finite, and are not")
            model._penalties = Penalties(**config["penalties"])
        except (TypeError, ValueError, OverflowError) as error:  # damaged along with its checksum
            raise damaged(path, error) from error
        model._report = report
        return model
