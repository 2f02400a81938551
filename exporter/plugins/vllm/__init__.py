"""Tells vLLM of serving routers: an entry point of the group `vllm.general_plugins`.

vLLM calls `register` in each of its processes, more than once in some. Nothing here imports vLLM before that.

A folder of `route --serve` has an entry `serving_router` in its config.json and the router's weights beside it. The
classes of `exporter/plugins/vllm/models.py` take the place of vLLM's own under the same architecture names; for a
folder without that entry they are vLLM's own, call for call. `exporter/plugins/vllm/refusals.py` refuses what would
otherwise be answered by the plain model in silence.
"""

from __future__ import annotations

from .known import MODELS, SERVED, is_known


def register() -> None:
    """Put the classes in place, and the refusals; a second call changes nothing."""
    import vllm
    from vllm import ModelRegistry

    from .refusals import watch

    if is_known(vllm.__version__):
        for architecture, name in SERVED.items():
            ModelRegistry.register_model(architecture, f"{MODELS}:{name}")
    watch(vllm.__version__)
