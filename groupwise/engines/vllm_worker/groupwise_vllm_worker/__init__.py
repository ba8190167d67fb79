"""What Groupwise adds to each worker of vLLM: `--worker-extension-cls groupwise_vllm_worker.GroupwiseWorker`.

One package of a name that nothing else has, which imports nothing of Groupwise: it runs in vLLM's environment. What
trainer and worker have to do alike (checksums, groups, changes) is here once, and the trainer takes it from here.
"""

from .folder import verified
from .worker import GroupwiseWorker

__all__ = ["GroupwiseWorker", "verified"]
