"""Sparse arithmetic of the top-k family: selection, decode and the gradients, without dense products.

With `k` of `d_sae` features active, a dense step spends five products of size batch x d_in x d_sae; here only the
encoder's forward pass is dense. The interface is the same on every device: CPU, CUDA, and CUDA with Triton.
"""

from training.kernels.selection import batch_topk, batch_topk_threshold, keep_above, kth_largest, topk_rows
from training.kernels.sparse import SparseActs, SparseGrads, sparse_backward, sparse_decode

__all__ = [
    "SparseActs",
    "SparseGrads",
    "batch_topk",
    "batch_topk_threshold",
    "keep_above",
    "kth_largest",
    "sparse_backward",
    "sparse_decode",
    "topk_rows",
]
