"""How experts of a layer differ: their weights, and their outputs on the same inputs. Shape suffixes: `moe.losses`."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fairseq_hash.moe.layer import SparseLayer
from fairseq_hash.moe.mapped_experts import MappedExperts

VALUES = 1 << 24  # in memory at once: 64 MiB in fp32


@dataclass(frozen=True, eq=False)
class Difference:
    """Compares each two of E vectors.

    Attributes:
        cosine_EE: fp64, from -1 to 1; 0 where a vector is zero.
        distance_EE: fp64, the L2 distance over the root mean square of all vectors' norms; of outputs, the root mean
            square over the inputs. Unrelated vectors of one length have 1.41.
    """

    cosine_EE: np.ndarray
    distance_EE: np.ndarray

    @property
    def mean_cosine(self) -> float:
        """Mean over the pairs of different experts; NaN for one expert."""
        return _mean_of_pairs(self.cosine_EE)

    @property
    def mean_distance(self) -> float:
        """Mean over the pairs of different experts; NaN for one expert."""
        return _mean_of_pairs(self.distance_EE)

    @property
    def closest(self) -> "tuple[int, int] | None":
        """The two experts with the largest cosine; None for one expert."""
        experts = len(self.cosine_EE)
        if experts < 2:
            return None
        above_EE = np.where(np.triu(np.ones((experts, experts), dtype=bool), 1), self.cosine_EE, -np.inf)
        one, other = divmod(int(above_EE.argmax()), experts)
        return one, other


@torch.no_grad()
def of_weights(layer: SparseLayer) -> Difference:
    """Compare all weights of each expert, as one vector. Experts in files are read piece by piece."""
    experts = layer.experts
    parameters = experts.parts() if isinstance(experts, MappedExperts) else [[p] for p in experts.parameters()]
    product_EE = torch.zeros(layer.parallel.num_experts, layer.parallel.num_experts, dtype=torch.float64)
    step = max(VALUES // len(product_EE), 1)
    for parts in parameters:
        flat = [part.flatten(1) for part in parts]
        for start in range(0, flat[0].shape[1], step):
            piece_EN = torch.cat([part_eN[:, start : start + step] for part_eN in flat]).double()
            product_EE += (piece_EN @ piece_EN.t()).cpu()
    square_E = product_EE.diagonal()
    norm_E = square_E.sqrt().clamp(min=1e-300)
    return _difference(product_EE / (norm_E[:, None] * norm_E), product_EE)


@torch.no_grad()
def of_outputs(layer: SparseLayer, x_MD: Tensor) -> Difference:
    """Compare what each expert makes of the same M inputs of the layer (fp32): cosines are means over the inputs."""
    experts = layer.parallel.num_experts
    cosine_EE, product_EE = (torch.zeros(experts, experts, dtype=torch.float64) for _ in range(2))
    for y_EMD in _outputs(layer, x_MD):
        y_MED = y_EMD.transpose(0, 1).double()
        product_MEE = y_MED @ y_MED.transpose(1, 2)
        norm_ME = product_MEE.diagonal(dim1=1, dim2=2).sqrt().clamp(min=1e-300)
        cosine_EE += (product_MEE / (norm_ME[:, :, None] * norm_ME[:, None])).sum(dim=0).cpu()
        product_EE += product_MEE.sum(dim=0).cpu()
    return _difference(cosine_EE / len(x_MD), product_EE)


def _outputs(layer: SparseLayer, x_MD: Tensor) -> Iterable[Tensor]:
    groups = layer.parallel.num_experts * layer.segments  # with MultiHash an expert's output is the sum of its segments
    for x_ND in x_MD.split(max(VALUES // (groups * max(x_MD.shape[1], groups)), 1)):
        y_RD = layer.experts(x_ND.repeat(groups, 1), (len(x_ND),) * groups)
        yield y_RD.view(-1, layer.segments, *x_ND.shape).sum(dim=1)


def _difference(cosine_EE: Tensor, product_EE: Tensor) -> Difference:
    square_E = product_EE.diagonal()
    distance_EE = (square_E[:, None] + square_E - 2 * product_EE).clamp(min=0).sqrt()
    scale = square_E.mean().sqrt().clamp(min=1e-300)
    return Difference(cosine_EE.numpy(), (distance_EE / scale).numpy())


def _mean_of_pairs(value_EE: np.ndarray) -> float:
    experts = len(value_EE)
    return float((value_EE.sum() - np.trace(value_EE)) / (experts * (experts - 1))) if experts > 1 else float("nan")
