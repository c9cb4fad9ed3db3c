"""What every rank imports, imported once: the fork server loads this file and forks each rank from itself.

torch, transformers and peft take 10 to 20 CPU seconds to import, a fork takes some 50 ms. So a fresh pool costs nothing
and a pool that crashed is simply replaced. Nothing here may start a thread or touch CUDA: neither survives a fork.
"""

import gc
import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft  # noqa: F401
    import torch
    import torch.distributed
    import torch.utils.checkpoint  # noqa: F401
    import transformers  # noqa: F401
    from transformers.models.bart import modeling_bart  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

# The imported world is not garbage: without this, each gc.collect() of each rank walks and copies all of it.
gc.collect()
gc.freeze()
