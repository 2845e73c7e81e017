"""Models that people use, unedited: random weights, as small as their constructors make them."""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported

WORDS, LENGTH, CLASSES = 32, 6, 3
_LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
_TEXT = {**_LAYERS, "intermediate_size": 24, "vocab_size": WORDS, "max_position_embeddings": 32}
_GROUPED = {**_TEXT, "num_key_value_heads": 1}


@dataclasses.dataclass(frozen=True)
class Family:
    """One kind of model.

    Attributes:
        label: what a table calls it.
        library: the package that has it.
        build: makes one.
        inputs: what it is called with, of so many rows.
        sections: how many of each kind it has.
        names: a pattern of their names.
        block: one of its blocks.
        vanishes: whether nothing is left of that block without its sections.
        left_out: how many blocks get no gate.
    """

    label: str
    library: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    sections: dict[str, int]
    names: str
    block: str
    vanishes: bool = True
    left_out: int = 0


def images(rows, size=32):
    return torch.randn(rows, 3, size, size)


def pixels(rows):
    return {"pixel_values": images(rows, 16)}


def words(rows, **more):
    return {"input_ids": torch.randint(1, WORDS, (rows, LENGTH)), **more}


def padded(rows):
    """Sentences of different lengths; the first one is whole."""
    mask = torch.ones(rows, LENGTH, dtype=torch.long)
    mask[1::2, LENGTH - 2 :] = 0
    return words(rows, attention_mask=mask)


def pairs(rows):
    return words(rows, decoder_input_ids=torch.randint(1, WORDS, (rows, LENGTH - 1)))


def _torchvision(label, make, *, inputs=images, **facts):
    def build():
        from torchvision import models

        return make(models)

    return Family(label, "torchvision", build, inputs, **facts)


def _timm(label, architecture, *, options=None, inputs=images, **facts):
    def build():
        import timm

        return timm.create_model(architecture, num_classes=CLASSES, **(options or {}))

    return Family(label, "timm", build, inputs, **facts)


def _transformers(label, model, config, options, *, inputs=words, **facts):
    def build():
        import transformers

        return getattr(transformers, model)(getattr(transformers, config)(**options))

    return Family(label, "transformers", build, inputs, **facts)


def _resnet(models, block, layers, **options):
    block = getattr(models.resnet, block)
    return models.ResNet(block, layers, num_classes=CLASSES, **options)


def _regnet(models):
    parameters = models.regnet.BlockParams(
        depths=[2, 2], widths=[8, 16], group_widths=[4, 4], bottleneck_multipliers=[1, 1],
        strides=[2, 2], se_ratio=0.25,
    )  # fmt: skip
    return models.RegNet(parameters, num_classes=CLASSES, stem_width=8)


def _mobilenet_v3(models):
    config = functools.partial(models.mobilenetv3.InvertedResidualConfig, width_mult=1.0)
    rows = [
        config(8, 3, 8, 8, True, "RE", 1, 1),
        config(8, 3, 16, 8, False, "RE", 1, 1),
        config(8, 5, 16, 16, True, "HS", 2, 1),
        config(16, 5, 24, 16, True, "HS", 1, 1),
    ]
    return models.MobileNetV3(rows, last_channel=16, num_classes=CLASSES, dropout=0.1)


def _efficientnet(models):
    config = functools.partial(models.efficientnet.MBConvConfig, width_mult=1.0, depth_mult=1.0)
    rows = [config(1, 3, 1, 8, 8, 2), config(2, 3, 2, 8, 16, 2)]
    return models.EfficientNet(
        rows, dropout=0.1, stochastic_depth_prob=0.1, num_classes=CLASSES, last_channel=16
    )


def _swin(models, second=False):
    swin = models.swin_transformer
    options = {}
    if second:
        options = {
            "block": swin.SwinTransformerBlockV2,
            "downsample_layer": swin.PatchMergingV2,
        }
    return models.SwinTransformer(
        patch_size=[4, 4], embed_dim=8, depths=[2, 1], num_heads=[1, 2], window_size=[2, 2],
        num_classes=CLASSES, **options,
    )  # fmt: skip


def _convnext(models):
    config = models.convnext.CNBlockConfig
    return models.ConvNeXt([config(8, 16, 2), config(16, None, 1)], num_classes=CLASSES)


def _mixer():
    import timm

    return timm.models.MlpMixer(
        num_classes=CLASSES, img_size=16, patch_size=8, num_blocks=2, embed_dim=16
    )


def _timm_efficientnet():
    import timm
    from timm.models._efficientnet_builder import decode_arch_def

    stages = decode_arch_def([["ds_r2_k3_s1_e1_c8_se0.25"], ["ir_r2_k3_s2_e2_c16_se0.25"]])
    return timm.models.EfficientNet(stages, CLASSES, num_features=16, stem_size=8)


_GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": WORDS, "n_positions": 32,
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
_OPT = {
    "hidden_size": 16, "word_embed_proj_dim": 16, "num_hidden_layers": 2, "ffn_dim": 24,
    "num_attention_heads": 2, "vocab_size": WORDS, "max_position_embeddings": 32,
}  # fmt: skip
_T5 = {
    "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": WORDS,
    "decoder_start_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
_BART = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
    "vocab_size": WORDS, "max_position_embeddings": 32, "decoder_start_token_id": 2,
}  # fmt: skip
_DISTILBERT = {
    "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "vocab_size": WORDS,
    "max_position_embeddings": 32,
}  # fmt: skip
_VIT = {**_LAYERS, "intermediate_size": 24, "image_size": 16, "patch_size": 8}
_SWIN = {
    "image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2],
    "window_size": 2,
}  # fmt: skip
_TIMM_VIT = {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 16, "num_heads": 2}
_SMALL = functools.partial(images, size=16)
_RESNET = {"inputs": _SMALL, "sections": {"twin": 5}, "names": r"layer\d\.\d", "block": "layer1.1"}
_REGNET = {
    "sections": {"branch": 2, "opaque": 2}, "names": r"trunk_output\.block\d\.block\d-\d(\.f)?",
    "block": "trunk_output.block1.block1-1",
}  # fmt: skip
_ENCODER = {"sections": {"branch": 4}, "vanishes": False}  # norms behind the additions stay
_DECODER = {
    "sections": {"branch": 4}, "names": r"model\.layers\.\d\.(self_attn|mlp)",
    "block": "model.layers.1",
}  # fmt: skip
_SWINS = {"inputs": _SMALL, "sections": {"branch": 6}, "names": r"features\.\d\.\d\.(attn|mlp)",
          "block": "features.1.1"}  # fmt: skip
_TIMM_VITS = {"inputs": _SMALL, "sections": {"branch": 4}, "names": r"blocks\.\d\.(attn|mlp)",
              "block": "blocks.1"}  # fmt: skip
_TIMM_RESNET = {"sections": {"twin": 6}, "names": r"layer\d\.\d", "block": "layer1.1"}

FAMILIES = {
    "torchvision-resnet18": _torchvision(
        "ResNet-18", lambda models: _resnet(models, "BasicBlock", [2, 1, 1, 1]), **_RESNET
    ),
    "torchvision-resnet50": _torchvision(
        "ResNet-50",
        lambda models: _resnet(models, "Bottleneck", [2, 1, 1, 1], width_per_group=16),
        **_RESNET,
    ),
    "torchvision-wide_resnet": _torchvision(
        "Wide ResNet",
        lambda models: _resnet(models, "Bottleneck", [2, 1, 1, 1], width_per_group=32),
        **_RESNET,
    ),
    "torchvision-resnext": _torchvision(
        "ResNeXt",
        lambda models: _resnet(models, "Bottleneck", [2, 1, 1, 1], groups=4, width_per_group=4),
        **_RESNET,
    ),
    "torchvision-regnet": _torchvision("RegNet", _regnet, **_REGNET),
    "torchvision-mobilenet_v2": _torchvision(
        "MobileNetV2",
        lambda models: models.MobileNetV2(
            CLASSES, inverted_residual_setting=[[1, 8, 1, 1], [2, 8, 2, 1], [2, 16, 2, 2]]
        ),
        sections={"opaque": 3},
        names=r"features\.\d",
        block="features.3",
    ),
    "torchvision-mobilenet_v3": _torchvision(
        "MobileNetV3",
        _mobilenet_v3,
        sections={"opaque": 3},
        names=r"features\.\d",
        block="features.2",
    ),
    "torchvision-efficientnet": _torchvision(
        "EfficientNet",
        _efficientnet,
        sections={"opaque": 3},
        names=r"features\.\d\.\d",
        block="features.1.1",
    ),
    "torchvision-convnext": _torchvision(
        "ConvNeXt",
        _convnext,
        sections={"opaque": 3},
        names=r"features\.\d\.\d",
        block="features.1.1",
    ),
    "torchvision-vit": _torchvision(
        "ViT",
        lambda models: models.VisionTransformer(16, 8, 2, 2, 16, 24, num_classes=CLASSES),
        inputs=_SMALL,
        sections={"branch": 4},
        names=r"encoder\.layers\.encoder_layer_\d\.(self_attention|mlp)",
        block="encoder.layers.encoder_layer_1",
    ),
    "torchvision-swin": _torchvision("Swin", _swin, **_SWINS),
    "torchvision-swin_v2": _torchvision(
        "Swin v2", lambda models: _swin(models, second=True), **_SWINS
    ),
    "timm-resnet18": _timm(
        "ResNet-18",
        "resnet18",
        options={"layers": (2, 2, 1, 1), "channels": (8, 8, 8, 16)},
        **_TIMM_RESNET,
    ),
    "timm-resnet50": _timm(
        "ResNet-50",
        "resnet50",
        options={"layers": (2, 2, 1, 1), "channels": (4, 4, 4, 8)},
        **_TIMM_RESNET,
    ),
    "timm-vit": _timm("ViT", "vit_tiny_patch16_224", options=_TIMM_VIT, **_TIMM_VITS),
    "timm-deit3": _timm(
        "DeiT III",
        "deit3_small_patch16_224",
        options={**_TIMM_VIT, "drop_path_rate": 0.1},
        **_TIMM_VITS,
    ),
    "timm-convnext": _timm(
        "ConvNeXt",
        "convnext_tiny",
        options={"depths": (2, 1, 1, 1), "dims": (8, 8, 16, 16)},
        sections={"opaque": 5},
        names=r"stages\.\d\.blocks\.\d",
        block="stages.0.blocks.1",
    ),
    "timm-swin": _timm(
        "Swin",
        "swin_tiny_patch4_window7_224",
        options={
            "img_size": 16,
            "patch_size": 2,
            "window_size": 2,
            "depths": (2, 1),
            "num_heads": (1, 2),
            "embed_dim": 8,
        },
        inputs=_SMALL,
        sections={"opaque": 3},
        names=r"layers\.\d\.blocks\.\d",
        block="layers.0.blocks.1",
    ),
    "timm-mixer": Family(
        "MLP-Mixer",
        "timm",
        _mixer,
        _SMALL,
        sections={"opaque": 2},
        names=r"blocks\.\d",
        block="blocks.1",
    ),
    "timm-efficientnet": Family(
        "EfficientNet",
        "timm",
        _timm_efficientnet,
        images,
        sections={"opaque": 3},
        names=r"blocks\.\d\.\d",
        block="blocks.0.1",
    ),
    "transformers-bert": _transformers(
        "BERT",
        "BertForSequenceClassification",
        "BertConfig",
        _TEXT,
        inputs=padded,
        names=r"bert\.encoder\.layer\.\d\.(attention\.self|intermediate)",
        block="bert.encoder.layer.1",
        **_ENCODER,
    ),
    "transformers-distilbert": _transformers(
        "DistilBERT",
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        _DISTILBERT,
        inputs=padded,
        names=r"distilbert\.transformer\.layer\.\d\.(attention|ffn)",
        block="distilbert.transformer.layer.1",
        **_ENCODER,
    ),
    "transformers-gpt2": _transformers(
        "GPT-2",
        "GPT2LMHeadModel",
        "GPT2Config",
        _GPT2,
        sections={"branch": 4},
        names=r"transformer\.h\.\d\.(attn|mlp)",
        block="transformer.h.1",
    ),
    "transformers-gpt_neox": _transformers(
        "GPT-NeoX",
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        _TEXT,
        sections={"branch": 4},
        names=r"gpt_neox\.layers\.\d\.(attention|mlp)",
        block="gpt_neox.layers.1",
    ),
    "transformers-phi": _transformers(
        "Phi", "PhiForCausalLM", "PhiConfig", _GROUPED, inputs=padded, **_DECODER
    ),
    "transformers-cohere": _transformers(
        "Cohere", "CohereForCausalLM", "CohereConfig", _GROUPED, inputs=padded, **_DECODER
    ),
    "transformers-mixtral": _transformers(
        "Mixtral",
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_GROUPED, "num_local_experts": 4},
        inputs=padded,
        **_DECODER,
    ),
    "transformers-opt": _transformers(
        "OPT",
        "OPTForCausalLM",
        "OPTConfig",
        _OPT,
        inputs=padded,
        sections={"opaque": 2},
        names=r"model\.decoder\.layers\.\d",
        block="model.decoder.layers.1",
    ),
    "transformers-llama": _transformers(
        "Llama", "LlamaForCausalLM", "LlamaConfig", _GROUPED, inputs=padded, **_DECODER
    ),
    "transformers-gemma2": _transformers(
        "Gemma 2",
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**_GROUPED, "head_dim": 8, "sliding_window": 4},
        **_DECODER,
    ),
    "transformers-t5": _transformers(
        "T5",
        "T5ForConditionalGeneration",
        "T5Config",
        _T5,
        inputs=pairs,
        sections={"opaque": 4},
        names=r"(encoder|decoder)\.block\.\d\.layer\.\d",
        block="decoder.block.1.layer.2",
        left_out=6,
    ),
    "transformers-bart": _transformers(
        "BART",
        "BartForConditionalGeneration",
        "BartConfig",
        _BART,
        inputs=pairs,
        sections={"branch": 10},
        names=r"model\.(encoder|decoder)\.layers\.\d\.(self_attn|encoder_attn|fc1)",
        block="model.decoder.layers.1",
        vanishes=False,
    ),
    "transformers-vit": _transformers(
        "ViT",
        "ViTForImageClassification",
        "ViTConfig",
        _VIT,
        inputs=pixels,
        sections={"branch": 4},
        names=r"vit\.layers\.\d\.(attention|mlp)",
        block="vit.layers.1",
    ),
    "transformers-swin": _transformers(
        "Swin",
        "SwinForImageClassification",
        "SwinConfig",
        _SWIN,
        inputs=pixels,
        sections={"opaque": 3},
        names=r"swin\.encoder\.layers\.\d\.blocks\.\d",
        block="swin.encoder.layers.0.blocks.1",
    ),
}
