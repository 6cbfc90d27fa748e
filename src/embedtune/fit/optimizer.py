"""AdamW on float32 masters: the model computes in bf16 or fp32, the optimizer always keeps full precision.

In bf16 the model's own parameters are working copies. As soon as autograd has a gradient ready it is added to the
master's float32 gradient and freed, so accumulation over micro-batches loses nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from embedtune.errors import UserError
from embedtune.fit.gpu import layers_of

HEAD, BODY = "head", "body"


class Optimizer:
    """AdamW (arXiv 1711.05101) with groups for head and body, with and without weight decay, and for layers."""

    def __init__(
        self,
        model: nn.Module,
        head: Iterable[str],
        weight_decay: float,
        bf16: nn.Module | None,
        layer_decay: float = 1.0,
    ) -> None:
        """`bf16` is the part of `model` that computes in bf16; None leaves all of it in float32.

        `layer_decay`: see `layer_scales`; at 1 all layers learn at one rate.
        """
        names = {name: p for name, p in model.named_parameters() if p.requires_grad}
        computing = list(bf16.parameters()) if bf16 is not None else []
        inside = {id(p) for p in computing}
        # What is frozen computes in bf16 too, or the layers would not fit together; its float32 values are kept.
        self.frozen = [(p, p.data) for p in computing if not p.requires_grad and p.is_floating_point()]
        for parameter, _ in self.frozen:
            parameter.data = parameter.data.to(torch.bfloat16)
        self.working = {name: p for name, p in names.items() if id(p) in inside}
        self.masters = {n: nn.Parameter(p.detach().clone()) if n in self.working else p for n, p in names.items()}
        for name, parameter in self.working.items():
            parameter.data = parameter.data.to(torch.bfloat16)
            parameter.register_post_accumulate_grad_hook(_collector(self.masters[name]))
        in_head = set(head)
        scales = layer_scales(model, layer_decay) if layer_decay != 1.0 else {}
        groups: dict[tuple[str, float, float], list[nn.Parameter]] = {}
        for name, master in self.masters.items():
            # Biases and norms are vectors; everything that decays is a matrix.
            decay = weight_decay if master.ndim > 1 else 0.0
            kind = HEAD if name in in_head else BODY
            groups.setdefault((kind, decay, scales.get(name, 1.0)), []).append(master)
        self.adam = torch.optim.AdamW(
            [{"params": p, "kind": k, "weight_decay": d, "scale": scale} for (k, d, scale), p in groups.items()],
            lr=0.0,
            betas=(0.9, 0.999),
            eps=1e-8,
            fused=True,
        )

    def flaw(self) -> Tensor:
        """() float64: 0, and NaN where a weight is not finite.

        One that no row of the batch reads, or an infinite one behind a tanh, shows in no loss and no gradient.
        """
        weights = torch.nn.utils.get_total_norm([m.detach() for m in self.masters.values()], foreach=True)
        return 0 * weights.double()

    def clip(self, norm: float) -> float:
        """Scale the gradients down to `norm`; returns their norm before."""
        with_grad = [m for m in self.masters.values() if m.grad is not None]
        total = torch.nn.utils.get_total_norm([m.grad for m in with_grad if m.grad is not None], foreach=True)
        found = float(total)
        if found > norm:
            torch.nn.utils.clip_grads_with_norm_(with_grad, norm, total, foreach=True)
        return found

    def step(self, rates: dict[str, float]) -> None:
        """One update at the given learning rate per kind (times the layer's scale); working copies follow masters."""
        for group in self.adam.param_groups:
            group["lr"] = rates[group["kind"]] * group["scale"]
        moved = [name for name in self.working if self.masters[name].grad is not None]
        self.adam.step()
        if moved:
            with torch.no_grad():
                torch._foreach_copy_([self.working[n].data for n in moved], [self.masters[n].data for n in moved])

    def clear(self) -> None:
        """Forget the gradients."""
        for parameter in (*self.masters.values(), *self.working.values()):
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Masters and moments as named tensors."""
        tensors = {f"weight.{name}": master.detach() for name, master in self.masters.items()}
        for name, master in self.masters.items():
            for key, value in self.adam.state.get(master, {}).items():
                tensors[f"{key}.{name}"] = value
        return tensors

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state` gave, in place; names that are missing or too many raise KeyError."""
        left = dict(tensors)
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(left.pop(f"weight.{name}"))
                moments = {
                    key: left.pop(f"{key}.{name}")
                    for key in ("step", "exp_avg", "exp_avg_sq")
                    if f"{key}.{name}" in left
                }
                if moments:
                    # Fused AdamW counts its steps on the parameter's own device.
                    self.adam.state[master] = {k: v.clone().to(master.device) for k, v in moments.items()}
                else:
                    self.adam.state.pop(master, None)
        if left:
            raise KeyError(f"unknown tensors {sorted(left)[:3]}")
        self.sync()

    def load_weights(self, tensors: dict[str, Tensor]) -> None:
        """Put weights back (names as in the model), and leave the moments alone."""
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(tensors[name])
        self.sync()

    def sync(self) -> None:
        """Copy the masters into the working parameters."""
        with torch.no_grad():
            for name, parameter in self.working.items():
                parameter.copy_(self.masters[name])

    def release(self) -> None:
        """Give the model its float32 masters, for saving."""
        for name, parameter in self.working.items():
            parameter.data = self.masters[name].detach()
        for parameter, kept in self.frozen:
            parameter.data = kept


def layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """What each parameter's learning rate is multiplied by, by name: decay^(L - l) in layer l of 0 .. L - 1.

    The embeddings have decay^(L + 1); the head, and all that stands behind the layers, 1: what is near to the text was
    learned for all tasks, what is near to the labels for none (arXiv 1801.06146). The layers are the longest list of
    modules; embeddings are what stands before it, and tables of vectors wherever they stand. Raises UserError where
    the model has no such list.
    """
    if (found := layers_of(model)) is None:
        raise UserError("finds no layers in this model", where="--layer-decay", fix="leave --layer-decay out")
    stack, layers = found
    tables = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    count, behind = len(layers), False
    scales = {}
    for name, parameter in model.named_parameters():
        inside = name.startswith(stack + ".")
        behind = behind or inside
        depth = count + 1 if behind else 0
        if inside:
            depth = 1 + int(name.removeprefix(stack + ".").split(".")[0])
        elif id(parameter) in tables:
            depth = 0
        scales[name] = decay ** (count + 1 - depth)
    return scales


def _collector(master: nn.Parameter):  # noqa: ANN202 - a hook for autograd
    # One buffer for the whole run: fresh memory of this size costs more in page faults than the sum itself.
    buffer = torch.empty_like(master)

    def collect(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = buffer.copy_(parameter.grad)
        else:
            master.grad.add_(parameter.grad)
        parameter.grad = None

    return collect
