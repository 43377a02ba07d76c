"""`write_report`: the page of a run at will, and the page that a run writes itself after its rounds.

Where it is used: `mates-hf report` calls `write_report`; `session` keeps a `RunPage`, whose failure is said once and
never reaches the run. It is here and not in `reporting/` because it asks `verify`, the saved influence model and the
run's pool.

Trade-off: a run shows texts and pictures because it has the pool at hand, and keeps those it showed in small files
next to its rounds (`kept_page`), so that a later page has them without the pool. A page is written again only while
pages take less than a hundredth of the run's time, so after some rounds of a fast run there is none.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mates_hf.disk import read_json, written_whole
from mates_hf.errors import MatesError
from mates_hf.paths import expand_path
from mates_hf.prediction.artifacts import library_version
from mates_hf.reporting.report import IMAGES_FILE, PAGE_FILE, TEXTS_FILE, newest_selection, report_data, report_html
from mates_hf.round_files import ROUND_FILE, find_rounds
from mates_hf.training.kept_page import delete_shown, keep, read_kept, write_plainly
from mates_hf.training.verify import verify_run

if TYPE_CHECKING:
    from mates_hf.data.pool import CandidatePool
    from mates_hf.training.run import Run

logger = logging.getLogger(__name__)

_MAX_SHARE = 0.01  # of a run's time that its pages may take


def write_report(
    run_dir: str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    *,
    price: float | None = None,
    num_devices: int = 1,
    redact: bool = False,
    dataset: Any = None,
    verify: bool = True,
    rounds_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Write the report of a run: one HTML file that makes no request and runs no script.

    Args:
        run_dir: The run's `output_dir`, or the directory of its rounds; while it trains or afterwards.
        path: The file to write; None is `report.html` next to the rounds.
        price: Price of one device for an hour, in any currency; None leaves money out.
        num_devices: Number of devices that the run trained on; money counts each.
        redact: Whether all texts, pictures and labels of the pool are left out. Names of groups and columns stay.
        dataset: The pool that the run trained on, for texts: a `datasets.Dataset` with `input_ids`, or with `text`
            where the run's tokenizer is known. None takes the texts that the run itself showed last.
        verify: Whether every selection is recomputed from what the rounds left.
        rounds_dir: Where the run's rounds are, where that is neither `run_dir` nor its `_mates`.

    Returns:
        The file.

    Raises:
        FileNotFoundError: there is no finished round.
        ImportError: jinja2 is not installed.
        MatesError: a file is damaged.
        ValueError: `price` is not above 0, or `dataset` is not the run's pool.
    """
    data = read_report(
        run_dir, price=price, num_devices=num_devices, redact=redact, dataset=dataset, verify=verify,
        rounds_dir=rounds_dir,
    )  # fmt: skip
    return save_report(data, run_dir, path, rounds_dir=rounds_dir)


def save_report(
    data: Mapping[str, Any],
    run_dir: str | os.PathLike[str],
    path: str | os.PathLike[str] | None = None,
    *,
    rounds_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Write the page of what `read_report` returned.

    Args:
        data: The data.
        run_dir: The run.
        path: The file to write; None is `report.html` next to the rounds.
        rounds_dir: Where the run's rounds are, where that is neither `run_dir` nor its `_mates`.

    Returns:
        The file.

    Raises:
        ImportError: jinja2 is not installed.
    """
    target = _folder(run_dir, rounds_dir) / PAGE_FILE if path is None else expand_path(path)
    page = report_html(data)
    with written_whole(target) as file:
        file.write(page.encode())
    return target


def read_report(
    run_dir: str | os.PathLike[str],
    *,
    price: float | None = None,
    num_devices: int = 1,
    redact: bool = False,
    dataset: Any = None,
    verify: bool = True,
    rounds_dir: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """What `write_report` writes, as plain JSON values.

    Args:
        run_dir: The run's `output_dir`, or the directory of its rounds.
        price: Price of one device for an hour, in any currency.
        num_devices: Number of devices that the run trained on.
        redact: Whether all texts, pictures and labels of the pool are left out.
        dataset: The pool that the run trained on, or None.
        verify: Whether every selection is recomputed.
        rounds_dir: Where the run's rounds are, where that is neither `run_dir` nor its `_mates`.

    Returns:
        The data.

    Raises:
        FileNotFoundError: there is no finished round.
        MatesError: a file is damaged.
        ValueError: `price` is not above 0, or `dataset` is not the run's pool.
    """
    folder = _folder(run_dir, rounds_dir)
    rounds = find_rounds(folder)[1]
    texts, missing = (None, []) if redact or not rounds else _texts_on_disk(folder, rounds, dataset)
    media = None if redact else _media_on_disk(folder, rounds)
    missing = missing if media is None else [line for line in missing if not line.startswith(_LEFT_OUT)]
    found = verify_run(folder).to_dict() if verify and rounds else None
    return report_data(
        run_dir, rounds_dir=rounds_dir, price=price, num_devices=num_devices, redact=redact, verify=found, texts=texts,
        media=media, missing=missing, version=library_version(),
    )  # fmt: skip


def _folder(run_dir: Any, rounds_dir: Any) -> Path:
    return find_rounds(expand_path(run_dir if rounds_dir is None else rounds_dir))[0]


def _texts_on_disk(folder: Path, rounds: Mapping[int, Path], dataset: Any) -> tuple[dict[str, Any] | None, list[str]]:
    """Texts of the newest round that selected from a dataset or from what the run kept; what is missing of them."""
    from mates_hf.reporting.page.texts import (
        example_texts,
        ngram_texts,
    )  # they need numba, a page without texts does not

    newest = newest_selection(rounds)
    if newest is None:
        return None, ["No round keeps rows whose texts could be shown."]
    number, path, info = newest
    inputs = str((info.get("pool") or {}).get("inputs") or "")
    if inputs and dataset is not None:
        raise ValueError(
            f"`dataset` must be left out: the rows of this run have {inputs}, which only the run itself can show. "
            '`MatesConfig(round_page="images")` has it keep small pictures of the rows on its page.'
        )
    if dataset is None:
        kept = read_kept(folder / TEXTS_FILE)
        if kept is not None and (kept["round"], kept["order_sha256"]) == (number, info.get("order_sha256")):
            return kept, [_not_shown(inputs.split(", "))] if inputs else []
    if inputs:
        return None, [_not_shown(inputs.split(", "))]
    model, tokenizer, unit, missing = _scorer(rounds, number)
    texts: dict[str, Any] = {"round": number, "order_sha256": info.get("order_sha256"), "examples": {}, "ngrams": None}
    if model is not None:
        texts["ngrams"] = ngram_texts(model, tokenizer, float(info.get("step_size") or 1.0))
    if dataset is None:
        missing.append(
            "Texts are not shown: rounds keep row numbers and no texts. Give the pool: `mates-hf report RUN --dataset "
            "PATH`, or `write_report(run, dataset=pool)`."
        )
        return texts, missing
    pool = _opened(dataset, tokenizer)
    _require_pool(pool, info, missing)
    texts["examples"] = example_texts(path, dict(info), pool, tokenizer, model, unit)
    return texts, missing


def _media_on_disk(folder: Path, rounds: Mapping[int, Path]) -> dict[str, Any] | None:
    """Pictures of the newest round that selected, where the run kept them."""
    newest = newest_selection(rounds)
    kept = None if newest is None else read_kept(folder / IMAGES_FILE)
    if newest is None or kept is None:
        return None
    return kept if (kept["round"], kept["order_sha256"]) == (newest[0], newest[2].get("order_sha256")) else None


def _scorer(rounds: Mapping[int, Path], number: int) -> tuple[Any, Any, float, list[str]]:
    """The influence model by which a round chose, its tokenizer, the unit of its predictions, and what is missing."""
    from mates_hf.selection.saved import read_selector

    info = read_json(rounds[number] / ROUND_FILE)
    made = number
    if (info.get("guard") or {}).get("decision") != "select":
        earlier = [n for n in rounds if n < number and (_decision(rounds[n]) == "select")]
        made = max(earlier, default=number)
    try:
        saved = read_selector(rounds[made] / "influence_model")
    except (OSError, ValueError, MatesError, ImportError) as error:
        return None, None, 1.0, [f"N-grams and colours are missing: {error}"]
    own = float(read_json(rounds[made] / ROUND_FILE).get("step_size") or 1.0)
    missing = [] if saved.tokenizer is not None else ["The run kept no tokenizer, so token ids stand for tokens."]
    return saved.model, saved.tokenizer, float(info.get("step_size") or 1.0) / own, missing


def _decision(path: Path) -> Any:
    return (read_json(path / ROUND_FILE).get("guard") or {}).get("decision")


class _Tokenised:
    """Rows of a dataset of texts as the run's tokenizer reads them."""

    def __init__(self, dataset: Any, tokenizer: Any) -> None:
        self.dataset, self.tokenizer = dataset, tokenizer

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"input_ids": self.tokenizer(self.dataset[int(i)]["text"] or "", truncation=True)["input_ids"]}


def _opened(dataset: Any, tokenizer: Any) -> CandidatePool:
    """The dataset as a pool."""
    from mates_hf.data.pool import CandidatePool

    names = getattr(dataset, "column_names", None) or ()
    if "input_ids" not in names and "text" in names:
        if tokenizer is None:
            raise ValueError("`dataset` must have `input_ids`, for the run kept no tokenizer; it has `text`.")
        return CandidatePool(_Tokenised(dataset, tokenizer))
    return CandidatePool(dataset)


def _require_pool(pool: CandidatePool, info: Mapping[str, Any], missing: list[str]) -> None:
    """Raise where a dataset cannot be the run's pool; note where it may be another."""
    recorded = info.get("pool") or {}
    if recorded.get("num_rows") != len(pool):
        raise ValueError(
            f"`dataset` must be the pool that the run trained on, with {recorded.get('num_rows')} rows, got "
            f"{len(pool)} rows."
        )
    if recorded.get("rows_sha256") != pool.identity()["rows_sha256"]:
        missing.append(
            "The tokens of this dataset are not those that the run's pool recorded: texts may belong to other rows."
        )


class RunPage:
    """The page that a run writes itself, in its main process; what fails in it is said once and harms nothing.

    Args:
        run: The run's state.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._began = time.perf_counter()
        self._spent = 0.0
        shown = {"images": (), "texts": (IMAGES_FILE,)}.get(run.config.round_page, (TEXTS_FILE, IMAGES_FILE))
        if run.processes.is_main and shown:
            with contextlib.suppress(OSError):
                delete_shown(run.rounds_dir, shown)
        self._failed = run.config.round_page == "none"
        self._is_old = False

    def update(self, *, last: bool = False) -> None:
        """Write the page again after a round, where pages do not take too much of the run's time.

        Args:
            last: Whether the run ends: a page that is behind is then written in any case.
        """
        if self._failed or not self._run.processes.is_main or (last and not self._is_old):
            return
        began = time.perf_counter()
        self._is_old = self._spent > _MAX_SHARE * (began - self._began)
        if self._is_old and not last:
            return
        try:
            self._write()
        except Exception as error:  # a page is never worth a run: no disk, no jinja2, a tokenizer of one's own
            self._failed = True
            logger.warning(
                "The run goes on without its report (`%s`), which could not be written: %s", PAGE_FILE, error
            )
        self._spent += time.perf_counter() - began

    def _write(self) -> None:
        run, folder = self._run, self._run.rounds_dir
        newest = newest_selection(find_rounds(folder)[1])
        page = run.config.round_page
        redact = page == "redacted"
        beyond = run.pool.beyond_text
        texts = self._texts(*newest) if newest is not None and not redact and run.pool.has_text else None
        media = self._media(*newest) if newest is not None and page == "images" and beyond else None
        keep(folder / TEXTS_FILE, texts)
        keep(folder / IMAGES_FILE, media)
        missing = [] if texts is not None or media is not None else ["No round keeps rows that could be shown."]
        if beyond and page != "images":
            missing = [_not_shown(beyond)]
        data = report_data(
            folder, texts=texts, media=media, missing=missing, redact=redact, version=library_version()
        )  # fmt: skip
        write_plainly(folder / PAGE_FILE, report_html(data).encode())

    def _media(self, number: int, path: Path, info: Mapping[str, Any]) -> dict[str, Any]:
        """Pictures, lengths of sounds and labels of the rows of a round that are shown."""
        from mates_hf.reporting.page.media import example_media

        names = getattr(getattr(self._run.model, "config", None), "id2label", None)
        found = example_media(path, dict(info), self._run.pool, self._run.tokenizer, names)
        return {"round": number, "order_sha256": info["order_sha256"], **found}

    def _texts(self, number: int, path: Path, info: Mapping[str, Any]) -> dict[str, Any]:
        """Texts of a round with the model that chose it, which the run still has."""
        from mates_hf.reporting.page.texts import example_texts, ngram_texts

        run, model = self._run, self._run.trusted_model
        selected = (info.get("guard") or {}).get("decision") == "select"
        unit = 1.0 if selected else float(info["step_size"]) / run.trusted_step_size
        return {
            "round": number,
            "order_sha256": info["order_sha256"],
            "examples": example_texts(path, dict(info), run.pool, run.tokenizer, model, unit),
            "ngrams": ngram_texts(model, run.tokenizer, float(info["step_size"])),
        }


_LEFT_OUT = "Rows have "


def _not_shown(inputs: Sequence[str]) -> str:
    """What a page says of rows that are more than text."""
    return (
        f"{_LEFT_OUT}`{'`, `'.join(inputs)}`, which this page does not show. "
        '`MatesConfig(round_page="images")` has a run show small pictures.'
    )
