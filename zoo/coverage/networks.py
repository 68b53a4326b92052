"""The networks of the coverage table, built with random weights at small input sizes."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Network:
    """One network of the table.

    Attributes:
        name: "library:model".
        size: height and width of its input.
        options: of its builder.
        frames: of its input; 0 for networks of images.
        takes: images or videos; words: token ids; sound: samples; spectra of it.
    """

    name: str
    size: int = 64
    options: dict[str, Any] = field(default_factory=dict)
    frames: int = 0
    takes: Literal["images", "words", "sound", "spectra"] = "images"

    def example(self, batch: int = 2) -> Tensor:
        """Random inputs, [batch, 3, size, size], of videos [batch, 3, frames, size, size]."""
        if self.takes == "words":  # the last of them ends the sentence
            return torch.cat([torch.randint(3, 100, (batch, 11)), torch.full((batch, 1), 2)], 1)
        if self.takes != "images":
            return torch.randn(batch, 16000) if self.takes == "sound" else torch.randn(batch, 80, 100)
        return torch.randn(batch, 3, *([self.frames] if self.frames else []), self.size, self.size)

    def build(self) -> nn.Module:
        """The network with the weights that its library draws, in eval mode."""
        library, _, model = self.name.partition(":")
        return _BUILDERS[library](model, **self.options).eval()


def _torchvision(name: str, **options: Any) -> nn.Module:
    import torchvision

    model: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    return model


def _timm(name: str, **options: Any) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, pretrained=False, **options)
    return model


def _segmentation(name: str, **options: Any) -> nn.Module:
    return _torchvision(name, weights_backbone=None, num_classes=5, **options)


def _detection(name: str, **options: Any) -> nn.Module:
    """The backbone of a detector: feature maps at four scales and their pyramid."""
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    model: nn.Module = resnet_fpn_backbone(
        backbone_name=name.removesuffix("_fpn"), weights=None, trainable_layers=5, norm_layer=nn.BatchNorm2d
    )
    return model


class _Logits(nn.Module):
    """A network of the transformers library as one from its main input to a tensor."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network, self.input = network, network.main_input_name

    def forward(self, given: Tensor) -> Tensor:
        output: Tensor = self.network(**{self.input: given}, return_dict=False)[0]
        return output


def _transformers(name: str, **options: Any) -> nn.Module:
    """With random weights, of the size that its configuration has by itself."""
    import transformers

    kind = getattr(transformers, name)
    return _Logits(kind(kind.config_class(**options)))


_BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "torchvision": _torchvision,
    "segmentation": _segmentation,
    "detection": _detection,
    "video": _torchvision,
    "timm": _timm,
    "transformers": _transformers,
}

# One of each family first, then its larger siblings
_TORCHVISION = """
alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 maxvit_t
mnasnet1_0 mobilenet_v2 mobilenet_v3_small regnet_x_400mf regnet_y_400mf resnet18 resnet50
resnext50_32x4d shufflenet_v2_x1_0 squeezenet1_0 swin_t swin_v2_t vgg11 vgg11_bn vit_b_16
wide_resnet50_2
resnet34 resnet101 resnet152 mobilenet_v3_large mnasnet0_5 mnasnet0_75 mnasnet1_3 shufflenet_v2_x0_5
shufflenet_v2_x1_5 shufflenet_v2_x2_0 squeezenet1_1 regnet_x_800mf regnet_x_1_6gf regnet_x_3_2gf
regnet_x_8gf regnet_y_800mf regnet_y_1_6gf regnet_y_3_2gf regnet_y_8gf densenet161 densenet169
densenet201 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 efficientnet_b5
efficientnet_b6 efficientnet_b7 efficientnet_v2_m efficientnet_v2_l convnext_small convnext_base
swin_s swin_b swin_v2_s swin_v2_b vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn vit_b_32
wide_resnet101_2 resnext101_32x8d resnext101_64x4d regnet_x_16gf regnet_x_32gf regnet_y_16gf
regnet_y_32gf convnext_large vit_l_16 vit_l_32 vit_h_14 regnet_y_128gf
""".split()
_TIMM = """
convnext_atto mobilenetv3_small_050 efficientnet_lite0 resnetv2_50 swin_tiny_patch4_window7_224
deit_tiny_patch16_224 mixer_s32_224 repvgg_a0 densenet121 regnetx_002 maxvit_rmlp_pico_rw_256
edgenext_xx_small sequencer2d_s nfnet_l0 resnetv2_50x1_bit res2net50_26w_4s levit_128s efficientformer_l1
""".split()
_TRANSFORMERS: dict[Literal["images", "words", "sound", "spectra"], list[str]] = {
    "words": """
BertForSequenceClassification DistilBertForSequenceClassification GPT2LMHeadModel LlamaForCausalLM
BartForSequenceClassification T5EncoderModel
""".split(),
    "images": """
ViTForImageClassification SwinForImageClassification SegformerForSemanticSegmentation
ConvNextForImageClassification
""".split(),
    "sound": ["Wav2Vec2ForSequenceClassification"],
    "spectra": ["WhisperForAudioClassification"],
}
_VIDEO = ["r3d_18", "mc3_18", "r2plus1d_18", "s3d", "swin3d_t"]
_SIZES = {"inception_v3": 96, "maxvit_t": 224, "vit_h_14": 56, "s3d": 224, "sequencer2d_s": 112}
_SIZES |= {"levit_128s": 224, "efficientformer_l1": 224}
_SIZES["SwinForImageClassification"] = 224
_FRAMES = dict.fromkeys(_VIDEO, 4) | {"s3d": 16}
_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"aux_logits": False, "init_weights": False},
    "inception_v3": {"aux_logits": False, "init_weights": False},
    "vit_h_14": {"image_size": 56},
    **{name: {"image_size": 64} for name in ("vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32")},
    "swin_tiny_patch4_window7_224": {"img_size": 56},
    "deit_tiny_patch16_224": {"img_size": 64},
    "mixer_s32_224": {"img_size": 64},
    "maxvit_rmlp_pico_rw_256": {"img_size": 64},
    "GPT2LMHeadModel": {"use_cache": False},
    "LlamaForCausalLM": {
        "hidden_size": 512,
        "intermediate_size": 1376,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "use_cache": False,
    },
    "BartForSequenceClassification": {
        "encoder_layers": 6,
        "decoder_layers": 6,
        "d_model": 768,
        "use_cache": False,
    },
    "ViTForImageClassification": {"image_size": 64},
    "WhisperForAudioClassification": {"max_source_positions": 50},
}
_SIZES |= {name: options["img_size"] for name, options in _OPTIONS.items() if "img_size" in options}

NETWORKS = {
    network.name: network
    for library, names in (
        ("torchvision", _TORCHVISION),
        ("segmentation", ["lraspp_mobilenet_v3_large", "deeplabv3_mobilenet_v3_large", "fcn_resnet50"]),
        ("detection", ["resnet18_fpn"]),
        ("video", _VIDEO),
        ("timm", _TIMM),
    )
    for network in (
        Network(f"{library}:{name}", _SIZES.get(name, 64), _OPTIONS.get(name, {}), _FRAMES.get(name, 0))
        for name in names
    )
} | {
    f"transformers:{name}": Network(
        f"transformers:{name}", _SIZES.get(name, 64), _OPTIONS.get(name, {}), takes=takes
    )
    for takes, names in _TRANSFORMERS.items()
    for name in names
}


@torch.no_grad()
def randomise_(model: nn.Module, seed: int = 0) -> None:
    """Statistics, scales and shifts far from the 0 and 1 that they start at, in place."""
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(getattr(module, "running_var", None), torch.Tensor):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    for parameter in model.parameters():
        if parameter.numel() == max(parameter.shape, default=1):
            parameter.uniform_(0.5, 1.5)
        elif not bool(parameter.any()):
            parameter.normal_(0, 0.02)
