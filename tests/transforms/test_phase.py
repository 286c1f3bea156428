"""Phases reach every quantizer, whatever it was in before."""

import itertools

import torch
from torch import nn
from torch.nn.utils import parametrizations

import lightning_qat as lq
from lightning_qat.transforms.phase import Phase, apply_phase, follow_weights


def test_every_flag_follows_from_every_phase_to_every_other():
    model = lq.prepare(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "int8")
    phases = [Phase(observing=o, quantizing=q, frozen=f) for o, q, f in itertools.product((True, False), repeat=3)]
    for before, phase in itertools.product(phases, phases):
        apply_phase(model, before)
        apply_phase(model, phase)
        for layer in model:
            weight, activation = layer.weight_quantizer, layer.input_quantizer
            assert (weight.quantizing, weight.frozen) == (phase.quantizing, phase.frozen)
            assert (activation.observing, activation.quantizing) == (phase.observing, phase.quantizing)
            assert activation.frozen == phase.frozen


def test_scales_follow_a_spectrally_normed_weight_without_a_power_iteration():
    model = lq.prepare(nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 8))), "int8").train()
    apply_phase(model, Phase(frozen=True))
    norm, scale = model[0].parametrizations.weight[0], model[0].weight_quantizer.scale.clone()
    vectors = norm._u.clone()
    with torch.no_grad():
        model[0].parametrizations.weight.original[0] *= 3
    follow_weights(model)
    assert torch.equal(norm._u, vectors)
    assert not torch.equal(model[0].weight_quantizer.scale, scale)
