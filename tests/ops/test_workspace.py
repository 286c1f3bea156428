"""Memory is used again only when nobody holds it."""

import threading

import pytest
import torch
from tensors import randn
from torch import nn

import lightning_qat as lq
from lightning_qat.ops import layout, workspace
from lightning_qat.ops.workspace import passing_results, release_workspace, take

SIZE = workspace._LEAST_BYTES // 4  # float32 elements


@pytest.fixture(autouse=True)
def _fresh():
    release_workspace()
    yield
    release_workspace()


def test_fresh_memory_is_the_rule():
    assert take(torch.empty(SIZE)) is None
    with passing_results():
        assert take(torch.empty(SIZE - 1)) is None
        assert take(torch.empty(4, SIZE)[:, ::2]) is None
        with passing_results():
            pass
        assert take(torch.empty(SIZE)) is not None
    assert take(torch.empty(SIZE)) is None


@pytest.mark.parametrize(
    "holder",
    [
        lambda t: t,
        lambda t: t[:3],
        lambda t: t.detach(),
        lambda t: t.numpy(),
        lambda t: t.view(torch.int32),
        lambda t: t.untyped_storage(),
        lambda t: torch.utils.dlpack.to_dlpack(t),
        lambda t: (t * nn.Parameter(torch.ones(SIZE))).sum(),
    ],
)
def test_what_is_held_is_never_given_again(holder):
    with passing_results():
        first = take(torch.empty(SIZE)).fill_(1.0)
        address = first.data_ptr()
        held = holder(first)
        del first
        others = [take(torch.empty(size)) for size in (SIZE, SIZE, 2 * SIZE, SIZE, 3 * SIZE)]
        assert address not in {t.data_ptr() for t in others if t is not None}
        del held, others
        release_workspace()


def test_what_is_let_go_is_given_again():
    with passing_results():
        first = take(torch.empty(SIZE))
        address = first.data_ptr()
        del first
        again = take(torch.empty(2, SIZE // 2))
        assert again.data_ptr() == address
        assert again.shape == (2, SIZE // 2)


def test_large_pieces_serve_smaller_results_but_not_tiny_ones():
    with passing_results():
        address = take(torch.empty(8 * SIZE)).data_ptr()
        assert take(torch.empty(SIZE)).data_ptr() == address
        release_workspace()
        take(torch.empty(9 * SIZE))
        assert take(torch.empty(SIZE)) is None


def test_only_the_largest_piece_stays():
    with passing_results():
        first = take(torch.empty(2 * SIZE))
        assert take(torch.empty(2 * SIZE)) is None  # the first is held: fresh memory, and the piece stays
        larger = take(torch.empty(3 * SIZE))
        assert larger.data_ptr() != first.data_ptr()
        assert len(workspace._WORKSPACE.pieces) == workspace._PIECES


def test_memory_is_on_the_cpu_whatever_the_default_device_is():
    """A kernel is given its address: that of a tensor on the meta device is 0."""
    like = torch.empty(SIZE)
    with torch.device("meta"), passing_results():
        assert take(like).device.type == "cpu"
        assert layout.empty_scratch(like, SIZE).device.type == "cpu"


def test_threads_have_their_own():
    with passing_results():
        address = take(torch.empty(SIZE)).data_ptr()
    found = []

    def other():
        with passing_results():
            found.append(take(torch.empty(SIZE)))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert found[0].data_ptr() != address


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_results_have_the_shape_strides_and_dtype_of_the_input(dtype, layout):
    like = torch.empty(16, 8, 128, 256, dtype=dtype).to(memory_format=layout)
    with passing_results():
        result = take(like)
    assert (result.shape, result.stride(), result.dtype) == (like.shape, like.stride(), dtype)


def test_layers_that_share_memory_train_as_layers_that_do_not(monkeypatch):
    """The witness is the same training with fresh memory; the inputs are large enough to be taken again."""

    def train():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        lq.calibrate(lq.prepare(model, "int8"), [randn(2, 4, 192, 192)])
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        taken = []
        for step in range(3):
            x = randn(2, 4, 192, 192, seed=step).requires_grad_()
            loss = model(x).square().mean() + model(x * 2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            taken.append(x.grad)
        return [*model.state_dict().values(), *taken]

    monkeypatch.setattr(workspace, "_LEAST_BYTES", 2**20)
    shared = train()
    assert workspace._WORKSPACE.pieces
    monkeypatch.setattr(workspace, "_LEAST_BYTES", 2**40)
    release_workspace()
    fresh = train()
    assert not workspace._WORKSPACE.pieces
    for a, b in zip(shared, fresh, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
