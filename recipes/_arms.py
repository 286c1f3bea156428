"""The arms of a comparison: read from YAML, checked, and each turned into the config that ``train`` would have."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lightning_qat.config import PRESETS, check_choice, check_int

from ._build import check, make_callbacks, make_trainer
from ._errors import ConfigError, nearest

#: The float fit that all arms of a seed go on from; no arm can have this name.
SHARED = "_shared"

_CONFIG = "lightning_qat.QATConfig"
_CALLBACK = "lightning_qat.QuantizationAwareTraining"
_NAME = re.compile(r"[A-Za-z][\w.-]*")


@dataclass(frozen=True)
class Arm:
    """What is done from the shared float checkpoint on.

    Args:
        name: of the arm, and of its folder.
        quantization: a node with ``_target_``; None is float.
        after: the float arm that is quantized after its training; None trains this arm itself.
        callbacks: name -> node of a callback, besides the one that quantizes.
        task: arguments of the task that differ from ``arm_task``.
        fit: arguments of the Trainer that differ from ``arm_fit``.
    """

    name: str
    quantization: Mapping[str, Any] | None = None
    after: str | None = None
    callbacks: Mapping[str, Any] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)
    fit: Mapping[str, Any] = field(default_factory=dict)


def read_arms(cfg: DictConfig) -> dict[str, Arm]:
    """Return the arms in an order in which they can be run: one that another is quantized from comes before it.

    Raises:
        ConfigError: a name, an argument or a value is wrong; the message says in which arm.
    """
    settings = _plain(cfg).get("arms")
    if not isinstance(settings, dict) or not settings:
        raise ConfigError(
            f"arms={settings!r} holds no arm; choose a file of conf/arms, or add +arms.NAME.quantization=..."
        )
    arms = {str(name): _read_arm(str(name), node) for name, node in settings.items()}
    for name in (cfg.reference, *(arm.after for arm in arms.values() if arm.after is not None)):
        if name not in arms:
            raise ConfigError(f"arm {name!r} is not known{nearest(name, arms)}")
        if arms[name].quantization is not None:
            raise ConfigError(f"arm {name!r} is compared with or quantized after training, so it must be a float arm")
    return dict(sorted(arms.items(), key=lambda item: item[1].after is not None))


def _read_arm(name: str, node: Any) -> Arm:
    known = [option.name for option in fields(Arm) if option.name != "name"]
    if not _NAME.fullmatch(name):
        raise ConfigError(f"arms.{name}: use letters, digits, '_', '-' and '.', beginning with a letter")
    node = {} if node is None else node
    if not isinstance(node, dict):
        raise ConfigError(f"arms.{name}={node!r} must hold some of: {', '.join(known)}")
    for key in node:
        if key not in known:
            raise ConfigError(f"arms.{name}.{key} is not known{nearest(key, known)}")
    given = {key: value for key, value in node.items() if value is not None}
    for key in ("callbacks", "task", "fit"):
        if not isinstance(given.get(key, {}), dict):
            raise ConfigError(f"arms.{name}.{key}={given[key]!r} must hold names and values")
    arm = Arm(name, **{**given, "quantization": _quantization(name, given.get("quantization"))})
    if arm.after is not None and (arm.quantization is None or arm.callbacks or arm.task or arm.fit):
        raise ConfigError(
            f"arms.{name}.after: the arm is not trained; it takes a quantization, and no task, fit, callbacks"
        )
    return arm


def _quantization(name: str, given: Any) -> dict[str, Any] | None:
    """Return a node that can be instantiated for a preset's name or fields of :class:`QATConfig`."""
    if given is None:
        return None
    given = {"preset": given} if isinstance(given, str) else dict(given)
    if "_target_" in given:
        return given
    base = given.pop("preset", None)
    if base is None:
        return {"_target_": _CONFIG, **given}
    try:
        settings = asdict(PRESETS[check_choice("preset", base, PRESETS)])
    except ValueError as error:
        raise ConfigError(f"arms.{name}.quantization: {error}") from error
    settings.update(scheme=str(settings["scheme"]), bits=int(settings["bits"]))  # as YAML has them
    return {"_target_": _CONFIG, **settings, **given}


def train_config(cfg: DictConfig, arm: Arm, seed: int, folder: str) -> DictConfig:
    """Return the config of ``lightning-qat train`` whose quantization-aware fit is what ``arm`` does."""
    plain = _plain(cfg)
    every_fit = (plain.get("callbacks") or {}).get("every_fit") or {}
    # A float arm has no callback that would use it; the check of the config wants a plan all the same.
    quantization = arm.quantization or _quantization(arm.name, "int8")
    settings = {"config": quantization, "calibration_batches": plain["calibration_batches"]}
    quantizing = (
        {} if arm.quantization is None else {"quantization_aware_training": {"_target_": _CALLBACK, **settings}}
    )
    kept = ("data", "model", "task", "trainer", "logger", "threads", "calibration_batches", "parity", "float_fit")
    return OmegaConf.create(
        {
            **{key: plain[key] for key in kept},
            "seed": seed,
            "float_checkpoint": None,
            "output_dir": folder,
            "quantization": quantization,
            "qat_task": {**plain["arm_task"], **arm.task},
            "qat_fit": {**plain["arm_fit"], **arm.fit},
            "callbacks": {"every_fit": every_fit, "qat_fit": {**quantizing, **arm.callbacks}},
        }
    )


def shared_config(cfg: DictConfig, seed: int) -> DictConfig:
    """Return what decides the shared float fit: two comparisons with an equal one have the same checkpoint."""
    plain = _plain(cfg)
    kept = {key: plain[key] for key in ("data", "task", "trainer", "threads", "float_fit")}
    every_fit = (plain.get("callbacks") or {}).get("every_fit") or {}
    return OmegaConf.create({**kept, "seed": seed, "callbacks": {"every_fit": every_fit}})


def check_comparison(cfg: DictConfig) -> dict[str, Arm]:
    """Return the arms of a comparison whose config fits as a whole; nothing was trained yet.

    Raises:
        ConfigError: a name, an argument or a value is wrong.
    """
    seeds = list(cfg.seeds) if OmegaConf.is_list(cfg.seeds) else []
    try:
        for seed in seeds:
            check_int("seeds", seed, 0, 2**32 - 1)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not seeds or len(set(seeds)) != len(seeds):
        raise ConfigError(f"seeds={cfg.seeds!r} must be a list of different integers, such as [0,1,2]")
    arms = read_arms(cfg)
    for arm in arms.values():
        config = train_config(cfg, arm, seeds[0], cfg.output_dir)
        try:
            check(config)
            callbacks = [f for key in ("every_fit", "qat_fit") for f in make_callbacks(config.callbacks[key], key)]
            make_trainer(config.trainer, callbacks, **config.qat_fit)
        except ConfigError as error:
            raise ConfigError(f"arm {arm.name!r}: {error}") from error
    return arms


def _plain(cfg: DictConfig) -> dict[str, Any]:
    found = OmegaConf.to_container(cfg, resolve=True)
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}
