"""What OpenEnv's own probe says of a server. python openenv_probe.py URL MODEL"""

import json
import sys

from openenv.core.harness.capture import validate_llm

report = validate_llm(sys.argv[1], sys.argv[2])
names = ("ok", "capture_level", "findings", "n_prompt_ids", "n_completion_ids", "tool_support", "reachable")
print(json.dumps({name: getattr(report, name) for name in names}, default=str))
