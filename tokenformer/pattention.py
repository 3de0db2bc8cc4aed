"""Pattention: attention of a token over learnable parameter tokens (arXiv 2410.23168, section 3.2).

    y = theta(x Kᵀ) V        x: (..., C_in)   K: (P, C_in)   V: (P, C_out)   y: (..., C_out)

A parameter token is a key row, which says when it speaks, and a value row, which says what. `theta` is one of

    l2_norm_gelu    gelu(scale * s / ||s||)          s = x Kᵀ; norms run over the P scores of one input row
    gelu_l2_norm    scale * gelu(s) / ||gelu(s)||
    softmax         scale * softmax(s)
    gelu, silu      gelu(scale * s), silu(scale * s)                   no norm: a row speaks whatever the others do
    relu2           max(0, scale * s)²                                 squared ReLU (arXiv 2109.08668)

with the exact (erf) GELU. A new layer has scale sqrt(P) for the two L2 forms and P for softmax, as published, and 1
where there is no norm, which makes it an ordinary two-layer feed-forward; from then on the scale is a stored number,
never derived from P again, so that rows can be added without changing the function. ||s|| stands for
root(sum s² + eps * scale²): an all-zero row gives zero, and neither rows of score zero nor tiling change it. A gated
layer multiplies by a second score: y = (theta(x Kᵀ) * (x Uᵀ)) V.

Legend: B rows of the flattened input, P parameter tokens, C widths.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

WITHOUT_NORM = ("gelu", "silu", "relu2")
THETAS = ("l2_norm_gelu", "gelu_l2_norm", "softmax", *WITHOUT_NORM)
HALF = (torch.float16, torch.bfloat16)

# Score entries handled at a time on a CPU: two float32 buffers of this size stay in a core's cache (measured).
CHUNK_ENTRIES = 2**19
# But no fewer rows: each piece reads the tables, and reads and writes their gradients, once more.
CHUNK_ROWS = 512


def default_scale(theta: str, tokens: int) -> float:
    """The scale of a new layer with `tokens` rows: sqrt(tokens) for the L2 forms, tokens for softmax, else 1."""
    if theta not in THETAS:
        raise ValueError(f"theta: {theta!r} is not known; allowed: {', '.join(THETAS)}")
    if theta in WITHOUT_NORM:
        return 1.0
    return float(tokens) if theta == "softmax" else math.sqrt(tokens)


def pattention_reference(
    x: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    theta: str = "l2_norm_gelu",
    eps: float = 1e-6,
    up: Tensor | None = None,
) -> Tensor:
    """Pattention by its formula, operation by operation: what the fast path is held against, and what compiles.

    Shapes as in the module's head; `up` (P, C_in) makes the layer gated. Norms and softmax are in float32 or wider.
    """
    return row_weights(x, key, scale, theta, eps, up) @ value


def row_weights(x: Tensor, key: Tensor, scale: float, theta: str, eps: float, up: Tensor | None = None) -> Tensor:
    """What each row's value is multiplied by, (..., P): theta(x Kᵀ), times x Uᵀ in a gated layer."""
    s = x @ key.t()  # (..., P)
    wide = s.float() if s.dtype in HALF else s
    if theta == "softmax":
        weights = scale * torch.softmax(wide, dim=-1)
    elif theta == "relu2":
        weights = F.relu(scale * wide).square()
    elif theta in WITHOUT_NORM:
        weights = F.silu(scale * wide) if theta == "silu" else F.gelu(scale * wide)
    else:
        t = F.gelu(wide) if theta == "gelu_l2_norm" else wide
        z = t * (scale * torch.rsqrt(t.square().sum(-1, keepdim=True) + eps * scale**2))
        weights = F.gelu(z) if theta == "l2_norm_gelu" else z
    weights = weights.to(s.dtype)
    return weights if up is None else weights * (x @ up.t())


def pattention(
    x: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    theta: str = "l2_norm_gelu",
    eps: float = 1e-6,
    up: Tensor | None = None,
) -> Tensor:
    """The same function as `pattention_reference`, faster and with less kept for the backward pass.

    One tensor of the scores' size is kept (two for a gated layer); everything else of that size is worked again in the
    backward pass, a cache-sized piece at a time. First derivatives only. Under torch.compile the plain
    formula is used, which the compiler fuses by itself. Takes part in autocast as a matrix product does.
    """
    if torch.compiler.is_compiling():
        return pattention_reference(x, key, value, scale, theta, eps, up)
    x, key, value, up = _as_a_product_takes(x, key, value, up)
    rows = x.reshape(-1, x.shape[-1])  # (B, C_in)
    if not torch.is_grad_enabled() and rows.shape[0] * key.shape[0] <= CHUNK_ENTRIES:
        y = _one_piece(rows, key, value, up, scale, theta, eps)
    else:
        (y,) = _ChunkedPattention.apply(rows, up, scale, theta, eps, key, value)
    return y.view(*x.shape[:-1], value.shape[1])


def _as_a_product_takes(*tensors: Any) -> tuple[Any, ...]:
    """The tensors, x first, in autocast's type where it is on."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(None if t is None else t.to(torch.get_autocast_dtype(kind)) for t in tensors)


def _one_piece(
    x: Tensor, key: Tensor, value: Tensor, up: Tensor | None, scale: float, theta: str, eps: float
) -> Tensor:
    """The forward pass on one piece of which nothing is kept: in generation autograd costs more than the arithmetic."""
    h = torch.mm(x, key.t())
    r = h.new_empty(x.shape[0], 1, dtype=torch.float32 if x.dtype in HALF else x.dtype)
    spare = torch.empty_like(h)
    _normalise(h, r, spare, scale, theta, eps)
    w = _weights(h, r, theta, spare)
    return torch.mm(w if up is None else w * torch.mm(x, up.t()), value)


class _ChunkedPattention(torch.autograd.Function):
    """x (B, C_in), up (P, C_in) or None, N keys (P, C_in), N values (P, C_out) -> N times (B, C_out), chunk by chunk.

    N layers side by side share what an operation costs beside its arithmetic. Kept for the backward pass: h (B, N, P),
    from which the weights w = theta(s) follow at once (see `_normalise`), the factor r (B, N, 1) of the norm, and the
    second scores u (B, 1, P) of a gated layer, which comes alone.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, up: Tensor | None, scale: float, theta: str, eps: float, *tables: Tensor
    ) -> tuple[Tensor, ...]:
        layers = len(tables) // 2
        keys, values = tables[:layers], tables[layers:]
        rows, tokens = x.shape[0], keys[0].shape[0]
        h = x.new_empty(rows, layers, tokens)
        r = x.new_empty(rows, layers, 1, dtype=torch.float32 if x.dtype in HALF else x.dtype)
        u = None if up is None else torch.empty_like(h)
        ys = tuple(x.new_empty(rows, value.shape[1]) for value in values)
        chunk = _chunk_rows(h)
        buffer = h.new_empty(chunk, layers, tokens)
        for x_, h_, r_, u_, *y_ in _pieces(chunk, x, h, r, u, *ys):
            spare = _rows(buffer, h_)
            for key, each in zip(keys, h_.unbind(1), strict=True):
                torch.mm(x_, key.t(), out=each)
            _normalise(h_, r_, spare, scale, theta, eps)
            w = _weights(h_, r_, theta, spare)
            if up is not None:
                torch.mm(x_, up.t(), out=u_[:, 0])
                w = torch.mul(w, u_, out=spare)
            for each, value, y in zip(w.unbind(1), values, y_, strict=True):
                torch.mm(each, value, out=y)
        ctx.save_for_backward(x, up, h, r, u, *tables)
        ctx.scale, ctx.theta = scale, theta
        return ys

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, up, h, r, u, *tables = ctx.saved_tensors
        need_x, need_up, _, _, _, *need_tables = ctx.needs_input_grad
        layers = len(dys)
        need_scores = need_x or need_up or any(need_tables[:layers])
        chunk = _chunk_rows(h)
        dx = torch.empty_like(x) if need_x else None
        # Pieces are summed in float32: a half-precision sum would lose digits with every piece.
        wide = torch.float32 if x.dtype in HALF and h.shape[0] > chunk else x.dtype
        new = torch.empty_like if h.shape[0] else torch.zeros_like
        wanted = zip((up, *tables), (need_up, *need_tables), strict=True)
        dup, *dtables = (new(t, dtype=wide) if need else None for t, need in wanted)
        buffers = [h.new_empty(chunk, *h.shape[1:]) for _ in range(4)]  # pages are taken when first touched, not here
        for i, (x_, h_, r_, u_, dx_, *dy_) in enumerate(_pieces(chunk, x, h, r, u, dx, *dys)):
            w, dw, gate, spare = (_rows(buffer, h_) for buffer in buffers)
            w = _weights(h_, r_, ctx.theta, w)
            gated = w if u is None else torch.mul(w, u_, out=gate)
            for dvalue, each, dy in zip(dtables[layers:], gated.unbind(1), dy_, strict=True):
                _accumulate(dvalue, each.t(), dy, i)
            if not need_scores:
                continue
            for dy, value, each in zip(dy_, tables[layers:], dw.unbind(1), strict=True):
                torch.mm(dy, value.t(), out=each)
            if u is not None:
                du = torch.mul(w, dw, out=gate)[:, 0]
                _accumulate(dup, du.t(), x_, i)
                dw.mul_(u_)
            ds = _scores_gradient(h_, w, dw, r_, spare, ctx.scale, ctx.theta)
            for j, each in enumerate(ds.unbind(1)):
                _accumulate(dtables[j], each.t(), x_, i)
                _accumulate(dx_, each, tables[j], j)
            if dx_ is not None and u is not None:
                dx_.addmm_(du, up)
        dx, dup, *dtables = (None if t is None else t.to(x.dtype) for t in (dx, dup, *dtables))
        return dx, dup, None, None, None, *dtables


def _chunk_rows(h: Tensor) -> int:
    """Rows of (B, N, P) handled at a time: cache-sized and even on a CPU, all of them on an accelerator."""
    rows, entries = h.shape[0], h.shape[1] * h.shape[2]
    if h.device.type != "cpu" or rows * entries <= CHUNK_ENTRIES:
        return max(1, rows)
    return math.ceil(rows / math.ceil(rows / max(CHUNK_ROWS, CHUNK_ENTRIES // entries)))


def _pieces(chunk: int, x: Tensor, *others: Tensor | None) -> Iterable[tuple[Any, ...]]:
    """`chunk` rows of each tensor at a time; the tensors themselves if they have no more, nothing if they have none."""
    if x.shape[0] <= chunk:
        return [(x, *others)] if x.shape[0] else []
    return zip(*(itertools.repeat(None) if t is None else t.split(chunk) for t in (x, *others)), strict=False)


def _rows(buffer: Tensor, like: Tensor) -> Tensor:
    return buffer if buffer.shape[0] == like.shape[0] else buffer[: like.shape[0]]


def _normalise(s: Tensor, r: Tensor, spare: Tensor, scale: float, theta: str, eps: float) -> None:
    """Turn scores s (..., P) in place into what is kept of them, and write scale / ||.|| of each row into r (..., 1).

    Kept are z = r s for l2_norm_gelu, s itself for gelu_l2_norm, and, without an r, the weights for softmax and
    z = scale * s for the forms without a norm.
    """
    if theta in WITHOUT_NORM:
        if scale != 1:
            s.mul_(scale)
        return
    if theta == "softmax":
        s.copy_(torch.softmax(s, dim=-1, dtype=r.dtype).mul_(scale))
        return
    t = s if theta == "l2_norm_gelu" else torch.ops.aten.gelu.out(s, out=spare)
    norm = torch.linalg.vector_norm(t, dim=-1, keepdim=True, dtype=r.dtype)
    torch.mul(norm.square_().add_(eps * scale**2).rsqrt_(), scale, out=r)
    if theta == "l2_norm_gelu":
        s.mul_(r)


def _weights(h: Tensor, r: Tensor, theta: str, out: Tensor) -> Tensor:
    """The weights theta(s) from what was kept of the scores; in `out` unless they are h itself."""
    if theta == "softmax":
        return h
    if theta == "relu2":
        return torch.clamp(h, min=0, out=out).square_()
    if theta == "silu":
        return torch.ops.aten.silu.out(h, out=out)
    torch.ops.aten.gelu.out(h, out=out)
    return out.mul_(r) if theta == "gelu_l2_norm" else out


def _scores_gradient(h: Tensor, w: Tensor, dw: Tensor, r: Tensor, spare: Tensor, scale: float, theta: str) -> Tensor:
    """dL/ds from dw = dL/dw, which is overwritten, as are w and `spare`.

    A norm z = scale t / ||t|| gives dt = r (dz - z (z·dz) / scale²), softmax ds = w (dw - (w·dw) / scale).
    """
    if theta == "softmax":
        mean = torch.mul(w, dw, out=spare).sum(-1, keepdim=True).div_(scale)
        return dw.sub_(mean).mul_(w)
    if theta in WITHOUT_NORM:
        if theta == "relu2":
            dw.mul_(torch.clamp(h, min=0, out=spare)).mul_(2)
        elif theta == "silu":
            torch.ops.aten.silu_backward.grad_input(dw, h, grad_input=dw)
        else:
            torch.ops.aten.gelu_backward.grad_input(dw, h, grad_input=dw)
        return dw if scale == 1 else dw.mul_(scale)
    if theta == "l2_norm_gelu":
        torch.ops.aten.gelu_backward.grad_input(dw, h, grad_input=dw)
        return _through_norm(h, dw, r, w, scale)
    dt = _through_norm(w, dw, r, spare, scale)
    return torch.ops.aten.gelu_backward.grad_input(dt, h, grad_input=dt)


def _through_norm(z: Tensor, dz: Tensor, r: Tensor, spare: Tensor, scale: float) -> Tensor:
    if z.dtype not in HALF and z.device.type == "cpu":  # one pass: weight normalisation's gradient, row by row
        z_, dz_, r_ = (t.view(-1, t.shape[-1]) for t in (z, dz, r))
        norm = torch.full_like(r_, scale)
        return torch.ops.aten._weight_norm_interface_backward(dz_, z_, r_ * scale, norm, 0)[0].view(z.shape)
    dot = torch.mul(z, dz, out=spare).sum(-1, keepdim=True).mul_(-1 / scale**2)
    return dz.addcmul_(z, dot).mul_(r)


def _accumulate(total: Tensor | None, a: Tensor, b: Tensor, i: int) -> None:
    """total = a b for the first piece, total += a b after it; nothing where no gradient is wanted."""
    if total is None:
        return
    if total.dtype != a.dtype:
        total.copy_(a @ b) if i == 0 else total.add_(a @ b)
    elif i == 0:
        torch.mm(a, b, out=total)
    else:
        total.addmm_(a, b)


class Pattention(nn.Module):
    """A linear layer's replacement: (..., in_features) -> (..., out_features) through `tokens` parameter tokens.

    Parameters `key` (tokens, in_features), `value` (tokens, out_features) and, if `gated`, `up` (tokens, in_features),
    drawn from N(0, key_std²) and N(0, value_std²). `scale` (default: that of `default_scale`) is stored in the
    state dict and restored from it, so a grown layer reloads as the function it was. Raises ValueError on an unknown
    theta or a size below 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        tokens: int,
        *,
        theta: str = "l2_norm_gelu",
        scale: float | None = None,
        eps: float = 1e-6,
        gated: bool = False,
        key_std: float = 0.02,
        value_std: float = 0.02,
    ) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features), ("tokens", tokens)):
            if size < 1:
                raise ValueError(f"{name}: {size} is too small; a Pattention needs at least 1")
        usual_scale = default_scale(theta, tokens)  # refuses an unknown theta
        self.theta, self.eps, self.key_std, self.value_std = theta, eps, key_std, value_std
        self.scale = usual_scale if scale is None else float(scale)
        self.key = nn.Parameter(torch.empty(tokens, in_features))
        self.up = nn.Parameter(torch.empty(tokens, in_features)) if gated else None
        self.value = nn.Parameter(torch.empty(tokens, out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.key, std=self.key_std)
        nn.init.normal_(self.value, std=self.value_std)
        if self.up is not None:
            nn.init.normal_(self.up, std=self.key_std)

    def forward(self, x: Tensor) -> Tensor:
        return pattention(x, self.key, self.value, self.scale, self.theta, self.eps, self.up)

    def row_weights(self, x: Tensor) -> Tensor:
        """What each row's value is multiplied by: (..., in_features) -> (..., tokens), by the plain formula."""
        return row_weights(x, self.key, self.scale, self.theta, self.eps, self.up)

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.scale, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.scale = float(state)

    def extra_repr(self) -> str:
        tokens, width = self.key.shape
        gated = ", gated" if self.up is not None else ""
        return f"{width} -> {self.value.shape[1]}, tokens={tokens}, {self.theta}, scale={self.scale:.6g}{gated}"


def side_by_side(layers: Sequence[Any], x: Tensor) -> list[Tensor]:
    """`[layer(x) for layer in layers]`; where gradients are wanted, Pattentions of one form are worked as one, faster.

    They are if they have as many tokens, the same scale, theta and eps, and neither gates nor hooks.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and all(map(_is_plain, layers)):
        forms = {(layer.key.shape, layer.scale, layer.theta, layer.eps) for layer in layers}
        if len(forms) == 1:
            _, scale, theta, eps = forms.pop()
            tables = [layer.key for layer in layers] + [layer.value for layer in layers]
            x, *tables = _as_a_product_takes(x, *tables)
            ys = _ChunkedPattention.apply(x.reshape(-1, x.shape[-1]), None, scale, theta, eps, *tables)
            return [y.view(*x.shape[:-1], y.shape[1]) for y in ys]
    return [layer(x) for layer in layers]


def _is_plain(layer: Any) -> bool:
    """Whether calling the layer does no more than the ungated formula."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    plain = isinstance(layer, Pattention) and type(layer).forward is Pattention.forward and layer.up is None
    return plain and not any(getattr(layer, name) for name in hooks)
