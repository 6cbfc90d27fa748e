import copy

import pytest
import torch

from embedtune.errors import UserError
from embedtune.fit.optimizer import BODY, HEAD, Optimizer, layer_scales


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 3))


def learn(net, optimizer, steps, seed=1):
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        dtype = next(net.parameters()).dtype
        net(torch.randn(5, 8, generator=draw).to(dtype)).square().mean().backward()
        optimizer.step({HEAD: 1e-2, BODY: 1e-3})
        optimizer.clear()


def test_it_is_adamw_without_decay_on_vectors():
    mine, theirs = model(), model()
    optimizer = Optimizer(mine, [], 0.1, bf16=None)
    matrices = [p for p in theirs.parameters() if p.ndim > 1]
    vectors = [p for p in theirs.parameters() if p.ndim == 1]
    stock = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=1e-3
    )
    draw = torch.Generator().manual_seed(2)
    for _ in range(5):
        x = torch.randn(5, 8, generator=draw)
        for net in (mine, theirs):
            net(x).square().mean().backward()
        optimizer.step({HEAD: 1.0, BODY: 1e-3})
        optimizer.clear()
        stock.step()
        stock.zero_grad()
    for one, two in zip(mine.parameters(), theirs.parameters()):
        torch.testing.assert_close(one, two, atol=1e-7, rtol=1e-6)


def test_the_head_has_a_rate_of_its_own():
    net = model()
    before = copy.deepcopy(net.state_dict())
    optimizer = Optimizer(net, ["2.weight", "2.bias"], 0.0, bf16=None)
    net(torch.ones(2, 8)).square().mean().backward()
    optimizer.step({HEAD: 1e-2, BODY: 0.0})
    moved = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"2.weight", "2.bias"}


@pytest.mark.parametrize("bf16", [False, True])
def test_state_and_load_go_on_with_the_same_bits(bf16):
    whole, part, rest = model(), model(), model()
    one = Optimizer(whole, ["2.weight"], 0.01, whole if bf16 else None)
    learn(whole, one, 3)
    saved = {name: tensor.clone() for name, tensor in one.state().items()}
    learn(whole, one, 4, seed=5)
    two = Optimizer(rest, ["2.weight"], 0.01, rest if bf16 else None)
    two.load(saved)
    learn(rest, two, 4, seed=5)
    for name, tensor in one.state().items():
        assert torch.equal(tensor, two.state()[name]), name
    assert len(saved) == 4 * 6  # a weight, a step and two moments each
    assert part is not None


def test_a_state_of_something_else_is_refused():
    net = model()
    optimizer = Optimizer(net, [], 0.0, bf16=None)
    learn(net, optimizer, 1)
    state = optimizer.state()
    with pytest.raises(KeyError, match="more.weight"):
        optimizer.load({**state, "more.weight": torch.zeros(1)})
    state.pop("weight.0.bias")
    with pytest.raises(KeyError):
        optimizer.load(state)


def test_bf16_accumulates_in_float32():
    """A thousand small gradients on top of a large one: lost in bf16, kept in the masters' gradients."""
    net = torch.nn.Linear(1, 1, bias=False)
    optimizer = Optimizer(net, [], 0.0, bf16=net)
    assert net.weight.dtype == torch.bfloat16 and optimizer.masters["weight"].dtype == torch.float32
    for size in [1.0] + [2.0**-10] * 1024:
        (net.weight * torch.tensor(size, dtype=torch.bfloat16)).sum().backward()
        assert net.weight.grad is None
    assert optimizer.masters["weight"].grad.item() == 2.0
    assert optimizer.clip(1.0) == 2.0 and optimizer.masters["weight"].grad.item() == pytest.approx(1.0, rel=1e-5)


def test_working_copies_follow_and_release_gives_the_masters():
    net = model()
    optimizer = Optimizer(net, [], 0.0, bf16=net)
    learn(net, optimizer, 3)
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, optimizer.masters[name].bfloat16())
    optimizer.release()
    for name, parameter in net.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, optimizer.masters[name])


def test_frozen_parameters_keep_their_gradients_hooks():
    """A body that is frozen at first and freed later learns in bf16 as well."""
    net = model()
    optimizer = Optimizer(net, ["2.weight", "2.bias"], 0.0, bf16=net)
    for frozen in (True, False):
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(not frozen or name.startswith("2."))
        net(torch.ones(2, 8, dtype=torch.bfloat16)).square().mean().backward()
        have = {name for name, master in optimizer.masters.items() if master.grad is not None}
        assert have == ({"2.weight", "2.bias"} if frozen else set(optimizer.masters))
        optimizer.clear()


def test_the_norm_tells_of_gradients_that_are_not_finite():
    net = model()
    optimizer = Optimizer(net, [], 0.0, bf16=None)
    net(torch.ones(2, 8)).sum().backward()
    assert optimizer.clip(1e9) > 0
    next(net.parameters()).grad[0, 0] = float("nan")
    assert not torch.isfinite(torch.tensor(optimizer.clip(1.0)))


# ---- layer-wise learning rates

DECAY = 0.5
# By architecture: where the layers stand, and what stands behind them.
LAYERS = {
    "bert": ("bert.encoder.layer.", ("bert.pooler.", "classifier.")),
    "minilm": ("bert.encoder.layer.", ("bert.pooler.", "classifier.")),
    "roberta": ("roberta.encoder.layer.", ("classifier.",)),
    "distilbert": ("distilbert.transformer.layer.", ("pre_classifier.", "classifier.")),
    "modernbert": ("model.layers.", ("model.final_norm.", "head.", "classifier.")),
    "mpnet": ("mpnet.encoder.layer.", ("classifier.",)),
}


def classifier(tiny_model, kind):
    from embedtune.encoder import heads

    return heads.load_head(tiny_model(kind), heads.SEQUENCE, 0, ["a", "b"], "single_label_classification").model


@pytest.mark.parametrize("kind", LAYERS)
def test_rates_fall_from_the_head_to_the_embeddings(tiny_model, kind):
    net, (layers, behind) = classifier(tiny_model, kind), LAYERS[kind]
    optimizer = Optimizer(net, [], 0.01, None, DECAY)
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step({HEAD: 1.0, BODY: 1e-3})
    rates = {id(p): group["lr"] for group in optimizer.adam.param_groups for p in group["params"]}
    found: dict[str, set] = {}
    for name, parameter in net.named_parameters():
        place = "embeddings"
        if name.startswith(layers):
            place = name.removeprefix(layers).split(".")[0]
        elif name.startswith(behind):
            place = "behind"
        found.setdefault(place, set()).add(rates[id(parameter)])
    count = 3 if kind == "modernbert" else 2
    expected = {"embeddings": 1e-3 * DECAY ** (count + 1), "behind": 1e-3}
    expected |= {str(n): 1e-3 * DECAY ** (count - n) for n in range(count)}
    assert found == {place: {rate} for place, rate in expected.items()}
    assert rates[id(net.get_input_embeddings().weight)] == min(rates.values())


def test_adapters_have_the_rate_of_the_layer_that_they_adapt(tiny_model):
    pytest.importorskip("peft")
    from embedtune.encoder import heads

    loaded = heads.load_head(tiny_model("bert"), heads.SEQUENCE, 0, ["a", "b"], "single_label_classification")
    heads.add_lora(loaded, 2, 0)
    scales = layer_scales(loaded.model, DECAY)
    assert {scale for name, scale in scales.items() if ".layer.0." in name} == {DECAY**2}
    assert any(".lora_" in name for name in scales)


def test_sentence_encoders_and_language_models_have_layers_too(tiny_model):
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModelForMaskedLM

    inside = layer_scales(SentenceTransformer(str(tiny_model("minilm")), device="cpu"), DECAY)
    assert sorted(set(inside.values())) == [DECAY**3, DECAY**2, DECAY, 1.0]
    tied = AutoModelForMaskedLM.from_pretrained(tiny_model("bert"))
    scales = layer_scales(tied, DECAY)
    assert scales["bert.embeddings.word_embeddings.weight"] == DECAY**3, "the decoder's weight is this one"
    assert scales["cls.predictions.transform.dense.weight"] == 1.0


def test_a_decay_of_one_is_none_at_all(tiny_model):
    """The same groups at the same rates as where nothing is said of it, so the same bits."""
    optimizers = [Optimizer(classifier(tiny_model, "bert"), [], 0.01, None, *given) for given in ((), (1.0,))]
    for optimizer in optimizers:
        learned = optimizer.masters["classifier.weight"]
        learned.grad = torch.ones_like(learned)
        optimizer.step({HEAD: 1e-3, BODY: 1e-3 / 3})
    one, two = ([(g["lr"], g["weight_decay"], len(g["params"])) for g in o.adam.param_groups] for o in optimizers)
    assert one == two and {lr for lr, _, _ in one} == {1e-3 / 3} and len(one) == 2


def test_a_model_without_layers_is_refused():
    with pytest.raises(UserError, match="--layer-decay: finds no layers"):
        Optimizer(model(), [], 0.0, None, DECAY)
    Optimizer(model(), [], 0.0, None, 1.0)
