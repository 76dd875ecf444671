"""What a user of the official `openai` client does, against the address in the first argument.

Run by `check_clients.py` with the interpreter of an environment that has the client and nothing of Headrace.
"""

import asyncio
import sys

import openai

MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


def check(client: openai.OpenAI) -> None:
    (model,) = [card.id for card in client.models.list()]
    answer = client.chat.completions.create(
        model=model, messages=MESSAGES, temperature=0, max_tokens=12, logprobs=True, top_logprobs=2
    )
    choice = answer.choices[0]
    assert "Paris" in choice.message.content, choice
    assert len(choice.logprobs.content) == answer.usage.completion_tokens
    assert len(choice.logprobs.content[0].top_logprobs) == 2

    stream = client.chat.completions.create(
        model=model,
        messages=MESSAGES,
        temperature=0,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == choice.message.content, (text, choice.message.content)
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens

    texts = client.completions.create(
        model=model, prompt=["One, two,", "A, B,"], n=2, max_tokens=4, seed=1, extra_body={"ignore_eos": True}
    )
    assert [choice.index for choice in texts.choices] == [0, 1, 2, 3]
    assert texts.usage.completion_tokens == 16
    named = {"extra_headers": {"Idempotency-Key": "check"}, "max_tokens": 4}
    first, again = (client.completions.create(model=model, prompt="Once", **named) for _ in range(2))
    assert first == again

    for call, error in (
        (lambda: client.completions.create(model="other", prompt="a"), openai.NotFoundError),
        (lambda: client.completions.create(model=model, prompt="a", temperature=-1), openai.BadRequestError),
    ):
        try:
            call()
        except error as raised:
            assert raised.body["message"], raised
        else:
            raise AssertionError(f"no {error.__name__}")


async def check_async(client: openai.AsyncOpenAI) -> None:
    (model,) = [card.id async for card in client.models.list()]
    answers = await asyncio.gather(
        *(
            client.chat.completions.create(model=model, messages=MESSAGES, temperature=0, max_tokens=8)
            for _ in range(8)
        )
    )
    assert len({answer.id for answer in answers}) == 8


address = sys.argv[1]
with openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=60) as client:
    check(client)
asyncio.run(check_async(openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=60)))
print(f"openai {openai.__version__}: good")
