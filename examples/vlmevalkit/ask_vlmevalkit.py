"""Ask a checkpoint by VLMEvalKit, on the first questions of the reference model's test task, without a network.

    python examples/vlmevalkit/ask_vlmevalkit.py examples/digits/model --questions 100

It needs VLMEvalKit and transformers, and lvlm-exporter only where the folder is to be made. VLMEvalKit's own classes
choose prompts by a model's name and run on a GPU; `Checkpoint` is what a class of one's own takes: it loads by
transformers' Auto classes, under the folder's default preset (`exporter.set_default(FOLDER, "fast")`), and puts a
question by the folder's own chat template. It writes the answers into build/vlmevalkit and prints the exact match.
"""

from __future__ import annotations

import argparse
import base64
import csv
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
DIGITS, BUILD = ROOT / "examples" / "digits" / "data", ROOT / "build" / "vlmevalkit"
NAME = "exporter_digits"


def write_task(number: int) -> list[str]:
    """Write the questions as VLMEvalKit reads them, and return the right answers."""
    BUILD.mkdir(parents=True, exist_ok=True)
    lines = [json.loads(line) for line in (DIGITS / "test.jsonl").read_text().splitlines()[:number]]
    with (BUILD / f"{NAME}.tsv").open("w", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(("index", "image", "question", "answer"))
        for index, line in enumerate(lines):
            picture = base64.b64encode((DIGITS / line["image"]).read_bytes()).decode()
            table.writerow((index, picture, line["question"], line["answer"]))
    return [line["answer"] for line in lines]


def checkpoint_class() -> Any:
    """Return the model class; VLMEvalKit's base class is there once it is imported."""
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from vlmeval.vlm.base import BaseModel

    class Checkpoint(BaseModel):
        INSTALL_REQ = False
        INTERLEAVE = True

        def __init__(self, model_path: str, device: str = "cpu", **generation: Any) -> None:
            super().__init__()
            loaded = AutoModelForImageTextToText.from_pretrained(model_path, dtype="auto", trust_remote_code=True)
            self.model = loaded.to(device).eval()
            self.processor = AutoProcessor.from_pretrained(model_path)
            self.generation = {"do_sample": False, "max_new_tokens": 16} | generation

        def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
            images = [Image.open(part["value"]).convert("RGB") for part in message if part["type"] == "image"]
            content = [
                {"type": "image"} if part["type"] == "image" else {"type": "text", "text": part["value"]}
                for part in message
            ]
            prompt = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            inputs = self.processor(images=images, text=prompt, return_tensors="pt").to(self.model.device)
            with torch.inference_mode():
                answer = self.model.generate(**inputs, **self.generation)[0, inputs["input_ids"].shape[1] :]
            return str(self.processor.decode(answer, skip_special_tokens=True)).strip()

    return Checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", type=int, default=400, metavar="N", help="of the test task (400)")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    right = write_task(options.questions)
    os.environ |= {"LMUData": str(BUILD), "PRED_FORMAT": "json"}
    from vlmeval import run
    from vlmeval.config import supported_VLM

    model = f"exporter_{options.folder.name}"
    supported_VLM[model] = functools.partial(checkpoint_class(), str(options.folder), device=options.device)
    out = BUILD / "results"
    sys.argv = ["vlmeval", "--data", NAME, "--model", model, "--mode", "infer", "--work-dir", str(out), "--reuse"]
    run.main()
    written = max(out.rglob(f"{model}_{NAME}.json"), key=lambda path: path.stat().st_mtime)
    said = {int(line["index"]): str(line["prediction"]) for line in json.loads(written.read_text())}
    same = [" ".join(said[index].lower().split()).rstrip(".") == answer.lower() for index, answer in enumerate(right)]
    print(f"{options.folder}: exact match {100 * sum(same) / len(same):.2f} % of {len(same)} questions ({written})")


if __name__ == "__main__":
    main()
