"""The smallest model of every module of timm, and a few more for what only they have.

``python -m benchmarks.sweep.families.timm_models`` finds the smallest models anew and prints ``SMALLEST``.
"""

__all__ = ["SMALLEST", "modules", "cases"]

from collections.abc import Iterator

import timm
import torch
from timm.models import _registry
from torch import nn

from tests.contract import Case, Inputs

SMALLEST = set(
    """
    beit_base_patch16_224 halonet_h1 test_byobnet cait_xxs24_224 coat_tiny convit_tiny convmixer_768_32
    test_convnext cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s cspnext_tiny davit_tiny
    deepseek_vit_412m deit_tiny_patch16_224 densenet121 dla46x_c dpn48b edgenext_xx_small efficientformer_l1
    efficientformerv2_s0 test_efficientnet efficientvim_m1 efficientvit_b0 efficientvit_m0
    vit_tiny_patch16_dinov3_qkvb fasternet_t0 fastvit_t8 focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m
    ghostnet_050 hardcorenas_b hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_t
    inception_next_atto ens_adv_inception_resnet_v2 adv_inception_v3 inception_v4 lcnetv2_small levit_128s
    lowformer_b0 test_mambaout test_coatnet poolformerv2_s12 gmlp_ti16_224 mobilenetv3_small_050
    mobilenetv5_base mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_parfac_gap nasnetalarge jx_nest_tiny
    nextvit_small test_nfnet pit_ti_224 pnasnet5large pvt_v2_b0 qwen3_vit_88m rdnet_tiny regnetx_002
    repghostnet_050 repvit_m1 res2next50 resnest14d test_resnet resnetv2_18 rexnet_100 selecsls42
    legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224
    swinv2_tiny_window16_256 swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m
    twins_svt_small vgg11 visformer_tiny test_vit vit_tiny_r_s16_p8_224 test_vit_relpos samvit_base_patch16_224
    vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw legacy_xception xception41p xcit_nano_12_p8_224
    """.split()
)
"""By the number of parameters, one for each module of timm 1.0.31."""

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


def cases() -> Iterator[Case]:
    """One model for each module of the timm that is installed, the cached biases also as Bayesian ones."""
    for models in modules().values():
        name = next((name for name in models if name in SMALLEST), models[0])
        yield _case(name, name)
        if name in _CACHED_BIASES:
            yield _case(f"{name}(select=attention_biases)", name, ["*.attention_biases"])
    for name in _MORE:
        yield _case(name, name)


def modules() -> dict[str, list[str]]:
    """Each module of ``timm.models`` that has models, with their names."""
    return {module: sorted(models) for module, models in sorted(_registry._module_to_models.items())}


def _case(title: str, name: str, select: list[str] | None = None) -> Case:
    size = _SIZES.get(name, 64)
    settings = {"select": select} if select else {}
    return Case(title, lambda: _build(name, size), lambda model: _images(size), settings=settings)


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
    for models in modules().values():
        print(min(models, key=_weights), flush=True)
