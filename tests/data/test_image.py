"""The split, the order in training and the batches that every image data module shares."""

from __future__ import annotations

import pickle

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_qat.data import ImageArrays, ImageDataModule, stratified_split


class Counted(ImageDataModule):
    """100 + 20 images whose pixels are their number."""

    loads = 0

    def load(self) -> tuple[ImageArrays, ImageArrays]:
        self.loads += 1
        images = torch.arange(120, dtype=torch.uint8).reshape(-1, 1, 1, 1)
        arrays = ImageArrays(images, torch.arange(120) % 5)
        return arrays.subset(torch.arange(100)), arrays.subset(torch.arange(100, 120))


def train_order(data: ImageDataModule, epoch: int) -> list[int]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return [round(float(pixel) * 255) for images, _ in loader for pixel in images.flatten()]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(0, 99))
def test_a_split_holds_every_index_once(labels: list[int], seed: int) -> None:
    parts = stratified_split(torch.tensor(labels), [0.2, 0.3], seed)
    assert torch.cat(parts).sort().values.tolist() == list(range(len(labels)))
    again = stratified_split(torch.tensor(labels), [0.2, 0.3], seed)
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))


def test_a_split_is_stratified() -> None:
    labels = torch.arange(1000) % 10
    small, large = stratified_split(labels, [0.1], seed=0)
    assert labels[small].bincount().tolist() == [10] * 10
    assert labels[large].bincount().tolist() == [90] * 10
    other, _ = stratified_split(labels, [0.1], seed=1)
    assert not torch.equal(small, other)


@pytest.mark.parametrize("fractions", [[-0.1], [1.0], [0.6, 0.6]])
def test_fractions_leave_something(fractions: list[float]) -> None:
    with pytest.raises(ValueError, match="fractions="):
        stratified_split(torch.zeros(4, dtype=torch.int64), fractions, 0)


def test_parts_do_not_overlap_and_load_happens_once() -> None:
    data = Counted(batch_size=16, val_fraction=0.2)
    for stage in ("fit", "test", None):
        data.setup(stage)
    assert data.loads == 1
    seen = [
        {round(float(p) * 255) for images, _ in loader for p in images.flatten()}
        for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
    ]
    assert [len(part) for part in seen] == [80, 20, 20]
    assert set.union(*seen) == set(range(120))


def test_batches_are_float_images_and_labels() -> None:
    data = Counted(batch_size=16)
    data.setup()
    images, labels = next(iter(data.test_dataloader()))
    assert (images.dtype, images.shape) == (torch.float32, (16, 1, 1, 1))
    assert labels.dtype == torch.int64
    assert torch.equal(images.flatten() * 255, torch.arange(100.0, 116.0))
    image, label = data.test_dataloader().dataset[3]
    assert (image.shape, label.shape) == ((1, 1, 1), ())


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    data = Counted()
    data.setup()
    torch.manual_seed(3)
    first, second = train_order(data, 0), train_order(data, 1)
    assert first != second
    assert sorted(first) == sorted(second)
    torch.manual_seed(3)
    torch.rand(7)  # the state does not matter, the seed does
    assert train_order(data, 1) == second
    torch.manual_seed(4)
    assert train_order(data, 1) != second


def test_lightning_gives_each_epoch_its_own_order() -> None:
    orders: list[list[float]] = []

    class Recorder(L.LightningModule):
        def on_train_epoch_start(self) -> None:
            orders.append([])

        def training_step(self, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
            orders[-1] += batch[0].flatten().tolist()

        def configure_optimizers(self) -> None:
            return None

    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(max_epochs=2, enable_model_summary=False, accelerator="cpu", **options)  # type: ignore[arg-type]
    trainer.fit(Recorder(), train_dataloaders=prepared().train_dataloader())
    assert len(orders) == 2
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1])


def prepared() -> Counted:
    data = Counted()
    data.setup()
    return data


def test_loaders_can_be_sent_to_workers() -> None:
    loader = prepared().train_dataloader()
    pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn)))


@pytest.mark.parametrize(
    "options", [{"batch_size": 0}, {"val_fraction": 0.0}, {"val_fraction": 1.0}, {"batch_size": -3}]
)
def test_wrong_options_are_named(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Counted(**options)


def test_arrays_are_checked() -> None:
    with pytest.raises(ValueError, match=r"images \(3, 8, 8\)"):
        ImageArrays(torch.zeros(3, 8, 8), torch.zeros(3))
    with pytest.raises(ValueError, match=r"labels \(2,\)"):
        ImageArrays(torch.zeros(3, 1, 8, 8), torch.zeros(2))


def test_a_data_module_must_say_where_its_images_come_from() -> None:
    with pytest.raises(NotImplementedError, match="load"):
        ImageDataModule().setup()
