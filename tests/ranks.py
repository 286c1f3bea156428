"""What the tests of strategies run: on two ranks, started together once, and on one rank with twice the batch.

As a script it is one rank: ``python ranks.py <folder>`` with torchelastic's variables writes ``<folder>/<rank>.pt``.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import lightning as L
import torch
from classifier import Classifier, data, trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from synced_norm import SumsByGloo, synced_on_cpu
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler

import lightning_qat as lq
from lightning_qat.transforms.prepare import qat_layers
from lightning_qat.transforms.ranges import defer_ranges, update_ranges

OBSERVERS = ("min_max", "moving_average", "percentile", "histogram", "mse")
GLOBAL_BATCH = 8


class Plain(Classifier):
    """Without BatchNorm, whose statistics are each rank's own."""

    def __init__(self):
        super().__init__()
        self.bn = nn.Identity()


class Branches(Plain):
    """Every other rank takes another way, once or twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.ways = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x):
        x = F.relu(self.conv(x)).mean((2, 3))
        way = self.trainer.global_rank
        for _ in range(way + 1):
            x = self.ways[way](x)
        return self.head(x)


class Sharded(Plain):
    """As a project with FSDP2 has it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.last = nn.Linear(16, 2)
        del self.conv, self.head

    def forward(self, x):
        return self.last(self.net(x))

    def configure_model(self):
        from torch.distributed.fsdp import FSDPModule, fully_shard

        if self.trainer.world_size > 1 and not isinstance(self.net, FSDPModule):
            mesh = self.device_mesh["data_parallel"]
            for layer in (self.net[1], self.net[3], self.net, self.last):
                fully_shard(layer, mesh=mesh)

    def phase(self):
        return None


class Normed(Classifier):
    """BatchNorm after convolutions and after a Linear; keeps the outputs of training."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(6)
        self.deep, self.deep_bn = nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.wide, self.wide_bn = nn.Linear(6, 8), nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 2)
        self.outputs = []

    def forward(self, x):
        x = F.relu(self.deep_bn(self.deep(F.relu(self.bn(self.conv(x))))))
        x = self.head(F.relu(self.wide_bn(self.wide(x.mean((2, 3))))))
        if self.training:
            self.outputs.append(x.detach().clone())
        return x


class Gradients(L.Callback):
    """Keeps the gradients that every step is taken with."""

    def __init__(self):
        self.steps = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        found = {name: p.grad for name, p in pl_module.named_parameters()}
        self.steps.append({name: None if grad is None else grad.clone() for name, grad in found.items()})


class Recorder(L.Callback):
    """Keeps the scales that every step computes with, and those that it leaves."""

    def __init__(self):
        self.steps = []

    def _keep(self, module):
        scales = {}
        for name, layer in qat_layers(module):
            scales[f"{name}.weight"] = layer.weight_quantizer.parameters_for(layer.weight)[0].detach().clone()
            scales[f"{name}.input"] = layer.input_quantizer.scale.clone()
        self.steps.append(scales)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._keep(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._keep(pl_module)


def whole(state):
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v.clone() if hasattr(v, "clone") else v
            for k, v in state.items()}  # fmt: skip


def loader(world, rank):
    sampler = DistributedSampler(data(), world, rank, shuffle=False)
    return DataLoader(data(), batch_size=GLOBAL_BATCH // world, sampler=sampler)


def fit(folder, world, rank, module, callbacks, strategy=None, **kwargs):
    recorder = Recorder()
    watched = [] if isinstance(module, Sharded) else [recorder]
    ranks = dict(devices=world, strategy=strategy or DDPStrategy()) if world > 1 else {}
    options = dict(max_epochs=2, num_sanity_val_steps=0, use_distributed_sampler=False, **ranks, **kwargs)
    run = trainer(folder, [*callbacks, *watched], **options)
    run.fit(module, loader(world, rank))
    return {"steps": recorder.steps, "state": whole(module.state_dict())}, run


def int8(**kwargs):
    config = lq.QATConfig("int8", per_channel=True, observer_momentum=0.8)
    return [lq.QuantizationAwareTraining(config, calibration_batches=2, certify=False, **kwargs)]


def ddp(folder, world, rank):
    return fit(folder, world, rank, Plain(), int8(start_step=1, freeze_step=6))[0]


def uncalibrated(folder, world, rank):
    callbacks = [lq.QuantizationAwareTraining("int8", calibration_batches=0, certify=False)]
    return fit(folder, world, rank, Plain(), callbacks)[0]


def accumulating(folder, world, rank):
    return fit(folder, world, rank, Plain(), int8(), accumulate_grad_batches=2)[0]


class Deciding(Plain):
    """Logs a metric that no two ranks agree on, and NaN on one of them alone."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        step, rank = self.trainer.global_step, self.trainer.global_rank
        self.log("mine", float("nan") if step == 5 and rank == 1 else 1.0 + rank * (step % 2))
        return loss


def deciding(folder, world, rank):
    options = {"every_n_steps": 2, "patience": 1, "recovery": 1, "layers_at_once": 1}
    gated = lq.PlateauBitReduction([8, 4], "mine", **options)
    result, _ = fit(folder, world, rank, Deciding(), [*int8(), gated])
    ordered = lq.SensitivityBitReduction([8, 4, 2], start_step=1, end_step=5)
    more, _ = fit(folder, world, rank, Plain(), [*int8(), ordered])
    return {"gated": result, "ordered": more, "orders": [gated.orders, ordered.orders], "stage": gated.stage,
            "rolled_back": gated._rolled_back}  # fmt: skip


def fixed_data(folder, world, rank):
    """Learned scales but of the data: no rank waits for their gradients."""
    config = lq.QATConfig("int8", per_channel=True, learnable_step_size=True)
    qat = lq.QuantizationAwareTraining(config, calibration_batches=2, certify=False, start_step=2)
    return fit(folder, world, rank, Plain(), [qat, lq.LearnedScales(of_data=False)])[0]


def synced_norms(folder, world, rank):
    """In float, to prove the stand-in; then quantized, with ranges and with learned scales."""
    learned = lq.QATConfig("int8", per_channel=True, learnable_step_size=True)
    runs = {
        "float": [],
        "ranges": int8(start_step=1, freeze_step=6),
        "uncalibrated": [lq.QuantizationAwareTraining("int8", calibration_batches=0, certify=False)],
        "still": [lq.QuantizationAwareTraining("int8"), lq.BatchNormFolding(freeze_step=5)],
        "learned": [lq.QuantizationAwareTraining(learned, calibration_batches=2, certify=False, start_step=1)],
    }
    with synced_on_cpu():
        return {name: _synced(folder, world, rank, name, callbacks) for name, callbacks in runs.items()}


def _synced(folder, world, rank, name, callbacks):
    module, gradients, calls = Normed(), Gradients(), SumsByGloo.calls
    by_hand = name == "uncalibrated"  # else Lightning does it, in the prepared module, and undoes it in the end
    if by_hand and world > 1:
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    result, _ = fit(folder, world, rank, module, [*callbacks, gradients], sync_batchnorm=not by_hand)
    result |= {"gradients": gradients.steps, "outputs": module.outputs, "synced": SumsByGloo.calls - calls}
    if callbacks:
        result["folds"] = {n: layer.weight_quantizer.folded_norm for n, layer in qat_layers(module)}
        result["converted"] = whole(lq.convert(module).state_dict())
    return result


def branches(folder, world, rank):
    strategy = DDPStrategy(find_unused_parameters=True)
    return fit(folder, world, rank, Branches(), int8(), strategy)[0]


def fsdp(folder, world, rank):
    strategy = ModelParallelStrategy(world, 1, save_distributed_checkpoint=False)
    callbacks = [*int8(freeze_step=6), lq.ProgressiveBitReduction({3: 4})]
    saver = ModelCheckpoint(folder, filename=f"fsdp{world}", save_on_train_epoch_end=True, every_n_epochs=2)
    module = Sharded()
    result, _ = fit(folder, world, rank, module, [*callbacks, saver], strategy, enable_checkpointing=True)
    if world > 1:
        try:
            lq.convert(module)
        except RuntimeError as error:
            result["error"] = str(error)
    return result


def learned_fsdp(folder, world, rank):
    """``configure_model`` shards before there are scales, which FSDP2 then leaves alone."""
    strategy = ModelParallelStrategy(world, 1, save_distributed_checkpoint=False)
    config = lq.QATConfig("int8", per_channel=True, learnable_step_size=True)
    learned = lq.LearnedScales(lr=0.03, clip=None)  # with which a gradient twice as large shows
    callbacks = [lq.QuantizationAwareTraining(config, calibration_batches=2, certify=False), learned]
    return fit(folder, world, rank, Sharded(), callbacks, strategy, accumulate_grad_batches=2)[0]


def calibrated(world, rank, config, batches=3):
    torch.manual_seed(1)
    model = lq.prepare(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), config)
    generator = torch.Generator().manual_seed(5)
    whole_batches = [torch.randn(GLOBAL_BATCH, 6, generator=generator) * 3.0**i for i in range(batches)]
    lq.calibrate(model, [x[rank::world] for x in whole_batches], across_ranks=world > 1)
    return whole(model.state_dict())


def calibration(folder, world, rank):
    found = {}
    for observer in (*OBSERVERS, "samples"):
        activation = lq.QuantizationConfig("int8", symmetric=False, observer=observer.replace("samples", "min_max"),
                                           calibration_samples=11 if observer == "samples" else None)  # fmt: skip
        plan = lq.QuantizationPlan([lq.LayerRule("*", lq.QuantizationConfig("int8"), activation)])
        found[observer] = calibrated(world, rank, plan)
    return found


def other_layers(folder, world, rank):
    """A loop of one's own in which a rank runs other layers than its neighbour, or none."""
    model = lq.prepare(nn.ModuleList(nn.Linear(3, 3) for _ in range(3)), "int8")
    defer_ranges(model, True)
    for step in range(3):
        for i in range(step % 2 + rank):
            model[i](torch.full((2, 3), float(1 + rank + step)))
        update_ranges(model, across_ranks=world > 1)
    return {name: (q.calibrated, q.scale.clone()) for name, q in
            ((name, layer.input_quantizer) for name, layer in qat_layers(model))}  # fmt: skip


SCENARIOS = (ddp, uncalibrated, accumulating, deciding, fixed_data, synced_norms, branches, fsdp, learned_fsdp,
             calibration, other_layers)  # fmt: skip


def run_two(folder):
    """Run all scenarios on two gloo ranks; return what each found."""
    folder = Path(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "tests", "OMP_NUM_THREADS": "1"}  # fmt: skip
    here = Path(__file__).parent
    both["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    ranks = []
    for rank in (0, 1):
        log = (folder / f"{rank}.log").open("w")
        environment = {**os.environ, **both, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(subprocess.Popen([sys.executable, __file__, str(folder)], env=environment, stdout=log, stderr=log))
    try:
        for rank, process in enumerate(ranks):
            if process.wait(timeout=240):
                raise RuntimeError((folder / f"{rank}.log").read_text()[-4000:])
    finally:
        for process in ranks:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    me = torch.distributed.get_rank()
    torch.save({scenario.__name__: scenario(sys.argv[1], 2, me) for scenario in SCENARIOS}, f"{sys.argv[1]}/{me}.pt")
