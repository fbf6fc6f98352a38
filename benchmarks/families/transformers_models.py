"""Hugging Face transformers: tiny random configurations, one of each model type."""

__all__ = ["specimens"]

from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import nn

from . import Inputs, Specimen

VOCABULARY, IMAGE, SAMPLES = 32, 32, 400

# The three ways in which configurations name the same sizes, and a vocabulary without special tokens beyond its end.
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BODY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
ENCODER = TOKENS | BODY | {"max_position_embeddings": 32}
LLAMA = ENCODER | {"num_key_value_heads": 1, "head_dim": 8}
GPT = TOKENS | {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
PAIR = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "decoder_start_token_id": 1,
}
VISION = BODY | {"image_size": IMAGE, "patch_size": 16}
T5 = TOKENS | {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
WAVE = BODY | {
    "vocab_size": VOCABULARY,
    "conv_dim": (8, 8),
    "conv_stride": (5, 4),
    "conv_kernel": (10, 8),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,
}
MAMBA = TOKENS | {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "use_mambapy": False}
STAGES = {"hidden_sizes": [8, 12], "depths": [1, 1]}


def specimens() -> Iterator[Specimen]:
    """One model of each type listed here, under the name that ``config.model_type`` gives it."""
    # Encoders of text.
    yield _specimen("BertForMaskedLM", ENCODER, _text)
    yield _specimen("RobertaForMaskedLM", ENCODER, _text)
    yield _specimen(
        "DistilBertForSequenceClassification",
        TOKENS | {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2},
        _text,
    )
    yield _specimen("ElectraForPreTraining", ENCODER | {"embedding_size": 12}, _text)
    yield _specimen("AlbertForMaskedLM", ENCODER | {"embedding_size": 12, "num_hidden_layers": 3}, _text)
    yield _specimen(
        "DebertaV2ForMaskedLM",
        ENCODER
        | {"relative_attention": True, "position_buckets": 4, "pos_att_type": ["c2p", "p2c"], "share_att_key": True},
        _text,
    )
    yield _specimen("DebertaForMaskedLM", ENCODER | {"relative_attention": True, "pos_att_type": "c2p|p2c"}, _text)
    yield _specimen("MPNetForMaskedLM", ENCODER, _text)
    yield _specimen("ConvBertForMaskedLM", ENCODER | {"embedding_size": 16, "num_groups": 2}, _text)
    yield _specimen("FNetForMaskedLM", ENCODER, _text)
    yield _specimen("SqueezeBertForMaskedLM", ENCODER | {"embedding_size": 16}, _text)
    yield _specimen("ModernBertForMaskedLM", ENCODER | {"cls_token_id": 1, "sep_token_id": 2}, _text)
    yield _specimen("EsmForMaskedLM", ENCODER | {"mask_token_id": 3}, _text)
    yield _specimen("XLNetLMHeadModel", TOKENS | {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}, _text)
    # Decoders of text.
    yield _specimen("GPT2LMHeadModel", GPT, _text)
    yield _specimen("OpenAIGPTLMHeadModel", GPT, _text)
    yield _specimen(
        "GPTNeoForCausalLM", ENCODER | {"num_layers": 2, "num_heads": 2, "attention_types": ATTENTION}, _text
    )
    yield _specimen("GPTNeoXForCausalLM", ENCODER, _text)
    yield _specimen("GPTJForCausalLM", GPT | {"rotary_dim": 4}, _text)
    yield _specimen("GPTBigCodeForCausalLM", GPT, _text)
    yield _specimen("OPTForCausalLM", ENCODER | {"ffn_dim": 24, "word_embed_proj_dim": 12}, _text)
    yield _specimen("BloomForCausalLM", TOKENS | {"hidden_size": 16, "n_layer": 2, "n_head": 2}, _text)
    yield _specimen("FalconForCausalLM", ENCODER, _text)
    yield _specimen("LlamaForCausalLM", LLAMA, _text)
    yield _specimen("MistralForCausalLM", LLAMA, _text)
    yield _specimen("MixtralForCausalLM", LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}, _text)
    yield _specimen("Qwen2ForCausalLM", LLAMA, _text)
    yield _specimen("Qwen2MoeForCausalLM", LLAMA | EXPERTS | {"shared_expert_intermediate_size": 12}, _text)
    yield _specimen("Qwen3ForCausalLM", LLAMA, _text)
    yield _specimen("Qwen3MoeForCausalLM", LLAMA | EXPERTS, _text)
    yield _specimen("GptOssForCausalLM", LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}, _text)
    yield _specimen(
        "DeepseekV3ForCausalLM",
        ENCODER
        | EXPERTS
        | {
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 4,
            "v_head_dim": 8,
            "first_k_dense_replace": 1,
        },
        _text,
    )
    yield _specimen("GemmaForCausalLM", LLAMA, _text)
    yield _specimen("Gemma2ForCausalLM", LLAMA | {"query_pre_attn_scalar": 8}, _text)
    yield _specimen("Gemma3ForCausalLM", LLAMA | {"query_pre_attn_scalar": 8}, _text)
    yield _specimen("PhiForCausalLM", ENCODER, _text)
    yield _specimen("Phi3ForCausalLM", ENCODER, _text)
    yield _specimen("StableLmForCausalLM", LLAMA, _text)
    yield _specimen("OlmoForCausalLM", LLAMA, _text)
    yield _specimen("CohereForCausalLM", LLAMA, _text)
    yield _specimen("Starcoder2ForCausalLM", LLAMA, _text)
    yield _specimen("MambaForCausalLM", MAMBA, _text)
    yield _specimen("Mamba2ForCausalLM", MAMBA | {"head_dim": 8, "num_heads": 4, "n_groups": 1}, _text)
    yield _specimen("RwkvForCausalLM", TOKENS | {"hidden_size": 16, "num_hidden_layers": 2}, _text)
    # Encoders and decoders of text.
    yield _specimen("T5ForConditionalGeneration", T5, _pair)
    yield _specimen("MT5ForConditionalGeneration", T5, _pair)
    yield _specimen("BartForConditionalGeneration", TOKENS | PAIR | {"max_position_embeddings": 32}, _pair)
    yield _specimen("PegasusForConditionalGeneration", TOKENS | PAIR | {"max_position_embeddings": 32}, _pair)
    yield _specimen("MarianMTModel", TOKENS | PAIR | {"max_position_embeddings": 32}, _pair)
    # Images.
    yield _specimen("ViTForImageClassification", VISION, _image)
    yield _specimen("DeiTForImageClassification", VISION, _image)
    yield _specimen("BeitForImageClassification", VISION | {"use_relative_position_bias": True}, _image)
    yield _specimen("Dinov2ForImageClassification", VISION | {"mlp_ratio": 2}, _image)
    yield _specimen(
        "SwinForImageClassification",
        {"image_size": IMAGE, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
        _image,
    )
    yield _specimen(
        "Swinv2ForImageClassification",
        {"image_size": IMAGE, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4},
        _image,
    )
    yield _specimen("ConvNextForImageClassification", {"num_stages": 2} | STAGES, _image)
    yield _specimen("ConvNextV2ForImageClassification", {"num_stages": 2} | STAGES, _image)
    yield _specimen("ResNetForImageClassification", {"embedding_size": 8, "layer_type": "basic"} | STAGES, _image)
    yield _specimen("MobileNetV2ForImageClassification", {"image_size": IMAGE, "depth_multiplier": 0.25}, _image)
    yield _specimen(
        "PoolFormerForImageClassification",
        {
            "num_encoder_blocks": 2,
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "padding": [2, 1],
        }
        | STAGES,
        _image,
    )
    yield _specimen(
        "SegformerForSemanticSegmentation",
        {
            "num_encoder_blocks": 2,
            "sr_ratios": [2, 1],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "num_attention_heads": [1, 2],
            "mlp_ratios": [2, 2],
            "decoder_hidden_size": 8,
        }
        | STAGES,
        _image,
    )
    yield _specimen(
        "YolosForObjectDetection", VISION | {"image_size": [IMAGE, IMAGE], "num_detection_tokens": 3}, _image
    )
    yield _specimen("DetrForObjectDetection", PAIR | {"num_queries": 3, "backbone_config": _resnet}, _image)
    yield _specimen(
        "ViTMAEForPreTraining",
        VISION | MAE,
        lambda model: ((), {"pixel_values": torch.randn(2, 3, IMAGE, IMAGE), "noise": torch.rand(2, 4)}),
    )
    # Images and text.
    yield _specimen(
        "CLIPModel", {"text_config": ENCODER, "vision_config": VISION, "projection_dim": 8}, _image_and_text
    )
    yield _specimen("SiglipModel", {"text_config": ENCODER, "vision_config": VISION}, _image_and_text)
    # Sound.
    yield _specimen("Wav2Vec2ForCTC", WAVE, _sound)
    yield _specimen("HubertForCTC", WAVE, _sound)
    yield _specimen("WavLMForCTC", WAVE, _sound)
    yield _specimen(
        "WhisperForConditionalGeneration",
        TOKENS | PAIR | {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16},
        lambda model: ((), {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": _tokens(2, 5)}),
    )
    # Time series.
    yield _specimen(
        "PatchTSTForPrediction",
        BODY
        | {"d_model": 16, "ffn_dim": 24, "num_input_channels": 2, "context_length": 16, "patch_length": 4}
        | {"patch_stride": 4, "prediction_length": 3},
        lambda model: ((), {"past_values": torch.randn(2, 16, 2)}),
    )


ATTENTION = [[["global", "local"], 1]]
MAE = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 24,
}


def _specimen(class_name: str, sizes: dict[str, Any], inputs: Callable[[nn.Module], Inputs]) -> Specimen:
    """A model of this class; a size that is a function makes the configuration of a part."""
    cls = getattr(transformers, class_name)

    def build() -> nn.Module:
        arguments = {name: size() if callable(size) else size for name, size in sizes.items()}
        config = cls.config_class(**arguments)
        _without_dropout(config)
        return cls(config)

    return Specimen(cls.config_class.model_type, build, inputs)


def _without_dropout(config: Any) -> None:
    """Leave the draws as the only noise of a forward in train."""
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            _without_dropout(value)
        elif "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)


def _resnet() -> Any:
    return transformers.ResNetConfig(embedding_size=8, layer_type="basic", out_features=["stage2"], **STAGES)


def _tokens(*shape: int) -> torch.Tensor:
    return torch.randint(4, VOCABULARY, shape)


def _text(model: nn.Module) -> Inputs:
    return (), {"input_ids": _tokens(2, 6)}


def _pair(model: nn.Module) -> Inputs:
    return (), {"input_ids": _tokens(2, 6), "decoder_input_ids": _tokens(2, 5)}


def _image(model: nn.Module) -> Inputs:
    return (), {"pixel_values": torch.randn(2, 3, IMAGE, IMAGE)}


def _image_and_text(model: nn.Module) -> Inputs:
    return (), {"input_ids": _tokens(2, 6), "pixel_values": torch.randn(2, 3, IMAGE, IMAGE)}


def _sound(model: nn.Module) -> Inputs:
    return (), {"input_values": torch.randn(2, SAMPLES)}
