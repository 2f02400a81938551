"""Model types that transformers does not know and this package ships a modeling file for.

Here they are run by the package's own file, whatever lies in a folder; a written checkpoint takes the file along and
names it in config.json, so that others load it with `trust_remote_code=True`.
"""

from __future__ import annotations

import importlib
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import modeling


@dataclass(frozen=True)
class OwnType:
    """A modeling file of ours with its siblings, and the classes in it."""

    module: str  # of exporter.modeling, and the file's name without its ending
    siblings: tuple[str, ...]  # that it imports
    config: str
    model: str

    @property
    def auto_map(self) -> dict[str, str]:
        """The entry of config.json by which transformers finds the classes."""
        return {
            "AutoConfig": f"{self.module}.{self.config}",
            "AutoModelForImageTextToText": f"{self.module}.{self.model}",
        }


OWN_TYPES = {
    "qwen": OwnType("modeling_qwen_vl", ("qwen_vl_visual",), "QWenVLConfig", "QWenVLForConditionalGeneration"),
}


def own_type(raw_config: dict[str, Any]) -> OwnType | None:
    """Return what config.json names of ours; None for every other configuration, an original one among them."""
    model_type, named = raw_config.get("model_type"), raw_config.get("auto_map")
    our_type = OWN_TYPES.get(model_type) if isinstance(model_type, str) else None
    return our_type if our_type is not None and isinstance(named, dict) and named == our_type.auto_map else None


def register(our_type: OwnType) -> None:
    """Let transformers' Auto classes know a type of ours in this process: the file does it when it is imported."""
    importlib.import_module(f"{modeling.__name__}.{our_type.module}")


def carry_modeling_files(our_type: OwnType, folder: Path) -> None:
    """Put the package's modeling files of a type into a folder."""
    for module in (our_type.module, *our_type.siblings):
        shutil.copyfile(Path(modeling.__file__).parent / f"{module}.py", folder / f"{module}.py")
