"""A causal language model as Hugging Face builds it: its Linears and embeddings are quantized as they are."""

import torch
from torch import nn
from torch.nn import functional as F

import lightning_qat as lq

FEATURES, WORDS = 16, 8


class Norm(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class LlamaBlock(nn.Module):
    """Separate projections, grouped keys, rotary places, a gated network."""

    def __init__(self, heads=4, groups=2):
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, FEATURES // heads
        self.input_layernorm, self.post_attention_layernorm = Norm(FEATURES), Norm(FEATURES)
        self.q_proj = nn.Linear(FEATURES, FEATURES, bias=False)
        self.k_proj = nn.Linear(FEATURES, groups * self.size, bias=False)
        self.v_proj = nn.Linear(FEATURES, groups * self.size, bias=False)
        self.o_proj = nn.Linear(FEATURES, FEATURES, bias=False)
        self.gate_proj = nn.Linear(FEATURES, 24, bias=False)
        self.up_proj, self.down_proj = nn.Linear(FEATURES, 24, bias=False), nn.Linear(24, FEATURES, bias=False)

    def rotated(self, x):
        angle = torch.arange(x.shape[2])[:, None] / 10.0 ** torch.arange(0, 1, 2 / self.size)
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    def forward(self, hidden_states):
        x = self.input_layernorm(hidden_states)
        q, k, v = (p(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        k, v = (t.repeat_interleave(self.heads // self.groups, 1) for t in (self.rotated(k), v))
        attended = F.scaled_dot_product_attention(self.rotated(q), k, v, is_causal=True)
        hidden_states = hidden_states + self.o_proj(attended.transpose(1, 2).flatten(2))
        x = self.post_attention_layernorm(hidden_states)
        return hidden_states + self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Llama(nn.Module):
    """With the head tied to the embedding."""

    def __init__(self):
        super().__init__()
        self.embed_tokens, self.layers = nn.Embedding(WORDS, FEATURES), nn.ModuleList([LlamaBlock(), LlamaBlock()])
        self.norm, self.lm_head = Norm(FEATURES), nn.Linear(FEATURES, WORDS, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, input_ids, labels=None):
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(hidden_states=x)
        logits = self.lm_head(self.norm(x))
        loss = None if labels is None else F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return {"loss": loss, "logits": logits}


def test_a_llama_works_as_it_is(tmp_path):
    torch.manual_seed(0)
    plan = lq.QuantizationPlan([lq.LayerRule("lm_head"), lq.LayerRule("layers.0.*", "w4a8", "w4a8")], base="int8")
    model = lq.prepare(Llama(), plan)
    ids = torch.tensor([[1, 2, 3, 4, 5, 6], [2, 3, 4, 5, 6, 7]])
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-2), []
    for _ in range(40):
        loss = model(input_ids=ids, labels=ids)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 < losses[0]
    batch = {"input_ids": ids, "labels": ids}
    model.eval()
    converted = lq.convert(model, verify=[batch])
    lq.save_quantized(converted, tmp_path / "model")
    assert torch.equal(lq.load_quantized(tmp_path / "model", Llama())(**batch)["logits"], converted(**batch)["logits"])
