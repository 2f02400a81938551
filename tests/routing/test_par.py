"""PAR's own settings (arXiv 2412.06458), each against the paper's text or equation.

Legend: B samples, S tokens, N candidate layers, H heads.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fixtures.routed import copied, seen_by_router

from exporter.checkpoints.source import open_source
from exporter.cli import main, parser
from exporter.cli.from_flags import router_from_flags
from exporter.modeling.routed_api import cache_of
from exporter.models.loading import text_decoder
from exporter.progress import silent
from exporter.recipe import RunOptions, load_recipe
from exporter.routing.folder import add_router, load_routed
from exporter.routing.rules import fastv_scores
from exporter.routing.training.perturbed import attention_of_heads, perturbed_heads, perturbed_mean
from exporter.routing.training.preference_loss import log_probability, preference_loss
from exporter.routing.with_router import prepare_router, train_job

ROOT = Path(__file__).parents[2]


class Judged:
    """A batch whose divergences are handed out in order: 16 visual tokens among 20, eight candidate layers."""

    def __init__(self, divergences: list[float]) -> None:
        random = torch.Generator().manual_seed(0)
        self.visual = (torch.arange(20) >= 4).expand(1, -1)
        self.token_logits, self.layer_logits = torch.randn(1, 20, generator=random), torch.randn(1, 8, generator=random)
        self.fastv = torch.randn(1, 20, generator=random).masked_fill(~self.visual, -torch.inf)
        self.fastv_of_heads = torch.rand(1, 4, 20, generator=random).softmax(-1)
        self.divergences = list(divergences)
        self.tried: list[tuple[torch.Tensor, torch.Tensor]] = []

    def gates(self, tokens: torch.Tensor, layers: torch.Tensor) -> Any:
        self.tried.append((tokens, layers))
        return None

    def kl(self, _: Any) -> torch.Tensor:
        return torch.tensor([self.divergences[len(self.tried) - 1]])

    def per_sample(self, kl: torch.Tensor) -> torch.Tensor:
        return kl


@pytest.mark.parametrize("noise_on", ["mean", "heads"])
def test_actions_are_the_papers(noise_on):
    """Five of them: all but M tokens of the lowest noisy scores stay, all but K layers at random."""
    batch = Judged([1.0, 2.0, 3.0, 4.0, 5.0])
    preference_loss(batch, torch.Generator().manual_seed(1), noise_on=noise_on)
    assert len(batch.tried) == 5
    for tokens, layers in batch.tried:
        assert tokens[batch.visual].sum() == 4 and layers.sum() == 6
    assert len({tuple(tokens[0].tolist()) for tokens, _ in batch.tried}) > 1
    quiet = Judged([1.0, 2.0, 3.0, 4.0, 5.0])
    preference_loss(quiet, torch.Generator().manual_seed(1), noise_on=noise_on, noise=0.0)
    scores = quiet.fastv if noise_on == "mean" else quiet.fastv_of_heads.mean(1).masked_fill(~quiet.visual, -1)
    assert all(set(t[0].nonzero()[:, 0].tolist()) == set(scores[0].topk(4).indices.tolist()) for t, _ in quiet.tried)


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_the_loss_is_equation_4(beta):
    """The halves of least and most divergence are S+ and S-; pi is a product over all that is kept or dropped."""
    batch = Judged([3.0, 1.0, 5.0, 2.0, 4.0])
    found = preference_loss(batch, torch.Generator().manual_seed(1), beta=beta)

    def log_pi(action: int) -> torch.Tensor:
        tokens, layers = batch.tried[action]
        kept = torch.cat([batch.token_logits[batch.visual], batch.layer_logits[0]]).sigmoid()  # equation 3
        chosen = torch.cat([tokens[batch.visual], layers[0]]).bool()
        return torch.where(chosen, kept, 1 - kept).log().sum()

    pairs = [(1, 2), (3, 4)]  # best and worst, second best and second worst
    margins = torch.stack([beta * log_pi(better) - beta * log_pi(worse) for better, worse in pairs])
    torch.testing.assert_close(found, -margins.sigmoid().log().mean())
    torch.testing.assert_close(log_probability(batch, *batch.tried[0])[0], log_pi(0))


def test_noise_on_heads_is_averaged_over_them():
    """A head alone is moved by the noise as it is, 32 alike by about a quarter of it; text is not moved in itself."""
    visual = torch.ones(1, 4000, dtype=torch.bool)
    uniform = torch.full((1, 1, 4000), 1 / 4000)
    spread = {
        heads: float(perturbed_heads(uniform.expand(1, heads, -1), visual, 1.0, torch.Generator().manual_seed(0)).std())
        for heads in (1, 32)
    }
    assert spread[1] == pytest.approx(1.0, abs=0.05) and 0.18 < spread[32] < 0.28
    mean = perturbed_mean(uniform[:, 0].log(), 1.0, torch.Generator().manual_seed(0))
    assert float(mean.std()) == pytest.approx(1.0, abs=0.05)
    few = torch.tensor([[False, True, True]])
    moved = perturbed_heads(torch.tensor([[[0.5, 0.25, 0.25]]]), few, 1.0, torch.Generator().manual_seed(0)).exp()
    assert float(moved.sum()) == pytest.approx(1.0)


def test_the_attention_of_heads_is_fastvs(routed, tiny):
    """Its mean over heads is what FastV ranks by, of prompts with padding too."""
    case = routed("llava", 2)
    inputs = case.prompts()
    batch = SimpleNamespace(inputs=inputs, is_visual=case.visual(inputs), is_text=~case.visual(inputs))
    batch.to = lambda _: batch
    heads = attention_of_heads(case.plain, batch)
    assert heads.shape[1] == case.model.config.text_config.num_attention_heads
    torch.testing.assert_close(heads.sum(-1), torch.ones(heads.shape[:2]))
    expected = fastv_scores(case.plain, batch)
    torch.testing.assert_close(heads.mean(1).log()[batch.is_visual], expected[batch.is_visual])


@pytest.mark.slow
def test_a_router_that_reads_the_embeddings_and_drops_before_layer_2(tiny, questions, tmp_path):
    """From the flags of `route` to the cache: trained with the noise of heads, run on what enters layer 0."""
    flags = ["--read-at", "0", "--drop-at", "2", "--loss", "preference", "--steps", "2", "--batch-size", "2"]
    flags += ["--loss-option", "noise_on=heads", "--loss-option", "actions=2", "--samples", "8"]
    source = str(tiny("llava"))
    options = parser().parse_args(["route", source, "--out", "-", "--calibration", str(questions), *flags])
    router = router_from_flags(options)
    job = prepare_router(Path(source), router, router.calibration, RunOptions("cpu"))
    trained = train_job(job, tmp_path / "state", silent)
    assert [point["step"] for point in trained.curve] == [0, 1]
    add_router(copied(Path(source), tmp_path / "par"), job.settings, trained.weights)
    model = load_routed(open_source(str(tmp_path / "par")), "cpu", torch.float32)
    entries: list[torch.Tensor] = []
    handle = text_decoder(model).layers[0].register_forward_pre_hook(lambda _, inputs: entries.append(inputs[0]))
    ids = torch.tensor([[5] + [model.config.image_token_id] * model.config.image_seq_length + [6, 7]])
    pixels = torch.zeros(1, 3, *[model.config.vision_config.image_size] * 2)
    with torch.no_grad(), seen_by_router(model) as seen:
        cache = cache_of(model(input_ids=ids, pixel_values=pixels, keep_visual_tokens=3, use_cache=True))
    handle.remove()
    assert torch.equal(seen[0][0], entries[0])
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    assert lengths == [ids.shape[1]] * 2 + [3 + 3] * (model.num_layers - 2)


def test_the_recipe_has_the_papers_numbers():
    recipe = load_recipe(ROOT / "examples" / "recipes" / "par.yaml")
    router = recipe.router
    assert router is not None and recipe.budget.drop_layers == 0
    assert (router.calibration.samples, router.batch_size, router.candidates) == (5000, 4, 16)
    assert router.steps * router.batch_size == 5000
    assert (router.read_at, router.drop_at) == (0, 2)
    options = router.loss.options
    assert 576 - round(576 * options["tokens"]) == 432 and round(16 * options["layers"]) == 4  # M and K
    assert (router.loss.name, options["actions"], options["beta"], options["noise_on"]) == (
        "preference",
        5,
        1.0,
        "heads",
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--read-at", "3"],
            "read_at=3 comes after drop_at=2: the router has to read before tokens leave. Lower read_at",
        ),
        (["--loss", "preference", "--loss-option", "noise_on=tail"], "noise_on must be 'mean' or 'heads', not 'tail'"),
    ],
)
def test_wrong_settings_are_refused(flags, message, tiny, questions, tmp_path, capsys):
    arguments = ["route", str(tiny("llava")), "--out", str(tmp_path / "out"), "--calibration", str(questions), *flags]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
