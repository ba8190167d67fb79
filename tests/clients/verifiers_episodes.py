"""Episodes of verifiers v1 against a server, by its training client; prints what a trainer would get.

python verifiers_episodes.py URL MODEL single|user
"""

import asyncio
import json
import sys

import verifiers.v1 as vf


async def main(url: str, model: str, kind: str) -> list[dict]:
    taskset = {"id": "groupwise_words"}
    agent = {"harness": {"id": "null"}, "runtime": {"type": "subprocess"}}
    if kind == "user":
        from verifiers.v1.envs.user_sim import UserSimEnv, UserSimEnvConfig

        config = UserSimEnvConfig.model_validate(
            {"taskset": taskset, "assistant": agent, "user": {**agent, "max_turns": 2}}
        )
        env = UserSimEnv(config)
    else:
        env = vf.load_environment(vf.SingleAgentEnvConfig.model_validate({"taskset": taskset, "agent": agent}))
    tasks = list(env.taskset)
    client = vf.TrainClientConfig(base_url=url, api_key_var="WORDS_KEY", renderer_model_name=model)
    context = vf.ModelContext(model=model, client=client, sampling=vf.SamplingConfig(temperature=1.0, max_tokens=8))
    async with env.serving():
        slots = [slot for task in tasks for slot in env.slots(task, n=2)]
        episodes = await asyncio.gather(*(env.run_slot(slot, context) for slot in slots))
    return [
        {
            "ok": episode.ok,
            "errors": [str(error) for error in episode.errors],
            "traces": [
                {
                    "agent": trace.agent.name,
                    "reward": trace.reward,
                    "branches": [
                        {
                            "tokens": list(branch.token_ids),
                            "sampled": [int(each) for each in branch.sampled_mask],
                            "logprobs": list(branch.logprobs or ()),
                        }
                        for branch in trace.branches
                    ],
                }
                for trace in episode.traces
            ],
        }
        for episode in episodes
    ]


print(json.dumps(asyncio.run(main(*sys.argv[1:]))))
