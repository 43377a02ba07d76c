"""Images and sounds through an encoder of their own, which does not train: features that hold at any weights.

Where it is used: `feature_model` with an encoder as `features`. What it predicts needs neither the model that trains
nor a label, so that a `MatesSelector` can map and filter datasets with it.

Trade-off: it is blind to labels, of which influence depends most where some are wrong. Sounds are run one at a time,
so that none is padded and a prediction is that of the sound alone.

Shape suffixes: N candidates, B rows of a batch, D width of a state.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from mates_hf.data.documents import require_column
from mates_hf.data.media_column import MediaRows
from mates_hf.data.pool import open_candidates
from mates_hf.engine.digest import live_digest
from mates_hf.engine.model_traits import hub_name, named_output
from mates_hf.flops import forward_flops
from mates_hf.influence.probe import count_multiplied_parameters
from mates_hf.prediction.features.rows import seconds_of_second
from mates_hf.prediction.pooling import left_as_found
from mates_hf.prediction.ridge import FitTarget, FloatVector, StateLine, fit_ridge, require_same_width
from mates_hf.records import InfluenceLabels

_BATCH = 16  # images in one pass
_COLUMN = "image"
_TIMED_ROWS = 32


@dataclasses.dataclass(frozen=True)
class MediaReader:
    """An encoder with its processor, and the column that it reads.

    Attributes:
        encoder: A model of transformers, in eval mode.
        processor: Its image processor or feature extractor, or a processor that has one.
        column: The pool's column of images or sounds.
        name: Folder or repository that it can be loaded from again; None where it must be given.
        progress: Whether to show progress bars.
    """

    encoder: nn.Module
    processor: Any
    column: str
    name: str | None
    progress: bool = False

    @classmethod
    def of(cls, features: Any, processor: Any, column: str | None, *, progress: bool) -> MediaReader:
        """Load or take an encoder.

        Args:
            features: A model of transformers, or the folder or repository of one.
            processor: Its processor; None loads the one next to a folder's or repository's model.
            column: The pool's column; None is `image` or, with a feature extractor, `audio`.
            progress: Whether to show progress bars.

        Returns:
            The reader.

        Raises:
            ValueError: there is no processor.
            OSError: there is no such model.
        """
        name = str(features) if isinstance(features, (str, Path)) else None
        if name is not None:
            from transformers import AutoModel

            features = AutoModel.from_pretrained(name, trust_remote_code=False, use_safetensors=True)
            processor = _load_processor(name) if processor is None else processor
        elif "/" in hub_name(features):
            name = hub_name(features)
        sounds = getattr(processor, "image_processor", None) is None and _is_for_sound(processor)
        processor = getattr(processor, "image_processor", None) or getattr(processor, "feature_extractor", processor)
        if not callable(processor):
            raise ValueError(
                "`processor` must be the encoder's image processor or feature extractor, got "
                f"{type(processor).__name__}. Pass `AutoImageProcessor.from_pretrained(name)`."
            )
        return cls(features.eval(), processor, column or ("audio" if sounds else _COLUMN), name, progress)

    def digest(self) -> str:
        """Digest of the encoder's weights."""
        return live_digest(self.encoder)

    def rows(self, candidates: Any, labels: InfluenceLabels | None = None) -> MediaRows:
        """Candidates of any accepted kind, or those of labels in their order.

        Args:
            candidates: `MediaRows`, rows of a run, a candidate pool, or a dataset with the column.
            labels: Measured influence; None takes all candidates.

        Returns:
            Their images or sounds.

        Raises:
            ValueError: the dataset has no such column, or lacks a labelled row.
        """
        if isinstance(candidates, MediaRows):
            return candidates
        dataset, ids = getattr(candidates, "dataset", None), getattr(candidates, "ids", None)
        num_targets = None if labels is None else labels.num_tokens
        if dataset is None or ids is None:
            pool, _ = open_candidates(_AnyRows(candidates) if dataset is None else candidates)
            dataset, ids = pool.dataset, pool.candidate_ids
        elif labels is None:
            num_targets = candidates.num_targets
        if labels is not None:
            ids = labels.candidate_id
        require_column(dataset, self.column, "column")
        if len(ids) and int(np.max(ids)) >= len(dataset):
            raise ValueError(
                f"`candidates` must be those that were measured, got {len(dataset)} rows for labels of rows up to "
                f"{int(np.max(ids))}. Pass the pool that was probed."
            )
        return MediaRows.of([dataset[int(i)][self.column] for i in ids], num_targets)

    def fit(self, rows: MediaRows, target: FitTarget, earlier: Any) -> tuple[FloatVector, StateLine, float]:
        """Run candidates, fit without those held out and predict these, then fit on all.

        Args:
            rows: N candidates.
            target: Their labels.
            earlier: An earlier round's line to build on, or None.

        Returns:
            z-scored predictions of the held-out candidates, the line in the labels' unit, and FLOPs.
        """
        states = self.states(rows)
        known = None if earlier is None else require_same_width(earlier, states.shape[1])
        part = fit_ridge(states[~target.held_out], target.values[~target.held_out], known)
        held_out = part.z_scores(states[target.held_out])
        line = fit_ridge(states, target.values, known).in_units_of(target)
        return held_out, line, forward_flops(count_multiplied_parameters(self.encoder), len(rows))

    def z_scores(self, rows: MediaRows, line: StateLine) -> FloatVector:
        """(N,) float64 z-scored predictions."""
        states = self.states(rows)
        return require_same_width(line, states.shape[1]).z_scores(states)

    def seconds(self, rows: Any, num: int) -> float:
        """Estimate how long `num` candidates take, by running a few."""
        some = self.rows(rows)
        some = some.take(np.arange(min(_TIMED_ROWS, len(some))))
        return seconds_of_second(lambda: self.states(some)) * num / max(1, len(some))

    def states(self, rows: MediaRows) -> npt.NDArray[np.float32]:
        """(N, D) float32 pooled states; random streams are left as found."""
        found: list[npt.NDArray[np.float32]] = []
        sounds = _is_for_sound(self.processor)
        size = 1 if sounds else _BATCH
        with left_as_found(self.encoder, 0), torch.no_grad():
            for start in tqdm(range(0, len(rows), size), desc="encode", disable=not self.progress):
                values = rows.values[start : start + size]
                inputs = self._sounds(values) if sounds else self._images(values)
                found.append(self._pooled(inputs).float().cpu().numpy())
        return np.concatenate(found) if found else np.zeros((0, 0), np.float32)

    def _images(self, values: list[Any]) -> Any:
        channels = getattr(getattr(self.encoder, "config", None), "num_channels", 3)
        return self.processor(images=[_image(value, channels) for value in values], return_tensors="pt")

    def _sounds(self, values: list[Any]) -> Any:
        rate = int(self.processor.sampling_rate)
        return self.processor([_sound(value, rate) for value in values], sampling_rate=rate, return_tensors="pt")

    def _pooled(self, inputs: Any) -> Tensor:
        """(B, D) what the encoder makes of a batch: its own pooled output, else the mean of its last states."""
        encoder: Any = self.encoder
        if getattr(getattr(encoder, "config", None), "is_encoder_decoder", False):
            encoder = encoder.get_encoder()
        device = next(self.encoder.parameters()).device
        given = {name: value.to(device) for name, value in inputs.items() if isinstance(value, Tensor)}
        if hasattr(encoder, "vision_model") and "pixel_values" in given:  # of images and texts
            encoder = encoder.vision_model
        output = encoder(**given)
        pooled = getattr(output, "pooler_output", None)
        if pooled is None:
            pooled = named_output(output, "last_hidden_state")
            pooled = pooled.flatten(2).mean(2) if pooled.dim() == 4 else pooled.mean(1)
        states: Tensor = pooled.reshape(len(pooled), -1)
        return states


class _AnyRows:
    """A map-style dataset as a pool takes it, whatever columns it has."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Any:
        return self._rows[i]


def _load_processor(name: str) -> Any:
    from transformers import AutoFeatureExtractor, AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError):
        return AutoFeatureExtractor.from_pretrained(name, trust_remote_code=False)


def _is_for_sound(processor: Any) -> bool:
    extractor = getattr(processor, "feature_extractor", processor)
    return getattr(extractor, "sampling_rate", None) is not None


def _image(value: Any, channels: int) -> Any:
    """A value as the processor takes it; what is stored encoded is decoded.

    Raises:
        TypeError: it is no image.
    """
    from PIL import Image

    if isinstance(value, Mapping):
        value = value.get("bytes") if value.get("bytes") is not None else value.get("path")
    if isinstance(value, (bytes, bytearray)):
        value = Image.open(io.BytesIO(bytes(value)))
    elif isinstance(value, (str, Path)):
        value = Image.open(value)
    if isinstance(value, Image.Image):
        return value.convert("L" if channels == 1 else "RGB")
    array = np.asarray(value)
    if array.dtype.kind not in "iuf" or array.ndim not in (2, 3):
        raise TypeError(
            f"`column` must hold images (files, bytes, PIL images or arrays), got {type(value).__name__}. Pass the "
            "one that does as `column=`."
        )
    if array.ndim == 2:
        return Image.fromarray(array.astype(np.uint8)).convert("L" if channels == 1 else "RGB")
    return array


def _sound(value: Any, rate: int) -> npt.NDArray[np.float32]:
    """A value as (length,) float32 numbers at a sampling rate.

    Raises:
        TypeError: it is no decoded sound.
        ValueError: it has another sampling rate.
    """
    if hasattr(value, "get_all_samples"):  # `datasets` decodes when asked
        samples = value.get_all_samples()
        value = {"array": samples.data.mean(0).numpy(), "sampling_rate": samples.sample_rate}
    found = rate
    if isinstance(value, Mapping) and value.get("array") is not None:
        found, value = int(value.get("sampling_rate", rate)), value["array"]
    elif isinstance(value, Mapping):
        value, found = _read_sound(value)
    array = np.asarray(value)
    if array.dtype.kind not in "iuf" or array.ndim != 1:
        raise TypeError(
            f"`column` must hold sounds of one channel, as numbers or as encoded files, got {type(value).__name__}."
        )
    if found != rate:
        raise ValueError(
            f"Sounds must have the sampling rate of the encoder, {rate} Hz, got {found}. Bring them to it: "
            f"`dataset.cast_column(column, Audio(sampling_rate={rate}))`."
        )
    return array.astype(np.float32)


def _read_sound(value: Mapping[str, Any]) -> tuple[Any, int]:
    """The samples and the sampling rate of an encoded sound."""
    try:
        soundfile: Any = importlib.import_module("soundfile")
    except ImportError as error:
        raise ImportError(
            "Sounds that are stored encoded need the package `soundfile`: `pip install soundfile`. Columns of decoded "
            "numbers need nothing."
        ) from error
    source = io.BytesIO(value["bytes"]) if value.get("bytes") is not None else value["path"]
    samples, rate = soundfile.read(source, dtype="float32", always_2d=True)
    return samples.mean(1), int(rate)
