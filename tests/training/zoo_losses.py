"""The tables of `zoo`: adapters, ways of padding, losses of one's own, classification."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithFlattening,
    LlamaForCausalLM,
    Trainer,
)

from tests.training.zoo import (
    NUM_ROWS,
    PAD,
    add,
    build,
    even,
    for_pairs,
    labelled_reference,
    lm_collator,
    ragged,
    texts,
    tokenizer,
    unlabelled,
    with_column,
)
from tests.training.zoo_kinds import BOTH, DECODER, HIDDEN, PADDED, SLOW, t5

# --- adapters --------------------------------------------------------------------------------------------------------


def adapted(kind: str, name: str = "LlamaForCausalLM", **settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return peft.get_peft_model(build(name), getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", **settings))


def add_adapted(name: str, kind: str, *, model: str = "LlamaForCausalLM", more: Any = (), **settings: Any) -> None:
    add(name, functools.partial(adapted, kind, model, **settings), **dict(more))


ON_Q = {"target_modules": ["q_proj", "v_proj"]}
add_adapted("LoRA", "Lora", r=4, more=PADDED, **ON_Q)
add_adapted("DoRA", "Lora", r=4, use_dora=True, more=SLOW, **ON_Q)
add_adapted("LoRA, modules_to_save", "Lora", r=4, modules_to_save=["lm_head"], **ON_Q)
add_adapted("LoRA, trainable tokens", "Lora", r=4, trainable_token_indices=[5, 6, 7], **ON_Q)
add_adapted("LoRA on embeddings and head", "Lora", r=4, target_modules=["embed_tokens", "lm_head"], more=SLOW)
add_adapted("AdaLoRA", "AdaLora", init_r=4, target_r=2, total_step=40, tinit=1, tfinal=1,
            more={"reading": "row by row", "probe": {"epsilon": 1e-3}}, **ON_Q)  # fmt: skip
add_adapted("VeRA", "Vera", r=4, target_modules=["q_proj"], more=SLOW)
add_adapted("IA3", "IA3", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
add_adapted("prefix tuning", "PrefixTuning", num_virtual_tokens=3, more=PADDED)
FIRST = {"trains_first": True}
add_adapted("prompt tuning", "PromptTuning", num_virtual_tokens=3, more={**PADDED, **FIRST})
add_adapted("p-tuning", "PromptEncoder", num_virtual_tokens=3, encoder_hidden_size=16,
            more={**SLOW, **FIRST})  # fmt: skip
add_adapted("prompt tuning of GPT-2", "PromptTuning", model="GPT2LMHeadModel", num_virtual_tokens=3,
            more={**SLOW, **FIRST})  # fmt: skip
add_adapted("LoHa", "LoHa", r=4, more=SLOW, **ON_Q)
add_adapted("LoKr", "LoKr", r=4, more=SLOW, **ON_Q)
add_adapted("OFT", "OFT", r=0, oft_block_size=4, more=SLOW, **ON_Q)
add_adapted("LN tuning", "LNTuning", target_modules=["input_layernorm"], more=SLOW)
add_adapted("trainable tokens alone", "TrainableTokens", token_indices=[5, 6, 7], more=SLOW)
add("LoRA of a Bart decoder", functools.partial(adapted, "Lora", "BartForCausalLM", r=4, **ON_Q), **SLOW, **DECODER)
virtual = functools.partial(adapted, "PromptTuning", "BartForCausalLM", num_virtual_tokens=3)
add("prompt tuning of a Bart decoder", virtual, **SLOW, **DECODER)


def adapted_pairs(kind: str, **settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    base = t5()
    return peft.get_peft_model(base, getattr(peft, f"{kind}Config")(task_type="SEQ_2_SEQ_LM", **settings))


add("LoRA of T5", functools.partial(adapted_pairs, "Lora", r=4, target_modules=["q", "v"]),
    **{**BOTH, "collator": lambda model: for_pairs(None)})  # fmt: skip

# --- ways of padding -------------------------------------------------------------------------------------------------


def positions(batch: dict[str, Any]) -> dict[str, Any]:
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)}


def on_the_left(model: Any, with_positions: bool = False) -> Any:
    collate = lm_collator(model, "left")
    return (lambda rows: positions(collate(rows))) if with_positions else collate


def by_hand(model: Any) -> Any:
    """Without a mask: padding is seen by what comes behind it, and nothing does."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        longest = max(len(row["input_ids"]) for row in rows)
        ids = [row["input_ids"] + [PAD] * (longest - len(row["input_ids"])) for row in rows]
        labels = [row["input_ids"] + [-100] * (longest - len(row["input_ids"])) for row in rows]
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}

    return collate


def prompted() -> dict[str, Any]:
    """As for fine-tuning; some rows are all prompt."""
    rows = texts(low=8, high=16)
    hidden = [len(row) if i % 5 == 4 else i % 7 for i, row in enumerate(rows)]
    return {"input_ids": rows, "labels": [[-100] * h + row[h:] for h, row in zip(hidden, rows, strict=True)]}


gpt2, llama = functools.partial(build, "GPT2LMHeadModel"), functools.partial(build, "LlamaForCausalLM")
add("left padding", llama, columns=ragged, collator=on_the_left)
add("left padding, absolute positions", gpt2, columns=ragged, collator=on_the_left)
add("left padding, positions given", gpt2, columns=ragged,
    collator=functools.partial(on_the_left, with_positions=True))  # fmt: skip
add("padded to a multiple of 8", llama, columns=ragged,
    collator=functools.partial(lm_collator, pad_to_multiple_of=8))  # fmt: skip
add("padded without a mask", gpt2, columns=ragged, collator=by_hand)
add("ALiBi, padded on the left", functools.partial(build, "BloomForCausalLM"), columns=ragged, collator=on_the_left)
add("state space, padded on the left", functools.partial(build, "MambaForCausalLM"), columns=ragged,
    collator=on_the_left, **SLOW)  # fmt: skip
add("prompts without labels", llama, columns=prompted, collator=lambda model: DataCollatorForSeq2Seq(tokenizer()))
add("token types", gpt2, columns=with_column("token_type_ids", lambda row, i: 0))
add("token types of two kinds", gpt2, columns=with_column("token_type_ids", lambda row, i: 7 + int(i > 4)))
add("packed", functools.partial(build, "LlamaForCausalLM", use_cache=False), columns=unlabelled,
    collator=lambda model: DataCollatorWithFlattening())  # fmt: skip

# --- losses of one's own ---------------------------------------------------------------------------------------------


class Own(LlamaForCausalLM):
    """A Llama with a loss of its own on the labels as they stand, of the kind that a subclass names."""

    kind = ""

    def forward(self, input_ids=None, attention_mask=None, labels=None, loss_mask=None, **kwargs):
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        if labels is None:
            return output
        moves = self.kind != "unshifted"
        logits, labels = (output.logits[:, :-1], labels[:, 1:]) if moves else (output.logits, labels)
        losses = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        counts = (labels != -100).flatten().float()
        if self.kind == "z-loss":
            losses = losses + 0.1 * torch.logsumexp(logits, -1).flatten() ** 2
        elif self.kind == "smoothed":
            losses = 0.7 * losses - 0.3 * logits.log_softmax(-1).mean(-1).flatten()
        elif self.kind == "focal":
            losses = losses * (1 - torch.exp(-losses)) ** 2
        elif self.kind == "summed":
            counts = torch.full_like(counts, 1 / 4)
        if loss_mask is not None:
            counts = loss_mask[:, 1:].flatten().float()
        total = (losses * counts).sum()
        loss = total if self.kind == "summed" else total / counts.sum().clamp(min=1)
        output["loss"] = loss * len(labels) ** 2 if self.kind == "contrastive" else loss
        return output


def own(kind: str) -> Any:
    model = build("LlamaForCausalLM")
    model.__class__ = type("Own", (Own,), {"kind": kind})
    return model


ROW = "row by row"
add("labels shifted in the dataset", functools.partial(own, "unshifted"), **DECODER)
add("z-loss in forward", functools.partial(own, "z-loss"), reading=ROW)
add("label smoothing in forward", functools.partial(own, "smoothed"), reading=ROW)
add("focal loss in forward", functools.partial(own, "focal"), reading=ROW, **SLOW)
add("a mask of the loss", functools.partial(own, "masked"),
    columns=with_column("loss_mask", lambda row, i: int(row % 4 == 0 or (i + row) % 3 > 0)))  # fmt: skip
add("weights of the loss", functools.partial(own, "masked"), reading=ROW,
    columns=with_column("loss_mask", lambda row, i: 1 + i % 3))  # fmt: skip
# Alone, a row loses the weight that it has among others.
add("weights of rows", functools.partial(own, "masked"), refused=r"one by one.*DirectionalProbe\(loss",
    columns=with_column("loss_mask", lambda row, i: 1 + row % 5))  # fmt: skip
add("a loss of the batch", functools.partial(own, "contrastive"), refused=r"one by one.*DirectionalProbe\(loss")


def with_attributes(**attributes: Any) -> Any:
    model = build("LlamaForCausalLM")
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def doubled(logits: Any, labels: Any, **kwargs: Any) -> Any:
    """A `loss_function` of a model."""
    return 2 * functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


add("`loss_type` of the model", functools.partial(with_attributes, loss_type="ForMaskedLM"), **DECODER)
add("`loss_function` of the model", functools.partial(with_attributes, loss_function=doubled), reading=ROW)


def squared(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    """A `compute_loss_func`."""
    losses = functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    return (losses**2).sum() / num_items_in_batch


def likelihood(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    losses = functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    return losses / num_items_in_batch


def likelihood_of_pairs(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
    losses = functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return losses / num_items_in_batch


class LastHalf(Trainer):
    """Trains the last tokens only, and does not give the model its labels."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")[:, 6:]
        outputs = model(**inputs)
        loss = functional.cross_entropy(outputs.logits[:, 5:-1].flatten(0, 1), labels.flatten())
        return (loss, outputs) if return_outputs else loss


TRAINERS = {"reading": ROW, "made_by_trainer": True}
add("`compute_loss_func`", llama, given={"compute_loss_func": squared}, **TRAINERS)
add("`compute_loss_func`, attached", llama, given={"compute_loss_func": squared}, attach=True, **SLOW, **TRAINERS)
add("`compute_loss_func`, the plain likelihood", llama, given={"compute_loss_func": likelihood}, made_by_trainer=True)
add("`compute_loss_func` of T5, the plain likelihood", t5, given={"compute_loss_func": likelihood_of_pairs},
    made_by_trainer=True, **BOTH)  # fmt: skip
add("a Trainer's own loss", llama, trainer=LastHalf, **TRAINERS)
add("a Trainer's own loss, attached", llama, trainer=LastHalf, attach=True, **TRAINERS, **SLOW)
add("label smoothing", llama, args={"label_smoothing_factor": 0.2}, **TRAINERS)
add("label smoothing, attached", llama, args={"label_smoothing_factor": 0.2}, attach=True, **TRAINERS)
add("label smoothing of T5", t5, args={"label_smoothing_factor": 0.2}, **{**BOTH, **TRAINERS})
add("label smoothing of a masked one", functools.partial(build, "BertForMaskedLM"),
    args={"label_smoothing_factor": 0.2}, **{**HIDDEN, **TRAINERS}, **SLOW)  # fmt: skip

# --- classification --------------------------------------------------------------------------------------------------


def classes() -> dict[str, Any]:
    return {"input_ids": texts(), "labels": [i % 3 for i in range(NUM_ROWS)]}


def class_loss(model: Any, batch: dict[str, Any]) -> Any:
    """Of a reference of texts: each should be of class 0."""
    ids = batch["input_ids"]
    return model(input_ids=ids, labels=torch.zeros(len(ids), dtype=torch.int64, device=ids.device)).loss


def tagged() -> dict[str, Any]:
    rows = texts(low=8, high=16)
    return {"input_ids": rows, "labels": [[t % 3 if t % 5 else -100 for t in row] for row in rows]}


bert_classes = functools.partial(build, "BertForSequenceClassification", num_labels=3)
add("classes, a reference of texts", bert_classes, columns=classes, refused=r"reference_loss=")
add("classes", bert_classes, columns=classes, reading="classes", probe={"reference_loss": class_loss})
add("classes of a decoder", functools.partial(build, "LlamaForSequenceClassification", num_labels=3), columns=classes,
    reading="classes", probe={"reference_loss": class_loss}, **SLOW)  # fmt: skip
add("a number a row", functools.partial(build, "BertForSequenceClassification", num_labels=1),
    columns=lambda: {**classes(), "labels": [i % 3 / 2 for i in range(NUM_ROWS)]}, refused=r"whole number",
    error=ValueError, probe={"reference_loss": class_loss})  # fmt: skip
add("tags of tokens", functools.partial(build, "BertForTokenClassification", num_labels=3), columns=tagged,
    collator=lambda model: DataCollatorForTokenClassification(tokenizer()), reading="unshifted",
    reference=labelled_reference(lambda row, i: row[i] % 3))  # fmt: skip


# Losses that are no likelihood of one label, or of several.
def replaced() -> dict[str, Any]:
    return with_column("labels", lambda row, i: int((row + i) % 4 == 0), unlabelled)()


def answers() -> dict[str, Any]:
    return {**unlabelled(), "start_positions": [i % 6 for i in range(NUM_ROWS)],
            "end_positions": [6 + i % 6 for i in range(NUM_ROWS)]}  # fmt: skip


def hidden_mean(model: Any, batch: dict[str, Any]) -> Any:
    """Of a reference of texts, for a model without a likelihood; of a part, as that of all is set by a layer norm."""
    return model(input_ids=batch["input_ids"], output_hidden_states=True).hidden_states[-1][..., :4].square().mean()


NO_LIKELIHOOD = {"reading": ROW, "probe": {"reference_loss": hidden_mean}}
discriminator = functools.partial(build, "ElectraForPreTraining")
add("replaced tokens", discriminator, columns=replaced, **NO_LIKELIHOOD)
add("replaced tokens, a reference of texts", discriminator, columns=replaced, refused=r"reference_loss=")
add("answers in a text", functools.partial(build, "BertForQuestionAnswering"), columns=answers, **NO_LIKELIHOOD)
add("two losses", functools.partial(build, "BertForPreTraining"), **NO_LIKELIHOOD,
    columns=lambda: {**even(), "next_sentence_label": [i % 2 for i in range(NUM_ROWS)]})  # fmt: skip
add("choices", functools.partial(build, "BertForMultipleChoice"), refused=r"shape \(1, length\)",
    columns=lambda: {"input_ids": [[row, row[::-1]] for row in texts()], "labels": classes()["labels"]},
    probe={"reference_loss": hidden_mean})  # fmt: skip
