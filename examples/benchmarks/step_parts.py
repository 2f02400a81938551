"""What it costs one process that a step of healing takes its questions in parts, which several processes share.

    python examples/benchmarks/step_parts.py --parts 16 8 4 2

Healed is the reference model by itself: only time matters. Processor time of all steps, by the number of questions
that a part has; as many as a step has: no parts. The first is run again at the end, which tells of the noise.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(HERE / "digits" / "model"))
    parser.add_argument("--calibration", default=str(HERE / "digits" / "data" / "calibration.jsonl"))
    parser.add_argument("--samples", type=int, default=160)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--parts", type=int, nargs="+", default=[16, 8, 4, 2])
    options = parser.parse_args()

    from exporter.clean_room import load_processor
    from exporter.healing import training
    from exporter.healing.healed import ask_teacher, prepare_healing
    from exporter.healing.student import prepared
    from exporter.models import gradients
    from exporter.models.loading import load_model
    from exporter.progress import silent
    from exporter.recipe import CalibrationData, HealRecipe, RunOptions

    heal = HealRecipe(steps=options.steps, batch_size=options.batch_size, exchanges=0)
    data = CalibrationData(options.calibration, samples=options.samples)
    job = prepare_healing(options.model, heal, data=data, teacher=options.model, options=RunOptions("cpu"))
    settings = training.HealTraining(heal.steps or 1, heal.batch_size, heal.learning_rate, loss=heal.loss, seed=0)
    with tempfile.TemporaryDirectory() as work:
        questions = ask_teacher(job, Path(work), silent)
        model, processor = load_model(job.source, job.device, job.dtype)[0], load_processor(job.source.folder)
        student = prepared(model, processor, job.source, rank=heal.rank, norms=False, seed=0)
        training.one_step(student, questions, settings, 0)  # what a first pass sets up is not timed
        print("| questions of a part | CPU s |")
        print("|---:|---:|")
        for part in (*options.parts, options.parts[0]):
            gradients.PART = part
            begin = time.process_time()
            for step in range(options.steps):
                training.one_step(student, questions, settings, step)
            print(f"| {part} | {time.process_time() - begin:.1f} |", flush=True)


if __name__ == "__main__":
    main()
