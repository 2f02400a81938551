"""Which layers a greedy search takes, by which loss and from how many questions: what `best_of` searches by.

    python examples/benchmarks/greedy_losses.py --model MODEL --calibration FILE.jsonl

The losses are the divergence at the model's own answers (what `greedy` goes by), and the relative squared error of the
states that the head reads, of all tokens. A loss is fit for few questions where it takes the layers that many name.
"""

from __future__ import annotations

import argparse

from exporter.compression.job import prepare
from exporter.localize.greedy import greedy
from exporter.models.answers import AnswerDivergence, StateError
from exporter.plan import LayerBudget
from exporter.recipe import CalibrationData, Recipe, RunOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/digits/model")
    parser.add_argument("--calibration", default="examples/digits/data/calibration.jsonl")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--layers", type=int, default=5, help="that go")
    parser.add_argument("--questions", type=int, nargs="+", default=[6, 12, 128])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    data = CalibrationData(options.calibration, samples=options.samples)
    recipe = Recipe(options.model, data, LayerBudget(drop_layers=options.layers), seed=options.seed)
    job = prepare(recipe, RunOptions(batch_size=16))
    model, _ = job.load_model()
    asked = job.questions(model)
    print("| loss | questions | layers, in the order in which they go |\n|---|---:|---|")
    for number in options.questions:
        batches = list(asked.answered("score layers", "fit", number))
        losses = {
            "error of the states": StateError.of(model, [one.batch for one in batches]),
            "divergence": AnswerDivergence.of(model, batches),
        }
        for name, loss in losses.items():
            dropped = greedy(loss, options.layers, job.protect).drop
            print(f"| {name} | {number} | {', '.join(map(str, dropped))} |", flush=True)


if __name__ == "__main__":
    main()
