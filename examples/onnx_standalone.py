"""A LLaVA-like ONNX folder answers a question with nothing but onnxruntime and transformers' processor.

    python examples/onnx_standalone.py FOLDER IMAGE QUESTION

For families whose images are plain tiles; the others' are laid out by exporter/onnx/runtime (onnxruntime and numpy).
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image
from transformers import AutoProcessor

folder, image, question = sys.argv[1:]
facts = json.loads(Path(folder, "onnx.json").read_text())
if (facts["vision"]["kind"], facts["cache"]) != ("tiles", "shared") or "router" in facts:
    sys.exit(f"this {facts['model_type']} needs exporter.onnx.load: its images, mask or routes are laid out there.")
vision, embeddings, decoder = (
    onnxruntime.InferenceSession(f"{folder}/{name}.onnx") for name in ("vision", "embeddings", "decoder")
)
processor = AutoProcessor.from_pretrained(folder)
content = [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": question}]
options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "np"}
inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
kind = {"float32": np.float32, "float16": np.float16}[facts["dtype"]]
features = vision.run(None, {"pixel_values": inputs["pixel_values"].astype(kind)})[0]

ids, length = inputs["input_ids"], inputs["input_ids"].shape[1]
answer: list[int] = []
end = json.loads(Path(folder, "generation_config.json").read_text()).get("eos_token_id")
empty = np.zeros((1, facts["heads"], length + 64, facts["head_size"]), kind)
cache = {f"{layer}.{part}": empty for layer in range(facts["layers"]) for part in ("key", "value")}
while len(answer) < 64:
    embeds = embeddings.run(None, {"input_ids": ids, "image_features": features})[0]
    positions = np.arange(length - ids.shape[1], length)[None]
    feed = {"inputs_embeds": embeds, "position_ids": positions, "row_lengths": np.array([length])}
    feed |= {"total_length": np.array(length, np.int32)} | {f"past_key_values.{name}": cache[name] for name in cache}
    logits, *present = decoder.run(None, feed)
    cache = dict(zip(cache, present, strict=True))
    answer.append(int(logits[0].argmax()))
    if answer[-1] in (end if isinstance(end, list) else [end]):
        break
    ids, length = np.array([answer[-1:]]), length + 1
print(processor.decode(answer, skip_special_tokens=True))
