"""LVLMs that run with fewer visual tokens in the form in which serving engines run them, by a small router.

    model = AutoModelForImageTextToText.from_pretrained(FOLDER, trust_remote_code=True)
    model.generate(**inputs, preset="serve-fast")
    model.generate(**inputs, keep_visual_tokens=0.25)  # or 144: of each picture
    model.generate(**inputs, preset="serve-fast", question_ids=[[17, 4, 25]])  # the question's ids, if it may choose
    model.set_budget("serve-fast")  # once for all

The tokens leave between projector and decoder: the router scores the projected features of each picture, as many stay
as its size and the budget say, and the stock decoder sees a shorter prompt with positions 0 to n - 1. Another engine
with the same router gives the same answers. The classes that this file makes are those of transformers with the
additions of `ServedModel`; loaded without these files, the folder is the plain model.

A question's way from `generate` to the next token:

    call                                        file
    ServedModel.generate, .forward              modeling_served   arguments to a budget
    ServedModel._compacted -> select            served_router     the rows of each picture that stay
    Layout.of                                   served_layout     the shorter prompt
    the stock generate, the stock forward       transformers      which are given the pictures' rows in place of pixels
    Layout.spread, the caller's ids in front    served_layout     what the caller gets is as long as what it gave

What the caller gets. `generate` returns the caller's own prompt and the new tokens after it, as transformers does, so
that `output[:, inputs["input_ids"].shape[1]:]` is the answer; `max_length` counts that prompt too. `forward` returns
logits of the caller's length, zero at placeholders whose rows left; hidden states, attentions and the cache are those
of the shorter prompt, which `output.served` lays out. A cache knows its layout, and further passes take attention masks
and ids of the caller's length, as criteria and processors of the caller's do.

Shapes: B sequences, S tokens of the caller's prompt, W of the shorter one, N rows of a picture, D hidden size.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from safetensors.torch import load_file  # transformers cannot do without it either
from torch import Tensor

from .routed_api import STOCK_CLASSES, cache_in, cache_name, cache_of, unsupported, with_cache_as
from .routed_types import register_hub_names
from .served_cells import blocks  # noqa: F401  (a sibling: older loaders copy what is named here)
from .served_file import name_class, router_file, save_router
from .served_layout import Layout, in_callers_ids, layout_in, question_rows
from .served_pictures import Shortened, check_copies, fewer_rows, positions_in_places, refuse_late_pictures
from .served_places import picture_coordinates, picture_places, served_positions
from .served_router import (
    OFF,
    SERVING_ROUTER_FILE,
    TYPES,
    ServingRouter,
    ServingSettings,
    load_serving_weights,
    select,
    why_untested,
)

PICTURE_ARGUMENTS = (  # of the stock model's get_image_features
    "pixel_values",
    "image_sizes",
    "image_grid_thw",
    "vision_feature_layer",
    "vision_feature_select_strategy",
)
LONGER = ("mm_token_type_ids", "position_ids")  # inputs of the caller's length that the shorter prompt does without
GENERATING: ContextVar[Any] = ContextVar("lvlm_exporter_served", default=(None, None))  # model and layout of a generate


class ServedModel:
    """The methods that every served class adds to its stock class.

    `forward` and `generate` take these arguments more:
        keep_visual_tokens: a count (144) or a share (0.25) of each picture's tokens.
        preset: a name of `config.serving_router["presets"]`, or "off", the plain model bit for bit.
        question_ids: ids of each sequence's question alone, without template: lists, or [B, Q] with -1 as padding.
            A router that was trained with questions chooses by them; without them it chooses by the picture.
    """

    _auto_class = "AutoModelForImageTextToText"  # save_pretrained copies this file and names the class in auto_map

    def __init__(self, config: Any, *args: Any, with_router: bool = True, **kwargs: Any) -> None:
        check_type(config, self._stock)
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        self.serving_settings = ServingSettings.of(config)
        self.budget = self.serving_settings.budget()
        if with_router:
            self._attach_router()

    def set_budget(self, preset: str | None = None, *, keep_visual_tokens: int | float | None = None) -> None:
        """Set the budget of all calls that name none: `set_budget("serve-fast")`, `set_budget("off")`."""
        self.budget = self._budget(preset, keep_visual_tokens)

    def _budget(self, preset: str | None, keep_visual_tokens: int | float | None) -> int | float | None:
        if preset is None and keep_visual_tokens is None:
            return self.budget
        return self.serving_settings.budget(preset, keep_visual_tokens)

    # --- fewer rows ---

    def _compacted(
        self, named: dict[str, Any], budget: int | float | None, question_ids: Any
    ) -> tuple[dict[str, Any], Layout] | None:
        """Return the inputs of the shorter prompt and its layout; None where there is no picture, or no budget."""
        if question_ids is not None and not self.serving_settings.question_aware:
            raise ValueError(
                "this serving router was trained without questions: leave question_ids out, or train it with "
                "`lvlm-exporter route --serve --question-aware`."
            )
        if budget is None:
            return None
        ids = self._checked_ids(named)
        pictured = ids == self.config.image_token_id  # [B, S]
        if not bool(pictured.any()):
            return None
        outputs = self.picture_outputs(named)
        questions = None if question_ids is None else question_rows(question_ids, self.get_input_embeddings(), len(ids))

        def choose(rows: Tensor, coordinates: Tensor, sequence: int) -> tuple[Tensor, Tensor]:
            question = None if questions is None else questions[sequence]
            return select(self.serving_router, rows, budget, coordinates=coordinates, question=question)

        return self.shorter(named, pictured, outputs, choose)

    def shorter(
        self, named: dict[str, Any], pictured: Tensor, outputs: Any, choose: Callable[[Tensor, Tensor, int], Any]
    ) -> tuple[dict[str, Any], Layout]:
        """Return the inputs of the shorter prompt and its layout.

        Args:
            pictured: [B, S] True at placeholders.
            outputs: of `picture_outputs`, changed here.
            choose: gives the rows that stay, [n, D], and their numbers, [n], from a picture's rows, where they lie
                and the number of its sequence.
        """
        keep, outputs, pictures = fewer_rows(
            pictured, outputs, lambda number, rows, at: choose(rows, self.coordinates_of(number, rows, named), at)
        )
        ids, mask = named["input_ids"], named.get("attention_mask")
        visible = torch.ones_like(pictured) if mask is None else mask.to(pictured.device).bool()
        layout = Layout.of(keep, visible)
        if self.serving_settings.keeps_places:
            places = self._places_of(pictures, named)
            layout = replace(layout, positions=positions_in_places(layout, keep & visible, pictures, places))
        left_out = (*PICTURE_ARGUMENTS, *LONGER)
        inputs = {name: value for name, value in named.items() if name not in left_out}
        inputs["input_ids"] = layout.narrowed(ids, self._padding_id())
        inputs["attention_mask"] = layout.visible.to(ids.device, torch.long)
        inputs["mm_encoder_outputs"] = {"image": outputs}
        if named.get("labels") is not None:
            inputs["labels"] = layout.narrowed(named["labels"], -100)
        return inputs, layout

    def _places_of(self, pictures: list[Shortened], named: dict[str, Any]) -> list[tuple[Tensor, int]]:
        """Return what `picture_places` says of each picture."""
        if named.get("image_grid_thw") is None:
            raise ValueError("under a budget, image_grid_thw has to say where the pictures' rows lie: pass it.")
        grids = named["image_grid_thw"].tolist()
        return [picture_places(self.config, grids[number], each.stays) for number, each in enumerate(pictures)]

    def _checked_ids(self, named: dict[str, Any]) -> Tensor:
        """Return the prompt's ids [B, S]. Raises ValueError for what cannot be made shorter."""
        ids: Tensor | None = named.get("input_ids")
        mask = named.get("attention_mask")
        if ids is None:
            raise ValueError(
                "inputs_embeds alone do not tell which tokens are of a picture: pass input_ids in place of them, or "
                "preset='off'."
            )
        if named.get("inputs_embeds") is not None:
            raise ValueError(
                "under a budget a prompt is input_ids alone: leave inputs_embeds out, or pass preset='off'."
            )
        if named.get("pixel_values_videos") is not None or (named.get("mm_encoder_outputs") or {}).get("video"):
            raise ValueError("a serving router keeps tokens of pictures, not of videos: pass preset='off' for a video.")
        if mask is not None and mask.ndim != 2:
            raise ValueError(f"attention_mask has {mask.ndim} dimensions: under a budget it has to be [B, S].")
        return ids

    def picture_outputs(self, named: dict[str, Any]) -> Any:
        """Return what the stock model makes of the pictures, before any row has left."""
        outputs = (named.get("mm_encoder_outputs") or {}).get("image")
        if outputs is not None:
            return type(outputs)(**outputs)  # another one, to be filled anew
        if named.get("pixel_values") is None:
            raise ValueError("the prompt has placeholders of pictures, and there are no pixel_values for them.")
        known = inspect.signature(self.model.get_image_features).parameters
        arguments = {n: named[n] for n in PICTURE_ARGUMENTS if n in known and named.get(n) is not None}
        return self.model.get_image_features(**arguments, return_dict=True)

    def coordinates_of(self, number: int, rows: Tensor, named: dict[str, Any]) -> Tensor:
        """Return where the rows of a picture lie, [N, 2]; `number` is the picture's, in the order of the prompts."""
        grids, sizes = named.get("image_grid_thw"), named.get("image_sizes")
        grid = None if grids is None else grids[number].tolist()
        size = None if sizes is None else torch.as_tensor(sizes)[number].tolist()
        return picture_coordinates(self.config, len(rows), grid=grid, size=size)

    def _padding_id(self) -> int:
        """Return an id that stands for nothing, to be masked: no placeholder."""
        text = self.config.get_text_config()
        known = (getattr(part, "pad_token_id", None) for part in (self.generation_config, self.config, text))
        return next((i for i in known if isinstance(i, int) and 0 <= i != self.config.image_token_id), 0)

    # --- running ---

    def _served_forward(self, named: dict[str, Any], preset: Any, keep_visual_tokens: Any, question_ids: Any) -> Any:
        """Run the stock forward on the shorter prompt, or as it is where nothing leaves."""
        if GENERATING.get()[0] is self:
            return self._stock.forward(self, **named)
        cache = cache_in(named)
        if (layout := layout_in(cache)) is not None:
            return self._stock.forward(self, **self._later_pass(named, layout, preset))
        budget = self._budget(preset, keep_visual_tokens)
        if budget is not None and cache is not None and cache.get_seq_length():
            refuse_late_pictures(named, budget)
            budget = None  # the prompt has run, without a picture or without a budget
        compacted = self._compacted(named, budget, question_ids)
        if compacted is None:
            return self._stock.forward(self, **named)
        inputs, layout = compacted
        inputs["position_ids"] = layout.numbered(inputs["attention_mask"], self.axes())
        self._note_deltas(layout)
        last, as_output = inputs.get("logits_to_keep", 0), inputs.pop("return_dict", True)
        alike = isinstance(last, int) and last > 0 and layout.ends_alike(last)
        output = self._stock.forward(self, **{**inputs, "logits_to_keep": last if alike else 0, "return_dict": True})
        if not alike:
            wide = layout.spread(output.logits)
            output.logits = wide[:, -last if last else 0 :] if isinstance(last, int) else wide[:, last]
        output.served = layout
        if (cache := cache_of(output)) is not None:
            cache.served = layout
        return output if as_output is not False else output.to_tuple()

    def _later_pass(self, named: dict[str, Any], layout: Layout, preset: str | None) -> dict[str, Any]:
        """Return the inputs of a pass that goes on with the cache of a shorter prompt."""
        if preset == OFF:
            raise ValueError(
                "preset='off' asks for the whole model, and this cache holds a shorter prompt: begin with a new cache, "
                "or leave the preset out."
            )
        if named.get("pixel_values") is not None or named.get("mm_encoder_outputs"):
            raise ValueError("a cache of a shorter prompt takes no further picture: begin with a new cache.")
        named = {name: value for name, value in named.items() if name not in LONGER}
        tokens = named["input_ids"] if named.get("input_ids") is not None else named["inputs_embeds"]
        past, mask = int(cache_in(named).get_seq_length()), named.get("attention_mask")
        layout = layout.repeated(len(tokens) // len(layout.columns))
        visible = torch.cat(
            [layout.visible, layout.visible.new_ones(len(tokens), past + tokens.shape[1] - layout.width)], 1
        )
        if mask is not None:
            if mask.shape[1:] != (length := layout.length + past + tokens.shape[1] - layout.width,):
                raise ValueError(
                    f"attention_mask is {list(mask.shape)}: behind this cache it has to tell of all {length} tokens, "
                    "the whole prompt's among them; or leave it out."
                )
            visible = layout.narrowed(mask, 0).to(visible.device).bool()
        positions = layout.numbered(visible, self.axes())[..., -tokens.shape[1] :]
        return {
            **named,
            "attention_mask": visible.to(tokens.device, torch.long),
            "position_ids": positions.to(tokens.device),
        }

    def axes(self) -> int | None:
        return 3 if hasattr(self.model, "get_rope_index") else None

    def _note_deltas(self, layout: Layout) -> None:
        """Set what M-RoPE models add to the positions of later tokens: 0 where the shorter prompt has no gaps."""
        if hasattr(self.model, "rope_deltas"):
            self.model.rope_deltas = layout.deltas().to(self.device)

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Any:
        """Return the positions that `generate` begins with; in models that keep places, by the layout."""
        model, layout = GENERATING.get()
        if model is not self or layout is None or layout.positions is None:
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        visible = model_kwargs["attention_mask"]
        layout = layout.repeated(len(visible) // len(layout.columns))
        self._note_deltas(layout)
        text = served_positions(visible)  # the stock model makes its mask by these
        return torch.cat([text[None], layout.numbered(visible, self.axes()).to(text.device)])

    @torch.no_grad()
    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generate as `GenerationMixin.generate` does, on a shorter prompt; outputs have its layout as `.served`."""
        kwargs = with_cache_as(cache_name(self._stock.forward), kwargs)
        serving = {name: kwargs.pop(name, None) for name in SERVING_ARGUMENTS}
        budget = self._budget(serving["preset"], serving["keep_visual_tokens"])
        ids: Any = kwargs.get("input_ids") if inputs is None else inputs
        cache = cache_in(kwargs)
        if (layout := layout_in(cache)) is not None:
            shorter = self._continued(ids, kwargs, layout, serving["preset"])
        elif cache is not None and cache.get_seq_length():
            refuse_late_pictures(kwargs, budget)
            shorter = None
        else:
            named = {**kwargs, "input_ids": ids}
            if named.get("attention_mask") is None and ids is not None:
                named["attention_mask"] = self._visible(ids, args, kwargs)
            shorter = self._compacted(named, budget, serving["question_ids"])
        if shorter is None:
            return self._generate(None, inputs, *args, **kwargs)
        kwargs, layout = shorter
        settings = kwargs.get("generation_config") or (args[0] if args else None) or self.generation_config
        for name, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            counts_new = kwargs.get(new) or getattr(settings, new, None)  # which goes before a count of the whole
            limit = kwargs.get(name) or (None if counts_new else getattr(settings, name, None))
            if limit is not None and limit > 0:  # it counts the caller's prompt
                kwargs[name] = max(limit - layout.length + layout.width, 0)
        check_copies(kwargs, settings)
        args = in_callers_ids(args, kwargs, ids, layout)
        return self._as_asked(self._generate(layout, None, *args, **kwargs), ids, layout, cache)

    def _generate(self, layout: Layout | None, inputs: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        before = GENERATING.set((self, layout))
        try:
            return super().generate(inputs, *args, **kwargs)
        finally:
            GENERATING.reset(before)

    def _visible(self, ids: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the attention mask of a caller that gives none: padding is known by its id, as in transformers."""
        settings = kwargs.get("generation_config") or (args[0] if args else None) or self.generation_config
        padding, ends = settings.pad_token_id, settings.eos_token_id
        is_end = padding in (ends if isinstance(ends, list) else [ends])
        return torch.ones_like(ids) if padding is None or is_end else (ids != padding).long()

    def _continued(
        self, ids: Tensor, kwargs: dict[str, Any], layout: Layout, preset: str | None
    ) -> tuple[dict[str, Any], Layout]:
        """Return the arguments of a generation that goes on with the cache of a shorter prompt, and the layout."""
        if ids is None:
            raise ValueError("a generation goes on with a cache by input_ids, from the first token on: pass them.")
        mask = kwargs.get("attention_mask")
        mask = torch.ones_like(ids) if mask is None else mask
        layout = layout.repeated(len(ids) // len(layout.columns))
        seen = layout.length + int(cache_in(kwargs).get_seq_length()) - layout.width
        later = self._later_pass({**kwargs, "input_ids": ids[:, seen:], "attention_mask": mask}, layout, preset)
        later["input_ids"] = layout.narrowed(ids, self._padding_id())
        del later["position_ids"]
        return later, layout

    def _as_asked(self, output: Any, ids: Tensor, layout: Layout, cache: Any) -> Any:
        """Put the caller's prompt in front of the new tokens, in place of the shorter one."""
        sequences = output if isinstance(output, Tensor) else output.sequences
        width = layout.width + ids.shape[1] - layout.length
        ids = ids.to(sequences.device).repeat_interleave(len(sequences) // len(ids), 0)
        sequences = torch.cat([ids, sequences[:, width:]], 1)
        for held in (cache, None if isinstance(output, Tensor) else cache_of(output)):
            if held is not None:
                held.served = layout
        if isinstance(output, Tensor):
            return sequences
        output.sequences, output.served = sequences, layout
        return output

    # --- the router's file ---

    def _attach_router(self) -> None:
        """Add the router, last and by torch's own initialisation: transformers neither loads nor places it."""
        self.serving_router = ServingRouter(self.config.get_text_config().hidden_size, self.serving_settings)
        self._keys_to_ignore_on_save |= {f"serving_router.{name}" for name in self.serving_router.state_dict()}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load as the stock class does, and the router: in float32, on the device of the embeddings, never offloaded.

        Args:
            kwargs: `preset="serve-fast"` among them is the budget of all calls that name none, as by `set_budget`.
        """
        preset = kwargs.pop("preset", None)
        weights = load_file(router_file(pretrained_model_name_or_path, kwargs))
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs, with_router=False)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._attach_router()
        load_serving_weights(model.serving_router, weights, SERVING_ROUTER_FILE)
        embedding = model.get_input_embeddings()
        device = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
        model.serving_router.to(embedding.weight.device if device is None else device, torch.float32).eval()
        if preset is not None:
            model.set_budget(preset)
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Save as the stock class does, with this file and the router's weights in a folder of their own."""
        is_main_process = args[0] if args else kwargs.get("is_main_process", True)
        if is_main_process:
            save_router(self.serving_router.state_dict(), save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)
        if is_main_process:  # to whoever does not run this file it is the plain model: engines go by this name
            name_class(self._stock.__name__, save_directory)


SERVING_ARGUMENTS = {
    name: inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
    for name in ("preset", "keep_visual_tokens", "question_ids")
}


def check_type(config: Any, stock: Any) -> None:
    """Raise ValueError for a type that is not tested, or a transformers that takes no rows in place of pixels."""
    if kind := why_untested(config):
        raise ValueError(f"no serving router runs in {kind}: it is made and tested for {', '.join(TYPES)}.")
    if "mm_encoder_outputs" not in inspect.signature(stock.forward).parameters:
        raise ValueError(unsupported(f"{stock.__name__}.forward has no argument 'mm_encoder_outputs'"))


# --- a class for each type --------------------------------------------------------------------------------------------


def served_name(model_type: str) -> str:
    """Return the class that config.json names in auto_map, after the name of this file."""
    return f"Served{STOCK_CLASSES[model_type]}"


@functools.cache
def served(stock: Any, module: str = __name__) -> Any:
    """Make the served class of a stock one: `forward` takes the arguments of both, the hub's names are kept.

    Args:
        module: that has the class, by which a saved folder finds it.
    """
    signature = inspect.signature(stock.forward)
    names, cache = list(signature.parameters)[1:], cache_name(stock.forward)

    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        named = with_cache_as(cache, {**dict(zip(names, args, strict=False)), **kwargs})
        return self._served_forward(named, **{name: named.pop(name, None) for name in SERVING_ARGUMENTS})

    *stock_parameters, rest = signature.parameters.values()  # `generate` reads the signature
    forward.__signature__ = signature.replace(parameters=[*stock_parameters, *SERVING_ARGUMENTS.values(), rest])
    name = f"Served{stock.__name__}"
    register_hub_names(stock, name)
    return type(name, (ServedModel, stock), {"__module__": module, "forward": forward, "_stock": stock})


def __getattr__(name: str) -> Any:
    """Make the class that is asked for: a checkpoint needs one, and importing all of transformers takes seconds."""
    import transformers

    stock = name.removeprefix("Served")
    if stock == name or stock not in STOCK_CLASSES.values():
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return served(getattr(transformers, stock))
