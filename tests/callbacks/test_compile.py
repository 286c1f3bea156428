"""``torch.compile``: no graph break, one graph for each phase, the bits of eager training."""

import copy
import shutil

import pytest
import torch
from classifier import Classifier, loader, trainer
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import lightning_qat as lq
from lightning_qat.transforms.phase import Phase, apply_phase
from lightning_qat.transforms.ranges import defer_ranges, update_ranges

PHASES = (
    Phase(quantizing=False),
    Phase(),
    Phase(weight_bits=4),
    Phase(weight_bits=4, activation_bits=6),
    Phase(weight_bits=4, activation_bits=6, frozen=True, observing=False),
)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """Convolution with BatchNorm, embedding, layer norm, and a layer that is used twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.bn = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.table, self.norm = nn.Embedding(10, 4), nn.LayerNorm(4)
        self.twice, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x, *, index):
        x = F.relu(self.bn(self.conv(x))).mean((2, 3)) + self.table(index)
        return self.head(self.norm(self.twice(F.gelu(self.twice(x)))))


def train(model, forward, deferred=True, steps=2):
    """Run the phases; return the losses, the state and the graphs compiled after each phase."""
    defer_ranges(model, deferred)
    optimizer, generator = torch.optim.SGD(model.parameters(), lr=0.05), torch.Generator().manual_seed(1)
    losses, graphs = [], []
    for phase in PHASES:
        for _ in range(steps):
            apply_phase(model, phase)
            x = torch.randn(5, 1, 8, 8, generator=generator)
            loss = forward(x, index=torch.arange(5)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if deferred:
                update_ranges(model)
            losses.append(loss.detach())
        graphs.append(getattr(forward, "counter", CompileCounterWithBackend("eager")).frame_count)
    return torch.stack(losses), model.state_dict(), graphs


def calibrated(plan):
    model = lq.prepare(Net(), plan)
    batches = [dict(x=torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(9)), index=torch.arange(5))]
    lq.calibrate(model, batches)
    return model


def compiled(model, backend, **options):
    counter = CompileCounterWithBackend(backend)
    compiled_model = torch.compile(model, backend=counter, fullgraph=True, **options)

    def forward(x, *, index):
        return compiled_model(x, index=index)

    forward.counter = counter
    return forward


@pytest.mark.parametrize(
    ("plan", "backend"),
    [("int8", "aot_eager"), ("int8", "eager"), ("w4a8", "eager"), ("int8_dynamic", "eager")],
)
def test_one_graph_for_each_phase_and_the_bits_of_eager(plan, backend):
    model = calibrated(plan)
    losses, state, graphs = train(model, compiled(model, backend))
    assert all(after - before <= 1 for before, after in zip([0, *graphs], graphs, strict=False)), graphs
    eager = calibrated(plan)
    eager_losses, eager_state, _ = train(eager, eager)
    assert torch.equal(losses, eager_losses)
    for key, value in state.items():
        assert torch.equal(value, eager_state[key]) if isinstance(value, torch.Tensor) else value == eager_state[key]


def test_a_loop_of_ones_own_needs_no_more_graphs():
    model = calibrated("int8")
    losses, _, graphs = train(model, compiled(model, "eager"), deferred=False)
    assert all(after - before <= 1 for before, after in zip([0, *graphs], graphs, strict=False)), graphs
    eager = calibrated("int8")
    assert torch.equal(losses, train(eager, eager, deferred=False)[0])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_trains_the_same_model():
    """Its kernels round a product and a sum once where eager rounds twice: losses agree to float noise."""

    def model():
        torch.manual_seed(0)
        layer = lq.prepare(nn.Linear(4, 3), "int8")
        return lq.calibrate(layer, [torch.randn(5, 4, generator=torch.Generator().manual_seed(9))])

    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))
    eager, other = model(), model()
    counter = CompileCounterWithBackend("inductor")
    results = []
    for forward, layer in ((torch.compile(other, backend=counter, fullgraph=True), other), (eager, eager)):
        loss = forward(x).square().mean()
        loss.backward()
        results.append((loss.detach(), layer.weight.grad, layer.input_quantizer.scale))
    assert counter.frame_count == 1
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two)


class Counted(Classifier):
    """Compiles its network by itself, as the documentation of Lightning shows."""

    def __init__(self, backend=None):
        super().__init__()
        self.counter = CompileCounterWithBackend(backend) if backend else None

    def features(self, x):
        return self.head(F.relu(self.bn(self.conv(x))).mean((2, 3)))

    def configure_model(self):
        if self.counter is not None:
            self.__dict__["run"] = torch.compile(self.features, backend=self.counter, fullgraph=True)
        else:
            self.__dict__["run"] = self.features

    def forward(self, x):
        return self.run(x)


def schedule():
    return [
        lq.QuantizationAwareTraining("int8", start_step=2, freeze_step=6, certify=False),
        lq.ProgressiveBitReduction({4: 4}),
    ]


@pytest.mark.parametrize("options", [{}, dict(accumulate_grad_batches=2, max_epochs=2)], ids=["", "accumulating"])
def test_a_network_compiled_in_a_module_under_the_whole_schedule(tmp_path, options):
    module, eager = Counted("aot_eager"), Counted()
    for each in (module, eager):
        trainer(tmp_path, schedule(), num_sanity_val_steps=0, limit_val_batches=0, **options).fit(each, loader())
    assert module.counter.frame_count == 4  # float, quantized, 4 bits, frozen; calibration runs eager
    for key, value in module.state_dict().items():
        other = eager.state_dict()[key]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, key
    assert lq.convert(eager).head.weight_format.bits == 4
    runs = [trainer(tmp_path, schedule()).validate(each, loader(8), verbose=False)[0] for each in (module, eager)]
    assert runs[0] == runs[1]
    assert module.counter.frame_count == 5


class Silent(Classifier):
    """Does not log: with torch 2.13 Lightning's own ``self.log`` fails in a compiled ``training_step``."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])


def test_a_compiled_lightning_module_fits_and_converts(tmp_path):
    """``torch.compile(module)`` given to ``Trainer.fit``, which compiles ``training_step``."""
    states = []
    for backend in ("eager", None):
        module = Silent()
        torch.manual_seed(0)
        given = torch.compile(module, backend=backend) if backend else module
        trainer(tmp_path, schedule()).fit(given, loader(), loader(8))
        states.append(copy.deepcopy(module.state_dict()))
        converted = lq.convert(module)
        assert isinstance(converted.bn, lq.nn.FoldedBatchNorm)
        x = torch.randn(4, 1, 8, 8)
        shipped = converted(x)
        for parameter in module.parameters():  # Lightning leaves a compiled forward: a copy of it is the module's own
            parameter.data.zero_()
        assert torch.equal(converted(x), shipped)
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]) if isinstance(value, torch.Tensor) else value == states[1][key], key
