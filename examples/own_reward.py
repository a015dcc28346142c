"""A language model learns from a reward function of yours: completions that repeat the prompt's word.

The model is the embedded one, which esfast makes itself in about a minute; put a name from the hub, or a folder, in its
place.
"""

import argparse

import esfast
from esfast.tasks import embedded

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", help="a Hugging Face name or folder (default: the embedded model)")
parser.add_argument("--out", default="runs/own-reward", help="the run folder (default: %(default)s)")
parser.add_argument("--quick", action="store_true", help="two generations only")
args = parser.parse_args()

WORDS = ("rain", "tea", "ships", "bread", "stone", "green", "seven", "north")


def repeats_the_word(completions: list[str], word: list[str], **columns) -> list[float]:
    """The share of the word's letters that the completion has, in order, at its start."""
    return [
        sum(a == b for a, b in zip(text, wanted, strict=False)) / len(wanted)
        for text, wanted in zip(completions, word, strict=True)
    ]


trainer = esfast.ESTrainer(
    model=args.model or str(embedded.cached()),
    reward_funcs=repeats_the_word,
    args=esfast.ESConfig(
        output_dir=args.out,
        generations=2 if args.quick else 100,
        population_size=4 if args.quick else 30,
        sigma=0.02,
        lr=0.02,
        prompts_per_generation=len(WORDS),
        max_completion_length=6,
    ),
    train_dataset=[{"prompt": f"{word} ", "word": word} for word in WORDS],
)
trainer.train()
print(f"mean reward of the last population: {trainer.folder.read_metrics()[-1]['reward_mean']:.2f}")
