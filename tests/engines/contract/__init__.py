"""Servers that behave on the wire as vLLM, SGLang, LMDeploy and OpenAI-compatible ones do, traps included.

Real HTTP over a real tiny model on a CPU, so that an adapter's tests compare values and not shapes. What each server
does was read in the engines' wheels, or seen with vLLM on a CPU; a trap (`traps.py`) is what such an engine does when
it goes wrong, switched on by name.

    python -m tests.engines.contract.vllm --model DIR --port 8000 --enable-scale-out --trap half_load

In a test, `server.serving(vllm.app(model_dir, flags))` runs one in a thread.
"""
