"""Small image models with the structure and the names of timm's and torchvision's: ConvNeXt, Swin
and MLP-Mixers. Their own code; what lies around the MLPs is as simple as it may be."""

import torch
import twins
from torch import nn

WIDTHS, DEPTHS, SIDE, CLASSES = (8, 12), (1, 2), 16, 5


class DropPath(nn.Module):
    """Stochastic depth."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        kept = torch.rand(len(x), *[1] * (x.ndim - 1)) >= self.p
        return x * kept / (1 - self.p)


class Permute(nn.Module):
    def __init__(self, dims):
        super().__init__()
        self.dims = dims

    def forward(self, x):
        return x.permute(self.dims)


class LayerNorm2d(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvMlp(twins.TimmMlp):
    """timm's Mlp with use_conv=True, and its ConvMlp."""

    def __init__(self, dim, hidden):
        super().__init__(dim=dim, hidden=hidden)
        self.fc1, self.fc2 = nn.Conv2d(dim, hidden, 1), nn.Conv2d(hidden, dim, 1)


class GlobalResponseNorm(nn.Module):
    """Of ConvNeXt V2: what it gives depends on all pixels. It starts as the identity."""

    def __init__(self, dim):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x):
        size = x.norm(dim=(1, 2), keepdim=True)
        return x + self.bias + self.weight * x * size / (size.mean(-1, keepdim=True) + 1e-6)


class GrnMlp(twins.TimmMlp):
    """timm's GlobalResponseNormMlp."""

    def __init__(self, dim, hidden):
        super().__init__(dim=dim, hidden=hidden)
        self.grn = GlobalResponseNorm(hidden)

    def forward(self, x):
        return self.fc2(self.grn(self.act(self.fc1(x))))


def plain_mlp(dim, hidden):
    return twins.TimmMlp(dim=dim, hidden=hidden)


def depthwise(dim):
    return nn.Conv2d(dim, dim, 7, padding=3, groups=dim)


class TimmConvNeXtBlock(nn.Module):
    def __init__(self, dim, mlp=plain_mlp, drop_path=0.0):
        super().__init__()
        self.use_conv_mlp = mlp is ConvMlp
        self.conv_dw = depthwise(dim)
        self.norm = (LayerNorm2d if self.use_conv_mlp else nn.LayerNorm)(dim)
        self.mlp = mlp(dim, 2 * dim)
        self.gamma = nn.Parameter(torch.full((dim,), 0.5))
        self.shortcut, self.drop_path = nn.Identity(), DropPath(drop_path)

    def forward(self, x):
        y = self.conv_dw(x)
        if self.use_conv_mlp:
            y = self.mlp(self.norm(y))
        else:
            y = self.mlp(self.norm(y.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return self.drop_path(y * self.gamma[:, None, None]) + self.shortcut(x)


class TimmStage(nn.Module):
    def __init__(self, downsample, blocks):
        super().__init__()
        self.downsample, self.blocks = downsample, nn.Sequential(*blocks)

    def forward(self, x):
        return self.blocks(self.downsample(x))


class TimmConvNeXt(nn.Module):
    def __init__(self, mlp=plain_mlp, drop_path=0.0):
        super().__init__()
        first, second = WIDTHS
        self.stem = nn.Sequential(nn.Conv2d(3, first, 4, 4), LayerNorm2d(first))
        downsample = nn.Sequential(LayerNorm2d(first), nn.Conv2d(first, second, 2, 2))
        self.stages = nn.Sequential(
            *(
                TimmStage(before, [TimmConvNeXtBlock(dim, mlp, drop_path) for _ in range(depth)])
                for before, dim, depth in zip(
                    (nn.Identity(), downsample), WIDTHS, DEPTHS, strict=True
                )
            )
        )
        self.head = nn.Linear(second, CLASSES)

    def forward(self, x):
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


class CNBlock(nn.Module):
    """torchvision's."""

    def __init__(self, dim):
        super().__init__()
        self.block = nn.Sequential(
            depthwise(dim),
            Permute([0, 2, 3, 1]),
            nn.LayerNorm(dim),
            nn.Linear(dim, 2 * dim),
            nn.GELU(),
            nn.Linear(2 * dim, dim),
            Permute([0, 3, 1, 2]),
        )
        self.layer_scale = nn.Parameter(torch.full((dim, 1, 1), 0.5))
        self.stochastic_depth = DropPath(0.1)

    def forward(self, x):
        return x + self.stochastic_depth(self.layer_scale * self.block(x))


class TorchvisionConvNeXt(nn.Module):
    def __init__(self):
        super().__init__()
        first, second = WIDTHS
        self.features = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, first, 4, 4), LayerNorm2d(first)),
            nn.Sequential(*(CNBlock(first) for _ in range(DEPTHS[0]))),
            nn.Sequential(LayerNorm2d(first), nn.Conv2d(first, second, 2, 2)),
            nn.Sequential(*(CNBlock(second) for _ in range(DEPTHS[1]))),
        )
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            LayerNorm2d(second), nn.Flatten(1), nn.Linear(second, CLASSES)
        )

    def forward(self, x):
        return self.classifier(self.avgpool(self.features(x)))


class WindowAttention(nn.Module):
    """In windows of 2 × 2, with a bias that a small MLP makes, as in Swin V2."""

    def __init__(self, dim):
        super().__init__()
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, 8), nn.ReLU(), nn.Dropout(0.0), nn.Linear(8, 1, bias=False)
        )

    def forward(self, x):
        images, height, width, dim = x.shape
        windows = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3).flatten(3, 4)
        windows = windows.reshape(images, height // 2, width // 2, 4, dim)
        query, key, value = self.qkv(windows).chunk(3, -1)
        corners = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).to(x)
        bias = self.cpb_mlp(corners[:, None] - corners)[..., 0]
        mixed = (query @ key.mT * dim**-0.5 + bias).softmax(-1) @ value
        mixed = mixed.unflatten(3, (2, 2)).transpose(2, 3).reshape(x.shape)
        return self.proj(mixed)


class SwinBlock(nn.Module):
    """timm's, and with ``torchvision`` torchvision's: tokens are (B, H, W, D)."""

    def __init__(self, dim, torchvision=False):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(dim), WindowAttention(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = twins.MLPBlock(dim, 2 * dim) if torchvision else plain_mlp(dim, 2 * dim)
        self.drop_path = DropPath(0.1)

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    def __init__(self, dim, out):
        super().__init__()
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, out, bias=False)

    def forward(self, x):
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.reduction(self.norm(torch.cat(corners, -1)))


class Swin(nn.Module):
    """timm's: ``layers.i.blocks.j.mlp``."""

    def __init__(self):
        super().__init__()
        first, second = WIDTHS
        self.patch_embed = nn.Conv2d(3, first, 4, 4)
        self.layers = nn.Sequential(
            TimmStage(nn.Identity(), [SwinBlock(first) for _ in range(DEPTHS[0])]),
            TimmStage(PatchMerging(first, second), [SwinBlock(second) for _ in range(DEPTHS[1])]),
        )
        self.norm, self.head = nn.LayerNorm(second), nn.Linear(second, CLASSES)

    def forward(self, x):
        x = self.layers(self.patch_embed(x).permute(0, 2, 3, 1))
        return self.head(self.norm(x).mean((1, 2)))


class TorchvisionSwin(nn.Module):
    """``features.i.j.mlp``."""

    def __init__(self):
        super().__init__()
        first, second = WIDTHS
        self.features = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, first, 4, 4), Permute([0, 2, 3, 1]), nn.LayerNorm(first)),
            nn.Sequential(*(SwinBlock(first, True) for _ in range(DEPTHS[0]))),
            PatchMerging(first, second),
            nn.Sequential(*(SwinBlock(second, True) for _ in range(DEPTHS[1]))),
        )
        self.norm, self.head = nn.LayerNorm(second), nn.Linear(second, CLASSES)

    def forward(self, x):
        return self.head(self.norm(self.features(x)).mean((1, 2)))


class MixerBlock(nn.Module):
    """timm's, of MLP-Mixer."""

    def __init__(self, dim, tokens):
        super().__init__()
        self.norm1, self.mlp_tokens = nn.LayerNorm(dim), plain_mlp(tokens, 12)
        self.drop_path = DropPath(0.1)
        self.norm2, self.mlp_channels = nn.LayerNorm(dim), plain_mlp(dim, 16)

    def forward(self, x):
        x = x + self.drop_path(self.mlp_tokens(self.norm1(x).mT).mT)
        return x + self.drop_path(self.mlp_channels(self.norm2(x)))


class ResBlock(nn.Module):
    """timm's, of ResMLP."""

    def __init__(self, dim, tokens):
        super().__init__()
        self.norm1, self.linear_tokens = nn.LayerNorm(dim), nn.Linear(tokens, tokens)
        self.norm2, self.mlp_channels = nn.LayerNorm(dim), plain_mlp(dim, 16)
        self.ls1, self.ls2 = (nn.Parameter(torch.full((dim,), 0.5)) for _ in range(2))

    def forward(self, x):
        x = x + self.ls1 * self.linear_tokens(self.norm1(x).mT).mT
        return x + self.ls2 * self.mlp_channels(self.norm2(x))


class GatedMlp(twins.TimmMlp):
    """timm's, of gMLP: its gate mixes the tokens."""

    def __init__(self, dim, tokens):
        super().__init__(dim=dim, hidden=2 * dim)
        self.gate, self.fc2 = nn.Linear(tokens, tokens), nn.Linear(dim, dim)

    def forward(self, x):
        left, right = self.act(self.fc1(x)).chunk(2, -1)
        return self.fc2(left * self.gate(right.mT).mT)


class SpatialGatingBlock(nn.Module):
    def __init__(self, dim, tokens):
        super().__init__()
        self.norm, self.mlp_channels = nn.LayerNorm(dim), GatedMlp(dim, tokens)

    def forward(self, x):
        return x + self.mlp_channels(self.norm(x))


class MlpMixer(nn.Module):
    """timm's, of any of the three blocks."""

    def __init__(self, block=MixerBlock, depth=3):
        super().__init__()
        dim, tokens = WIDTHS[0], (SIDE // 4) ** 2
        self.stem = nn.Conv2d(3, dim, 4, 4)
        self.blocks = nn.Sequential(*(block(dim, tokens) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, CLASSES)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.stem(x).flatten(2).mT)).mean(1))
