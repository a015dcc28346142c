"""A small model, and episodes that it plays, for the tests of episodes."""

import time

import torch

from esfast.rollout import TransformersEngine
from esfast.rollout.episodes import Episodes, Limits, Settings
from esfast.tasks import embedded, guess

ROWS = [{"prompt": f"{i}", "number": i} for i in range(6)]


def small_model():
    torch.manual_seed(0)
    tokenizer = embedded.make_tokenizer()
    tokenizer.chat_template = guess.TEMPLATE
    return embedded.make_model(tokenizer).eval(), tokenizer


def small_engine():
    return TransformersEngine(*small_model(), 12)


def play(engine, episode, rows=ROWS, seeds=None, **options):
    limits = Limits(**{"seconds": 20.0, **options.pop("limits", {})})
    played = Episodes(episode, engine, engine.tokenizer, Settings(limits, **options))
    try:
        return played.generate(rows, seeds)
    finally:
        if played._port is not None:
            played._port.close()


async def three_turns(client, row):
    messages = [{"role": "user", "content": row["prompt"]}]
    for turn in range(3):
        answer = await client.chat.completions.create(model=client.model, messages=messages)
        messages += [answer.choices[0].message, {"role": "user", "content": f"<{turn}"}]
    return float(len(answer.choices[0].message.content))


async def fine(client, row):
    await client.completions.create(model="member", prompt="1")
    return 1.0


# ---- episodes that misbehave -----------------------------------------------------------------------------------------


async def blocks(client, row):
    time.sleep(1000)


async def floods(client, row):
    while True:
        await client.completions.create(model="member", prompt="1", max_tokens=1)


async def overflows(client, row):
    await client.completions.create(model="member", prompt="1" * 5000)
