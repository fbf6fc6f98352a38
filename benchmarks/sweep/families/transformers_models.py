"""Hugging Face transformers: tiny random configurations, one of each model type."""

__all__ = ["cases"]

from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from torch import nn

from tests.contract import Case, Inputs

VOCABULARY, IMAGE, SAMPLES = 32, 32, 400

# The three ways in which configurations name the same sizes, and a vocabulary without special tokens beyond its end.
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BODY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
ENCODER = TOKENS | BODY | {"max_position_embeddings": 32}
LLAMA = ENCODER | {"num_key_value_heads": 1, "head_dim": 8}
GPT = TOKENS | {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
PAIR = {"d_model": 16, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
PAIR |= {"decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 24, "decoder_start_token_id": 1}
VISION = BODY | {"image_size": IMAGE, "patch_size": 16}
T5 = TOKENS | {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
RELATIVE = {"relative_attention": True, "position_buckets": 4, "share_att_key": True}
ATTENTION = [[["global", "local"], 1]]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
DEEPSEEK = EXPERTS | {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
DEEPSEEK |= {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
WAVE = BODY | {"vocab_size": VOCABULARY, "conv_dim": (8, 8), "conv_stride": (5, 4), "conv_kernel": (10, 8)}
WAVE |= {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
WAVE |= {"num_feat_extract_layers": 2, "apply_spec_augment": False}
MAMBA = TOKENS | {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "use_mambapy": False}
STAGES = {"hidden_sizes": [8, 12], "depths": [1, 1]}
SWIN = {"image_size": IMAGE, "patch_size": 4, "window_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2]}
BLOCKS = STAGES | {"num_encoder_blocks": 2, "strides": [4, 2]}
SEGFORMER = {"sr_ratios": [2, 1], "patch_sizes": [7, 3], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
MAE = {"decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
MAE |= {"decoder_hidden_size": 16, "decoder_intermediate_size": 24}
PATCHES = {"d_model": 16, "ffn_dim": 24, "num_input_channels": 2, "context_length": 16, "patch_length": 4}
PATCHES |= {"patch_stride": 4, "prediction_length": 3}


def _resnet() -> Any:
    return transformers.ResNetConfig(embedding_size=8, layer_type="basic", out_features=["stage2"], **STAGES)


# The sizes in a configuration, and the models that have such a configuration.
TEXT: list[tuple[dict[str, Any], str]] = [
    (ENCODER, "BertForMaskedLM RobertaForMaskedLM MPNetForMaskedLM FNetForMaskedLM"),
    (TOKENS | {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2}, "DistilBertForSequenceClassification"),
    (ENCODER | {"embedding_size": 12}, "ElectraForPreTraining"),
    (ENCODER | {"embedding_size": 12, "num_hidden_layers": 3}, "AlbertForMaskedLM"),
    (ENCODER | RELATIVE | {"pos_att_type": ["c2p", "p2c"]}, "DebertaV2ForMaskedLM"),
    (ENCODER | {"relative_attention": True, "pos_att_type": "c2p|p2c"}, "DebertaForMaskedLM"),
    (ENCODER | {"embedding_size": 16, "num_groups": 2}, "ConvBertForMaskedLM"),
    (ENCODER | {"embedding_size": 16}, "SqueezeBertForMaskedLM"),
    (ENCODER | {"cls_token_id": 1, "sep_token_id": 2}, "ModernBertForMaskedLM"),
    (ENCODER | {"mask_token_id": 3}, "EsmForMaskedLM"),
    (TOKENS | {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24}, "XLNetLMHeadModel"),
    (GPT, "GPT2LMHeadModel OpenAIGPTLMHeadModel GPTBigCodeForCausalLM"),
    (GPT | {"rotary_dim": 4}, "GPTJForCausalLM"),
    (ENCODER | {"num_layers": 2, "num_heads": 2, "attention_types": ATTENTION}, "GPTNeoForCausalLM"),
    (ENCODER, "GPTNeoXForCausalLM FalconForCausalLM PhiForCausalLM Phi3ForCausalLM"),
    (ENCODER | {"ffn_dim": 24, "word_embed_proj_dim": 12}, "OPTForCausalLM"),
    (TOKENS | {"hidden_size": 16, "n_layer": 2, "n_head": 2}, "BloomForCausalLM"),
    (LLAMA, "LlamaForCausalLM MistralForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM GemmaForCausalLM"),
    (LLAMA, "OlmoForCausalLM CohereForCausalLM Starcoder2ForCausalLM StableLmForCausalLM"),
    (LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}, "MixtralForCausalLM GptOssForCausalLM"),
    (LLAMA | EXPERTS | {"shared_expert_intermediate_size": 12}, "Qwen2MoeForCausalLM"),
    (LLAMA | EXPERTS, "Qwen3MoeForCausalLM"),
    (ENCODER | DEEPSEEK, "DeepseekV3ForCausalLM"),
    (LLAMA | {"query_pre_attn_scalar": 8}, "Gemma2ForCausalLM Gemma3ForCausalLM"),
    (MAMBA, "MambaForCausalLM"),
    (MAMBA | {"head_dim": 8, "num_heads": 4, "n_groups": 1}, "Mamba2ForCausalLM"),
    (TOKENS | {"hidden_size": 16, "num_hidden_layers": 2}, "RwkvForCausalLM"),
]
PAIRS: list[tuple[dict[str, Any], str]] = [
    (T5, "T5ForConditionalGeneration MT5ForConditionalGeneration"),
    (
        TOKENS | PAIR | {"max_position_embeddings": 32},
        "BartForConditionalGeneration PegasusForConditionalGeneration MarianMTModel",
    ),
]
IMAGES: list[tuple[dict[str, Any], str]] = [
    (VISION, "ViTForImageClassification DeiTForImageClassification"),
    (VISION | {"use_relative_position_bias": True}, "BeitForImageClassification"),
    (VISION | {"mlp_ratio": 2}, "Dinov2ForImageClassification"),
    (SWIN, "SwinForImageClassification Swinv2ForImageClassification"),
    (STAGES | {"num_stages": 2}, "ConvNextForImageClassification ConvNextV2ForImageClassification"),
    (STAGES | {"embedding_size": 8, "layer_type": "basic"}, "ResNetForImageClassification"),
    ({"image_size": IMAGE, "depth_multiplier": 0.25}, "MobileNetV2ForImageClassification"),
    (BLOCKS | {"patch_sizes": [7, 3], "padding": [2, 1]}, "PoolFormerForImageClassification"),
    (BLOCKS | SEGFORMER | {"decoder_hidden_size": 8}, "SegformerForSemanticSegmentation"),
    (VISION | {"image_size": [IMAGE, IMAGE], "num_detection_tokens": 3}, "YolosForObjectDetection"),
    (PAIR | {"num_queries": 3, "backbone_config": _resnet}, "DetrForObjectDetection"),
]


def cases() -> Iterator[Case]:
    """One model of each type listed here, under the name that ``config.model_type`` gives it."""
    for inputs, table in ((_text, TEXT), (_pair, PAIRS), (_image, IMAGES)):
        for sizes, names in table:
            for name in names.split():
                yield _case(name, sizes, inputs)
    yield _case(
        "ViTMAEForPreTraining",
        VISION | MAE,
        lambda model: ((), {"pixel_values": torch.randn(2, 3, IMAGE, IMAGE), "noise": torch.rand(2, 4)}),
    )
    both = {"text_config": ENCODER, "vision_config": VISION}
    yield _case("CLIPModel", both | {"projection_dim": 8}, _image_and_text)
    yield _case("SiglipModel", both, _image_and_text)
    for name in ("Wav2Vec2ForCTC", "HubertForCTC", "WavLMForCTC"):
        yield _case(name, WAVE, _sound)
    yield _case(
        "WhisperForConditionalGeneration",
        TOKENS | PAIR | {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 16},
        lambda model: ((), {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": _tokens(2, 5)}),
    )
    yield _case("PatchTSTForPrediction", BODY | PATCHES, lambda model: ((), {"past_values": torch.randn(2, 16, 2)}))


def _case(class_name: str, sizes: dict[str, Any], inputs: Callable[[nn.Module], Inputs]) -> Case:
    """A model of this class; a size that is a function makes the configuration of a part."""
    cls = getattr(transformers, class_name)

    def build() -> nn.Module:
        arguments = {name: size() if callable(size) else size for name, size in sizes.items()}
        config = cls.config_class(**arguments)
        _without_dropout(config)
        return cls(config)

    return Case(cls.config_class.model_type, build, inputs)


def _without_dropout(config: Any) -> None:
    """Leave the draws as the only noise of a forward in train."""
    for name, value in list(vars(config).items()):
        if isinstance(value, transformers.PreTrainedConfig):
            _without_dropout(value)
        elif "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)


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
