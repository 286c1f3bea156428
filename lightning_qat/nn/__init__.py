"""QAT layers (float weight and fake quantizers) and quantized layers (packed weight)."""

from lightning_qat.nn.attention import QATMultiheadAttention, QuantizedMultiheadAttention
from lightning_qat.nn.conv import (
    QATConv1d,
    QATConv2d,
    QATConv3d,
    QATConvTranspose2d,
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedConv3d,
    QuantizedConvTranspose2d,
)
from lightning_qat.nn.embedding import QATEmbedding, QuantizedEmbedding
from lightning_qat.nn.layer import QATLayer, QuantizedLayer
from lightning_qat.nn.linear import QATLinear, QuantizedLinear
from lightning_qat.nn.norm import FoldedBatchNorm, fold_bn_into_conv
from lightning_qat.nn.recurrent import (
    QATGRU,
    QATLSTM,
    QATRNN,
    QATGRUCell,
    QATLSTMCell,
    QATRNNCell,
    QuantizedGRU,
    QuantizedGRUCell,
    QuantizedLSTM,
    QuantizedLSTMCell,
    QuantizedRNN,
    QuantizedRNNCell,
    RecurrentLayer,
)
from lightning_qat.nn.region import keep_codes_inside
from lightning_qat.nn.region_functions import codes_pass

__all__ = [
    "QATGRU",
    "QATLSTM",
    "QATRNN",
    "FoldedBatchNorm",
    "QATConv1d",
    "QATConv2d",
    "QATConv3d",
    "QATConvTranspose2d",
    "QATEmbedding",
    "QATGRUCell",
    "QATLSTMCell",
    "QATLayer",
    "QATLinear",
    "QATMultiheadAttention",
    "QATRNNCell",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedConv3d",
    "QuantizedConvTranspose2d",
    "QuantizedEmbedding",
    "QuantizedGRU",
    "QuantizedGRUCell",
    "QuantizedLSTM",
    "QuantizedLSTMCell",
    "QuantizedLayer",
    "QuantizedLinear",
    "QuantizedMultiheadAttention",
    "QuantizedRNN",
    "QuantizedRNNCell",
    "RecurrentLayer",
    "codes_pass",
    "fold_bn_into_conv",
    "keep_codes_inside",
]
