"""Opens what is timed: checkpoints of transformers and ONNX folders, and the reference that they are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ..checkpoints.hub_access import resolve
from ..errors import InputError
from ..onnx.manifest import is_onnx, onnxruntime_version, read_manifest
from .onnx_subject import OnnxRuntime
from .subject import GenerateKwargs, Setup, Subject
from .torch_subject import TorchRuntime, TorchSubject


@dataclass(frozen=True)
class Runtimes:
    """Opens what a path holds: a checkpoint of transformers, or an ONNX folder."""

    torch: TorchRuntime
    onnx: OnnxRuntime

    @classmethod
    def of(cls, setup: Setup, new_tokens: int) -> Runtimes:
        """Put both on one device, and on the CPU on as many threads."""
        threads = None if setup.device.startswith("cuda") else torch.get_num_threads()
        return cls(TorchRuntime(setup), OnnxRuntime(setup.device, new_tokens, threads))

    def open(self, path: str, request: GenerateKwargs | None) -> Subject:
        return self.onnx.open(path, request) if is_onnx(path) else self.torch.open(path, request)


def onnx_device(paths: Sequence[str]) -> str | None:
    """Return the device that the first ONNX folder was exported for; None where there is none."""
    devices = [read_manifest(Path(path)).device for path in paths if is_onnx(path)]
    return devices[0] if devices else None


def onnx_versions(subjects: Sequence[Subject]) -> dict[str, str]:
    if not any(is_onnx(subject.path) for subject in subjects):
        return {}
    return {"onnxruntime": onnxruntime_version()}


def made_from(path: str) -> str:
    """Return the checkpoint that an ONNX folder was exported from."""
    name = read_manifest(Path(path)).source.name
    try:
        resolve(name)
    except InputError as error:
        raise InputError(
            f"{path} is compared with {name}, which it was exported from, but that cannot be opened ({error}) "
            "Name a checkpoint or an ONNX folder with --reference."
        ) from error
    return name


def open_subjects(
    runtimes: Runtimes, paths: Sequence[str], reference: str | Path | None, budgets: Sequence[GenerateKwargs]
) -> list[Subject]:
    """Open the reference, run whole, then every path; the first path only once where it is the reference by default.

    One that is named as its own reference is measured twice: how far the ratios are from 1 is the error of measurement.
    An ONNX folder is compared with the checkpoint that it was made from, and that with the other ways torch runs it.
    """
    if reference is None and is_onnx(paths[0]):
        reference = made_from(paths[0])
    first = runtimes.open(str(reference or paths[0]), {"preset": "off"})
    ways: list[Subject] = []
    if isinstance(first, TorchSubject) and any(is_onnx(path) for path in paths):
        ways = [*runtimes.torch.other_ways(first)]
    opened = [runtimes.open(path, budget) for path in dict.fromkeys(paths) for budget in budgets or (None,)]
    if any(budget != {"preset": "off"} for budget in budgets) and not any(subject.routed for subject in opened):
        raise InputError(f"{', '.join(paths)}: no router here, so nothing can run under {budgets[0]}: leave it out.")
    others: dict[str, Subject] = {f"{subject.path} {subject.budget}": subject for subject in opened}
    if reference is None:
        others.pop(f"{first.path} None", None)
    return [first, *ways, *others.values()]
