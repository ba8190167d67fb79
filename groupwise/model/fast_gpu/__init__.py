"""Decoder layers and heads on a GPU in few kernels: norms, rotations, gates, log-probs and draws, for sampler and
trainer alike.

Each kernel computes a row by itself, in one order, so that a row has the same bits in any company. Values are rounded
where transformers' modules round. The modules named `…_kernel` import Triton, and are imported where one is launched.
"""
