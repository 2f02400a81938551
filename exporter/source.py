"""Opening what the user names: a local folder or a hub id, checked before anything expensive starts."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import InputError
from .families import Decoder, Family, decoder_of, family_of
from .files import Companions, companions, is_snapshot, sha256
from .weights import Weights, open_weights

if TYPE_CHECKING:
    import torch
    from huggingface_hub.errors import HfHubHTTPError

logger = logging.getLogger(__name__)
LAYER_KEY = re.compile(r"^((?:model\.|language_model\.|text_model\.)*layers\.)(\d+)\.(.+)$")
HUB_ID = re.compile(r"^(?:hub:)?([\w.-]+/[\w.-]+)(?:@([\w./-]+))?$")
# What a checkpoint needs beside its weights: configuration, processor, tokenizer, templates, licence texts.
COMPANION_FILES = (
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
    "additional_chat_templates/*",
)
HUB_TIMEOUT_S = 60
TOKEN = re.compile(r"\bhf_[\w.-]{8,}")
HUB_STATUS = {
    400: "it does not accept what was sent",
    401: "your token is missing or invalid (`hf auth login`)",
    402: "the account has to pay for this",
    403: "your token lacks the right to do this",
    404: "it does not exist there",
    409: "it is in conflict with what is there",
    412: "somebody else committed to it meanwhile, repeat the command",
    413: "a file is too large for it",
    429: "too many requests, wait a while",
}
WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json", "router/model.safetensors")


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk that has passed every check that needs no forward pass."""

    name: str  # as the user wrote it: a path or a hub id
    folder: Path
    revision: str | None  # the hub's commit
    config: Any  # transformers' configuration
    raw_config: dict[str, Any]  # config.json as it stands
    weights: Weights
    family: Family
    decoder: Decoder

    @property
    def num_layers(self) -> int:
        return int(self.config.get_text_config().num_hidden_layers)

    @cached_property
    def layer_prefix(self) -> str:
        """What comes before the layer index in the decoder's tensor names, 'language_model.model.layers.' for one."""
        return next(m[1] for m in map(LAYER_KEY.match, self.weights.entries) if m)

    def layer_of(self, tensor_name: str) -> int | None:
        """The decoder layer that a tensor belongs to, None for the vision tower, embeddings, head."""
        match = LAYER_KEY.match(tensor_name)
        return int(match[2]) if match else None

    @property
    def parameters_per_layer(self) -> list[int]:
        counts = [0] * self.num_layers
        for name, entry in self.weights.entries.items():
            if (layer := self.layer_of(name)) is not None:
                counts[layer] += entry.num_parameters
        return counts

    @cached_property
    def beside_weights(self) -> Companions:
        """What lies beside the weights: what goes along, and what stays behind."""
        return companions(self.folder)

    def companions(self) -> list[Path]:
        """Files that go along, relative to the folder."""
        return [Path(name) for name in self.beside_weights.kept]


def open_source(name: str, revision: str | None = None) -> Source:
    """Resolve, download where needed, and check. Raises InputError for everything that is wrong with the input."""
    folder, revision = resolve(name, revision)
    raw_config = read_json(folder / "config.json")
    config = load_config(folder, raw_config)
    family = family_of(config)
    weights = open_weights(folder)
    source = Source(name, folder, revision, config, raw_config, weights, family, decoder_of(config))
    found = {layer for layer in map(source.layer_of, weights.entries) if layer is not None}
    expected = set(range(source.num_layers))
    if found != expected:
        raise InputError(
            f"{name}: config.json says {len(expected)} decoder layers, the weights hold {len(found)}"
            f"{_difference(expected, found)}. The checkpoint is incomplete, or its config is of another one."
        )
    return source


def _difference(expected: set[int], found: set[int]) -> str:
    missing, extra = sorted(expected - found), sorted(found - expected)
    parts = [f"missing {missing}"] * bool(missing) + [f"too many {extra}"] * bool(extra)
    return f" ({', '.join(parts)})" if parts else ""


def resolve(name: str, revision: str | None = None, whole: bool = False) -> tuple[Path, str | None]:
    """Folder and commit of what the user named. Hub ids are downloaded into the hub's own cache.

    Args:
        whole: download everything, code too, for comparing each file with a record; else what models are made of.
    """
    path = Path(name).expanduser()
    if path.is_dir() and not name.startswith("hub:"):
        return path, None
    match = HUB_ID.match(name)
    if not match or name.startswith((".", "/", "~")) or path.exists():
        raise InputError(f"'{name}' is neither a folder nor a hub id (USER/NAME or hub:USER/NAME@REVISION).")
    repo, revision = match[1], match[2] or revision
    from huggingface_hub import snapshot_download

    with hub_errors(repo, revision):
        wanted = None if whole else [*COMPANION_FILES, *WEIGHT_FILES, "README.md"]
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    return folder, folder.name


@contextlib.contextmanager
def hub_errors(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turn what huggingface_hub raises into one sentence each, and wait for no answer for ever.

    The token is never part of a message. A server may quote it, hence 'from None': a traceback would show its words.
    """
    try:
        with _limited_waiting():
            yield
    except Exception as error:
        sentence = _hub_sentence(error, repo, revision)
        if sentence is None:
            raise
        raise InputError(sentence) from None


@contextlib.contextmanager
def _limited_waiting() -> Iterator[None]:
    """Give every request of huggingface_hub a time limit; most have none of their own."""
    from huggingface_hub import get_session

    limit = hub_timeout()

    def set_limit(request: Any) -> None:
        given = request.extensions.get("timeout", {})
        kinds = ("connect", "read", "write", "pool")
        request.extensions["timeout"] = {kind: given.get(kind) or limit for kind in kinds}

    client = get_session()
    hooks = client.event_hooks
    client.event_hooks = {**hooks, "request": [*hooks.get("request", []), set_limit]}
    try:
        yield
    finally:
        client.event_hooks = hooks


def hub_timeout() -> float:
    """Seconds that the hub may stay silent. The variable is huggingface_hub's own, which it applies to downloads."""
    return float(os.environ.get("HF_HUB_DOWNLOAD_TIMEOUT") or HUB_TIMEOUT_S)


def _hub_sentence(error: BaseException, repo: str, revision: str | None) -> str | None:
    """What a user is told of an error of huggingface_hub; None if it is not one."""
    from huggingface_hub import errors

    if type(error) in (RuntimeError, ValueError) and error.__cause__ is not None:  # as uploads report a failed step
        return _hub_sentence(error.__cause__, repo, revision)
    home = type(error).__module__.split(".")[0]
    match error:
        case errors.GatedRepoError():
            return f"{repo} is gated: accept its terms on the hub and log in (`hf auth login`)."
        case errors.RevisionNotFoundError():
            return f"{repo} has no revision '{revision}'."
        case errors.RepositoryNotFoundError():
            return (
                f"{repo} is neither a folder here nor a repository that you can see on the hub: check the name, or log "
                "in (`hf auth login`) if it is private."
            )
        case errors.LocalEntryNotFoundError():
            return f"{repo} is not in the local hub cache and the hub can't be reached."
        case errors.HfHubHTTPError():
            return f"the hub answered {error.response.status_code} for {repo}: {_refusal(error)}."
        case errors.HFValidationError():
            return f"'{repo}' is no valid repository name: {error}"
        case errors.OfflineModeIsEnabled():
            return f"{repo} is on the hub, and HF_HUB_OFFLINE is set: unset it."
        case ValueError() if str(error).startswith("LFS batch API"):
            return f"the hub takes no large file for {repo}: its storage may be used up."
        case json.JSONDecodeError():
            return f"what answers for {repo} is no hub, or a broken one: check HF_ENDPOINT, or try again later."
    if "Timeout" in type(error).__name__ and home.startswith("httpx"):
        return f"the hub does not answer for {repo}: try again later, or wait longer with HF_HUB_DOWNLOAD_TIMEOUT=300."
    if home.startswith("httpx"):  # the hub client's transport, whatever its version
        return f"the hub can't be reached for {repo} ({type(error).__name__}): try again later."
    if home == "hf_xet" or type(error) is ConnectionError:  # as hf_xet reports that its storage fails
        return f"the hub's Xet storage fails for {repo}: try again later, or set HF_HUB_DISABLE_XET=1 to do without."
    if home == "huggingface_hub":
        return f"the hub's client fails for {repo} ({type(error).__name__})."
    return None


def _refusal(error: HfHubHTTPError) -> str:
    """Why the hub said no: what the status means, and the hub's own words without the token, should they quote it."""
    status = error.response.status_code
    meaning = HUB_STATUS.get(status, "it has a problem of its own, try again later" if status >= 500 else "it says no")
    words = " ".join((error.server_message or "").split())
    sent = error.response.request.headers.get("authorization", "").removeprefix("Bearer ")
    words = re.sub(TOKEN, "...", words.replace(sent or "\0", "..."))
    return meaning if not words or words.startswith("<") else f'{meaning} ("{words[:200]}")'


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise InputError(f"{path.parent} has no {path.name}: it is no Hugging Face checkpoint.") from error
    except ValueError as error:
        raise InputError(f"{path} is no JSON ({error}).") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a JSON object.")
    return content


def load_config(folder: Path, raw_config: dict[str, Any]) -> Any:
    """transformers' configuration, from native code only."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    model_type = raw_config.get("model_type")
    if model_type not in CONFIG_MAPPING_NAMES:
        from transformers import __version__

        hint = " It needs remote code; look for a version that transformers loads natively ('...-hf')." * (
            "auto_map" in raw_config
        )
        raise InputError(f"transformers {__version__} has no model_type '{model_type}' ({folder}/config.json).{hint}")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, TypeError, KeyError, OSError) as error:
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise InputError(f"{folder}/config.json is not accepted by transformers: {first_line}") from error


def load_model(
    source: Source, device: str, dtype: torch.dtype, memory: str | None = None, cls: Any = None
) -> tuple[Any, list[str]]:
    """The stock model, in evaluation mode, frozen, checked for missing weights and NaN; and what it has no use for.

    Args:
        device: 'cpu', 'cuda', 'cuda:1', or 'auto' to spread over what there is (accelerate).
        memory: most memory a device may hold, '12GB'; the rest is read from disk layer by layer (accelerate).
        cls: a class to load it with in place of the stock one.
    """
    from transformers import AutoModelForImageTextToText

    placement: dict[str, Any] = {"device_map": device}
    if memory:
        first = 0 if device != "cpu" else "cpu"
        placement = {"device_map": "auto", "max_memory": {first: memory}, "offload_folder": _offload_folder()}
    model, report = (cls or AutoModelForImageTextToText).from_pretrained(
        source.folder, dtype=dtype, output_loading_info=True, trust_remote_code=False, **placement
    )
    for kind in ("missing_keys", "mismatched_keys"):
        if names := sorted(map(str, report[kind])):
            raise InputError(
                f"{source.name}: {len(names)} {kind.replace('_', ' ')} when transformers loads it, {names[0]} among "
                "them: weights and config.json do not belong together."
            )
    if report["unexpected_keys"]:
        logger.warning("%s holds tensors that transformers ignores: %s", source.name, sorted(report["unexpected_keys"]))
    check_finite(model, source.name)
    return model.eval().requires_grad_(False), sorted(map(str, report["unexpected_keys"]))


def _offload_folder() -> str:
    import atexit
    import shutil
    import tempfile

    folder = tempfile.mkdtemp(prefix="lvlm-exporter-offload-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def check_finite(model: Any, name: str) -> None:
    for parameter_name, parameter in model.named_parameters():
        if parameter.is_meta:  # offloaded: met when it runs
            continue
        if not parameter.isfinite().all():
            raise InputError(f"{name}: tensor {parameter_name} holds NaN or infinite values. Download it again.")


def text_decoder(model: Any) -> Any:
    """The module whose `layers` are the decoder layers, in any family."""
    decoder = model.get_decoder()
    return decoder if hasattr(decoder, "layers") else decoder.get_decoder()


def compute_dtype(name: str, config: Any, device: str) -> torch.dtype:
    """'auto' is the checkpoint's own dtype on a GPU and float32 on the CPU, where half precision is slow or inexact."""
    import torch

    if name == "auto":
        own = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
        return own if isinstance(own, torch.dtype) and device != "cpu" else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise InputError(f"dtype '{name}' is not known: auto, {', '.join(known)}.")
    return known[name]


def pick_device(name: str | None) -> str:
    """The device asked for, checked; the first GPU if there is one and none was asked for."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device '{name}' was asked for, but torch {torch.__version__} sees no GPU.")
    try:
        return name if name == "auto" else str(torch.device(name))
    except RuntimeError as error:
        raise InputError(f"device '{name}' is not known: cpu, cuda, cuda:1 or auto.") from error


def file_hash(path: Path) -> str:
    """SHA-256. A file of the hub's cache is named by it, which saves reading large ones."""
    blob = Path(os.path.realpath(path))
    cached = path.is_symlink() and is_snapshot(path.parent) and blob.parent.name == "blobs"
    return blob.name if cached and re.fullmatch(r"[0-9a-f]{64}", blob.name) else sha256(path)


def file_hashes(source: Source) -> dict[str, str]:
    """SHA-256 of every file that the result depends on."""
    paths = [source.folder / "config.json", *(shard.path for shard in source.weights.shards)]
    paths += [source.folder / path for path in source.companions()]
    return {str(path.relative_to(source.folder)): file_hash(path) for path in paths}
