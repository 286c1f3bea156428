"""Quantizes a model of many blocks and says what memory it took: ``streamed.py FOLDER streamed|loaded``.

The first line it prints is the most megabytes beyond those before the run, the second those of the result. With all
weights loaded nothing but rounding to nearest is done, which takes the least there is.
"""

import gc
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

import lightning_qat as lq

BLOCKS, WIDTH, HIDDEN, WORDS = 36, 512, 1024, 256


class Block(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.norm, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv_proj, self.o_proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up_proj, self.down_proj = nn.Linear(width, 2 * hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (8, -1)).transpose(1, 2) for part in self.qkv_proj(self.norm(x)).chunk(3, -1))
        x = x + self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        gate, up = self.up_proj(self.norm_2(x)).chunk(2, -1)
        return x + self.down_proj(F.silu(gate) * up)


class Network(nn.Module):
    def __init__(self, blocks=BLOCKS, width=WIDTH, hidden=HIDDEN):
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.layers = nn.ModuleList(Block(width, hidden) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def write(folder):
    """Write random weights: a file for each block, one for the rest, and the index."""
    torch.manual_seed(0)
    with lq.without_weights():
        network = Network()
    parts = {}
    for name, parameter in network.named_parameters():
        key = name.split(".")[1] if name.startswith("layers.") else "rest"
        parts.setdefault(key, {})[name] = tuple(parameter.shape)
    placed = {}
    for key, shapes in parts.items():
        tensors = {name: torch.randn(shape) / max(shape[-1], 1) ** 0.5 for name, shape in shapes.items()}
        save_file(tensors, folder / f"model-{key}.safetensors")
        placed |= dict.fromkeys(shapes, f"model-{key}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))


def memory(key):
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in text.splitlines() if line.startswith(key))


def quantized(network, batches, method="gptq", **arguments):
    plan = lq.QuantizationPlan([lq.LayerRule("layers.*_proj", lq.QuantizationConfig("int4", group_size=64))])
    options = lq.PTQOptions(order="blocks", gptq=lq.GPTQOptions(scale_search="none", sweeps=0, refit_scales=False))
    return lq.quantize_model(network, plan, batches, method, options=options, **arguments)


def main(folder, mode):
    torch.set_num_threads(1)
    batches = [torch.arange(64).view(1, -1), torch.arange(64, 128).view(1, -1)]
    quantized(Network(2, 64, 64).eval(), batches)  # what is loaded or built once is there
    gc.collect()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the most is counted from here
    with lq.without_weights():
        network = Network().eval()
    if mode == "streamed":
        made = quantized(network, batches, weights=folder)
    else:
        files = lq.WeightFiles(folder)
        state = {name: files.read(name) for name in files.names}
        network.load_state_dict(state | {"head.weight": state["embed.weight"]}, assign=True)
        del state
        made = quantized(network, None, "rtn")
    most = memory("VmHWM") - before
    result = sum(t.numel() * t.element_size() for t in made.state_dict().values()) / 1e6
    sys.stdout.write(f"{most}\n{result}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
