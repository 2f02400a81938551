"""The subcommand `convert`."""

from __future__ import annotations

import argparse
from pathlib import Path

from .arguments import json_argument
from .from_flags import progress_bar, write_json

SUMMARY = "write a checkpoint in its authors' own format as one that the other subcommands read"
EXAMPLE = "convert hub:liuhaotian/llava-v1.5-7b --out llava-1.5-7b --allow-pickle"


def add_arguments(subcommand: argparse.ArgumentParser) -> None:
    subcommand.add_argument(
        "folder", metavar="FOLDER", help="folder or hub id: the original LLaVA format, Qwen-VL(-Chat) or mPLUG-Owl2"
    )
    subcommand.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    subcommand.add_argument(
        "--vision-tower", metavar="MODEL", help="folder or hub id of the CLIP tower, where FOLDER lacks it"
    )
    subcommand.add_argument(
        "--allow-pickle", action="store_true", help="read pytorch_model.bin, as tensors alone: no code of it runs"
    )
    subcommand.add_argument("--base-model", metavar="USER/NAME", help="hub id for the card, if FOLDER is a folder")
    subcommand.add_argument("--device", help="cpu, cuda, cuda:1, auto (the first GPU, else the CPU)")
    subcommand.add_argument("--dtype", default="auto", help="of the check: float32, bfloat16, float16 (auto)")
    json_argument(subcommand)


def run(options: argparse.Namespace) -> None:
    from ..checkpoints.record import read_record
    from ..conversion.convert import convert

    folder = convert(
        options.folder,
        options.out,
        vision_tower=options.vision_tower,
        allow_pickle=options.allow_pickle,
        base_model=options.base_model,
        device=options.device,
        dtype=options.dtype,
        progress=progress_bar(options),
    )
    record = read_record(folder)
    assert record.conversion is not None
    write_json(
        options, {"folder": str(folder), "format": record.conversion.format, "measured": record.data["measured"]}
    )
    print(
        f"{folder}: converted from {record.conversion.format}, {record.plan.num_layers} decoder layers, "
        f"{record.measured.parameters:,} parameters; verified"
    )
    for note in record.conversion.notes:
        print(note)
