"""Training a router: what the gated pass computes is what the routed model runs, and training is repeatable.

Legend: B rows, S tokens, L layers.
"""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fixtures.checkpoints import FAMILIES
from loopback_hub import OWNER

from exporter.checkpoints.record import read_record
from exporter.checkpoints.source import open_source
from exporter.checkpoints.verification import verify
from exporter.clean_room import load_processor
from exporter.cli.entry import main
from exporter.data.batches import make_batch
from exporter.data.calibration import load_calibration
from exporter.data.epochs import questions_of_step
from exporter.errors import InputError
from exporter.methods import LOSSES
from exporter.modeling.routed_route import Route, RouterSettings
from exporter.models.answers import answered
from exporter.models.loading import load_model
from exporter.models.replay import logits, trace
from exporter.pipeline import route
from exporter.publishing.push import push
from exporter.recipe import CalibrationData, RouterRecipe, RunOptions, router_from_data
from exporter.routing.folder import MODELING_FILES, routable
from exporter.routing.settings import default_settings
from exporter.routing.training.importance_loss import layer_risk, ranking_loss
from exporter.routing.training.learner import Learner, TrainingBatch
from exporter.routing.training.loop import Training, train_router
from exporter.routing.training.relaxation import Gates, gated_attention, gated_states, straight_through
from exporter.routing.with_router import forget_router


def silent(items, what, total):
    return items


@pytest.fixture(scope="module")
def opened(tiny, questions):
    """opened(family): a tiny model able to follow routes, its processor, and answered questions."""
    made = {}

    def case(family):
        if family not in made:
            source = open_source(str(tiny(family)))
            model = routable(load_model(source, "cpu", torch.float32)[0])
            processor = load_processor(source.folder)
            samples = load_calibration(str(questions), samples=3).samples
            made[family] = model, answered(model, make_batch(samples, processor, model.config), 4)
        return made[family]

    return case


@pytest.mark.parametrize("drop_at", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_gates_of_zero_and_one_are_what_the_routed_model_runs(family, drop_at, opened):
    model, one = opened(family)
    random = torch.Generator().manual_seed(0)
    visual = one.batch.is_visual
    keep = ~visual | (torch.rand(visual.shape, generator=random) < 0.5)
    layers = torch.rand(len(visual), model.num_layers, generator=random) < 0.7
    layers[:, :drop_at] = True
    with torch.no_grad():
        wanted = model(**one.batch.inputs, route=Route(keep, layers, drop_at=drop_at)).logits[one.predicts]
    given = trace(model, one.batch, torch.no_grad)
    state = given.entry
    with torch.no_grad(), gated_attention(model) as attention:
        given = trace(model, one.batch, torch.no_grad)
        for layer_idx in range(drop_at):
            layer = model._text_model().layers[layer_idx]
            state = given.after(layer_idx, given.step(layer, layer_idx, state))
        output = gated_states(model, given, attention, state, drop_at, Gates(keep.float(), layers.float()))
    torch.testing.assert_close(logits(model, output[one.predicts]), wanted, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("again", [False, True])
def test_gradients_reach_gates_that_are_shut(opened, monkeypatch, again):
    model, one = opened("llava")
    model.requires_grad_(False)
    if again:
        monkeypatch.setattr("exporter.routing.training.relaxation.KEPT_BYTES", 0)
    tokens = torch.ones(one.batch.is_visual.shape)
    tokens[one.batch.is_visual] = 0.0
    layers = torch.ones(len(tokens), model.num_layers)
    layers[:, -1] = 0.0
    gates = Gates(tokens.requires_grad_(), layers.requires_grad_())
    with gated_attention(model) as attention:
        given = trace(model, one.batch, torch.no_grad)
        output = gated_states(model, given, attention, given.entry, 0, gates)
        output[one.predicts].square().sum().backward()
    assert gates.tokens.grad[one.batch.is_visual].abs().min() > 0
    assert gates.layers.grad.abs().min() > 0


def test_straight_through_keeps_the_highest_and_pulls_where_it_is_close():
    scores = torch.tensor([[3.0, 1.0, 2.0, 9.0], [0.1, 0.2, 0.3, 0.4]], requires_grad=True)
    candidates = torch.tensor([[True, True, True, False], [True] * 4])
    gates = straight_through(scores, candidates, torch.tensor([1, 9]))
    assert gates.tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]
    gates.sum().backward()
    assert scores.grad[0, 3] == 0
    assert scores.grad[0, 0] > scores.grad[0, 1] > 0  # 3.0 and 2.0 are next to the border, 1.0 is not
    assert straight_through(scores, candidates, torch.tensor([0, 0])).sum() == 0


def test_every_question_is_drawn_once_an_epoch_in_batches_of_like_size():
    sizes = [index % 4 for index in range(16)]
    batches = [questions_of_step(range(16), sizes, step, batch_size=4, seed=0) for step in range(8)]
    for epoch in (batches[:4], batches[4:]):
        assert sorted(index for batch in epoch for index in batch) == list(range(16))
        assert all(len({sizes[index] for index in batch}) == 1 for batch in epoch)
    assert batches[:4] != batches[4:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "options"),
    [("importance", {}), ("importance", {"draws": 2, "sets": 2}), ("relaxed", {}), ("preference", {"actions": 4})],
)
def test_training_is_repeatable_and_goes_on_where_it_was(loss, options, tiny, questions, tmp_path, monkeypatch):
    source = open_source(str(tiny("llava")))
    source.config.router = default_settings(source.config)
    settings = RouterSettings.of(source.config)
    samples = load_calibration(str(questions), samples=None).samples * 2
    training = Training(steps=4, batch_size=4, loss=loss, options=options, answer_tokens=8)

    def run(progress=silent, **keep):
        model, _ = load_model(source, "cpu", torch.float32)
        return train_router(model, load_processor(source.folder), samples, settings, training, progress, **keep)

    whole = run()
    assert any("KL at 50% of the tokens" in point for point in whole.curve)
    assert [point["step"] for point in whole.curve] == [0, 1, 2, 3]

    def broken(items, what, total):
        for number, item in enumerate(items):
            if what == "train router" and number == 3:
                raise KeyboardInterrupt
            yield item

    monkeypatch.setattr("exporter.routing.training.loop.SAVE_EVERY", 2)
    keep = {"state_file": tmp_path / "state", "fingerprint": "same"}
    with pytest.raises(KeyboardInterrupt):
        run(broken, **keep)
    resumed = run(**keep)
    assert resumed.curve == whole.curve
    for name, tensor in whole.weights.items():
        assert torch.equal(resumed.weights[name], tensor), name
    other = run(state_file=tmp_path / "state", fingerprint="another")
    assert other.curve == whole.curve, "a state of another run is not gone on from"
    (tmp_path / "state").write_bytes(b"garbage")
    assert run(**keep).curve == whole.curve, "a damaged state is begun anew"


def test_ranking_loss_is_lowest_where_the_ranking_is_that_of_the_importance():
    importance = torch.tensor([[4.0, 1.0, 0.0, 9.0], [1e-30, 1e-32, 0.0, 0.0]])
    there = torch.tensor([[True, True, True, False], [True, True, False, False]])
    shares = torch.tensor([[2 / 3, 1 / 3, 0.0], [10 / 11, 1 / 11, 0.0]])  # of the roots
    exact = torch.cat([shares.clamp(min=1e-9).log(), torch.full((2, 1), 9.0)], dim=1)
    lowest = ranking_loss(exact, importance, there, power=0.5)
    assert lowest == pytest.approx(float(-(torch.xlogy(shares, shares)).sum(1).mean()), abs=1e-4)
    assert ranking_loss(exact.roll(1, 1), importance, there, power=0.5) > lowest
    nothing = torch.zeros(2, 4, requires_grad=True)
    ranking_loss(nothing, importance, torch.zeros_like(there), power=0.5).backward()
    assert not nothing.grad.any(), "a batch of questions without images teaches nothing about tokens"


@pytest.mark.parametrize("drop_at", [0, 2])
def test_sets_of_layers_cost_what_the_routed_model_says(drop_at, opened):
    model, one = opened("llava")
    candidates, tried = (2, 3, 5), torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 1, 1]])  # a row each
    layers = torch.ones(3, model.num_layers, dtype=torch.bool)
    layers[:, candidates] = tried.bool()
    with torch.no_grad(), gated_attention(model) as attention:
        given = trace(model, one.batch, torch.no_grad)
        log_p = model(**one.batch.inputs, preset="off").logits[one.predicts].float().log_softmax(-1)
        log_q = model(**one.batch.inputs, route=Route(layers=layers)).logits[one.predicts].float().log_softmax(-1)
        settings = replace(model.router_settings, candidates=candidates, drop_at=drop_at, read_at=drop_at)
        learner = Learner(SimpleNamespace(model=model), None, settings, attention)
        state = learner._prefix(given)[1]
        visual = one.batch.is_visual
        look = TrainingBatch(learner, None, one, given, state, log_p, torch.zeros(visual.shape), torch.zeros(3, 3))
        kept_and_all = look.kl_of_layers([tried, torch.ones(3, 3)])
    wanted = look.per_sample((log_p.exp() * (log_p - log_q)).sum(-1))
    torch.testing.assert_close(kept_and_all, torch.stack([wanted, torch.zeros(3)]), atol=1e-4, rtol=1e-3)
    assert wanted[2] == pytest.approx(0, abs=1e-5) and wanted[:2].min() > 1e-3


def test_layers_that_do_each_others_work_are_not_skipped_together():
    """One by one layers 0 and 1 cost least, together they cost most: layer 2 is to go with the first of them."""
    logits = torch.zeros(8, 4, requires_grad=True)

    def kl_of_layers(tried):
        gone = 1 - torch.stack(tried)
        return gone @ torch.tensor([0.01, 0.02, 0.05, 0.5]) + gone[..., 0] * gone[..., 1]

    optimizer = torch.optim.Adam([logits], lr=0.05)
    look = SimpleNamespace(layer_logits=logits, kl_of_layers=kl_of_layers)
    for step in range(150):
        loss = layer_risk(look, torch.Generator().manual_seed(step), sets=3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(set(pair) in ({0, 2}, {1, 2}) for pair in logits.argsort(1)[:, :2].tolist())


def test_no_layer_to_skip_teaches_nothing():
    logits = torch.zeros(2, 0, requires_grad=True)
    look = SimpleNamespace(layer_logits=logits)
    assert layer_risk(look, torch.Generator(), sets=3) == 0


def test_a_router_soon_learns_which_tokens_matter(digits):
    source = open_source(str(digits / "model"))
    source.config.router = default_settings(source.config, candidates=0)  # layers take most of the time
    samples = load_calibration(str(digits / "data" / "calibration.jsonl"), samples=96).samples
    model, _ = load_model(source, "cpu", torch.float32)
    training = Training(steps=12, batch_size=8)
    trained = train_router(
        model, load_processor(source.folder), samples, RouterSettings.of(source.config), training, silent
    )
    untaught, taught = (point["KL at 25% of the tokens"] for point in (trained.curve[0], trained.curve[-1]))
    assert taught < 0.25 * untaught


@pytest.mark.parametrize("loss", LOSSES)
def test_a_router_without_layers_to_skip_is_trained(loss, tiny, questions):
    """Held-out questions are judged as well, under budgets of tokens alone."""
    source = open_source(str(tiny("llava")))
    source.config.router = default_settings(source.config, candidates=0)
    settings = RouterSettings.of(source.config)
    assert all(set(budget) == {"keep_visual_tokens"} for budget in settings.presets.values())
    samples = load_calibration(str(questions), samples=None).samples * 2
    model, _ = load_model(source, "cpu", torch.float32)
    training = Training(steps=2, batch_size=4, loss=loss, answer_tokens=4)
    trained = train_router(model, load_processor(source.folder), samples, settings, training, silent)
    assert trained.held_out and trained.curve[-1]["KL at 25% of the tokens"] > 0
    assert all(weights.isfinite().all() for weights in trained.weights.values())


@pytest.fixture(scope="module")
def routed_folder(tiny, questions, tmp_path_factory):
    """A pruned tiny LLaVA with a router, made by `compress --router`, and the plain one that it was made from."""
    folder = tmp_path_factory.mktemp("routed")
    arguments = ["compress", str(tiny("llava")), "--calibration", str(questions), "--layers", "3", "--quiet"]
    assert main([*arguments, "--out", str(folder / "plain")]) == 0
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        json.dumps(
            {
                "model": str(tiny("llava")),
                "calibration": str(questions),
                "layers": [3],
                "router": {"steps": 3, "batch_size": 4, "drop_at": 1},
            }
        )
    )
    assert main(["compress", "--recipe", str(recipe), "--out", str(folder / "routed"), "--quiet"]) == 0
    return folder


@pytest.mark.clean_process
def test_compress_with_a_router_makes_one_verified_folder(routed_folder):
    routed, plain = routed_folder / "routed", routed_folder / "plain"
    assert sorted(path.name for path in routed_folder.iterdir()) == ["plain", "recipe.yaml", "routed"]
    assert (routed / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()
    record = read_record(routed).to_data()
    assert record["plan"]["drop"] == [3] and record["recipe"]["router"]["steps"] == 3
    assert record["router"]["settings"]["drop_at"] == 1
    assert len(record["router"]["curve"]) == 3
    card = (routed / "README.md").read_text()
    assert (
        "custom_code" in card and "trust_remote_code=True" in card and (routed / "assets/router_training.png").exists()
    )
    found = verify(routed)
    assert found.holds and found.details["routed"]["class"].startswith("Routed")


@pytest.mark.clean_process
def test_a_routed_folder_verifies_by_its_name_on_the_hub(routed_folder, here):
    """Nothing stands in for the clean process: the modeling file and its siblings run from what was downloaded."""
    push(routed_folder / "routed", f"{OWNER}/routed")
    by_name = verify(f"{OWNER}/routed")
    assert by_name.problems == () and by_name.details["routed"]["class"] == "RoutedLlavaForConditionalGeneration"
    assert set(MODELING_FILES) <= {path.name for path in by_name.folder.iterdir()}
    assert not by_name.folder.is_relative_to(routed_folder)


@pytest.mark.clean_process
def test_a_router_that_is_not_the_recorded_one_does_not_verify(routed_folder, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(routed_folder / "routed", tmp_path / "copy")
    weights = load_file(copy / "router/model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, copy / "router/model.safetensors", {"format": "pt"})
    found = verify(copy)
    assert not found.holds and "router" in found.problems[0]


@pytest.mark.clean_process
def test_reproduce_trains_the_router_again(routed_folder):
    out = routed_folder / "again"
    assert main(["reproduce", str(routed_folder / "routed"), "--out", str(out), "--quiet"]) == 0
    assert (out / "router/model.safetensors").read_bytes() == (
        routed_folder / "routed/router/model.safetensors"
    ).read_bytes()


@pytest.mark.clean_process
def test_route_takes_a_model_as_its_authors_made_it(tiny, questions, tmp_path):
    router = RouterRecipe(CalibrationData(str(questions), None), steps=2, batch_size=4, candidates=0)
    made = route(str(tiny("qwen2_vl")), router, tmp_path / "routed", RunOptions("cpu"))
    record = read_record(made).to_data()
    assert record["plan"]["drop"] == []
    card = (made / "README.md").read_text()
    assert "No layer was removed" in card
    assert "this model runs fewer visual tokens. A router" in card and "It skips no layers." in card
    assert "token-pruning" in card and "layer-skipping" not in card and "layer-only" not in card
    assert not list(tmp_path.glob(".routed*"))


@pytest.mark.parametrize(
    ("router", "message"),
    [
        ({"steps": 0}, "steps=0: a whole number from 1"),
        ({"drop_at": -1}, "drop_at=-1"),
        ({"learning_rate": 3}, "learning_rate=3"),
        ({"loss": "hinge"}, "loss 'hinge' is not known"),
        ({"stepz": 5}, "router has no key 'stepz'"),
        ({"calibration": {"samples": 3}}, "calibration needs 'data'"),
    ],
)
def test_wrong_router_recipes_are_refused(router, message):
    with pytest.raises(InputError, match=message):
        router_from_data(router)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--drop-at", "40"], "before drop_at=40"),
        (["--candidates", "99"], "candidates=99 of"),
        (["--loss-option", "heat=2"], "loss 'importance' has no option 'heat'"),
        (["--loss-option", "sets=1"], "sets=1, 2 or more are needed"),
        (["--loss-option", "sets=2.5"], "sets"),
        (["--loss-option", "least=0"], "least=0"),
        (["--loss", "preference", "--loss-option", "actions=1"], "actions=1, 2 or more"),
        (["--loss", "preference", "--loss-option", "layers=3"], "layers=3 is a share, at most 1"),
        (["--loss", "relaxed", "--loss-option", "temperature=0"], "temperature=0 is out of range"),
        (["--samples", "3"], "holds 3 questions: a router needs 8"),
    ],
)
def test_wrong_flags_of_route_are_refused(flags, message, tiny, questions, tmp_path, capsys):
    arguments = ["route", str(tiny("llava")), "--out", str(tmp_path / "out"), "--calibration", str(questions), *flags]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_second_router_forgets_what_was_measured_with_the_first():
    """Figures of the whole model still hold: its weights are the same."""
    record = {"evaluations": [{"budget": {"preset": "fast"}}, {"budget": None, "n": 5}], "routes": [{}],
              "benchmarks": [{"budget": {"keep_layers": 5}}]}  # fmt: skip
    forget_router(record)
    assert record == {"evaluations": [{"budget": None, "n": 5}], "benchmarks": []}
