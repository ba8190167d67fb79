"""vLLM on the same card: the same shape with random weights, prompts and lengths, and log-probs of what is drawn."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from typing import Any

from gpu.bench import write_record
from gpu.decode import GROUP_SIZE, make_prompts
from gpu.shapes import SHAPES, hf_config


def run(args: argparse.Namespace) -> None:
    sys.path.insert(0, str(args.site))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(args.site), os.environ.get("PYTHONPATH", "")])
    # One process; and a sampler that needs no kernels compiled on the spot.
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_USE_FLASHINFER_SAMPLER="0", VLLM_NO_USAGE_STATS="1")
    import vllm  # pyright: ignore[reportMissingImports]

    package: Any = vllm
    shape = SHAPES[args.model_shape]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        hf_config(shape).save_pretrained(folder)
        engine = package.LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=args.dtype,
            max_model_len=args.prompt_tokens + args.tokens,
            max_num_seqs=max(args.samples),
            gpu_memory_utilization=args.memory,
            compilation_config={"cudagraph_capture_sizes": sorted(args.samples)},
        )
    write_record(args.json, "vllm_start", version=package.__version__, seconds=time.perf_counter() - started)
    while args.wait_for is not None and not args.wait_for.exists():
        time.sleep(0.1)
    sampling = package.SamplingParams(
        temperature=1.0, max_tokens=args.tokens, ignore_eos=True, logprobs=0, detokenize=False
    )
    for samples in args.samples:
        prompts = make_prompts(shape, -(-samples // GROUP_SIZE), args.prompt_tokens)
        asked = [{"prompt_token_ids": list(p.token_ids)} for p in prompts for _ in range(GROUP_SIZE)]
        for counted in (False, True):
            started = time.perf_counter()
            found = engine.generate(asked, sampling, use_tqdm=False)
            seconds = time.perf_counter() - started
            tokens = sum(len(one.outputs[0].token_ids) for one in found)
            if tokens != len(asked) * args.tokens:
                raise SystemExit(f"got {tokens} tokens, expected {len(asked) * args.tokens}")
            if counted:
                write_record(
                    args.json, "vllm_decode", model_shape=args.model_shape, samples=len(asked), tokens=tokens,
                    tokens_per_s=tokens / seconds, ms_per_step=seconds / args.tokens * 1e3,
                )  # fmt: skip
            engine.reset_prefix_cache()
