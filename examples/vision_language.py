# /// script
# requires-python = ">=3.10"
# dependencies = ["mates-hf", "pillow"]
# [tool.uv.sources]
# mates-hf = { path = ".." }
# ///
"""A vision-language model that selects its captioned pictures while it trains: shapes that are drawn, in words.

Each picture has one shape, and a caption such as "a small red circle". A fifth of the captions belong to another
picture, and the reference task is right captions of circles and squares. A Llava of 116,000 parameters trains on
random rows, then on those that it selects.

    python examples/vision_language.py
    accelerate launch --num_processes 2 examples/vision_language.py --num_probes 300 --learning_rate 2e-3

Settings are the fields of `CaptionArguments`, `TrainingArguments` and `MatesConfig`.

It took 74 seconds on a busy machine, 38 of one CPU core, and 0.7 GB of memory. Selected rows end at a lower loss here:
wrong captions and other shapes were planted to be found, and one seed is no measurement. Last lines:

    random rows: loss 0.2943 nats/token, 0.370 of 100 held-out captions right
    selected rows: loss 0.1823 nats/token, 0.740 of 100 held-out captions right
"""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from transformers import (
    CLIPVisionConfig,
    HfArgumentParser,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.hf_argparser import HfArg

from mates_hf import FeatureInfluenceModel, MatesCallback, MatesConfig, ReferenceTask

SIZES = ["small", "large"]
COLOURS = ["red", "green", "blue", "yellow", "white", "purple"]
SHAPES = ["circle", "square", "triangle", "cross"]
WANTED = ["circle", "square"]  # what to get better at
WORDS = ["<pad>", "<start>", "<end>", "<image>", "a", *SIZES, *COLOURS, *SHAPES]  # a token is a word
PAD, START, END, IMAGE = range(4)
SIDE, PATCH = 24, 6  # pixels of a picture, and of one of the patches that it is cut into
NUM_PATCHES = (SIDE // PATCH) ** 2  # tokens of a picture
NOISE = 20  # of a pixel, which is 0 to 255
DEFAULTS = {
    "output_dir": "runs/vision_language", "max_steps": 300, "update_steps": 50, "num_probes": 200,
    "learning_rate": 3e-3, "per_device_train_batch_size": 16, "warmup_steps": 20, "selection_ratio": 0.5,
    "logging_steps": 50, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
}  # fmt: skip


@dataclass
class CaptionArguments:
    """What this script adds to `TrainingArguments` and `MatesConfig`."""

    num_rows: int = HfArg(default=1600, help="Pictures to select from.")
    num_reference: int = HfArg(default=100, help="Pictures of the reference task; as many are held out.")
    wrong: float = HfArg(default=0.2, help="Share of the captions to select from that belong to another picture.")
    hidden_size: int = HfArg(default=48, help="Size of the states of both models.")


def paint(caption: str, random: np.random.Generator) -> torch.Tensor:
    """(3, SIDE, SIDE) the picture of a caption, anywhere and with noise; values around 0."""
    _, size, colour, shape = caption.split()
    radius = {"small": 3, "large": 6}[size]
    x, y = (int(place) for place in random.integers(radius + 1, SIDE - radius - 1, 2))
    box = (x - radius, y - radius, x + radius, y + radius)
    image = Image.new("RGB", (SIDE, SIDE))
    draw = ImageDraw.Draw(image)
    if shape == "circle":
        draw.ellipse(box, fill=colour)
    elif shape == "square":
        draw.rectangle(box, fill=colour)
    elif shape == "triangle":
        draw.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=colour)
    else:
        draw.line((x - radius, y, x + radius, y), fill=colour, width=radius // 2)
        draw.line((x, y - radius, x, y + radius), fill=colour, width=radius // 2)
    pixels = np.asarray(image, np.float32) + random.normal(0, NOISE, (SIDE, SIDE, 3)).astype(np.float32)
    return torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1)


def make_rows(args: CaptionArguments, seed: int) -> tuple[list[dict[str, Any]], ...]:
    """The pool, a share of whose captions is wrong; right captions for the reference task, and held-out ones."""
    random = np.random.default_rng(seed)

    def caption(shapes: list[str]) -> str:
        return " ".join(["a", random.choice(SIZES), random.choice(COLOURS), random.choice(shapes)])

    def row(picture: str, text: str) -> dict[str, Any]:
        words = [*map(WORDS.index, text.split()), END]
        ids = [IMAGE] * NUM_PATCHES + [START, *words]
        labels = [-100] * (len(ids) - len(words)) + words  # the picture is no target
        told = {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}
        return {"pixel_values": paint(picture, random), **told}

    pool = []
    for _ in range(args.num_rows):
        picture = caption(SHAPES)
        pool.append(row(picture, caption(SHAPES) if random.random() < args.wrong else picture))
    right = [row(text, text) for text in (caption(WANTED) for _ in range(2 * args.num_reference))]
    return pool, right[: args.num_reference], right[args.num_reference :]


def make_model(hidden_size: int) -> LlavaForConditionalGeneration:
    """A Llava of two small models with fresh weights, whose tokens are `WORDS`."""
    sizes = {
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_attention_heads": 4,
        "initializer_range": 0.1,
    }
    vision = CLIPVisionConfig(image_size=SIDE, patch_size=PATCH, num_hidden_layers=3, **sizes)
    text = LlamaConfig(
        vocab_size=len(WORDS), num_hidden_layers=2, max_position_embeddings=NUM_PATCHES + 8, pad_token_id=PAD,
        bos_token_id=START, eos_token_id=END, **sizes,
    )  # fmt: skip
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=NUM_PATCHES)
    )


def measure(model: torch.nn.Module, rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Mean loss, in nats a token, and the share of captions whose every word is right given the words before."""
    batch = default_data_collator(rows)
    model.eval()
    with torch.no_grad():
        output = model(**batch)
    labels = batch["labels"][:, 1:]
    right = (output.logits[:, :-1].argmax(-1) == labels) | (labels == -100)
    return float(output.loss), float(right.all(-1).float().mean())


def main(arguments: list[str] | None = None) -> None:
    """Train twice from the same weights, and compare."""
    parser = HfArgumentParser((CaptionArguments, TrainingArguments, MatesConfig))
    parser.set_defaults(**DEFAULTS)
    args, training, mates = parser.parse_args_into_dataclasses(arguments)
    pool, reference, held_out = make_rows(args, training.seed)
    for kind in ("random", "selected"):
        set_seed(training.seed)
        settings = copy.copy(training)
        settings.output_dir = str(Path(training.output_dir) / kind)
        model = make_model(args.hidden_size)
        callbacks = []
        if kind == "selected":
            task = ReferenceTask.from_examples(reference)
            callbacks = [MatesCallback(task, mates, influence_model=FeatureInfluenceModel())]
        trainer = Trainer(
            model=model, args=settings, train_dataset=pool, data_collator=default_data_collator, callbacks=callbacks
        )
        trainer.train()
        if trainer.is_world_process_zero():
            loss, right = measure(model.cpu(), held_out)
            print(f"{kind} rows: loss {loss:.4f} nats/token, {right:.3f} of {len(held_out)} held-out captions right")


if __name__ == "__main__":
    main()
