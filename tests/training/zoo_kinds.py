"""The tables of `zoo`: one of each way of being different in the default run, the others of their families as slow.

A decoder whose loss does not shift is trained on labels that are shifted in the dataset, as its users do.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional
from transformers import (
    DataCollatorForPermutationLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithFlattening,
    LlamaForCausalLM,
    Trainer,
)

from tests.training.zoo import (
    BOS,
    IMAGE,
    KINDS,
    NUM_ROWS,
    PAD,
    SMALL,
    VOCAB,
    Kind,
    add,
    add_each,
    build,
    completions,
    even,
    for_pairs,
    labelled_reference,
    lm_collator,
    masking,
    pairs,
    ragged,
    shifted,
    texts,
    tokenizer,
    unlabelled,
    with_column,
)

__all__ = ["KINDS", "Kind"]

LM, MASKED, PAIRS = "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration"
PADDED = {"columns": ragged, "collator": lm_collator}
LOW_RANK = {"q_lora_rank": 8, "head_dim": 4, "num_key_value_heads": 4}
HYBRID = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
          "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
SSM = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2, "mamba_chunk_size": 4}
HEAD = {"head": "LMHeadModel"}

# --- causal language models -------------------------------------------------------------------------------------------

add_each("Llama Mistral Qwen3 Gemma2 GptOss OPT BioGpt XGLM Bloom Mpt Mamba Rwkv", LM)
add_each(
    {
        "Falcon": {"alibi": True},
        "GPTNeo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
        "DeepseekV3": LOW_RANK,
        "Mamba2": {"num_heads": 8, "n_groups": 2, "chunk_size": 4},
        "Qwen3Next": HYBRID,
        "RecurrentGemma": {"block_types": ["recurrent", "attention"], "num_key_value_heads": 1},
        "GPT2": HEAD,
        "OpenAIGPT": HEAD,
        "Bert": {**HEAD, "is_decoder": True},
    },
    LM,
)
add_each("GPTNeoX Phi3 StableLm Cohere2", LM, **PADDED)
add_each(
    {
        "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
                  "mamba_dt_rank": 4, "mamba_d_state": 4, "use_mamba_kernels": False},
        "CTRL": HEAD,
        "Gemma3": {"config": "Gemma3TextConfig"},
    },
    LM, **PADDED,
)  # fmt: skip
ROUTED = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
add_each(
    {"Mixtral": ROUTED, "Qwen2Moe": ROUTED, "GraniteMoe": ROUTED},
    LM, without={"output_router_logits": False},
)  # fmt: skip
# A causal head on an encoder that sees both ways: shifted all the same, and padding must stay masked.
add("BertLMHeadModel both ways", functools.partial(build, "BertLMHeadModel"), **PADDED)

add_each(
    "Afmoe Apertus Arcee AriaText BitNet Camembert CodeGen Cohere Cohere2Moe Cwm Data2VecText DiffLlama Doge Dots1 "
    "Electra Ernie Ernie4_5 Ernie4_5_Moe Exaone4 FalconMamba FlexOlmo Gemma Glm Glm4 Glm4Moe GPTBigCode Granite "
    "GPTNeoXJapanese GraniteMoeShared Helium HunYuanDenseV1 HunYuanMoEV1 JetMoe Lfm2 MegatronBert MiniMax MiniMaxM2 "
    "Ministral ModernBertDecoder Moshi NanoChat Nemotron Olmo Olmo2 Olmo3 OlmoHybrid Olmoe Persimmon Phi Phimoe Qwen2 "
    "Qwen3Moe RemBert Roberta RobertaPreLayerNorm RoFormer SeedOss SmolLM3 SolarOpen Starcoder2 VaultGemma XLMRoberta "
    "XLMRobertaXL BigBird GPTJ", LM, slow=True, **PADDED,
)  # fmt: skip
add_each("BertGenerationDecoder", "", slow=True, **PADDED)
add_each({"ProphetNet": {"num_hidden_layers": ..., "num_encoder_layers": 2, "num_decoder_layers": 2,
                         "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4}}, LM, slow=True,
         columns=shifted, reading="row by row")  # fmt: skip
add_each(
    {
        "Bamba": {**SSM, "attn_layer_indices": [1]},
        "Dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
                 "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}},
        "DeepseekV2": LOW_RANK,
        "FalconH1": {**SSM, "mamba_d_ssm": 64},
        "Glm4MoeLite": LOW_RANK,
        "Gemma4": {"config": "Gemma4TextConfig", "layer_types": ["sliding_attention", "full_attention"], "head_dim": 8,
                   "num_key_value_heads": 2, "sliding_window": 4, "vocab_size_per_layer_input": VOCAB,
                   "hidden_size_per_layer_input": 8},
        "GraniteMoeHybrid": {**SSM, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 48},
        "Lfm2Moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
        "Llama4": {"config": "Llama4TextConfig", "intermediate_size_mlp": 48, "attention_chunk_size": 8,
                   "layer_types": ["chunked_attention", "full_attention"]},
        "LongcatFlash": {**LOW_RANK, "expert_ffn_hidden_size": 24, "moe_topk": 2, "zero_expert_num": 1},
        "MiniCPM3": LOW_RANK,
        "Qwen3_5": {**HYBRID, "config": "Qwen3_5TextConfig"},
        "Xmod": {"is_decoder": True, "languages": ["en"], "default_language": "en"},
        "Zamba2": {"layers_block_type": ["mamba", "hybrid"], "num_key_value_heads": 4, "head_dim": ...,
                   "n_mamba_heads": 4, "mamba_d_state": 8, "mamba_headdim": 16, "mamba_ngroups": 1, "chunk_size": 4,
                   "num_mem_blocks": 1, "hybrid_layer_ids": [1], "use_mamba_kernels": False},
    },
    LM, slow=True, **PADDED,
)  # fmt: skip

# --- decoders whose loss does not shift -------------------------------------------------------------------------------

DECODER = {"columns": shifted, "reading": "unshifted"}
add_each("Bart Pegasus TrOCR Whisper", LM, **DECODER)
add_each({"XLM": {"causal": True, "head": "WithLMHeadModel"}}, "", **DECODER)
add_each("MBart Marian Blenderbot BlenderbotSmall PLBart Mvp", LM, slow=True, **DECODER)

# --- masked language models -------------------------------------------------------------------------------------------

HIDDEN = {"columns": unlabelled, "collator": masking, "reading": "unshifted"}
add_each("Bert ModernBert DistilBert Electra FNet", MASKED, **HIDDEN)
add_each("Deberta DebertaV2", MASKED, **{**HIDDEN, "columns": ragged})
add(
    "XLNet permuted", functools.partial(build, "XLNetLMHeadModel", max_position_embeddings=...), columns=unlabelled,
    collator=lambda model: DataCollatorForPermutationLanguageModeling(tokenizer()), reading="unshifted",
)  # fmt: skip
add_each(
    "Albert Camembert ConvBert Data2VecText Ernie Esm EuroBert IBert MegatronBert MobileBert MPNet NomicBert RemBert "
    "Roberta RobertaPreLayerNorm RoFormer SqueezeBert Tapas XLMRoberta XLMRobertaXL", MASKED, slow=True,
    **{**HIDDEN, "columns": ragged},
)  # fmt: skip
add_each({"Flaubert": {"head": "WithLMHeadModel"}}, "", slow=True, **{**HIDDEN, "columns": ragged})

# --- encoder-decoders -------------------------------------------------------------------------------------------------

BOTH = {"columns": pairs, "collator": for_pairs, "reading": "unshifted", "reference": completions}
START = {"decoder_start_token_id": PAD}
t5 = functools.partial(build, "T5ForConditionalGeneration", **START)
add_each("Bart Pegasus", PAIRS, **BOTH)
add("T5", t5, **BOTH)
add("T5 without decoder inputs", t5, **{**BOTH, "collator": lambda model: for_pairs(None)})
add("T5 and a reference of texts", t5, columns=pairs, collator=for_pairs,
    refused=r"prompts and completions for an encoder-decoder")  # fmt: skip
add_each(
    "MBart LED M2M100 Mvp NllbMoe PLBart Blenderbot BlenderbotSmall PegasusX BigBirdPegasus", PAIRS, slow=True, **BOTH,
)  # fmt: skip
add_each({"MT5": START, "UMT5": START, "LongT5": START}, PAIRS, slow=True, **BOTH)
add_each({"SeamlessM4T": {"head": "ForTextToText"}, "Marian": {**START, "head": "MTModel"}}, "", slow=True, **BOTH)

# --- adapters ---------------------------------------------------------------------------------------------------------


def adapted(kind: str, name: str = "LlamaForCausalLM", **settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return peft.get_peft_model(build(name), getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", **settings))


def add_adapted(name: str, kind: str, *, model: str = "LlamaForCausalLM", more: Any = (), **settings: Any) -> None:
    add(name, functools.partial(adapted, kind, model, **settings), **dict(more))


ON_Q = {"target_modules": ["q_proj", "v_proj"]}
SLOW = {"slow": True}
add_adapted("LoRA", "Lora", r=4, more=PADDED, **ON_Q)
add_adapted("DoRA", "Lora", r=4, use_dora=True, **ON_Q)
add_adapted("LoRA, modules_to_save", "Lora", r=4, modules_to_save=["lm_head"], **ON_Q)
add_adapted("LoRA, trainable tokens", "Lora", r=4, trainable_token_indices=[5, 6, 7], **ON_Q)
add_adapted("LoRA on embeddings and head", "Lora", r=4, target_modules=["embed_tokens", "lm_head"], more=SLOW)
add_adapted("AdaLoRA", "AdaLora", init_r=4, target_r=2, total_step=40, tinit=1, tfinal=1,
            more={"reading": "row by row", "probe": {"epsilon": 1e-3}}, **ON_Q)  # fmt: skip
add_adapted("VeRA", "Vera", r=4, target_modules=["q_proj"], more=SLOW)
add_adapted("IA3", "IA3", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
add_adapted("prefix tuning", "PrefixTuning", num_virtual_tokens=3, more=PADDED)
add_adapted("prompt tuning", "PromptTuning", num_virtual_tokens=3, more=PADDED)
add_adapted("p-tuning", "PromptEncoder", num_virtual_tokens=3, encoder_hidden_size=16)
add_adapted("prompt tuning of GPT-2", "PromptTuning", model="GPT2LMHeadModel", num_virtual_tokens=3, more=SLOW)
add_adapted("LoHa", "LoHa", r=4, more=SLOW, **ON_Q)
add_adapted("LoKr", "LoKr", r=4, more=SLOW, **ON_Q)
add_adapted("OFT", "OFT", r=0, oft_block_size=4, more=SLOW, **ON_Q)
add_adapted("LN tuning", "LNTuning", target_modules=["input_layernorm"], more=SLOW)
add_adapted("trainable tokens alone", "TrainableTokens", token_indices=[5, 6, 7], more=SLOW)
add("LoRA of a Bart decoder", functools.partial(adapted, "Lora", "BartForCausalLM", r=4, **ON_Q), **SLOW, **DECODER)
add("prompt tuning of a Bart decoder",
    functools.partial(adapted, "PromptTuning", "BartForCausalLM", num_virtual_tokens=3), **SLOW, **DECODER)  # fmt: skip


def adapted_pairs(kind: str, **settings: Any) -> Any:
    peft = pytest.importorskip("peft")
    base = t5()
    return peft.get_peft_model(base, getattr(peft, f"{kind}Config")(task_type="SEQ_2_SEQ_LM", **settings))


add("LoRA of T5", functools.partial(adapted_pairs, "Lora", r=4, target_modules=["q", "v"]),
    **{**BOTH, "collator": lambda model: for_pairs(None)})  # fmt: skip

# --- ways of padding --------------------------------------------------------------------------------------------------


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
add("token types", gpt2, columns=with_column("token_type_ids", lambda row, i: 0))
add("token types of two kinds", gpt2, columns=with_column("token_type_ids", lambda row, i: 7 + int(i > 4)))
add("packed", llama, columns=unlabelled, collator=lambda model: DataCollatorWithFlattening(),
    refused=r"one row of the batch from one row of the dataset")  # fmt: skip

# --- losses of one's own ----------------------------------------------------------------------------------------------


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
        output.loss = total if self.kind == "summed" else total / counts.sum().clamp(min=1)
        if self.kind == "contrastive":
            output.loss = output.loss * len(labels) ** 2
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
    columns=with_column("loss_mask", lambda row, i: 1 + (i + row) % 3))  # fmt: skip
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


class LastHalf(Trainer):
    """Trains the last tokens only, and does not give the model its labels."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")[:, 6:]
        outputs = model(**inputs)
        loss = functional.cross_entropy(outputs.logits[:, 5:-1].flatten(0, 1), labels.flatten())
        return (loss, outputs) if return_outputs else loss


TRAINERS = {"reading": ROW, "made_by_trainer": True}
add("`compute_loss_func`", llama, given={"compute_loss_func": squared}, **TRAINERS)
add("`compute_loss_func`, attached", llama, given={"compute_loss_func": squared}, attach=True, **TRAINERS)
add("`compute_loss_func`, the plain likelihood", llama, given={"compute_loss_func": likelihood}, made_by_trainer=True)
add("a Trainer's own loss", llama, trainer=LastHalf, **TRAINERS)
add("a Trainer's own loss, attached", llama, trainer=LastHalf, attach=True, **TRAINERS, **SLOW)
add("label smoothing", llama, args={"label_smoothing_factor": 0.2}, **TRAINERS)
add("label smoothing, attached", llama, args={"label_smoothing_factor": 0.2}, attach=True, **TRAINERS)
add("label smoothing of T5", t5, args={"label_smoothing_factor": 0.2}, **{**BOTH, **TRAINERS})
add("label smoothing of a masked one", functools.partial(build, "BertForMaskedLM"),
    args={"label_smoothing_factor": 0.2}, **{**HIDDEN, **TRAINERS}, **SLOW)  # fmt: skip

# --- classification ---------------------------------------------------------------------------------------------------


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
    probe={"reference_loss": class_loss})  # fmt: skip
add("tags of tokens", functools.partial(build, "BertForTokenClassification", num_labels=3), columns=tagged,
    collator=lambda model: DataCollatorForTokenClassification(tokenizer()), reading="unshifted",
    reference=labelled_reference(lambda row, i: row[i] % 3))  # fmt: skip

# --- pictures and text ------------------------------------------------------------------------------------------------

SEEN = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
        "patch_size": 4}  # fmt: skip
TEXT = {key: SMALL[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
        "num_attention_heads", "num_key_value_heads", "head_dim", "pad_token_id", "bos_token_id", "eos_token_id")}  # fmt: skip


def pictures(num_tokens: int = 4, shape: tuple[int, ...] = (3, 8, 8)) -> dict[str, Any]:
    """Picture tokens, whose labels are -100, before a text; pixels tell which text."""
    generator = torch.Generator().manual_seed(0)
    rows = texts(low=8, high=8)
    pixels = [torch.randn(shape, generator=generator) + row[0] / 32 for row in rows]
    return {
        "input_ids": [[IMAGE] * num_tokens + row for row in rows],
        "labels": [[-100] * num_tokens + row for row in rows],
        "attention_mask": [[1] * (num_tokens + len(row)) for row in rows],
        "pixel_values": [one.tolist() for one in pixels],
    }


def seeing(name: str, vision: Any, text: Any, **changes: Any) -> Any:
    config_class = getattr(transformers, f"{name}Config", None)
    if config_class is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    names = {vision: "vision_config", text: "text_config"}
    parts = {key: getattr(transformers, kind)(**copy.deepcopy(SEEN if key == "vision_config" else TEXT))
             for kind, key in names.items()}  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return getattr(transformers, f"{name}{PAIRS}")(config_class(**parts, **changes))


add("Llava", functools.partial(seeing, "Llava", "CLIPVisionConfig", "LlamaConfig", image_token_index=IMAGE,
                               image_seq_length=4), columns=pictures)  # fmt: skip
add("PaliGemma", functools.partial(seeing, "PaliGemma", "SiglipVisionConfig", "GemmaConfig", image_token_index=IMAGE,
                                   projection_dim=32),
    columns=with_column("token_type_ids", lambda row, i: int(i >= 6), pictures))  # fmt: skip


def more_pictures(num_tokens: int, shape: tuple[int, ...], **columns: Any) -> Any:
    return lambda: {**pictures(num_tokens, shape), **{key: [value] * NUM_ROWS for key, value in columns.items()}}


def qwen2_vl() -> Any:
    kind = getattr(transformers, "Qwen2VLForConditionalGeneration")
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
              "spatial_merge_size": 2, "temporal_patch_size": 1}  # fmt: skip
    text = {**TEXT, "max_position_embeddings": 64, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    text["layer_types"] = ["full_attention"] * 2
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(kind.config_class(vision_config=vision, text_config=text, image_token_id=IMAGE,
                                      video_token_id=VOCAB - 3, vision_start_token_id=VOCAB - 2))  # fmt: skip


def patches() -> dict[str, Any]:
    columns = pictures(4, (16, 48))
    rows = [[VOCAB - 2, *row] for row in columns["input_ids"]]
    return {
        "input_ids": rows,
        "labels": [[-100, *row] for row in columns["labels"]],
        "attention_mask": [[1] * len(row) for row in rows],
        "mm_token_type_ids": [[int(token == IMAGE) for token in row] for row in rows],
        "pixel_values": columns["pixel_values"],
        "image_grid_thw": [[[1, 4, 4]]] * NUM_ROWS,
    }


def joined(model: Any) -> Any:
    """The pictures of a batch one behind the other, as models of this kind want them."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}
        return batch | {key: batch[key].flatten(0, 1) for key in ("pixel_values", "image_grid_thw")}

    return collate


add("Qwen2-VL", qwen2_vl, columns=patches, collator=joined)
add("Idefics3", functools.partial(seeing, "Idefics3", "Idefics3VisionConfig", "LlamaConfig", image_token_id=IMAGE,
                                  scale_factor=2), columns=more_pictures(1, (1, 3, 8, 8)), **SLOW)  # fmt: skip
add("Gemma3 with pictures", functools.partial(seeing, "Gemma3", "SiglipVisionConfig", "Gemma3TextConfig",
                                              image_token_index=IMAGE, mm_tokens_per_image=4),
    columns=with_column("token_type_ids", lambda row, i: int(i < 4), pictures), **SLOW)  # fmt: skip


def git() -> Any:
    return build("GitForCausalLM", vision_config=dict(SEEN))


add("Git, pictures before the text", git, columns=more_pictures(0, (3, 8, 8)), reading="", **SLOW)

# --- rows without tokens ----------------------------------------------------------------------------------------------

NO_TOKENS = r"must have `input_ids`"


def heard() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {"input_features": [torch.randn(8, 32, generator=generator).tolist() for _ in range(NUM_ROWS)],
            "labels": texts(low=8, high=8)}  # fmt: skip


def seen() -> dict[str, Any]:
    return {"pixel_values": pictures()["pixel_values"], "labels": classes()["labels"]}


add("pictures alone", lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**SEEN, num_labels=3)),
    columns=seen, refused=NO_TOKENS)  # fmt: skip
add("speech", functools.partial(build, "WhisperForConditionalGeneration", num_mel_bins=8, max_source_positions=16,
                                **START), columns=heard, refused=NO_TOKENS)  # fmt: skip
