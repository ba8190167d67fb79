"""provisional"""

import hashlib
import json
import time
from pathlib import Path

import torch
from safetensors.torch import load_file


class GroupwiseWorker:
    def groupwise_load(self, path, version):
        started = time.time()
        folder = Path(path)
        try:
            manifest = json.loads((folder / "manifest.json").read_bytes())
            assert manifest["version"] == version
            found = {}
            for f in sorted(folder.glob("*.safetensors")):
                found |= load_file(f)
            assert found.keys() == manifest["tensors"].keys()
            for n, t in found.items():
                d = hashlib.blake2b(memoryview(t.reshape(-1).view(torch.uint8).numpy()), digest_size=16).hexdigest()
                assert d == manifest["tensors"][n]["digest"], n
        except Exception as e:
            return {"error": f"{type(e).__name__}: {e}", "touched": False}
        try:
            self.model_runner.reload_weights(weights_iterator=iter(found.items()))
            model = self.model_runner.get_model()
            head = getattr(model, "lm_head", None)
            if (
                head is not None
                and getattr(head, "quant_method", None) is not None
                and model.config.tie_word_embeddings
            ):
                head.quant_method.process_weights_after_loading(head)
        except Exception as e:
            return {"error": f"{type(e).__name__}: {e}", "touched": True}
        return {"tensors": len(found), "seconds": time.time() - started}
