"""Experts: what is computed, what is exact and what is rounding, and routers that learn."""

import copy

import pytest
import timm
import torch
from timm.models.vision_transformer import ResPostBlock
from torch.func import functional_call

import img2vid
from img2vid.config import ConfigError
from img2vid.convert import convert
from img2vid.grafts import GraftError, fold, graft, remove
from img2vid.grafts.experts import Experts, balance_loss
from img2vid.grafts.grafting import num_parameters
from img2vid.objectives import BalanceExperts, Classification, ObjectiveError, Step, Surroundings, WeightedSum
from img2vid.temporal.infront import fronts_of
from tests.conftest import small_clip, small_eva, small_vit
from tests.test_grafts import clips, features, planted, push

TOWERS = {"vit": small_vit, "eva": small_eva, "clip": small_clip}
every_tower = pytest.mark.parametrize("make", TOWERS.values(), ids=TOWERS)
every_way = pytest.mark.parametrize("compute", ["sparse", "dense"])


def with_experts(make=small_vit, **options):
    return convert(make(), num_frames=4, grafts=[{"type": "experts", "layers": "all", **options}])


def scion_of(model):
    return next(module for module in model.modules() if isinstance(module, Experts))


def naive(scion, x):
    """Token by token: softmax, the k largest, divided by their sum, times each expert's own output."""
    host = {name: p for name, p in scion.host.named_parameters() if "graft_" not in name}
    out = []
    for token in x.flatten(0, -2):
        shares = (scion.router.weight @ token).softmax(dim=0)
        best = sorted(range(len(shares)), key=lambda e: -float(shares[e]))[: scion.top_k]
        total = sum(shares[e] for e in best)
        y = 0
        for e in best:
            weights = {name: host[name] + p for name, p in scion.zero_experts[e].named_parameters()}
            y = y + shares[e] / total * functional_call(scion.zero_experts[e], weights, (token[None],))[0]
        out.append(y)
    return torch.stack(out).view_as(x)


@every_tower
@every_way
@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 2), (5, 3), (2, 2)])
@torch.no_grad()
def test_it_is_the_mixture_it_is_said_to_be(make, compute, num_experts, top_k):
    model = push(with_experts(make, num_experts=num_experts, top_k=top_k, compute=compute), 0.3)
    scion = scion_of(model)
    x = torch.randn(2, 5, scion.router.in_features, generator=torch.Generator().manual_seed(3))
    expected = naive(scion, x)
    torch.testing.assert_close(scion.host(x), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(expected, scion.expert(0)(x), atol=1e-2)


@every_tower
def test_sparse_and_dense_are_one_function_and_have_one_gradient(make):
    models = [push(with_experts(make, compute=compute), 0.1) for compute in ("sparse", "dense")]
    models[1].load_state_dict(models[0].state_dict())
    torch.testing.assert_close(features(models[0]), features(models[1]), atol=1e-5, rtol=1e-4)
    for model in models:
        run = model.encode_video if hasattr(model, "encode_video") else model
        run(clips()).square().sum().backward()
    for name, p in planted(models[0]).items():
        torch.testing.assert_close(p.grad, planted(models[1])[name].grad, atol=1e-3, rtol=1e-3)


@every_way
def test_whatever_the_router_says_equal_experts_are_their_host(compute):
    model, plain = with_experts(compute=compute, top_k=3), convert(small_vit(), num_frames=4)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Experts):
                torch.nn.init.normal_(module.router.weight, std=3.0)
    if compute == "dense":
        assert torch.equal(features(model), features(plain))
    torch.testing.assert_close(features(model), features(plain), atol=1e-5, rtol=1e-5)


def test_where_the_mlp_is_frozen_differences_learn_as_separate_copies_would():
    """One step of gradient descent on copies, by hand, against one on differences."""
    model = with_experts(num_experts=2, top_k=2)
    scion = scion_of(model)
    x, target = torch.randn(2, 6, 48), torch.randn(2, 6, 48)
    own = {name: p for name, p in scion.host.named_parameters() if "graft_" not in name}
    copies = [{name: p.detach().clone().requires_grad_() for name, p in own.items()} for _ in range(2)]
    shares = scion.router(x).softmax(dim=-1).detach()
    outputs = [functional_call(scion.zero_experts[e], copies[e], (x,)) for e in range(2)]
    (shares[..., :1] * outputs[0] + shares[..., 1:] * outputs[1] - target).square().sum().backward()
    (scion(x) - target).square().sum().backward()
    for e in range(2):
        for name, p in scion.zero_experts[e].named_parameters():
            torch.testing.assert_close(own[name] - 0.1 * p.grad + p, copies[e][name] - 0.1 * copies[e][name].grad)


def test_beside_other_grafts_in_any_order():
    others = [{"type": "adapter", "bottleneck": 8}, {"type": "lora", "rank": 2, "targets": ["mlp"]}]
    mine = {"type": "experts", "layers": "all", "compute": "dense"}
    plain = convert(small_vit(), num_frames=4)
    for specs in ([*others, mine], [mine, *others]):
        model = convert(small_vit(), num_frames=4, grafts=specs)
        assert torch.equal(features(model), features(plain))
        push(model)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "zero_experts" in name:
                    p.zero_()
        expected = features(remove(copy.deepcopy(model), "experts"))
        torch.testing.assert_close(features(model), expected, atol=1e-5, rtol=1e-5)  # LoRA in the weight, or beside it
        assert not torch.allclose(expected, features(plain), atol=1e-2)
        push(model)
        before = features(model)
        fold(model, "lora")
        torch.testing.assert_close(features(model), before, atol=1e-5, rtol=1e-5)
        remove(model)
        assert not planted(model) and not any(fronts_of(block.mlp) for _, block in model.tower.blocks)


def test_balance_is_one_where_even_and_the_number_of_experts_where_not():
    even, one = torch.full((8, 4), 0.25), torch.eye(4)[torch.zeros(8, dtype=torch.long)]
    assert balance_loss(even, torch.arange(8).view(8, 1) % 4) == pytest.approx(1.0)
    assert balance_loss(one, torch.zeros(8, 1, dtype=torch.long)) == pytest.approx(4.0)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_routers_learn_to_spread_tokens(checkpointed):
    model = convert(small_vit(), num_frames=4, num_classes=3, grafts=["experts"]).train()
    if checkpointed:
        model.set_grad_checkpointing()
    objective = WeightedSum({"named": Classification(), "balance": BalanceExperts(weight=1.0)})
    objective.setup(Surroundings(model, class_names=("a", "b", "c")))
    batch = {"clip": clips(), "label": torch.tensor([0, 1])}
    routers = [p for name, p in model.named_parameters() if "router" in name]
    with torch.no_grad():
        for _, block in model.tower.blocks:  # tokens have something in common, and routers a favourite for that
            block.norm2.bias.add_(1.0)
        for p in routers:
            p[0] += 0.05
    optimizer, losses = torch.optim.Adam(routers, lr=3e-2), []
    for _ in range(15):
        found = objective(Step(model, batch))
        losses.append(float(found["balance_loss"]))
        optimizer.zero_grad()
        found["balance_loss"].backward()
        assert all(p.grad.abs().sum() > 0 for p in routers)
        optimizer.step()
    assert losses[0] > 1.2 and losses[-1] < 1 + 0.6 * (losses[0] - 1)
    copy.deepcopy(model)  # what was noted of the last step stays behind


def test_balance_needs_experts_in_training():
    with pytest.raises(ObjectiveError, match="has no experts"):
        BalanceExperts().setup(Surroundings(convert(small_vit(), num_frames=4)))
    with pytest.raises(ObjectiveError, match="no router is in training mode"):
        BalanceExperts()(Step(with_experts().eval(), {"clip": clips()}))


def test_flops_are_those_of_the_experts_that_are_asked():
    flops = {}
    for name, options in {"plain": None, "sparse": {}, "dense": {"compute": "dense"}}.items():
        grafts = [] if options is None else [{"type": "experts", "num_experts": 4, "layers": "all", **options}]
        flops[name] = img2vid.inspect("timm:vit_tiny_patch16_224", num_frames=1, grafts=grafts).flops_per_clip
    mlps = 12 * 197 * 2 * 2 * 192 * 768
    assert flops["sparse"] - flops["plain"] == pytest.approx(mlps, rel=0.02)
    assert flops["dense"] - flops["plain"] == pytest.approx(3 * mlps, rel=0.02)


def test_dense_experts_export():
    model = with_experts(compute="dense").eval()
    program = torch.export.export(model, (clips(),), strict=False)
    torch.testing.assert_close(program.module()(clips()), features(model), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 1}, "no router learns"),
        ({"num_experts": 2, "top_k": 3}, "expected 2 to that many"),
        ({"compute": "some"}, "compute='some'"),
        ({"layers": [9]}, "expected block numbers from 0 to 2"),
    ],
)
def test_bad_options_are_explained(options, message):
    with pytest.raises(ConfigError, match=message):
        convert(small_vit(), grafts=[{"type": "experts", **options}])


def test_one_mixture_an_mlp():
    model = with_experts()
    with pytest.raises(GraftError, match="has experts already, from experts"):
        graft(model, [{"type": "experts", "name": "more"}])
    import timm

    parallel = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0,
                                 block_fn=timm.models.vision_transformer.ParallelScalingBlock)  # fmt: skip
    with pytest.raises(img2vid.Img2VidError, match="has no mlp of its own"):
        convert(parallel, grafts=["experts"])


@pytest.mark.parametrize("checkpointed", [False, True])
def test_balance_is_of_all_chunks_together(checkpointed):
    """In chunks (gradient caching) as at once: the loss, and every router's gradient."""
    losses, gradients = [], []
    for size in (None, 1):
        torch.manual_seed(0)
        model = push(with_experts(), 0.3).train()
        if checkpointed:
            model.set_grad_checkpointing()
        step = Step(model, {"clip": clips(), "label": torch.tensor([0, 1])}, chunk_size=size)
        (BalanceExperts(weight=1.0)(step)["balance_loss"] + step.features.square().mean()).backward()
        losses.append(float(BalanceExperts(weight=1.0)(step)["balance_loss"].detach()))
        gradients.append({name: p.grad for name, p in model.named_parameters() if "router" in name})
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and losses[0] > 1.01
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, atol=1e-5, rtol=1e-4)


def test_nothing_is_noted_outside_of_a_step_and_nothing_of_an_earlier_one():
    model = with_experts().train()
    for _ in range(3):
        model(clips()).sum().backward()  # a loop of one's own, in which nobody asks
    assert not scion_of(model).balance.parts
    for _ in range(3):
        BalanceExperts()(Step(model, {"clip": clips()}))
        assert len(scion_of(model).balance.parts) == 1
    with pytest.raises(ObjectiveError, match="no router is in training mode"):  # not what training has left
        BalanceExperts()(Step(model.eval(), {"clip": clips()}))


def test_the_parameters_are_those_of_the_experts_and_a_router():
    """E experts of the MLP's size instead of one, and E x D numbers a router, in each layer that is upcycled."""
    model, dim = with_experts(num_experts=5), 48
    mlp = sum(p.numel() for p in small_vit().blocks[0].mlp.parameters())
    assert num_parameters(model, "experts") == 3 * (5 * mlp + 5 * dim)


def post_normed(seed, causal):
    torch.manual_seed(seed)
    options = dict(img_size=48, embed_dim=64, num_heads=4, depth=3, num_classes=0, block_fn=ResPostBlock)
    image = timm.create_model("vit_tiny_patch16_224", **options, init_values=1.0).eval()
    reference = copy.deepcopy(image)
    sparse = {"type": "experts", "layers": "all"}
    return convert(image, num_frames=2, causal=causal, grafts=[sparse]), reference


@pytest.mark.parametrize("causal", [False, True])
def test_groups_of_tokens_may_round_but_not_leak(causal):
    """Other clips change which tokens an expert works on together, and so how it rounds: that is no leak; one is."""
    certificate = img2vid.certify(*post_normed(4, causal))
    assert certificate.ok, certificate.failures
    assert 0.0 < certificate.leak < 1e-6 < certificate.rounding < 1e-3 < certificate.exchange
    if causal:
        assert 0.0 < certificate.later < certificate.rounding

    model, reference = post_normed(4, causal)
    mlp = model.blocks[1].mlp
    own = mlp.forward
    mlp.forward = lambda x: own(x) + 1e-3 * x.mean(dim=0, keepdim=True)  # what the batch has in common
    certificate = img2vid.certify(model, reference)
    assert not certificate.separate and certificate.leak > certificate.rounding
    assert any("clips of a batch see each other" in failure for failure in certificate.failures)


def test_frames_that_are_kept_apart_may_round_too():
    """exchange is rounding alone: without attention along time, frames must not be said to know of each other."""
    torch.manual_seed(4)
    image = timm.create_model("vit_tiny_patch16_224", img_size=48, embed_dim=64, num_heads=4, depth=3, num_classes=0)
    reference = copy.deepcopy(image.eval())
    certificate = img2vid.certify(
        convert(image, attention="space_only", num_frames=3, grafts=[{"type": "experts", "layers": "all"}]), reference
    )
    assert certificate.ok and certificate.exchange <= certificate.rounding
