"""The models of `modalities`, the examples they train on, and how much is measured.

Trade-off: models of some ten thousand parameters on small pictures and made-up sounds, so that seeds are cheap. What
is wrong or beside the point is planted, and a label that is wrong cannot be seen in the inputs alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from mates_hf.data.pool import CandidatePool
from mates_hf.data.reference import ReferenceTask
from mates_hf.influence.example_losses import contrastive_loss

Batch = dict[str, Any]
Ids = npt.NDArray[np.int64]
Rng = np.random.Generator

IMAGE, NUM_WORDS, NUM_SOUNDS, TEXT_LENGTH = 39, 16, 8, 4
CARED_FOR = 5  # digits 0 to 4
WRONG, MISLABELLED = 0.2, 0.4  # of labels, in the pool
FEW = 0.3  # of the pool's texts are of the first half of the letters
BANK_PAIRS = 32


class Examples:
    """Examples as tensors of equal first dimension, read row by row as a Trainer reads a dataset."""

    def __init__(self, **columns: Any) -> None:
        self.columns = {name: torch.as_tensor(value) for name, value in columns.items()}

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, row: int) -> Batch:
        return {name: value[row] for name, value in self.columns.items()}

    def batch(self, ids: Any) -> Batch:
        """A batch of these rows."""
        return {name: value[torch.as_tensor(ids)] for name, value in self.columns.items()}

    def pool(self, ids: Any) -> CandidatePool:
        """These rows as candidates."""
        return CandidatePool(self, stacked, np.asarray(ids, np.int64))


def stacked(rows: list[Batch]) -> Batch:
    """The collator: rows of equal shape as one batch."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """What one run works with."""

    pool: Examples
    planted: npt.NDArray[np.bool_]  # whether a row of the pool is of the wanted kind; read by no arm
    reference: Examples
    judged: Examples

    def task(self) -> ReferenceTask:
        """The reference task."""
        return ReferenceTask.from_examples([self.reference[i] for i in range(len(self.reference))], stacked)


Splitter = Callable[[int, int, int, int], Split]

# --- examples ---


def digits(num: int, num_reference: int, num_judged: int, seed: int) -> Split:
    """scikit-learn's digits, with noise on each draw; wrong labels in the pool, and 0 to 4 are wanted."""
    from sklearn.datasets import load_digits

    rng = np.random.default_rng([seed, 1])
    pixels, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(labels))
    images, labels = (pixels[order] / 8 - 1).reshape(-1, 8, 8), labels[order]
    kept_out = np.flatnonzero((labels < CARED_FOR) & (np.arange(len(labels)) >= 1300))

    def drawn(num: int, rows: Ids) -> tuple[Any, Ids]:
        rows = rng.choice(rows, num)
        noisy = images[rows] + rng.normal(0, 0.3, (num, 8, 8))
        return noisy.astype(np.float32)[:, None], labels[rows]

    found, said = drawn(num, np.arange(1300))
    wrong = rng.random(num) < WRONG
    told = np.where(wrong, (said + rng.integers(1, 10, num)) % 10, said)
    parts = []
    for part, size in ((kept_out[::2], num_reference), (kept_out[1::2], num_judged)):
        other, own = drawn(size, part)
        parts.append(Examples(pixel_values=other, labels=own))
    pool = Examples(pixel_values=found, labels=told)
    return Split(pool=pool, planted=~wrong & (said < CARED_FOR), reference=parts[0], judged=parts[1])


def speech(num: int, num_reference: int, num_judged: int, seed: int, *, halves: bool = False) -> Split:
    """Sounds whose loud bands are the letters of a text; of the pool a share has another text.

    With `halves` a text is of one half of the letters. Texts of the first half are wanted and are the smaller part of
    the pool: of two equal parts rows by loss fall into either one and stay there. Fewer are wrong, too.
    """
    rng = np.random.default_rng([seed, 2])
    own = NUM_SOUNDS // 2 if halves else NUM_SOUNDS  # letters that a text is made of

    def drawn(first: Ids, wrong: npt.NDArray[np.bool_]) -> Examples:
        said = first[:, None] + rng.integers(0, own, (len(first), TEXT_LENGTH))
        sound = rng.normal(0, 0.5, (len(first), NUM_SOUNDS, 4 * TEXT_LENGTH)).astype(np.float32)
        for place in range(TEXT_LENGTH):
            sound[np.arange(len(first)), said[:, place], 4 * place : 4 * place + 4] += 2
        text = np.where(wrong[:, None], first[:, None] + rng.integers(0, own, said.shape), said)
        return Examples(input_features=sound, labels=text + 3)

    wrong = rng.random(num) < (WRONG if halves else MISLABELLED)
    first = own * (rng.random(num) >= FEW) if halves else np.zeros(num, np.int64)
    parts = [drawn(np.zeros(size, np.int64), np.zeros(size, bool)) for size in (num_reference, num_judged)]
    return Split(pool=drawn(first, wrong), planted=~wrong & (first == 0), reference=parts[0], judged=parts[1])


def lit_quadrants(shown: Ids, rng: Rng) -> Any:
    """(N, 3, 8, 8) noisy pictures; each bit of `shown` lights a quadrant."""
    pictures = rng.normal(0, 0.7, (len(shown), 3, 8, 8)).astype(np.float32)
    for bit in range(4):
        row, column = divmod(bit, 2)
        pictures[shown >> bit & 1 == 1, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1
    return pictures


def captions(
    num: int, num_reference: int, num_judged: int, seed: int, *, pairs: bool = False, halves: bool = False
) -> Split:
    """Pictures of 16 kinds, each with a text that says which; of the pool a share is told wrong.

    With `halves` pictures of the first 8 kinds are wanted, and fewer are told wrong.
    """
    rng = np.random.default_rng([seed, 3])
    own = NUM_WORDS // 2 if halves else NUM_WORDS  # kinds that are wanted

    def drawn(shown: Ids, wrong: npt.NDArray[np.bool_]) -> Examples:
        size = len(shown)
        word = np.where(wrong, (shown + rng.integers(1, NUM_WORDS, size)) % NUM_WORDS, shown) + 5
        if pairs:
            ids = np.stack([np.ones(size, np.int64), word, np.full(size, 2)], 1)
            return Examples(input_ids=ids, pixel_values=lit_quadrants(shown, rng))
        ids = np.concatenate([np.full((size, 4), IMAGE), np.full((size, 1), 3), word[:, None], word[:, None] + 17], 1)
        labels = np.where(np.arange(7) < 5, -100, ids)
        return Examples(
            input_ids=ids, pixel_values=lit_quadrants(shown, rng), labels=labels, attention_mask=np.ones_like(ids)
        )

    wrong = rng.random(num) < (WRONG if halves else MISLABELLED)
    parts = [drawn(rng.integers(0, own, size), np.zeros(size, bool)) for size in (num_reference, num_judged)]
    shown = rng.integers(0, NUM_WORDS, num)
    return Split(pool=drawn(shown, wrong), planted=~wrong & (shown < own), reference=parts[0], judged=parts[1])


# --- models ---


def vit() -> nn.Module:
    """A ViT of digits."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=48, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=96, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )  # fmt: skip
    return ViTForImageClassification(config)


def resnet() -> nn.Module:
    """A residual network of digits, with batch norm."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10
    )
    return ResNetForImageClassification(config)


def whisper() -> nn.Module:
    """An encoder of sounds and a decoder of letters."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=24, num_mel_bins=NUM_SOUNDS, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
        max_source_positions=8, max_target_positions=16, dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1, suppress_tokens=[], begin_suppress_tokens=[], attn_implementation="eager",
    )  # fmt: skip
    return WhisperForConditionalGeneration(config)


def llava() -> nn.Module:
    """Pictures as tokens of a small Llama."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=4)
    config._attn_implementation = "eager"
    return LlavaForConditionalGeneration(config)


def clip() -> nn.Module:
    """Pictures and texts side by side."""
    from transformers import CLIPConfig, CLIPModel

    own: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    }  # fmt: skip
    text = {"vocab_size": 40, "max_position_embeddings": 8, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
    vision = {"image_size": 8, "patch_size": 4}
    return CLIPModel(CLIPConfig(text_config=own | text, vision_config=own | vision, projection_dim=16))


# --- set-ups ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A model, its examples, and what a step of it minimises."""

    model: Callable[[], nn.Module]
    split: Splitter
    lr: float
    contrastive: bool = False

    def build(self, seed: int) -> nn.Module:
        """Fresh weights."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.model()

    def own_loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """What the model's own Trainer would minimise."""
        extra = {"return_loss": True} if self.contrastive else {}
        loss: torch.Tensor = model(**batch, **extra).loss
        return loss

    def probe_loss(self, split: Split) -> Any:
        """What a probe is given; None where it finds the loss itself."""
        return contrastive_loss(split.judged.batch(np.arange(BANK_PAIRS))) if self.contrastive else None


KINDS = {
    "ViT": Kind(model=vit, split=digits, lr=1e-3),
    "ResNet": Kind(model=resnet, split=digits, lr=1e-3),
    "Whisper": Kind(model=whisper, split=speech, lr=2e-3),
    "Llava": Kind(model=llava, split=captions, lr=2e-3),
    "CLIP": Kind(model=clip, split=functools.partial(captions, pairs=True), lr=2e-3, contrastive=True),
}


class Trained(NamedTuple):
    """A set-up of trainings."""

    kind: str  # of `KINDS`
    split: Splitter  # what it trains on
    only_wrong: bool = False  # whether labels are wrong and nothing else is planted
    later: int = 0  # steps by which choosing begins and ends later


TRAINED = {
    "digits": Trained("ViT", digits),
    # After 250 steps one such model in eight knows next to nothing yet (loss about ln 4), and what it lacks is steps.
    "speech": Trained("Whisper", functools.partial(speech, halves=True), later=200),
    "images with text": Trained("Llava", functools.partial(captions, halves=True)),
    "speech, mislabelled": Trained("Whisper", speech, only_wrong=True),
    "images with text, mislabelled": Trained("Llava", captions, only_wrong=True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """How an arm that chooses does so; tuned."""

    round: int = 25  # steps; by loss each step is one
    share: float = 0.25  # of each slice that is trained on
    random_share: float = 0.0  # of those
    # The rest is ours alone.
    features: str = "head_gradient"  # of the influence model
    probes: int = 100  # of a slice

    @property
    def name(self) -> str:
        """In names of units and in tables."""
        shared = f", {self.random_share:g} of them random" if self.random_share else ""
        rounds = f", rounds of {self.round}" if self.round != 1 else ""
        features = f", by {self.features}" if self.features != "head_gradient" else ""
        probes = f", {self.probes} probes" if self.probes != 100 else ""
        return f"{self.share:g} of a slice{shared}{rounds}{features}{probes}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured; the defaults are the full run."""

    # Labels.
    label_seeds: int = 3
    label_steps: int = 150
    candidates: int = 40
    truth_batches: int = 6
    label_reference: int = 64
    # Speed, candidates in one turn.
    speed: int = 512
    speed_oracle: int = 16
    turns: int = 3
    # Training.
    seeds: int = 40
    seeds_only_wrong: int = 5  # of set-ups in which labels are wrong and nothing else
    first_seed: int = 20  # of those reported; others were reported with other set-ups
    tuning_seeds: tuple[int, ...] = (10, 11, 12)
    tuned: float = 1.5  # times the steps of random rows: the FLOPs that each arm is tuned at
    steps: int = 400
    batch: int = 32
    first: int = 250  # random steps that all arms share
    window: int = 15  # steps whose weights' mean a round looks at
    choices: tuple[Choice, ...] = (
        Choice(), Choice(share=0.5), Choice(share=0.5, random_share=0.25), Choice(share=0.5, round=50),
        Choice(share=0.5, round=50, random_share=0.25), Choice(share=0.5, round=75, random_share=0.25),
        Choice(share=0.5, random_share=0.25, features="inputs"),
        Choice(share=0.5, round=50, features="inputs"),
        Choice(share=0.5, round=50, random_share=0.25, features="inputs"),
        Choice(share=0.5, round=50, random_share=0.25, features="inputs", probes=200),
        Choice(share=0.25, round=50, random_share=0.25, features="inputs"),
        Choice(share=0.25, round=50, random_share=0.5, features="inputs"),
    )  # fmt: skip
    by_loss: tuple[Choice, ...] = (Choice(round=1), Choice(round=1, share=0.5))
    reference: int = 128
    judged: int = 512
    rates: tuple[float, ...] = (1e-3, 2e-3, 5e-3)
    setups: tuple[str, ...] = tuple(TRAINED)
    kinds: tuple[str, ...] = tuple(KINDS)


QUICK = Sizes(
    label_seeds=1, label_steps=20, candidates=8, truth_batches=2, label_reference=16, speed=16, speed_oracle=2,
    turns=1, seeds=2, seeds_only_wrong=1, tuning_seeds=(10,), steps=30, first=10, first_seed=0, window=5,
    choices=(Choice(round=10, share=0.5, probes=40), Choice(round=10, share=0.5, features="inputs", probes=40)),
    by_loss=(Choice(round=1, share=0.5),), reference=24, judged=32, rates=(2e-3,),
    setups=("digits",), kinds=("ViT", "CLIP"),
)  # fmt: skip
