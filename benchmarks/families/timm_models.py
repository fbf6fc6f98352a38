"""The smallest model of every module of timm, and a few more for what only they have.

Usage: ``python -m families.timm_models`` in ``benchmarks`` finds the smallest models anew and prints ``SMALLEST``.
"""

__all__ = ["SMALLEST", "modules", "specimens"]

from collections.abc import Iterator

import timm
import torch
from timm.models import _registry
from torch import nn

from . import Inputs, Specimen

SMALLEST = {
    "beit": "beit_base_patch16_224",
    "byoanet": "halonet_h1",
    "byobnet": "test_byobnet",
    "cait": "cait_xxs24_224",
    "coat": "coat_tiny",
    "convit": "convit_tiny",
    "convmixer": "convmixer_768_32",
    "convnext": "test_convnext",
    "cpubone": "cpubone_nano",
    "crossvit": "crossvit_tiny_240",
    "csatv2": "csatv2",
    "cspnet": "cs3darknet_focus_s",
    "cspnext": "cspnext_tiny",
    "davit": "davit_tiny",
    "deepseek_vit": "deepseek_vit_412m",
    "deit": "deit_tiny_patch16_224",
    "densenet": "densenet121",
    "dla": "dla46x_c",
    "dpn": "dpn48b",
    "edgenext": "edgenext_xx_small",
    "efficientformer": "efficientformer_l1",
    "efficientformer_v2": "efficientformerv2_s0",
    "efficientnet": "test_efficientnet",
    "efficientvim": "efficientvim_m1",
    "efficientvit_mit": "efficientvit_b0",
    "efficientvit_msra": "efficientvit_m0",
    "eva": "vit_tiny_patch16_dinov3_qkvb",
    "fasternet": "fasternet_t0",
    "fastvit": "fastvit_t8",
    "focalnet": "focalnet_tiny_srf",
    "gcvit": "gcvit_xxtiny",
    "gemma4_vit": "gemma4_vit_167m",
    "ghostnet": "ghostnet_050",
    "hardcorenas": "hardcorenas_b",
    "hgnet": "hgnetv2_b0",
    "hiera": "hiera_tiny_224",
    "hieradet_sam2": "sam2_hiera_tiny",
    "hrnet": "hrnet_w18_small",
    "iformer": "iformer_t",
    "inception_next": "inception_next_atto",
    "inception_resnet_v2": "ens_adv_inception_resnet_v2",
    "inception_v3": "adv_inception_v3",
    "inception_v4": "inception_v4",
    "lcnetv2": "lcnetv2_small",
    "levit": "levit_128s",
    "lowformer": "lowformer_b0",
    "mambaout": "test_mambaout",
    "maxxvit": "test_coatnet",
    "metaformer": "poolformerv2_s12",
    "mlp_mixer": "gmlp_ti16_224",
    "mobilenetv3": "mobilenetv3_small_050",
    "mobilenetv5": "mobilenetv5_base",
    "mobilevit": "mobilevit_xxs",
    "mvitv2": "mvitv2_tiny",
    "naflexvit": "naflexvit_base_patch16_parfac_gap",
    "nasnet": "nasnetalarge",
    "nest": "jx_nest_tiny",
    "nextvit": "nextvit_small",
    "nfnet": "test_nfnet",
    "pit": "pit_ti_224",
    "pnasnet": "pnasnet5large",
    "pvt_v2": "pvt_v2_b0",
    "qwen3_vit": "qwen3_vit_88m",
    "rdnet": "rdnet_tiny",
    "regnet": "regnetx_002",
    "repghost": "repghostnet_050",
    "repvit": "repvit_m1",
    "res2net": "res2next50",
    "resnest": "resnest14d",
    "resnet": "test_resnet",
    "resnetv2": "resnetv2_18",
    "rexnet": "rexnet_100",
    "selecsls": "selecsls42",
    "senet": "legacy_seresnet18",
    "sequencer": "sequencer2d_s",
    "shvit": "shvit_s1",
    "sknet": "skresnet18",
    "starnet": "starnet_s050",
    "swiftformer": "swiftformer_xs",
    "swin_transformer": "swin_tiny_patch4_window7_224",
    "swin_transformer_v2": "swinv2_tiny_window16_256",
    "swin_transformer_v2_cr": "swinv2_cr_tiny_224",
    "tiny_vit": "tiny_vit_5m_224",
    "tnt": "tnt_s_legacy_patch16_224",
    "tresnet": "tresnet_m",
    "twins": "twins_svt_small",
    "vgg": "vgg11",
    "visformer": "visformer_tiny",
    "vision_transformer": "test_vit",
    "vision_transformer_hybrid": "vit_tiny_r_s16_p8_224",
    "vision_transformer_relpos": "test_vit_relpos",
    "vision_transformer_sam": "samvit_base_patch16_224",
    "vitamin": "vitamin_small_224",
    "volo": "volo_d1_224",
    "vovnet": "ese_vovnet19b_slim_dw",
    "xception": "legacy_xception",
    "xception_aligned": "xception41p",
    "xcit": "xcit_nano_12_p8_224",
}
"""By the number of parameters, in timm 1.0.31."""

_MORE = (
    "eva02_tiny_patch14_224",  # EVA as such; the smallest model of its module is DINOv3
    "mobilevitv2_050",  # separable attention
    "resnetv2_50x1_bit",  # convolutions with standardised weights, and group normalisation
    "swinv2_cr_tiny_ns_224",  # a norm after each stage
)
_SIZES = {
    "crossvit_tiny_240": 240,
    "deepseek_vit_412m": 56,
    "efficientformer_l1": 224,
    "ens_adv_inception_resnet_v2": 96,
    "adv_inception_v3": 96,
    "eva02_tiny_patch14_224": 56,
    "halonet_h1": 256,
    "inception_v4": 96,
}
"""Where 64 pixels are too few, no multiple of the patch, or not a size that the model can be built for."""

# Where bare parameters are added to the attention logits and, in eval, what is indexed from them is kept.
_CACHED_BIASES = ("levit_128s", "efficientformerv2_s0", "efficientvit_m0", "tiny_vit_5m_224")


def specimens() -> Iterator[Specimen]:
    """One model for each module of the timm that is installed, the cached biases also as Bayesian ones."""
    for module, models in modules().items():
        name = SMALLEST.get(module, models[0])
        yield _specimen(name, name)
        if name in _CACHED_BIASES:
            yield _specimen(f"{name}(select=attention_biases)", name, ["*.attention_biases"])
    for name in _MORE:
        yield _specimen(name, name)


def modules() -> dict[str, list[str]]:
    """Each module of ``timm.models`` that has models, with their names."""
    return {module: sorted(models) for module, models in sorted(_registry._module_to_models.items())}


def _specimen(title: str, name: str, select: list[str] | None = None) -> Specimen:
    size = _SIZES.get(name, 64)
    settings = {"select": select} if select else {}
    return Specimen(title, lambda: _build(name, size), lambda model: _images(size), settings=settings)


def _build(name: str, size: int) -> nn.Module:
    try:
        return timm.create_model(name, img_size=size)
    except TypeError:  # the model takes any size
        return timm.create_model(name)


def _images(size: int) -> Inputs:
    return (torch.randn(2, 3, size, size),), {}


def _weights(name: str) -> float:
    try:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in timm.create_model(name).parameters())
    except RuntimeError:  # a name that timm lists but does not build
        return float("inf")


if __name__ == "__main__":
    for module, models in modules().items():
        print(f'    "{module}": "{min(models, key=_weights)}",', flush=True)
