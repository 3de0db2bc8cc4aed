"""Pattention: attention of a token over learnable parameter tokens (arXiv 2410.23168, section 3.2).

    y = theta(x Kᵀ) V        x: (..., C_in)   K: (P, C_in)   V: (P, C_out)   y: (..., C_out)

A parameter token is a key row, which says when it speaks, and a value row, which says what. `theta` is one of

    l2_norm_gelu    gelu(scale * s / ||s||)          s = x Kᵀ; norms run over the P scores of one input row
    gelu_l2_norm    scale * gelu(s) / ||gelu(s)||
    softmax         scale * softmax(s)

with the exact (erf) GELU. A new layer has scale sqrt(P) for the two L2 forms and P for softmax, as published; from then
on the scale is a stored number, never derived from P again, so that rows can be added without changing the function.
||s|| stands for root(sum s² + eps * scale²): an all-zero row gives zero, and neither rows of score zero nor tiling
change it. A gated layer multiplies by a second score: y = (theta(x Kᵀ) * (x Uᵀ)) V.

Legend: B rows of the flattened input, P parameter tokens, C widths.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

THETAS = ("l2_norm_gelu", "gelu_l2_norm", "softmax")
HALF = (torch.float16, torch.bfloat16)

# Score entries handled at a time on a CPU: two float32 buffers of this size stay in a core's cache (measured).
CHUNK_ENTRIES = 2**19


def default_scale(theta: str, tokens: int) -> float:
    """The published scale of a new layer with `tokens` rows: sqrt(tokens) for the L2 forms, tokens for softmax."""
    if theta not in THETAS:
        raise ValueError(f"theta: {theta!r} is not known; allowed: {', '.join(THETAS)}")
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
    s = x @ key.t()  # (..., P)
    wide = s.float() if s.dtype in HALF else s
    if theta == "softmax":
        weights = scale * torch.softmax(wide, dim=-1)
    else:
        t = F.gelu(wide) if theta == "gelu_l2_norm" else wide
        z = t * (scale * torch.rsqrt(t.square().sum(-1, keepdim=True) + eps * scale**2))
        weights = F.gelu(z) if theta == "l2_norm_gelu" else z
    weights = weights.to(s.dtype)
    if up is not None:
        weights = weights * (x @ up.t())
    return weights @ value


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

    Only the scores (..., P) are kept (and the second scores of a gated layer); everything else of that size is worked
    again in the backward pass, a cache-sized piece at a time. First derivatives only. Under torch.compile the plain
    formula is used, which the compiler fuses by itself. Takes part in autocast as a matrix product does.
    """
    if torch.compiler.is_compiling():
        return pattention_reference(x, key, value, scale, theta, eps, up)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        x, key, value = x.to(dtype), key.to(dtype), value.to(dtype)
        up = None if up is None else up.to(dtype)
    rows = x.reshape(-1, x.shape[-1])  # (B, C_in)
    y = _ChunkedPattention.apply(rows, key, value, up, scale, theta, eps)
    return y.view(*x.shape[:-1], value.shape[1])


def _inverse_norm(t: Tensor, scale: float, eps: float) -> Tensor:
    """scale / ||t|| per row, (B, 1), in float32 or wider."""
    wide = torch.float32 if t.dtype in HALF else t.dtype
    norm = torch.linalg.vector_norm(t, dim=-1, keepdim=True, dtype=wide)
    return norm.square_().add_(eps * scale**2).rsqrt_().mul_(scale)


def _weights(s: Tensor, scale: float, theta: str, eps: float, out: Tensor) -> Tensor:
    """theta(s) written into `out` (B, P); returns the per-row factor of the norm (unused for softmax)."""
    if theta == "softmax":
        wide = torch.float32 if s.dtype in HALF else s.dtype
        out.copy_(torch.softmax(s, dim=-1, dtype=wide).mul_(scale))
        return s.new_empty(0)
    if theta == "gelu_l2_norm":
        torch.ops.aten.gelu.out(s, out=out)
        r = _inverse_norm(out, scale, eps)
        out.mul_(r)
        return r
    r = _inverse_norm(s, scale, eps)
    torch.mul(s, r, out=out)
    torch.ops.aten.gelu_(out)
    return r


def _scores_gradient(s: Tensor, dw: Tensor, w: Tensor, r: Tensor, scale: float, theta: str, z: Tensor) -> Tensor:
    """The gradient at the scores, given that at the weights dw = dL/dw, w = theta(s) and r from `_weights`.

    With unit vector u = z / scale:  d(scale t/||t||) = r (dz - u (u·dz)). Overwrites dw, w and the buffer z (B, P).
    """
    if theta == "softmax":
        mean = (w * dw).sum(-1, keepdim=True, dtype=torch.float32 if s.dtype in HALF else None).div_(scale)
        return dw.sub_(mean).mul_(w)
    if theta == "gelu_l2_norm":
        dot = torch.linalg.vecdot(w, dw).unsqueeze(-1).div_(scale**2)
        torch.ops.aten.gelu_backward.grad_input(dw.addcmul_(w, dot, value=-1).mul_(r), s, grad_input=z)
        return z
    torch.mul(s, r, out=z)
    dz = torch.ops.aten.gelu_backward.grad_input(dw, z, grad_input=w)
    dot = torch.linalg.vecdot(dz, z).unsqueeze(-1).div_(scale**2)
    return dz.addcmul_(z, dot, value=-1).mul_(r)


class _ChunkedPattention(torch.autograd.Function):
    """x (B, C_in), key (P, C_in), value (P, C_out), up (P, C_in) or None -> (B, C_out)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, key: Tensor, value: Tensor, up: Tensor | None, scale: float, theta: str, eps: float
    ) -> Tensor:
        s = x @ key.t()  # (B, P)
        u = None if up is None else x @ up.t()
        chunk = _chunk_rows(s)
        y = x.new_empty(x.shape[0], value.shape[1])
        buffer = s.new_empty(chunk, s.shape[1])
        for i in range(0, s.shape[0], chunk):
            piece = slice(i, i + chunk)
            w = buffer[: s[piece].shape[0]]
            _weights(s[piece], scale, theta, eps, out=w)
            if u is not None:
                w.mul_(u[piece])
            torch.mm(w, value, out=y[piece])
        ctx.save_for_backward(x, key, value, up, s, u)
        ctx.settings = (scale, theta, eps)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, key, value, up, s, u = ctx.saved_tensors
        scale, theta, eps = ctx.settings
        need_x, need_key, need_value, need_up = ctx.needs_input_grad[:4]
        need_scores = need_x or need_key or need_up
        dx = torch.empty_like(x) if need_x else None
        dkey, dvalue = (torch.zeros_like(t) if need else None for t, need in ((key, need_key), (value, need_value)))
        dup = torch.zeros_like(up) if need_up else None
        chunk = _chunk_rows(s)
        buffers = [s.new_empty(chunk, s.shape[1]) for _ in range(3 if u is None else 4)]
        for i in range(0, s.shape[0], chunk):
            piece = slice(i, i + chunk)
            s_, x_, dy_ = s[piece], x[piece], dy[piece]
            w, dw, z, *rest = (b[: s_.shape[0]] for b in buffers)
            r = _weights(s_, scale, theta, eps, out=w)
            if u is None:
                gated = w
            else:
                gated = torch.mul(w, u[piece], out=rest[0])
            if dvalue is not None:
                dvalue.addmm_(gated.t(), dy_)
            if not need_scores:
                continue
            torch.mm(dy_, value.t(), out=dw)
            if u is not None:
                du = torch.mul(dw, w, out=rest[0])
                dw.mul_(u[piece])
                if dup is not None:
                    dup.addmm_(du.t(), x_)
            ds = _scores_gradient(s_, dw, w, r, scale, theta, z)
            if dx is not None:
                torch.mm(ds, key, out=dx[piece])
                if u is not None:
                    dx[piece].addmm_(du, up)
            if dkey is not None:
                dkey.addmm_(ds.t(), x_)
        return dx, dkey, dvalue, dup, None, None, None


def _chunk_rows(s: Tensor) -> int:
    """Rows of the scores (B, P) handled at a time: cache-sized on a CPU, all of them on an accelerator."""
    rows = s.shape[0] if s.device.type != "cpu" else max(128, CHUNK_ENTRIES // s.shape[1])
    return max(1, min(rows, s.shape[0]))


class Pattention(nn.Module):
    """A linear layer's replacement: (..., in_features) -> (..., out_features) through `tokens` parameter tokens.

    Parameters `key` (tokens, in_features), `value` (tokens, out_features) and, if `gated`, `up` (tokens, in_features),
    drawn from N(0, key_std²) and N(0, value_std²). `scale` (default: the published one for `tokens`) is stored in the
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
        self.theta, self.eps, self.key_std, self.value_std = theta, eps, key_std, value_std
        self.scale = default_scale(theta, tokens) if scale is None else float(scale)
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

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.scale, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        self.scale = float(state)

    def extra_repr(self) -> str:
        tokens, width = self.key.shape
        gated = ", gated" if self.up is not None else ""
        return f"{width} -> {self.value.shape[1]}, tokens={tokens}, {self.theta}, scale={self.scale:.6g}{gated}"
