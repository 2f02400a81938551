"""Model types that transformers does not know and this package ships a modeling file for.

Here they are run by the package's own file, whatever lies in a folder; a written checkpoint takes the file along and
names it in config.json, so that others load it with `trust_remote_code=True`.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Mapping
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
    def routed_module(self) -> str:
        """The file that has the class with a router."""
        return self.module.replace("modeling_", "modeling_routed_")

    @property
    def routed_auto_map(self) -> dict[str, str]:
        """The entry of a routed folder. Both classes are named in one file: transformers copies each file's own kin."""
        return {
            "AutoConfig": f"{self.routed_module}.{self.config}",
            "AutoModelForImageTextToText": f"{self.routed_module}.Routed{self.model}",
        }

    @property
    def auto_map(self) -> dict[str, str]:
        """The entry of config.json by which transformers finds the classes."""
        return {
            "AutoConfig": f"{self.module}.{self.config}",
            "AutoModelForImageTextToText": f"{self.module}.{self.model}",
        }


OWN_TYPES = {
    "qwen": OwnType("modeling_qwen_vl", ("qwen_vl_visual",), "QWenVLConfig", "QWenVLForConditionalGeneration"),
    "mplug_owl2": OwnType(
        "modeling_mplug_owl2", ("mplug_owl2_visual",), "MPLUGOwl2Config", "MPLUGOwl2ForConditionalGeneration"
    ),
}


def own_type(raw_config: Mapping[str, Any]) -> OwnType | None:
    """Return what config.json names of ours; None for every other configuration, an original one among them."""
    model_type, named = raw_config.get("model_type"), raw_config.get("auto_map")
    our_type = OWN_TYPES.get(model_type) if isinstance(model_type, str) else None
    return our_type if our_type is not None and named in (our_type.auto_map, our_type.routed_auto_map) else None


def register(our_type: OwnType) -> None:
    """Let transformers' Auto classes know a type of ours, by the package's own classes, in this process.

    The files don't do it themselves: a program that loads two folders with their code would get one's class for both.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText

    module = importlib.import_module(f"{modeling.__name__}.{our_type.module}")
    config, model = getattr(module, our_type.config), getattr(module, our_type.model)
    AutoConfig.register(config.model_type, config, exist_ok=True)
    AutoModelForImageTextToText.register(config, model, exist_ok=True)


def routed_class(model_type: str) -> Any:
    """Return the class of a model type with a router, the package's own: of transformers' class, or of ours."""
    if (our_type := OWN_TYPES.get(model_type)) is not None:
        module = importlib.import_module(f"{modeling.__name__}.{our_type.routed_module}")
        return getattr(module, f"Routed{our_type.model}")
    from ..modeling import modeling_routed

    return getattr(modeling_routed, modeling_routed.class_name(model_type))


def carry_modeling_files(our_type: OwnType, folder: Path) -> None:
    """Put the package's modeling files of a type into a folder."""
    for module in (our_type.module, *our_type.siblings):
        shutil.copyfile(Path(modeling.__file__).parent / f"{module}.py", folder / f"{module}.py")
