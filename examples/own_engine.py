"""The engine is a function from prompts to completions. Here it is a greedy loop over logits; yours may call a server
that holds the same weights, a game, or a simulator."""

import argparse

import torch

import esfast
from esfast.tasks import embedded

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--out", default="runs/own-engine", help="the run folder (default: %(default)s)")
parser.add_argument("--quick", action="store_true", help="two generations only")
args = parser.parse_args()

torch.manual_seed(0)
tokenizer = embedded.make_tokenizer()
model = embedded.make_model(tokenizer).eval()


@torch.no_grad()
def engine(prompts: list[str]) -> list[str]:
    """Four greedy tokens after each prompt. It reads the model's weights anew at each call: they are a member's."""
    completions = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        for _ in range(4):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        completions.append(tokenizer.decode(ids[0, -4:], skip_special_tokens=True))
    return completions


def distinct_letters(completions: list[str], **columns) -> list[float]:
    return [float(len(set(text))) for text in completions]


trainer = esfast.ESTrainer(
    model=model,
    processing_class=tokenizer,
    reward_funcs=distinct_letters,
    engine=engine,
    args=esfast.ESConfig(
        output_dir=args.out,
        generations=2 if args.quick else 30,
        population_size=8,
        sigma=0.05,
        lr=0.05,
        prompts_per_generation=4,
        max_completion_length=4,
    ),
    train_dataset=[{"prompt": f"{i}+1="} for i in range(8)],
)
trainer.train()
