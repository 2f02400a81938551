"""Show that the page answers as torch does in a real browser, asks no other machine, and says clearly what went wrong.

    python examples/web/in_a_browser.py [FOLDER]      (part of make js-test; FOLDER: the reference model, exported)

A headless Chromium is used as a person would: pictures are dropped and chosen, questions typed, Enter pressed. The
pictures are as large as the model's square, so that nothing is resized and the checkpoint's own processor makes the
same of them.
Screenshots are left in build/web. Skipped by name where no browser is on the path or in LVLM_EXPORTER_BROWSER.
Exit code 1: an answer differs, a request went elsewhere, or a message is not the one that is documented.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

from serve import HERE, REFERENCE, ROOT, reference_folder, server

from exporter.data.calibration import load_calibration

DIGITS = ROOT / "examples" / "digits"
OUT = REFERENCE.parent
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
QUESTIONS, NEW_TOKENS = 20, 64
ERRORS = {  # patterns
    "model": r"The model does not load: the server did not send \w+\.onnx\.",
    "picture": r"Choose a picture first\.",
    "file": r"notes\.txt is no picture that this browser reads: choose a PNG, JPEG or WebP file\.",
    "question": r"Write a question first\.",
}


def browser() -> str | None:
    """Return a browser that runs without a screen; None for none."""
    named = os.environ.get("LVLM_EXPORTER_BROWSER")
    return named or next((found for name in BROWSERS if (found := shutil.which(name))), None)


def questions(side: int) -> list[Any]:
    """Return questions on pictures of side x side pixels, which neither side resizes."""
    samples = load_calibration(DIGITS / "data" / "test.jsonl", samples=None).samples
    fitting = [sample for sample in samples if sample.open_images()[0].size == (side, side)]
    return fitting[:: len(fitting) // QUESTIONS][:QUESTIONS]


def torch_answers(samples: list[Any]) -> list[list[int]]:
    import torch
    from transformers import AutoModelForImageTextToText

    from exporter.clean_room import encode, greedy_answers, load_processor

    model = AutoModelForImageTextToText.from_pretrained(DIGITS / "model", dtype=torch.float32).eval()
    processor = load_processor(DIGITS / "model")
    batches = [encode(processor, [sample.chat()], [sample.open_images()]) for sample in samples]
    return [greedy_answers(model, batch, NEW_TOKENS)[0].tolist() for batch in batches]


def ask_page(folder: Path, samples: list[Any], program: str) -> tuple[dict[str, Any], str]:
    """Return what the browser found, and the page's address."""
    from against_torch import BUILD, call

    OUT.mkdir(parents=True, exist_ok=True)
    shutil.copy(HERE / "ask_page.mjs", BUILD / "ask_page.mjs")
    (OUT / "notes.txt").write_text("no picture\n")
    asked = [{"picture": str(s.images[0]), "question": s.chat()[0]["content"][-1]["text"]} for s in samples]
    place = server(folder)
    url = f"http://127.0.0.1:{place.server_address[1]}/"
    threading.Thread(target=place.serve_forever, daemon=True).start()
    job = {"browser": program, "url": url, "dtype": "fp32", "questions": asked, "screenshots": str(OUT)}
    (OUT / "job.json").write_text(json.dumps(job | {"notPicture": str(OUT / "notes.txt")}))
    try:
        call("node", "ask_page.mjs", OUT / "job.json", OUT / "found.json", cwd=BUILD)
    finally:
        place.shutdown()
        place.server_close()
    return json.loads((OUT / "found.json").read_text()), url


def asked(folder: Path) -> tuple[str, bool]:
    """Return a sentence on what was found, and whether it is as it should be; True where there is no browser."""
    if (program := browser()) is None:
        return f"The page was not asked: no browser is installed ({', '.join(BROWSERS)}).", True
    samples = questions(json.loads((folder / "onnx.json").read_text())["vision"]["tile"])
    found, url = ask_page(folder, samples, program)
    pairs = list(zip(found["answers"], torch_answers(samples), strict=True))
    equal = sum(answer["tokens"] == tokens for answer, tokens in pairs)
    # Blobs and data are made by the page itself, and go nowhere.
    elsewhere = [a for a in found["addresses"] if not a.startswith((url, "blob:" + url, "data:"))]
    problems = [f"asked elsewhere: {address}" for address in elsewhere]
    problems += [f"the browser complains: {text}" for text in found["complaints"]]
    problems += [
        f"says '{found['errors'][name]}'"
        for name, pattern in ERRORS.items()
        if not re.fullmatch(pattern, found["errors"][name])
    ]
    problems += [] if found["isolated"] else ["has no threads"]
    for problem in problems:
        print(f"in_a_browser.py: the page {problem}", file=sys.stderr)
    sentence = (
        f"Chromium {found['version']}, headless: {equal} of {len(pairs)} answers as torch's, token for token, in fp32; "
        f"{len(found['addresses'])} requests, {len(elsewhere)} of them to another machine."
    )
    return sentence, equal == len(pairs) and not problems


def main() -> int:
    from against_torch import install_client

    install_client()
    sentence, holds = asked(Path(sys.argv[1]) if len(sys.argv) > 1 else reference_folder())
    print(sentence)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
