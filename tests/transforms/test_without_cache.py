"""``without_cache`` changes what it has to, and gives it back."""

from types import SimpleNamespace

import pytest
from torch import nn

from lightning_qat.transforms.without_cache import without_cache


def test_every_config_is_as_it_was_also_after_an_error():
    shared, other, none = SimpleNamespace(use_cache=True), SimpleNamespace(use_cache=False), SimpleNamespace()
    model = nn.Sequential(nn.Identity(), nn.Identity(), nn.Identity(), nn.Identity())
    model.config, model[0].config, model[1].config, model[2].config = shared, shared, other, none
    model[3].config = None

    def breaks():
        with without_cache(model):
            assert not shared.use_cache
            assert not hasattr(none, "use_cache")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        breaks()
    assert (shared.use_cache, other.use_cache, vars(none)) == (True, False, {})
