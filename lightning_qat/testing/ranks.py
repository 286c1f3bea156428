"""Do all ranks have the same weights and scales, bit for bit?"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import torch.multiprocessing as mp
from lightning.pytorch.strategies import DDPStrategy

from lightning_qat.testing.record import MakeCallbacks, Record, Recorder, named_leaves
from lightning_qat.testing.resume import fit, quiet_trainer, seeded
from lightning_qat.transforms.prepare import qat_layers


def assert_rank_equal(
    make_module: Callable[[], pl.LightningModule],
    make_data: Callable[[], Any],
    callbacks: MakeCallbacks,
    *,
    ranks: int = 2,
    folder: str | Path | None = None,
    start_method: str | None = None,
    seed: int = 0,
    **trainer_options: Any,
) -> None:
    """Assert that parameters, scales and observed ranges are the same on all ranks after every step.

    Processes of one thread each train with DDP over gloo on the CPU.

    Args:
        make_module: returns a new module.
        make_data: returns new data: a ``LightningDataModule``, a training loader, or a tuple of a training and a
            validation loader.
        callbacks: returns new quantization callbacks for a Trainer.
        ranks: how many.
        folder: where results go for the time being; None is a temporary folder.
        start_method: of the processes; ``"spawn"`` needs functions at the top of a module that the new processes can
            import, ``"fork"`` takes any, and may hang where this process has run threads or a GPU. None is
            ``"spawn"`` where the three functions and the options allow it.
        seed: of the random numbers, the same on all ranks.
        **trainer_options: of the Trainer; two epochs unless they say otherwise.

    Raises:
        AssertionError: naming the rank, the first step and the tensor that differ.
        RuntimeError: a rank failed, with its traceback.
        ValueError: there is no way to start processes with these functions.
    """
    method = start_method or _start_method(make_module, make_data, callbacks, trainer_options)
    with tempfile.TemporaryDirectory(dir=folder) as where:
        job = (make_module, make_data, callbacks, ranks, where, _free_port(), seed, trainer_options)
        try:
            mp.start_processes(_run_rank, args=job, nprocs=ranks, start_method=method)
        except mp.ProcessRaisedException as error:
            raise RuntimeError(f"assert_rank_equal: a rank failed. {error}") from error
        records: list[Record] = [torch.load(_path(where, r), weights_only=False) for r in range(ranks)]
    if not records[0].steps:
        raise AssertionError("the ranks took no step; check max_epochs and the data")
    for rank, record in enumerate(records[1:], 1):
        if record.steps.keys() != records[0].steps.keys():
            raise AssertionError(f"rank 0 took {len(records[0].steps)} steps and rank {rank} {len(record.steps)}")
        difference = records[0].first_difference(record)
        if difference is not None:
            raise AssertionError(f"rank {rank} differs from rank 0 {difference}")


def _start_method(*passed: Any) -> str:
    """Return how to start processes that are passed these objects."""
    try:
        pickle.dumps(passed)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        if "fork" not in multiprocessing.get_all_start_methods():
            raise ValueError(
                f"assert_rank_equal starts processes, which need functions at the top of a module here: {error}; "
                "define them there, without lambda"
            ) from None
        return "fork"
    return "spawn"


def _path(folder: str, rank: int) -> Path:
    return Path(folder) / f"rank_{rank}.pt"


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _run_rank(
    rank: int,
    make_module: Callable[[], pl.LightningModule],
    make_data: Callable[[], Any],
    callbacks: MakeCallbacks,
    ranks: int,
    folder: str,
    port: int,
    seed: int,
    options: dict[str, Any],
) -> None:
    # Lightning takes a process with LOCAL_RANK for one that was started for it.
    os.environ |= {
        "LOCAL_RANK": str(rank),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    recorder = Recorder(_shared, loss=False)
    strategy = {"strategy": DDPStrategy(process_group_backend="gloo"), "devices": ranks, **options}
    with seeded(seed):
        trainer = quiet_trainer(Path(folder), [*callbacks(), recorder], strategy)
        fit(trainer, make_module(), make_data())
    torch.save(recorder.record, _path(folder, rank))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _shared(trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[tuple[str, Any]]:
    """Yield what has to be the same: not BatchNorm statistics, which DDP takes from rank 0 before each forward."""
    yield from module.named_parameters()
    for name, layer in qat_layers(module):
        for part in ("weight_quantizer", "input_quantizer"):
            quantizer = getattr(layer, part)
            if quantizer is not None:
                yield from named_leaves(f"{name}.{part}", quantizer.state_dict())
