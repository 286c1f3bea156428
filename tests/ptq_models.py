"""Small models of the kinds that post-training quantization meets."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, WORDS = 16, 11


class Norm(nn.Module):
    def __init__(self, features=WIDTH):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(features) + 0.5)

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class LlamaBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = Norm(), Norm()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, 32, bias=False), nn.Linear(WIDTH, 32, bias=False)
        self.down_proj = nn.Linear(32, WIDTH, bias=False)

    def forward(self, hidden_states, positions=None, mask=None, cache=None):
        x = self.input_layernorm(hidden_states)
        cos, sin = positions
        q, k, v = (p(x).unflatten(-1, (2, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        q, k = q * cos + q.flip(-1) * sin, k * cos + k.flip(-1) * sin
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        hidden_states = hidden_states + self.o_proj(attended.transpose(1, 2).flatten(2))
        x = self.post_attention_layernorm(hidden_states)
        return (hidden_states + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)),)


class Llama(nn.Module):
    """Blocks in a ModuleList, called with keywords, that return tuples; the head is tied to the embedding."""

    def __init__(self, blocks=3):
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.layers = nn.ModuleList(LlamaBlock() for _ in range(blocks))
        self.norm, self.lm_head = Norm(), nn.Linear(WIDTH, WORDS, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        angle = torch.arange(ids.shape[1])[:, None] * torch.linspace(1, 0.1, WIDTH // 2)
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        positions = angle.cos(), angle.sin()
        for layer in self.layers:
            (x,) = layer(x, positions=positions, mask=mask)
        return self.lm_head(self.norm(x))


class Bert(nn.Module):
    """Blocks with the norm behind the sum, whose output a residual reads too, and GELU: no scale can be folded."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.norm = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH), nn.LayerNorm(WIDTH)
            self.norm.weight.data = 4.0 ** torch.randn(WIDTH)

        def forward(self, x):
            return self.norm(x + self.down(F.gelu(self.up(x))))

    def __init__(self, blocks=2):
        super().__init__()
        self.embed, self.first = nn.Embedding(WORDS, WIDTH), nn.LayerNorm(WIDTH)
        self.first.weight.data = 4.0 ** torch.randn(WIDTH)
        self.layers = nn.ModuleList(self.Block() for _ in range(blocks))

    def forward(self, ids):
        x = self.first(self.embed(ids))
        for layer in self.layers:
            x = layer(x)
        return x


def tokens(batches=4, size=2, length=9):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(WORDS, (size, length), generator=generator) for _ in range(batches)]


def inputs_of(model, name):
    """Return what a layer is called with over the batches of :func:`tokens`, ``[rows, features]``."""
    seen = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in tokens():
            model(batch)
    handle.remove()
    return torch.cat(seen)


class Experts(nn.Module):
    """Each row goes to one of four experts; those of one batch of ``some_rows`` to the same."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 24), nn.ReLU(), nn.Linear(24, WIDTH)) for _ in range(4)
        )
        self.last = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        chosen, made = x[:, 0].long() % 4, torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows = (chosen == index).nonzero()[:, 0]
            if len(rows):
                made = made.index_add(0, rows, expert(x[rows]))
        return self.last(x + made)


class Mixture(nn.Module):
    """Two blocks of experts."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Experts() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x[:, :1], layer(x)[:, 1:]], 1)  # all layers choose the same
        return x


def some_rows(experts):
    generator = torch.Generator().manual_seed(5)
    batches = [torch.rand(20, WIDTH, generator=generator) for _ in experts]
    for batch, expert in zip(batches, experts, strict=True):
        batch[:, 0] = expert
    return batches


class Inverted(nn.Module):
    """Expand, depthwise, project; the input is added where it fits. It changes what it computes in place."""

    def __init__(self, inputs, outputs):
        super().__init__()
        hidden = inputs * 2
        self.body = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False), nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True), nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.adds = inputs == outputs

    def forward(self, x):
        return self.body(x).add_(x) if self.adds else self.body(x)


class MobileNet(nn.Module):
    def __init__(self):
        super().__init__()
        first = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU6(inplace=True))
        self.features = nn.Sequential(first, Inverted(4, 4), Inverted(4, 6), Inverted(6, 6))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(6, 5))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


def images(batches=3, size=4):
    return [torch.randn(size, 3, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(batches)]


class ViT(nn.Module):
    """With ``nn.TransformerEncoder``, whose attention calls no projection by itself."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = self.encoder(torch.cat([self.token.expand(len(x), -1, -1), x], 1))
        return self.head(x[:, 0])


class EncoderDecoder(nn.Module):
    """Two lists of blocks; those of the second also get what the first made."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x, other=None):
            return x + torch.tanh(self.a(x)) if other is None else x + torch.tanh(self.a(x) + self.b(other))

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(5, 8)
        self.encoder = nn.ModuleList(self.Block() for _ in range(2))
        self.decoder = nn.ModuleList(self.Block() for _ in range(2))
        self.head = nn.Linear(8, 3)

    def forward(self, x, *, y):
        x = self.first(x)
        for block in self.encoder:
            x = block(x)
        y = self.second(y)
        for block in self.decoder:
            y = block(y, other=x)
        return self.head(y)


def pairs(batches=3):
    make = [torch.Generator().manual_seed(i) for i in range(batches)]
    return [{"x": torch.randn(6, 5, generator=g), "y": torch.randn(6, 5, generator=g)} for g in make]


def built(kind, **arguments):
    """Return a model with settled statistics of BatchNorm, in evaluation mode."""
    torch.manual_seed(0)
    model = kind(**arguments)
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        for x in images(6):
            model(x)
    return model.eval()


MODELS = {
    "llama": (Llama, tokens),
    "mobilenet": (MobileNet, images),
    "vit": (ViT, images),
    "encoder_decoder": (EncoderDecoder, pairs),
}
