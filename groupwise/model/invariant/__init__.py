"""A forward on a GPU whose rows have the same bits in any company: `model.batch_invariant`.

`use` puts it into a model. The modules named `…_kernel` import Triton, and are imported where a kernel is launched.
"""
