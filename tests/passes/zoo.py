"""Tiny random instances of many architectures, and a count of their norms that knows no graphs."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

IDS = torch.arange(1, 13).reshape(2, 6)
TEXT = {"input_ids": IDS}
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GQA = {**SMALL, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
IMAGE = {"image_size": 16, "patch_size": 4, "num_channels": 3}
VISION = {k: v for k, v in SMALL.items() if k not in ("vocab_size", "max_position_embeddings")}

#: name -> (config class, model class, config arguments, kind of input)
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT, "text"),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {**SMALL, "ffn_dim": 48, "word_embed_proj_dim": 32},
        "text",
    ),
    "bert": ("BertConfig", "BertModel", SMALL, "text"),
    "llama": ("LlamaConfig", "LlamaForCausalLM", GQA, "text"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**GQA, "head_dim": 8}, "text"),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**GQA, "head_dim": 8, "query_pre_attn_scalar": 8},
        "text",
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", SMALL, "text"),
    "phi": ("PhiConfig", "PhiForCausalLM", {**GQA, "qk_layernorm": True}, "text"),
    "bloom": (
        "BloomConfig",
        "BloomForCausalLM",
        {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
        "text",
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "vocab_size": 64,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        "seq2seq",
    ),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", GQA, "text"),
    "falcon": (
        "FalconConfig",
        "FalconForCausalLM",
        {**SMALL, "new_decoder_architecture": True, "num_kv_heads": 2},
        "text",
    ),
    "mpt": (
        "MptConfig",
        "MptForCausalLM",
        {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
        "text",
    ),
    "codegen": ("CodeGenConfig", "CodeGenForCausalLM", {**GPT, "rotary_dim": 4}, "text"),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", GQA, "text"),
    "gpt_bigcode": ("GPTBigCodeConfig", "GPTBigCodeForCausalLM", GPT, "text"),
    "modernbert": (
        "ModernBertConfig",
        "ModernBertModel",
        {**SMALL, "pad_token_id": 0, "attn_implementation": "sdpa"},
        "text",
    ),
    "vit": ("ViTConfig", "ViTModel", {**VISION, **IMAGE}, "image"),
    "dinov2": ("Dinov2Config", "Dinov2Model", {**VISION, **IMAGE}, "image"),
    "clip_vision": ("CLIPVisionConfig", "CLIPVisionModel", {**VISION, **IMAGE}, "image"),
    "convnext": (
        "ConvNextConfig",
        "ConvNextModel",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2},
        "image",
    ),
    "swin": (
        "SwinConfig",
        "SwinModel",
        {
            "image_size": 16,
            "patch_size": 2,
            "embed_dim": 8,
            "depths": [2, 1],
            "num_heads": [2, 2],
            "window_size": 4,
        },
        "image",
    ),
    "resnet": (
        "ResNetConfig",
        "ResNetModel",
        {
            "embedding_size": 8,
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "layer_type": "basic",
        },
        "image",
    ),
    # -- more architectures, beyond the ones promised
    "mistral": ("MistralConfig", "MistralForCausalLM", GQA, "text"),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", GQA, "text"),
    "cohere": ("CohereConfig", "CohereForCausalLM", {**GQA, "use_qk_norm": True}, "text"),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", {**GQA, "qk_layernorm": True}, "text"),
    "gptj": ("GPTJConfig", "GPTJForCausalLM", {**GPT, "rotary_dim": 4}, "text"),
    "xlm_roberta": ("XLMRobertaConfig", "XLMRobertaModel", SMALL, "text"),
    "deberta_v2": (
        "DebertaV2Config",
        "DebertaV2Model",
        {**SMALL, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        "text",
    ),
    "deberta": ("DebertaConfig", "DebertaModel", SMALL, "text"),
    "whisper": (
        "WhisperConfig",
        "WhisperModel",
        {
            "vocab_size": 64,
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "max_target_positions": 32,
            "pad_token_id": 0,
            "decoder_start_token_id": 1,
        },
        "audio",
    ),
    "mamba": (
        "MambaConfig",
        "MambaModel",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
        "text_uncached",
    ),
    "mamba2": (
        "Mamba2Config",
        "Mamba2Model",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "state_size": 4,
            "num_heads": 4,
            "head_dim": 16,
            "n_groups": 1,
            "chunk_size": 8,
        },
        "text_uncached",
    ),
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", {**GQA, "head_dim": 8}, "text"),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**GQA, "head_dim": 8}, "text"),
    "granite": ("GraniteConfig", "GraniteForCausalLM", GQA, "text"),
    "nemotron": ("NemotronConfig", "NemotronForCausalLM", GQA, "text"),
    "olmo": ("OlmoConfig", "OlmoForCausalLM", GQA, "text"),
    "glm4": ("Glm4Config", "Glm4ForCausalLM", {**GQA, "head_dim": 8}, "text"),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {**GQA, "num_local_experts": 2, "num_experts_per_tok": 1},
        "text",
    ),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertModel",
        {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
        "text",
    ),
    "electra": ("ElectraConfig", "ElectraModel", {**SMALL, "embedding_size": 16}, "text"),
    "albert": ("AlbertConfig", "AlbertModel", {**SMALL, "embedding_size": 16}, "text"),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", SMALL, "text"),
    "siglip_vision": ("SiglipVisionConfig", "SiglipVisionModel", {**VISION, **IMAGE}, "image"),
    "beit": ("BeitConfig", "BeitModel", {**VISION, **IMAGE}, "image"),
    "vitdet": ("VitDetConfig", "VitDetModel", {**VISION, **IMAGE}, "image"),
    "convnextv2": (
        "ConvNextV2Config",
        "ConvNextV2Model",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2},
        "image",
    ),
    "segformer": (
        "SegformerConfig",
        "SegformerModel",
        {
            "num_encoder_blocks": 2,
            "depths": [1, 1],
            "hidden_sizes": [8, 16],
            "num_attention_heads": [1, 2],
            "sr_ratios": [2, 1],
            "patch_sizes": [3, 3],
            "strides": [2, 2],
            "mlp_ratios": [2, 2],
        },
        "image",
    ),
    "wav2vec2": (
        "Wav2Vec2Config",
        "Wav2Vec2Model",
        {
            **VISION,
            "conv_dim": [8, 8],
            "conv_kernel": [3, 3],
            "conv_stride": [2, 2],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
        },
        "wave",
    ),
    "bart": (
        "BartConfig",
        "BartModel",
        {
            "vocab_size": 64,
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 64,
        },
        "seq2seq",
    ),
    "persimmon": ("PersimmonConfig", "PersimmonForCausalLM", GQA, "text"),
    "minilm_like_mpnet": ("MPNetConfig", "MPNetModel", SMALL, "text"),
    "squeezebert": (
        "SqueezeBertConfig",
        "SqueezeBertModel",
        {
            **SMALL,
            "embedding_size": 32,
            "q_groups": 1,
            "k_groups": 1,
            "v_groups": 1,
            "post_attention_groups": 1,
            "intermediate_groups": 1,
            "output_groups": 1,
        },
        "text",
    ),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", GQA, "text"),
    "exaone4": ("Exaone4Config", "Exaone4ForCausalLM", GQA, "text"),
    "ernie4_5": ("Ernie4_5Config", "Ernie4_5ForCausalLM", GQA, "text"),
    "helium": ("HeliumConfig", "HeliumForCausalLM", {**GQA, "head_dim": 8}, "text"),
    "diffllama": ("DiffLlamaConfig", "DiffLlamaForCausalLM", GQA, "text"),
    "xglm": (
        "XGLMConfig",
        "XGLMModel",
        {"vocab_size": 64, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
        "text",
    ),
    "rwkv": (
        "RwkvConfig",
        "RwkvModel",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "attention_hidden_size": 32,
            "intermediate_size": 48,
        },
        "text",
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {
            **GQA,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
        "text",
    ),
    "cohere2": ("Cohere2Config", "Cohere2ForCausalLM", GQA, "text"),
    "openai_gpt": ("OpenAIGPTConfig", "OpenAIGPTModel", GPT, "text"),
    "llama4_text": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            **GQA,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "interleave_moe_layer_step": 1,
        },
        "text",
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {**GQA, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
        "text",
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            **GQA,
            "num_key_value_heads": 4,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "first_k_dense_replace": 2,
        },
        "text",
    ),
}


def build(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny random model in evaluation mode and the inputs its users would give."""
    import transformers

    config_class, model_class, settings, kind = ARCHITECTURES[name]
    config = getattr(transformers, config_class)(**settings)
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).eval()
    with torch.no_grad():  # norms whose gain is one and bias zero would hide a lost affine part
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model, inputs(kind)


def inputs(kind: str) -> dict[str, Any]:
    g = torch.Generator().manual_seed(1)
    if kind == "text":
        return {"input_ids": IDS}
    if kind == "text_uncached":  # a cache of states cannot be an output of torch.export
        return {"input_ids": IDS, "use_cache": False}
    if kind == "seq2seq":
        return {"input_ids": IDS, "decoder_input_ids": IDS[:, :4]}
    if kind == "image":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=g)}
    if kind == "wave":
        return {"input_values": torch.randn(2, 64, generator=g)}
    if kind == "audio":
        return {
            "input_features": torch.randn(2, 8, 32, generator=g),
            "decoder_input_ids": IDS[:, :4],
        }
    raise ValueError(kind)


_FUNCTIONS = {"layer_norm": "row", "rms_norm": "row", "batch_norm": "batch_norm"}
_FUNCTIONS |= {"group_norm": "group_norm", "instance_norm": "instance_norm"}
_NORM_CLASS = re.compile(r"norm", re.IGNORECASE)


def _class_kind(module: nn.Module) -> str | None:
    """``row`` (layer or RMS norm), ``batch_norm``… for a module that *is* a norm, else ``None``."""
    if type(module).__module__.startswith("torch.nn.utils"):
        return None  # weight and spectral norm: parametrizations of weights
    if any(True for _ in module.children()) or not _NORM_CLASS.search(type(module).__name__):
        return None
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "batch_norm"
    if isinstance(module, nn.GroupNorm):
        return "group_norm"
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return "instance_norm"
    return "row"


@contextlib.contextmanager
def counted_norms(model: nn.Module) -> Iterator[Counter[str]]:
    """Counts the norms of every forward run inside: norm modules, and functional calls elsewhere."""
    counts: Counter[str] = Counter()
    inside = [0]
    handles = []

    def enter(kind: str) -> Callable:
        def hook(*_: Any) -> None:
            if not inside[0]:
                counts[kind] += 1
            inside[0] += 1

        return hook

    def leave(*_: Any) -> None:
        inside[0] -= 1

    for module in model.modules():
        kind = _class_kind(module)
        if kind is not None:
            handles.append(module.register_forward_pre_hook(enter(kind)))
            handles.append(module.register_forward_hook(leave))
    saved = {name: getattr(F, name) for name in _FUNCTIONS}

    def wrap(name: str) -> Callable:
        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            if not inside[0]:
                counts[_FUNCTIONS[name]] += 1
            return saved[name](*args, **kwargs)

        return call

    for name in _FUNCTIONS:
        setattr(F, name, wrap(name))
    try:
        yield counts
    finally:
        for name, function in saved.items():
            setattr(F, name, function)
        for handle in handles:
            handle.remove()
