"""Train the reference model: a stock LLaVA-NeXT of 12 decoder layers and 3 million parameters.

Two phases:
1. the vision tower alone, with throw-away heads that name digit and colour of every patch;
2. the whole model, on the answer tokens of eight questions an image. The questions share the image's tokens through a
   block mask: each sees the image and itself, at the positions it would have alone. Throw-away heads on the visual
   tokens of an early layer also name what each token shows and where it stands, and others, on the words of a middle
   layer that mean one digit of the image, where that digit is: without them the model learns to compare places last
   (questions of "left of" stayed at chance for 3,000 steps without the first, at 62 % without the second).

Images have 14 sizes, so that a question comes with 78 to 192 visual tokens; no layer and no token is ever dropped in
training, so that what pruning finds redundant has not been made redundant on purpose.

    python examples/digits/train.py --out examples/digits/model      (resumes from --work when interrupted)
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from data import BINS, COLORS, QUESTION_TYPES, SIZES, Scene, ask, make_scene, mentions
from joint_training import (
    Heads,
    PackedQuestion,
    additive,
    load_state,
    muon_and_adamw,
    pack_rows,
    save_state,
    schedules,
    visible,
    word_places,
)
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

# Shapes: B images, T tiles, P patches a tile, S tokens, D hidden size.
TILE, PATCH = 48, 8
# How often a type of question is drawn: what is learnt late more often.
TYPE_WEIGHTS = {
    "count": 0.5,
    "background": 0.6,
    "exists": 0.7,
    "color": 2.0,
    "where": 2.0,
    "left": 3.0,
    "describe": 1.3,
}
NAMED_LAYER = 2  # the decoder layer whose visual tokens the throw-away heads of phase 2 read
MENTIONED_LAYER = 5  # the one whose words are read
NAMED_WEIGHT = 0.4  # of their losses; where it was let fade out, places were forgotten again
SIDE = TILE // PATCH
MOST = 3 * SIDE  # tokens in the longest row of tiles
PINPOINTS = [[48, 48], [48, 96], [96, 48], [96, 96], [48, 144], [144, 48]]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | upper }}:"
    "{% if message['content'] is string %} {{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %} <image>\n{% else %} {{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
WORDS = """user assistant system : ? . , ! what color is the which digit where there a an in image how many digits are
left right of largest smallest background describe from to top bottom yes no then and on number picture this it plain
stripes checks dots""".split()


def build_processor() -> LlavaNextProcessor:
    words = ["<unk>", "<s>", "</s>", "<pad>", "<image>", *WORDS, *COLORS, *map(str, range(10))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, unk_token="<unk>"))
    from tokenizers import normalizers

    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # joins words with single spaces
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    image_processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE}, crop_size={"height": TILE, "width": TILE}, image_grid_pinpoints=PINPOINTS
    )
    return LlavaNextProcessor(
        image_processor,
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def build_model(processor: LlavaNextProcessor) -> LlavaNextForConditionalGeneration:
    tokenizer = processor.tokenizer
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlavaNextConfig(
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=12,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=1024,
            initializer_range=0.06,
            **ids,
        ),
        vision_config=CLIPVisionConfig(
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=5,
            num_attention_heads=4,
            image_size=TILE,
            patch_size=PATCH,
            projection_dim=96,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        image_seq_length=(TILE // PATCH) ** 2,
        **ids,
    )
    model = LlavaNextForConditionalGeneration(config)
    model.generation_config = GenerationConfig(max_new_tokens=32, **ids)
    return model


# --- data -----------------------------------------------------------------------------------------------------------


def patch_labels(scene: Scene, processor: LlavaNextImageProcessorPil) -> np.ndarray:
    """Per tile and patch what it shows: 0 background, else 1 + 10 * color + digit. [T, P] uint8"""
    height, width = scene.image.size[::-1]
    label = np.zeros((height, width), np.uint8)
    for digit in scene.digits:
        x0, y0, x1, y1 = (round(v) for v in digit.box)
        label[y0:y1, x0 + 2 : x1 - 2] = 1 + 10 * list(COLORS).index(digit.color) + digit.value
    tiles = processor.get_image_patches(
        label[None], PINPOINTS, size=(TILE, TILE), patch_size=TILE, resample=Image.Resampling.NEAREST
    )
    grid = np.stack([t[0] for t in tiles]).reshape(len(tiles), TILE // PATCH, PATCH, TILE // PATCH, PATCH)
    grid = grid.transpose(0, 1, 3, 2, 4).reshape(len(tiles), -1, PATCH * PATCH)
    found = np.zeros(grid.shape[:2], np.uint8)
    for t, p in np.argwhere((grid > 0).mean(-1) >= 0.3):
        found[t, p] = np.bincount(grid[t, p][grid[t, p] > 0]).argmax()
    return found


def make_samples(seed: int, count: int) -> list[dict]:
    """Scenes as raw tiles [T, 3, 48, 48] uint8, with patch labels and every question that can be asked."""
    torch.set_num_threads(1)
    rng = np.random.default_rng([seed, 1])
    processor = build_processor().image_processor
    samples = []
    for _ in range(count):
        scene = make_scene(rng, "train", vary=True)
        tiles = processor(scene.image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"][0]
        asked = []
        for kind in QUESTION_TYPES:
            for _ in range(1 if kind in ("count", "largest", "background", "describe") else 2):
                if (found := ask(scene, kind, rng)) and (kind, *found) not in asked:
                    asked.append((kind, *found))
        named = [(*one, mentions(scene, *one[:2])) for one in asked]
        samples.append(
            {
                "tiles": tiles.round().clip(0, 255).astype(np.uint8),
                "size": scene.image.size[::-1],
                "patch_labels": patch_labels(scene, processor),
                "asked": named,
            }
        )
    return samples


def load_samples(work: Path, scenes: int) -> list[dict]:
    path = work / f"scenes-{scenes}.pt"
    if not path.exists():
        share = scenes // 20
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            parts = pool.starmap(make_samples, [(seed, share) for seed in range(20)])
        torch.save([s for part in parts for s in part], path)
    return torch.load(path, weights_only=False)


def normalize(tiles: torch.Tensor, processor: LlavaNextProcessor) -> torch.Tensor:
    mean, std = (
        torch.tensor(v)[:, None, None]
        for v in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    return (tiles.float() / 255 - mean) / std


# --- phase 1: the vision tower ---------------------------------------------------------------------------------------


def train_vision(model, processor, samples: list[dict], steps: int, bf16: bool, report) -> None:
    """Two throw-away heads name the colour and the digit that each patch shows; 0 is background."""
    tower = model.model.vision_tower
    heads = nn.ModuleDict(
        {
            "color": nn.Linear(tower.config.hidden_size, 1 + len(COLORS)),
            "digit": nn.Linear(tower.config.hidden_size, 11),
        }
    )
    weights = {name: torch.tensor([0.3] + [1.0] * (head.out_features - 1)) for name, head in heads.items()}
    tiles = torch.cat([torch.from_numpy(s["tiles"]) for s in samples])
    drawn = torch.cat([torch.from_numpy(s["patch_labels"]) for s in samples]).long()
    shown = drawn > 0
    labels = {"color": ((drawn - 1) // 10 + 1) * shown, "digit": ((drawn - 1) % 10 + 1) * shown}
    parameters = [*tower.parameters(), *heads.parameters()]
    matrices = [p for n, p in tower.named_parameters() if ".layers." in n and p.ndim == 2]
    others = [p for p in parameters if not any(p is matrix for matrix in matrices)]
    optimizers = muon_and_adamw(matrices, [{"params": others}])
    stateful = [*optimizers, *schedules(optimizers, steps)]
    for layer in tower.encoder.layers:
        layer.compile()
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        pick = torch.randint(len(tiles), (128,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            features = tower(normalize(tiles[pick], processor)).last_hidden_state[:, 1:]  # [T, P, 96]
            named = {name: head(features).flatten(0, 1).float() for name, head in heads.items()}
        wanted = {name: labels[name][pick].flatten() for name in heads}
        loss = sum(F.cross_entropy(named[name], wanted[name], weight=weights[name]) for name in heads)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for each in stateful:
            each.step()
        if step % 100 == 0 or step == steps - 1:
            right = {name: (named[name].argmax(-1) == wanted[name])[wanted[name] > 0].float().mean() for name in heads}
            report(
                f"vision {step}: loss {loss:.3f}, patches named: {right['color']:.3f} color, {right['digit']:.3f} digit"
            )


# --- phase 2: the whole model ----------------------------------------------------------------------------------------


def token_labels(model, sample: dict) -> torch.Tensor:
    """What each visual token shows and where it stands: color, digit, column, row; -100: none. [V, 4]"""
    shown = torch.from_numpy(sample["patch_labels"]).float()  # [T, P]
    features = torch.stack([((shown - 1) // 10 + 1) * (shown > 0), ((shown - 1) % 10 + 1) * (shown > 0)], dim=-1)
    packed, _ = model.model.pack_image_features(
        [features], [sample["size"]], "default", image_newline=torch.full((2,), -100.0)
    )
    named = packed[0].long()  # [V, 2]
    newline = named[:, 0] == -100
    width = int(newline.nonzero()[0]) - SIDE**2 + 1  # of a row of the tiles, its newline included
    base, tiles = torch.arange(SIDE**2), torch.arange(len(named) - SIDE**2)
    column = torch.cat([MOST + base % SIDE, tiles % width])
    row = torch.cat([MOST + base // SIDE, tiles // width])
    return torch.cat([named, torch.stack([column, row], dim=-1).masked_fill(newline[:, None], -100)], dim=-1)


def pack(
    model, batch: list[dict], processor, rng: np.random.Generator, questions: int, type_weights: dict[str, float]
) -> dict[str, torch.Tensor]:
    """One row an image: the image's tokens, then its questions side by side. Shapes [B, S], mask [B, 1, S, S]."""
    tokenizer = processor.tokenizer
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    prefixes, asked = [], []
    for sample in batch:
        visual = processor._get_number_of_features(*sample["size"], TILE, TILE) - 1
        user = tokenizer.encode("user:", add_special_tokens=False)
        prefixes.append([tokenizer.bos_token_id, *user, *[image_id] * visual])
        weights = np.array([type_weights.get(kind, 1.0) for kind, *_ in sample["asked"]])
        number = min(questions, len(weights))
        chosen = rng.choice(len(weights), number, replace=False, p=weights / weights.sum())
        asked.append([packed_question(tokenizer, *sample["asked"][index][1:]) for index in chosen])
    packed = pack_rows(prefixes, asked, tokenizer.pad_token_id)
    most = max(len(s["tiles"]) for s in batch)
    tiles = torch.zeros(len(batch), most, 3, TILE, TILE, dtype=torch.uint8)
    for row, sample in enumerate(batch):
        tiles[row, : len(sample["tiles"])] = torch.from_numpy(sample["tiles"])
    return {
        "input_ids": packed["input_ids"],
        "position_ids": packed["position"],
        "mask": additive(visible(packed["segment"])),
        "target": packed["target"],
        "places": packed["places"],
        "pixel_values": normalize(tiles, processor),
        "image_sizes": torch.tensor([s["size"] for s in batch]),
        "named": torch.cat([token_labels(model, s) for s in batch]),
    }


def packed_question(tokenizer, question: str, answer: str, mentioned: list[tuple[str, int, int]]) -> PackedQuestion:
    """A question and its answer as tokens, with the places of the digits that they mean."""
    asked = tokenizer.encode(f"{question} assistant:", add_special_tokens=False)
    answered = [*tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]
    meant = [(tokenizer.convert_tokens_to_ids(word), x, y) for word, x, y in mentioned]
    return PackedQuestion(asked + answered, len(asked), word_places(asked + answered, meant))


def answer_loss(
    model, heads: Heads, packed: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss on the answers, those of the throw-away heads (two), and the share of answer tokens that are right."""
    embeds = model.get_input_embeddings()(packed["input_ids"])
    features = torch.cat(model.model.get_image_features(packed["pixel_values"], packed["image_sizes"]).pooler_output)
    visual = packed["input_ids"] == model.config.image_token_id
    hidden = embeds.masked_scatter(visual[..., None], features.to(embeds.dtype))
    mask = packed["mask"].to(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype)
    decoder = model.model.language_model
    rotary = decoder.rotary_emb(hidden, position_ids=packed["position_ids"])
    for index, layer in enumerate(decoder.layers):
        hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        if index == NAMED_LAYER:
            named = heads.named_loss(hidden[visual], packed["named"])
        if index == MENTIONED_LAYER:
            words = packed["places"][..., 0] >= 0
            mentioned = heads.mentioned_loss(hidden[words], packed["places"][words])
    answered = packed["target"] >= 0
    logits = model.lm_head(decoder.norm(hidden)[answered]).float()
    target = packed["target"][answered]
    return F.cross_entropy(logits, target), named, mentioned, (logits.argmax(-1) == target).float().mean()


def make_optimizers(model, heads: Heads) -> list[torch.optim.Optimizer]:
    """Muon for the decoder's matrices, which gets to a loss in fewer steps; AdamW for everything else."""
    matrices = [p for n, p in model.named_parameters() if "language_model.layers" in n and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [(n, p) for n, p in model.named_parameters() if id(p) not in chosen]
    groups = [
        {"params": [p for n, p in rest if "vision_tower" in n], "lr": 1e-3},
        {"params": [*(p for n, p in rest if "vision_tower" not in n), *heads.parameters()], "lr": 2e-3},
    ]
    return muon_and_adamw(matrices, groups)


def train_jointly(model, processor, samples: list[dict], options, report) -> None:
    steps, work = options.steps, options.work
    often = {kind: float(weight) for kind, _, weight in (one.partition("=") for one in options.often)}
    sizes = {"color": 1 + len(COLORS), "digit": 11, "column": MOST + SIDE, "row": MOST + SIDE}
    heads = Heads(model.config.text_config.hidden_size, sizes, BINS)
    optimizers = make_optimizers(model, heads)
    for layer in model.model.language_model.layers:
        layer.compile(dynamic=True)

    stateful = [*optimizers, *schedules(optimizers, steps, options.rate)]
    saved, modules = work / "joint.pt", {"model": model, "heads": heads}
    first = load_state(saved, modules, stateful)
    if first:
        report(f"resumed at step {first}")
    lengths = np.array([processor._get_number_of_features(*s["size"], TILE, TILE) for s in samples])
    begin = time.monotonic()
    for step in range(first, steps):
        rng = np.random.default_rng([7, step])
        pool = rng.choice(len(samples), options.batch * 4, replace=False)
        pool = pool[np.argsort(lengths[pool] + rng.normal(0, 8, len(pool)))]  # rows of like length: less padding
        start = rng.integers(4) * options.batch
        chosen = [samples[i] for i in pool[start : start + options.batch]]
        packed = pack(model, chosen, processor, rng, 8, TYPE_WEIGHTS | often)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bf16):
            loss, named, mentioned, correct = answer_loss(model, heads, packed)
        model.zero_grad()
        heads.zero_grad()
        (loss + NAMED_WEIGHT * (named + mentioned)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in stateful:
            each.step()
        if step % 20 == 0 or step == steps - 1:
            report(
                f"joint {step}: loss {loss:.3f}, answer tokens right {correct:.3f}, tokens named {named:.3f}, "
                f"words placed {mentioned:.3f}, "
                f"{time.monotonic() - begin:.0f} s"
            )
        if (step + 1) % 200 == 0:
            save_state(saved, step + 1, modules, stateful)


def save(model, processor, out: Path) -> None:
    """Write the folder with the names that LLaVA-NeXT checkpoints have on the hub."""
    from safetensors.torch import load_file, save_file

    model.eval().save_pretrained(out)
    processor.save_pretrained(out)
    path = out / "model.safetensors"
    tensors = load_file(path)
    # transformers 5 leaves out the level that hub checkpoints, and serving engines, have in the CLIP tower's names
    tensors = {
        k.replace("vision_tower.", "vision_tower.vision_model.") if "vision_tower.vision_model." not in k else k: v
        for k, v in tensors.items()
    }
    save_file(tensors, path, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("work/digits"), help="scenes, checkpoints and log")
    parser.add_argument("--scenes", type=int, default=24_000)
    parser.add_argument("--vision-steps", type=int, default=3200)
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--init", type=Path, help="a checkpoint to train on, in place of phase 1 and random weights")
    parser.add_argument(
        "--often",
        nargs="+",
        default=[],
        metavar="TYPE=WEIGHT",
        help="how often types of question are drawn, if not as usual",
    )
    parser.add_argument("--rate", type=float, default=1.0, help="of the learning rates of phase 2")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=torch.cpu.get_capabilities().get("avx512_bf16", False),
        help="bfloat16 matrix products (default: where the CPU has them)",
    )
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    log = (options.work / "train.log").open("a")

    def report(line: str) -> None:
        print(line, flush=True)
        print(line, file=log, flush=True)

    torch.manual_seed(0)
    processor = build_processor()
    model = build_model(processor)
    model.set_attn_implementation("eager")  # compiled, and with gradients, it is the faster one on a CPU
    report(f"{sum(p.numel() for p in model.parameters()):,} parameters, image sizes {SIZES}")
    begin = time.monotonic()
    samples = load_samples(options.work, options.scenes)
    report(f"{len(samples)} scenes, {time.monotonic() - begin:.0f} s")
    if options.init:
        trained = LlavaNextForConditionalGeneration.from_pretrained(options.init, dtype=torch.float32)
        model.load_state_dict(trained.state_dict())
    else:
        vision = options.work / "vision.pt"
        if not vision.exists():
            train_vision(model, processor, samples, options.vision_steps, options.bf16, report)
            torch.save(model.model.vision_tower.state_dict(), vision)
        model.model.vision_tower.load_state_dict(torch.load(vision, weights_only=True))
    train_jointly(model, processor, samples, options, report)
    save(model, processor, options.out)
    report(f"saved {options.out}, {time.monotonic() - begin:.0f} s in all")


if __name__ == "__main__":
    main()
