"""MLPs and blocks of other libraries with the same names, order and values, for tests that need
none of the libraries."""

from torch import nn

DIM, HIDDEN = 12, 16


class TimmMlp(nn.Module):
    """timm's Mlp."""

    def __init__(
        self, act=nn.GELU, bias=(True, True), drop=0.0, norm=None, dim=DIM, hidden=HIDDEN, out=None
    ):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden, bias=bias[0])
        self.act = act()
        self.drop1 = nn.Dropout(drop)
        self.norm = norm(hidden) if norm else nn.Identity()
        self.fc2 = nn.Linear(hidden, out or dim, bias=bias[1])
        self.drop2 = nn.Dropout(drop)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class TimmGluMlp(TimmMlp):
    """timm's GluMlp."""

    def __init__(self, act, gate_last):
        super().__init__(act)
        self.gate_last = gate_last
        self.fc2 = nn.Linear(HIDDEN // 2, DIM)

    def forward(self, x):
        left, right = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(left * self.act(right) if self.gate_last else self.act(left) * right)


class TimmSwiGLU(nn.Module):
    """timm's SwiGLU."""

    def __init__(self):
        super().__init__()
        self.fc1_g, self.fc1_x = nn.Linear(DIM, HIDDEN), nn.Linear(DIM, HIDDEN)
        self.act, self.drop1, self.norm = nn.SiLU(), nn.Dropout(0.0), nn.Identity()
        self.fc2 = nn.Linear(HIDDEN, DIM)

    def forward(self, x):
        return self.fc2(self.norm(self.act(self.fc1_g(x)) * self.fc1_x(x)))


class Dinov2SwiGLUFFN(nn.Module):
    """DINOv2's, in releases of transformers that join gate and up."""

    def __init__(self):
        super().__init__()
        self.weights_in, self.weights_out = nn.Linear(DIM, 2 * HIDDEN), nn.Linear(HIDDEN, DIM)

    def forward(self, x):
        gate, up = self.weights_in(x).chunk(2, dim=-1)
        return self.weights_out(nn.functional.silu(gate) * up)


class MLPBlock(nn.Sequential):
    """torchvision's."""

    def __init__(self, dim=DIM, hidden=HIDDEN, dropout=0.0):
        parts = (
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, dim),
            nn.Dropout(dropout),
        )
        super().__init__(*parts)


class Projections(nn.Module):
    """transformers' names for two or three layers."""

    def __init__(self, gated, bias=True):
        super().__init__()
        for name in ("gate_proj", "up_proj") if gated else ("up_proj",):
            self.add_module(name, nn.Linear(DIM, HIDDEN, bias=bias))
        self.down_proj, self.act_fn = nn.Linear(HIDDEN, DIM, bias=bias), nn.GELU(approximate="tanh")

    def forward(self, x):
        if hasattr(self, "gate_proj"):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(self.act_fn(self.up_proj(x)))


class Block(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(DIM), nn.Linear(DIM, DIM)
        self.norm2, self.mlp = nn.LayerNorm(DIM), mlp

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Encoder(nn.Module):
    """Blocks between a stem and a head whose layers look like an MLP's."""

    def __init__(self, depth, mlp=TimmMlp, chain=nn.Sequential):
        super().__init__()
        self.stem = nn.Linear(DIM, DIM)
        self.blocks = chain(*(Block(mlp()) for _ in range(depth)))
        self.head = TimmMlp()

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)))
