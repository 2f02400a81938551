"""What a refit needs at widths that trained small models do not have: tokens for each input of the refitted matrices.

    python examples/benchmarks/fold_widths.py             widths of 512 and 1,024, as Markdown

Models are LLaVA's with random weights, and so are pictures and questions: nothing is told of what a trained model
keeps, but the regressions have their true sizes. One of four layers goes, `reconstruction` refits what stays, and the
relative squared error of the last states on questions that it was not fitted on says whether it helped. With fewer
tokens than inputs the fold falls back to fewer matrices, and at last to none; the last column refits all anyway.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from exporter.data.batches import Batch
from exporter.data.samples import Sample
from exporter.families import DECODERS
from exporter.fold import reconstruction
from exporter.fold.job import FoldJob
from exporter.models.answers import AnsweredBatch, with_answers
from exporter.models.divergence import READ
from exporter.models.loading import text_decoder
from exporter.models.variants import Variant, judge
from exporter.plan import Folded, make_plan

LAYERS, GONE = 4, 2
VISUAL, TEXT, ANSWER = 64, 12, 4  # tokens of a question
WORDS = 1000
HELD_OUT = 32  # questions
ROWS = 16  # questions of a batch


def llava(width: int) -> LlavaForConditionalGeneration:
    """Return a model with random weights, whose layers add as much to the residual stream as trained ones do."""
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=LAYERS,
        num_attention_heads=width // 64,
        vocab_size=WORDS,
        initializer_range=width**-0.5,
    )
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=8
    )
    torch.manual_seed(width)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_index=0, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config).eval().requires_grad_(False)


def questions(model: LlavaForConditionalGeneration, number: int, seed: int) -> list[AnsweredBatch]:
    """Return random questions with random answers."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for start in range(0, number, ROWS):
        rows = min(ROWS, number - start)
        ids = torch.randint(1, WORDS, (rows, VISUAL + TEXT), generator=generator)
        ids[:, 1 : 1 + VISUAL] = 0
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.randn(rows, 3, 64, 64, generator=generator),
        }
        samples = tuple(Sample("random", (), ()) for _ in range(rows))
        batch = Batch(inputs, ids == 0, ids != 0, samples)
        answers = torch.randint(1, WORDS, (rows, ANSWER), generator=generator)
        made.append(with_answers(model, batch, answers, torch.ones_like(answers, dtype=torch.bool)))
    return made


@contextmanager
def least(tokens_per_input: float) -> Iterator[None]:
    with mock.patch.object(reconstruction, "TOKENS_PER_INPUT", tokens_per_input):
        yield


def refitted(model: LlavaForConditionalGeneration, fitted_on: list[AnsweredBatch]) -> tuple[Folded, dict[str, object]]:
    weights = dict(text_decoder(model).layers.named_parameters())
    job = FoldJob(
        model=model,
        batches=lambda share=1.0: [answered.batch for answered in fitted_on],
        plan=make_plan(LAYERS, (GONE,)),
        read=lambda layer, name: weights.get(f"{layer}.{name}"),
        decoder=DECODERS["llama"],
    )
    return reconstruction.fold_reconstruction(job, share=1.0), job.report


def error(model: LlavaForConditionalGeneration, folded: Folded, judged_by: list[AnsweredBatch]) -> float:
    found = judge(model, [Variant(make_plan(LAYERS, (GONE,)), folded)], judged_by)[0]
    return found.states.over(READ)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[512, 1024])
    parser.add_argument("--tokens-per-input", type=float, nargs="+", default=[0.25, 0.5, 0.8, 1.2, 2, 4])
    options = parser.parse_args()
    print("| width | inputs | questions | tokens per input | refitted in a layer | without | with | all refitted |")
    print("|---:|---:|---:|---:|---|---:|---:|---:|")
    for width in options.widths:
        model = llava(width)
        judged_by = questions(model, HELD_OUT, seed=1)
        without = error(model, {}, judged_by)
        for ratio in options.tokens_per_input:
            number = max(1, round(ratio * 3 * width / (VISUAL + TEXT + ANSWER)))
            fitted_on = questions(model, number, seed=2)
            folded, report = refitted(model, fitted_on)
            names = " and ".join(sorted({name.split(".")[-2] for _, name in folded})) or "nothing"
            with least(0.0):
                everything, _ = refitted(model, fitted_on)
            errors = (without, error(model, folded, judged_by), error(model, everything, judged_by))
            at = int(str(report["tokens"])) / int(str(report["inputs"]))
            print(
                f"| {width:,} | {report['inputs']:,} | {number} | {at:.2f} | {names} | "
                + " | ".join(f"{value:.3f}" for value in errors)
                + " |",
                flush=True,
            )


if __name__ == "__main__":
    main()
