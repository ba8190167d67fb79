"""The `openai` package against a server. python openai_client.py URL MODEL"""

import json
import sys

import openai

url, model = sys.argv[1:]
client = openai.OpenAI(base_url=url, api_key="right")
asked = {"model": model, "messages": [{"role": "user", "content": "say red:"}], "max_tokens": 12, "seed": 3}
found: dict = {"models": [each.id for each in client.models.list().data]}

whole = client.chat.completions.create(**asked, logprobs=True, n=2)
found["chat"] = [choice.message.content for choice in whole.choices]
found["logprobs"] = [len(choice.logprobs.content) for choice in whole.choices]
found["usage"] = whole.usage.completion_tokens

said, count = "", 0
options = {"include_usage": True}
for chunk in client.chat.completions.create(**asked, stream=True, logprobs=True, stream_options=options):
    for choice in chunk.choices:
        said += choice.delta.content or ""
        count += len(choice.logprobs.content) if choice.logprobs else 0
    if chunk.usage:
        found["stream_usage"] = chunk.usage.completion_tokens
found["stream"], found["stream_logprobs"] = said, count

text = client.completions.create(model=model, prompt=[5, 6, 7], max_tokens=6, seed=1, logprobs=0)
found["completion"] = [text.choices[0].text, len(text.choices[0].logprobs.token_logprobs)]

left = client.chat.completions.create(**{**asked, "max_tokens": 2000}, extra_body={"min_tokens": 2000}, stream=True)
next(iter(left))
left.close()

refused: dict = {}
wrong_key = openai.OpenAI(base_url=url, api_key="wrong")
for name, who, change in (
    ("model", client, {"model": "other"}),
    ("key", wrong_key, {}),
    ("length", client, {"max_tokens": 10**6}),
    ("format", client, {"response_format": {"type": "json_object"}}),
):
    try:
        who.chat.completions.create(**{**asked, **change})
        refused[name] = None
    except openai.APIStatusError as error:
        refused[name] = [type(error).__name__, error.status_code]
found["refused"] = refused
print(json.dumps(found))
