"""The tables of `zoo`: architectures. One of each way of being different is tried by default, its family as slow.

A decoder whose loss does not shift is trained on labels that are shifted in the dataset, as its users do.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import transformers
from transformers import DataCollatorForPermutationLanguageModeling

from tests.training.zoo import (
    IMAGE,
    NUM_ROWS,
    PAD,
    SMALL,
    VOCAB,
    add,
    add_each,
    build,
    completions,
    for_pairs,
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

LM, MASKED, PAIRS = "ForCausalLM", "ForMaskedLM", "ForConditionalGeneration"
PADDED = {"columns": ragged, "collator": lm_collator}
LOW_RANK = {"q_lora_rank": 8, "head_dim": 4, "num_key_value_heads": 4}
HYBRID = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
          "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
SSM = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2, "mamba_chunk_size": 4}
HEAD = {"head": "LMHeadModel"}
SLOW = {"slow": True}

# --- causal language models ------------------------------------------------------------------------------------------

add_each("Llama Mistral Gemma2 GptOss BioGpt Bloom Mamba Rwkv", LM)
add_each(
    {
        "Falcon": {"alibi": True},
        "DeepseekV3": LOW_RANK,
        "Mamba2": {"num_heads": 8, "n_groups": 2, "chunk_size": 4},
        "Qwen3Next": HYBRID,
        "GPT2": HEAD,
        "Bert": {**HEAD, "is_decoder": True},
    },
    LM,
)
add_each("GPTNeoX Cohere2", LM, **PADDED)
add_each(
    {
        "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
                  "mamba_dt_rank": 4, "mamba_d_state": 4, "use_mamba_kernels": False},
    },
    LM, **PADDED,
)  # fmt: skip
ROUTED = {"output_router_logits": True, "router_aux_loss_coef": 0.5}
UNROUTED = {"without": {"output_router_logits": False}}
add_each({"Mixtral": ROUTED}, LM, **UNROUTED)
add_each({"Qwen2Moe": ROUTED, "GraniteMoe": ROUTED}, LM, slow=True, **UNROUTED)
# A causal head on an encoder that sees both ways: shifted all the same, and padding must stay masked.
add("BertLMHeadModel both ways", functools.partial(build, "BertLMHeadModel"), **PADDED)

add_each(
    "Afmoe Apertus Arcee AriaText BitNet Camembert CodeGen Cohere Cohere2Moe Cwm Data2VecText DiffLlama Doge Dots1 "
    "Electra Ernie Ernie4_5 Ernie4_5_Moe Exaone4 FalconMamba FlexOlmo Gemma Glm Glm4 Glm4Moe GPTBigCode Granite "
    "GPTNeoXJapanese GraniteMoeShared Helium HunYuanDenseV1 HunYuanMoEV1 JetMoe Lfm2 MegatronBert MiniMax MiniMaxM2 "
    "Ministral ModernBertDecoder Moshi NanoChat Nemotron Olmo Olmo2 Olmo3 OlmoHybrid Olmoe Persimmon Phi Phimoe Qwen2 "
    "Qwen3Moe RemBert Roberta RobertaPreLayerNorm RoFormer SeedOss SmolLM3 SolarOpen Starcoder2 VaultGemma XLMRoberta "
    "XLMRobertaXL BigBird GPTJ Qwen3 OPT XGLM Mpt Phi3 StableLm", LM, slow=True, **PADDED,
)  # fmt: skip
add_each("BertGenerationDecoder", "", slow=True, **PADDED)
# What it says of a position depends on two later tokens, so that no likelihood of a passage's tokens is its own.
add_each({"ProphetNet": {"num_hidden_layers": ..., "num_encoder_layers": 2, "num_decoder_layers": 2,
                         "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4}}, LM, slow=True,
         columns=shifted, refused=r"reference_loss=")  # fmt: skip
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
        "GPTNeo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
        "GraniteMoeHybrid": {**SSM, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 48},
        "Lfm2Moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
        "Llama4": {"config": "Llama4TextConfig", "intermediate_size_mlp": 48, "attention_chunk_size": 8,
                   "layer_types": ["chunked_attention", "full_attention"]},
        "LongcatFlash": {**LOW_RANK, "expert_ffn_hidden_size": 24, "moe_topk": 2, "zero_expert_num": 1},
        "MiniCPM3": LOW_RANK,
        "CTRL": HEAD,
        "Gemma3": {"config": "Gemma3TextConfig"},
        "OpenAIGPT": HEAD,
        "RecurrentGemma": {"block_types": ["recurrent", "attention"], "num_key_value_heads": 1},
        "Qwen3_5": {**HYBRID, "config": "Qwen3_5TextConfig"},
        "Xmod": {"is_decoder": True, "languages": ["en"], "default_language": "en"},
        "Zamba2": {"layers_block_type": ["mamba", "hybrid"], "num_key_value_heads": 4, "head_dim": ...,
                   "n_mamba_heads": 4, "mamba_d_state": 8, "mamba_headdim": 16, "mamba_ngroups": 1, "chunk_size": 4,
                   "num_mem_blocks": 1, "hybrid_layer_ids": [1], "use_mamba_kernels": False},
    },
    LM, slow=True, **PADDED,
)  # fmt: skip

# --- decoders whose loss does not shift ------------------------------------------------------------------------------

DECODER = {"columns": shifted, "reading": "unshifted"}
add_each("Bart Pegasus Whisper", LM, **DECODER)
add_each({"XLM": {"causal": True, "head": "WithLMHeadModel"}}, "", **DECODER)
add_each("TrOCR MBart Marian Blenderbot BlenderbotSmall PLBart Mvp", LM, slow=True, **DECODER)

# --- masked language models ------------------------------------------------------------------------------------------

HIDDEN = {"columns": unlabelled, "collator": masking, "reading": "unshifted"}
add_each("Bert ModernBert FNet", MASKED, **HIDDEN)
add_each("Deberta", MASKED, **{**HIDDEN, "columns": ragged})
add(
    "XLNet permuted", functools.partial(build, "XLNetLMHeadModel", max_position_embeddings=...), columns=unlabelled,
    collator=lambda model: DataCollatorForPermutationLanguageModeling(tokenizer()), reading="unshifted",
)  # fmt: skip
add_each(
    "DistilBert Electra DebertaV2 Albert Camembert ConvBert Data2VecText Ernie Esm EuroBert IBert "
    "MegatronBert MobileBert MPNet NomicBert RemBert Roberta RobertaPreLayerNorm RoFormer SqueezeBert Tapas "
    "XLMRoberta XLMRobertaXL", MASKED, slow=True,
    **{**HIDDEN, "columns": ragged},
)  # fmt: skip
add_each({"Flaubert": {"head": "WithLMHeadModel"}}, "", slow=True, **{**HIDDEN, "columns": ragged})

# --- encoder-decoders ------------------------------------------------------------------------------------------------

BOTH = {"columns": pairs, "collator": for_pairs, "reading": "unshifted", "reference": completions}
START = {"decoder_start_token_id": PAD}
t5 = functools.partial(build, "T5ForConditionalGeneration", **START)
add_each("Bart", PAIRS, **BOTH)
# Experts of a fixed capacity: what a row loses depends on the rows beside it.
SWITCH = {**START, "expert_capacity": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1,
          "num_decoder_layers": 2}  # fmt: skip
add_each({"SwitchTransformers": SWITCH}, PAIRS, **BOTH, **UNROUTED)  # in transformers 4 routed by default
add("T5", t5, **BOTH)
add("T5 without decoder inputs", t5, **{**BOTH, "collator": lambda model: for_pairs(None)})
add("T5 and a reference of texts", t5, columns=pairs, collator=for_pairs,
    refused=r"prompts and completions for an encoder-decoder")  # fmt: skip
add_each(
    "Pegasus MBart M2M100 Mvp NllbMoe PLBart Blenderbot BlenderbotSmall BigBirdPegasus", PAIRS, slow=True, **BOTH,
)  # fmt: skip
add_each({"LED": {"attention_window": [4, 4]}, "PegasusX": {"block_size": 4}}, PAIRS, slow=True, **BOTH)
add_each({"MT5": START, "UMT5": START, "LongT5": START}, PAIRS, slow=True, **BOTH)
add_each({"SeamlessM4T": {"head": "ForTextToText"}, "Marian": {**START, "head": "MTModel"}}, "", slow=True, **BOTH)

# --- pictures and text -----------------------------------------------------------------------------------------------

SEEN = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8,
        "patch_size": 4}  # fmt: skip
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "pad_token_id", "bos_token_id", "eos_token_id")  # fmt: skip
TEXT = {key: SMALL[key] for key in SIZES}


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
    columns=with_column("token_type_ids", lambda row, i: int(i >= 6), pictures), **SLOW)  # fmt: skip


def more_pictures(num_tokens: int, shape: tuple[int, ...], **columns: Any) -> Any:
    return lambda: {**pictures(num_tokens, shape), **{key: [value] * NUM_ROWS for key, value in columns.items()}}


def qwen2_vl() -> Any:
    kind = transformers.Qwen2VLForConditionalGeneration
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


# Its pictures stand before the text and have logits: only its own loss knows how many, and passages have none.
add("Git", git, columns=more_pictures(0, (3, 8, 8)), reading="row by row", **SLOW)

# --- rows without tokens; with an influence model that reads them they are in `test_modalities` ----------------------

NO_TOKENS = r"reads text, and the rows of this pool have none"


def heard() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {"input_features": [torch.randn(8, 32, generator=generator).tolist() for _ in range(NUM_ROWS)],
            "labels": texts(low=8, high=8)}  # fmt: skip


def seen() -> dict[str, Any]:
    return {"pixel_values": pictures()["pixel_values"], "labels": [i % 3 for i in range(NUM_ROWS)]}


add("pictures alone", lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**SEEN, num_labels=3)),
    columns=seen, refused=NO_TOKENS)  # fmt: skip
add("speech", functools.partial(build, "WhisperForConditionalGeneration", num_mel_bins=8, max_source_positions=16,
                                **START), columns=heard, refused=NO_TOKENS)  # fmt: skip
