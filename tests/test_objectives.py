"""Objectives: what they minimise, what they refuse, and that gradients are those of the whole batch."""

import pytest
import torch
from torch.nn import functional as F

import img2vid
from img2vid.data.transforms import MixClips
from img2vid.objectives import (
    Classification,
    Contrastive,
    Distillation,
    InterpolatedWeights,
    KeepAnswers,
    ObjectiveError,
    Step,
    Surroundings,
    WeightedSum,
)
from tests.conftest import randomize, small_clip, small_vit

NAMES = ("jump", "run", "sit")


def text_model(**kwargs):
    model = img2vid.convert(small_clip(**kwargs), num_frames=2).train()
    model.tokenize = lambda texts: torch.stack(
        [F.pad(torch.tensor([1, *map(number, text.split()), 199]), (0, 16))[:16] for text in texts]
    )
    return model


def number(word):
    return 3 + len(word) + 7 * (ord(word[-1]) % 20)


def class_model():
    return randomize(img2vid.convert(small_vit(), num_frames=2, num_classes=3)).train()


def batch(size=4, **more):
    generator = torch.Generator().manual_seed(5)
    clips = torch.randn(size, 2, 3, 32, 32, generator=generator)
    return {
        "clip": clips,
        "label": torch.arange(size) % 3,
        "caption": [f"a {'x' * i} b{chr(97 + i)}" for i in range(size)],
        **more,
    }


def around(model, **more):
    given = dict(class_names=NAMES, captions=sorted(batch(6)["caption"]), image_model=lambda: frozen_image(model))
    return Surroundings(model, **{**given, **more})


def frozen_image(model):
    image = small_clip() if hasattr(model, "encode_text") else small_vit()
    return img2vid.convert(image, num_frames=1, attention="space_only")


def gradients(model, losses):
    model.zero_grad()
    sum(losses.values()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_linear_classification_is_cross_entropy_of_the_logits():
    model, objective = class_model(), Classification(label_smoothing=0.1)
    objective.setup(around(model))
    losses = objective(Step(model, batch()))
    expected = F.cross_entropy(model(batch()["clip"]), batch()["label"], label_smoothing=0.1)
    assert list(losses) == ["classification_loss"] and torch.allclose(losses["classification_loss"], expected)
    soft = MixClips(3)(batch()["clip"], batch()["label"])[1]
    mixed = objective(Step(model, batch(soft_label=soft)))["classification_loss"]
    logits = model(batch()["clip"]).log_softmax(-1)
    target = soft * 0.9 + 0.1 / 3
    assert torch.allclose(mixed, -(target * logits).sum(-1).mean(), atol=1e-6)


def test_text_classification_scores_against_averaged_prompts():
    model, objective = text_model(), Classification("text", prompts=["a {}", "the video of {}"])
    objective.setup(around(model))
    scores = objective.predict(Step(model, batch()))
    with torch.no_grad():
        text = torch.stack(
            [model.encode_text(model.tokenize([f"a {n}", f"the video of {n}"]), normalize=True) for n in NAMES]
        )
        text = F.normalize(text.mean(1), dim=-1)
        expected = model.logit_scale.exp() * model.encode_video(batch()["clip"], normalize=True) @ text.T
    assert torch.allclose(scores, expected, atol=1e-5)
    loss = objective(Step(model, batch()))["classification_loss"]
    assert torch.allclose(loss, F.cross_entropy(expected, batch()["label"]), atol=1e-5)
    moved = gradients(model, {"x": loss})
    assert not any(name.startswith(("transformer", "token_embedding", "text_projection")) for name in moved)
    assert any(name.startswith("visual") for name in moved)


def test_a_text_tower_that_learns_is_read_anew_at_each_step():
    model, objective = text_model(), Classification("text", train_text=True)
    objective.setup(around(model))
    before = objective.predict(Step(model, batch())).detach()
    moved = gradients(model, objective(Step(model, batch())))
    assert moved["token_embedding.weight"].abs().sum() > 0
    with torch.no_grad():
        model.text_projection.add_(torch.randn_like(model.text_projection))
    objective(Step(model, batch()))
    with torch.no_grad():
        assert not torch.allclose(objective.predict(Step(model, batch())), before, atol=1e-2)


def test_captions_as_classes():
    model, objective = text_model(), Classification("text", classes="caption")
    objective.setup(around(model))
    assert objective.targets(batch(6), torch.device("cpu")).tolist() == [0, 1, 2, 3, 4, 5]
    assert objective.predict(Step(model, batch())).shape == (4, 3)  # validation is about labels
    with pytest.raises(ObjectiveError, match="shares of labels, not of captions"):
        objective(Step(model, batch(soft_label=torch.ones(4, 3) / 3)))


def test_words_never_met_are_told_apart_and_old_ones_kept():
    model = img2vid.convert("nano_clip", num_frames=2).train()
    captions = [f"the digit {digit} moving {way}" for digit in ("two", "six") for way in ("left", "right")]
    kept = ["a photo of the digit two", "a photo of the digit six"]

    def likeness():
        with torch.no_grad():
            x = model.encode_text(model.tokenize(captions), normalize=True)
            return (x @ x.T)[0, 1].item(), model.encode_text(model.tokenize(kept), normalize=True)

    before, old = likeness()
    objective = Classification(
        "text",
        "caption",
        train_text=True,
        spread=1.0,
        spread_steps=20,
        keep_classes=0.5,
        keep_text=1.0,
        keep_prompts=kept,
    )
    objective.setup(Surroundings(model, captions=captions))
    after, new = likeness()
    assert before > 0.99 and after < 0.8
    assert (old * new).sum(-1).min() > 0.9
    with torch.no_grad():  # "the digit two moving left" still is a two
        x = model.encode_text(model.tokenize(captions), normalize=True)
    assert (x @ old.T).argmax(dim=1).tolist() == [0, 0, 1, 1]
    losses = objective(Step(model, batch(4, caption=captions)))
    assert set(losses) == {"classification_loss", "text_spread_loss", "class_keep_loss", "text_keep_loss"}


def test_a_text_tower_that_only_learned_new_words_stands_still_and_is_asked_once(monkeypatch):
    model = img2vid.convert("nano_clip", num_frames=2).train()
    captions = ["moving left", "moving right"]
    objective = Classification("text", "caption", spread=1.0, spread_steps=3)
    tower = {name: p for name, p in model.named_parameters() if not name.startswith(("visual.", "logit_scale"))}
    for parameter in tower.values():
        parameter.requires_grad_(False)
    before = {name: p.clone() for name, p in tower.items()}
    objective.setup(Surroundings(model, captions=captions))
    assert any(not torch.equal(before[name], p) for name, p in tower.items())
    assert not any(p.requires_grad for p in tower.values())

    asked, encode = [], model.encode_text
    monkeypatch.setattr(model, "encode_text", lambda *args, **kwargs: asked.append(1) or encode(*args, **kwargs))
    for _ in range(2):
        losses = objective(Step(model, batch(2, caption=captions)))
        assert set(losses) == {"classification_loss"}
        assert not any(name in tower for name in gradients(model, losses))
    assert len(asked) == 1


@pytest.mark.parametrize("loss", ["clip", "siglip"])
@pytest.mark.parametrize("train_text", [True, False])
def test_contrastive_is_the_loss_of_its_paper(loss, train_text):
    model, objective = text_model(init_logit_bias=-2.0), Contrastive(loss, train_text=train_text)
    objective.setup(around(model))
    found = objective(Step(model, batch()))["contrastive_loss"]
    video = model.encode_video(batch()["clip"], normalize=True)
    text = model.encode_text(model.tokenize(batch()["caption"]), normalize=True)
    logits = model.logit_scale.exp() * video @ text.T
    if loss == "clip":
        pairs = torch.arange(4)
        expected = (F.cross_entropy(logits, pairs) + F.cross_entropy(logits.T, pairs)) / 2
    else:
        expected = -F.logsigmoid((2 * torch.eye(4) - 1) * (logits + model.logit_bias)).sum() / 4
    assert torch.allclose(found, expected, atol=1e-5)
    assert ("token_embedding.weight" in gradients(model, {"x": found})) is train_text


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_give_the_gradients_of_the_whole_batch(chunk):
    model, objective = text_model(), Contrastive()
    objective.setup(around(model))
    whole = gradients(model, objective(Step(model, batch())))
    parts = gradients(model, objective(Step(model, batch(), chunk_size=chunk)))
    assert whole.keys() == parts.keys()
    for name, gradient in whole.items():
        assert torch.allclose(gradient, parts[name], atol=1e-5 * gradient.abs().max().item() + 1e-8), name


def numbers_held(model, chunk):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        assert Step(model, batch(), chunk).features.shape == (4, 24)
    return sum(sizes)


def test_chunks_hold_less_in_memory():
    model = text_model()
    assert numbers_held(model, 1) < 0.2 * numbers_held(model, None)


def test_the_tower_runs_once_for_several_objectives():
    model = text_model()
    objective = WeightedSum(
        {"words": Classification("text"), "pairs": Contrastive(), "image": Distillation(1.0, tokens=1.0)},
        {"pairs": 0.5},
    )
    objective.setup(around(model))
    runs = []
    model.visual.register_forward_hook(lambda *_: runs.append(1))
    losses = objective(Step(model, batch()))
    assert len(runs) == 1
    assert set(losses) == {
        "classification_loss",
        "contrastive_loss",
        "feature_distillation_loss",
        "token_distillation_loss",
    }
    alone = Contrastive()
    alone.setup(around(model))
    assert torch.allclose(losses["contrastive_loss"], 0.5 * alone(Step(model, batch()))["contrastive_loss"])
    assert objective.predict(Step(model, batch())).shape == (4, 3)


def test_answers_are_kept_at_the_beginning_and_only_there():
    model, objective = text_model().eval(), KeepAnswers(NAMES, ["a {}", "one {}"], weight=2.0)
    objective.setup(around(model))
    assert objective(Step(model, batch()))["answers_loss"].item() == pytest.approx(0.0, abs=1e-6)
    randomize(model.visual, seed=8)
    loss = objective(Step(model, batch()))["answers_loss"]
    # from the definition: sum of p (log p - log q) over classes, averaged over clips
    image = frozen_image(model).eval()
    with torch.no_grad():
        tokens = model.tokenize([p.format(name) for name in NAMES for p in ("a {}", "one {}")])
        text = image.encode_text(tokens, normalize=True).view(len(NAMES), 2, -1).mean(dim=1)
        text = text / text.norm(dim=-1, keepdim=True)
        clips = batch()["clip"]
        p, q = (
            (image.logit_scale.exp() * m.encode_video(clips, normalize=True) @ text.T).softmax(dim=-1)
            for m in (image, model)
        )
    assert loss.item() == pytest.approx(2.0 * float((p * (p / q).log()).sum(dim=-1).mean()), rel=1e-4)
    assert loss > 1e-4
    found = gradients(model, {"answers_loss": loss})
    assert any(name.startswith("visual.") for name in found)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"classes": ["one"]}, "two names or more"),
        ({"classes": NAMES, "prompts": ["no place"]}, "where the class name goes"),
    ],
)
def test_questions_without_answers(given, message):
    with pytest.raises(ObjectiveError, match=message):
        KeepAnswers(**given)


def test_answers_need_a_text_tower():
    with pytest.raises(ObjectiveError, match="KeepAnswers needs a text tower"):
        KeepAnswers(NAMES).setup(around(class_model()))


def test_equal_names_in_a_sum_stay_apart():
    objective = WeightedSum({"a": Distillation(1.0), "b": Distillation(0.5)})
    model = text_model()
    objective.setup(around(model))
    assert set(objective(Step(model, batch()))) == {"feature_distillation_loss", "b_feature_distillation_loss"}


@pytest.mark.parametrize("make", [text_model, class_model])
def test_distillation_is_zero_at_the_beginning_and_only_there(make):
    model, objective = make().eval(), Distillation(features=1.0, tokens=1.0)
    if make is class_model:
        model.load_image_weights(small_vit().state_dict(), refresh_copies=False)
    objective.setup(around(model))
    with torch.no_grad(), model.gates_closed() if hasattr(model, "gates_closed") else torch.no_grad():
        losses = objective(Step(model, batch()))
    assert all(loss.abs() < 1e-5 for loss in losses.values())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "temporal_fc" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    assert all(loss > 1e-4 for loss in objective(Step(model, batch())).values())
    assert not any("teacher" in key for key in objective.state_dict())


def test_masked_distillation_hides_pixels_and_counts_what_is_left():
    model, objective = text_model(), Distillation(features=0.0, tokens=1.0, mask_ratio=0.75)
    objective.setup(around(model))
    seen = []
    model.visual.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    torch.manual_seed(0)
    loss = objective(Step(model, batch()))["token_distillation_loss"]
    hidden = (seen[0] == 0).all(dim=2)  # (B, T, H, W)
    patches = hidden.unflatten(-1, (4, 8)).unflatten(-3, (4, 8)).all(dim=-1).all(dim=-2)  # (B, T, 4, 4)
    assert (patches.flatten(2).sum(-1) == 12).all()
    assert (patches[:, 0] == patches[:, 1]).all()
    assert loss > 0


def test_interpolated_weights_score_a_point_on_the_line():
    model = text_model()
    objective = InterpolatedWeights(Contrastive(), weight=0.5, most=0.6)
    objective.setup(around(model))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    randomize(model, seed=3, std=0.1)
    torch.manual_seed(0)
    losses = objective(Step(model, batch()))
    torch.manual_seed(0)
    alpha = 0.6 * torch.rand(()).item()
    there = text_model()
    with torch.no_grad():
        for name, parameter in there.named_parameters():
            parameter.copy_(torch.lerp(dict(model.named_parameters())[name], start[name], alpha))
    expected = objective.objective(Step(there, batch()))["contrastive_loss"]
    assert torch.allclose(losses["interpolated_contrastive_loss"], 0.5 * expected, atol=1e-5)
    moved = gradients(model, {"x": losses["interpolated_contrastive_loss"]})
    own = gradients(there, {"x": 0.5 * (1 - alpha) * expected})
    assert torch.allclose(moved["visual.conv1.weight"], own["visual.conv1.weight"], atol=1e-5)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Classification("linaer"), "expected one of linear, text.*linear"),
        (lambda: Classification("text", prompts=["a video"]), "where the class name goes"),
        (lambda: Classification("text", spread=1.0), "train_text=true or spread_steps"),
        (lambda: Classification("text", train_text=True, spread_steps=3), "give spread a weight"),
        (lambda: Classification("text", train_text=True, keep_prompts=["a dog"]), "give it a weight"),
        (lambda: Classification("text", train_text=True, keep_text=1.0, keep_prompts=["a {}"]), "keep_names"),
        (lambda: Classification("text", keep_classes=1.0), "train_text=true or spread_steps"),
        (lambda: Classification("text", train_text=True, keep_classes=1.0), "give those"),
        (lambda: Classification(label_smoothing=1.0), "from 0 to below 1"),
        (lambda: Contrastive("infonce"), "clip, siglip"),
        (lambda: Distillation(features=0.0), "does nothing"),
        (lambda: Distillation(mask_ratio=1.0), "from 0 to below 1"),
        (lambda: WeightedSum({"a": Distillation()}, {"b": 1.0}), "no objective is called 'b'"),
        (lambda: InterpolatedWeights(Distillation(), most=0.0), "does nothing"),
    ],
)
def test_settings_that_make_no_sense_teach(make, words):
    with pytest.raises(ObjectiveError, match=words):
        make()


@pytest.mark.parametrize(
    ("objective", "make", "more", "words"),
    [
        (Classification(), text_model, {}, "give num_classes"),
        (Classification("text"), class_model, {}, "needs a text tower"),
        (Classification("text"), text_model, {"class_names": None}, "give data.classes"),
        (Classification("text", "caption"), text_model, {"captions": ()}, "has no captions"),
        (Contrastive("siglip"), text_model, {}, "logit_bias"),
        (Contrastive(), class_model, {}, "needs a text tower"),
        (Distillation(), text_model, {"image_model": None}, "image model"),
    ],
)
def test_objectives_that_do_not_fit_teach(objective, make, more, words):
    with pytest.raises(ObjectiveError, match=words):
        objective.setup(around(make(), **more))


@pytest.mark.parametrize(
    ("objective", "gap"),
    [
        (Classification("text"), {"label": torch.tensor([0, 1, -1, 2])}),
        (Contrastive(), {"caption": ["a", "", "b", "c"]}),
    ],
)
def test_rows_without_label_or_caption_are_refused(objective, gap):
    model = text_model()
    objective.setup(around(model))
    with pytest.raises(ObjectiveError, match="A video without"):
        objective(Step(model, batch(**gap)))


def test_interpolated_weights_refuse_sharded_ones():
    with pytest.raises(ObjectiveError, match="needs whole weights.*strategy ddp"):
        InterpolatedWeights(Contrastive()).setup(Surroundings(text_model(), sharded=True))


def test_a_text_tower_that_another_objective_trains_is_not_remembered():
    model = text_model()
    objective = Classification("text")  # does not train it itself
    objective.setup(Surroundings(model, class_names=NAMES))
    before = objective(Step(model, batch(3)))["classification_loss"]
    with torch.no_grad():
        model.text_projection.add_(0.5 * torch.randn_like(model.text_projection))
    assert objective(Step(model, batch(3)))["classification_loss"] != before
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("visual."))
    objective.setup(Surroundings(model, class_names=NAMES))
    objective(Step(model, batch(3)))
    assert "label" in objective.known  # one that stands still is embedded once


def test_contrastive_refuses_what_has_no_text_of_its_own():
    model, objective = text_model(), Contrastive(text="label")
    objective.setup(around(model))
    with pytest.raises(ObjectiveError, match="without a label"):  # -1 is no name for the last class
        objective(Step(model, batch(label=torch.tensor([0, -1, 1, 2]))))
    mixed, soft = MixClips(3)(batch()["clip"], batch()["label"])
    with pytest.raises(ObjectiveError, match="Mixed clips"):
        objective(Step(model, batch(clip=mixed, soft_label=soft)))


def test_embeddings_of_classes_are_forgotten_with_the_weights_they_came_from():
    model, inner = text_model(), Classification("text", train_text=True)
    objective = InterpolatedWeights(WeightedSum({"classes": inner}))
    objective.setup(around(model))
    with torch.no_grad():
        before = objective.predict(Step(model, batch()))
        model.text_projection.copy_(torch.randn_like(model.text_projection))
        objective.forget()
        after = objective.predict(Step(model, batch()))
    fresh = Classification("text", train_text=True)
    fresh.setup(around(model))
    with torch.no_grad():
        assert torch.equal(after, fresh.predict(Step(model, batch()))) and not torch.allclose(before, after)
