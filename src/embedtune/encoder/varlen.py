"""Padding-free attention on any device: sequences lie end to end, and attention stays inside each of them.

transformers lets anyone register an attention function, so stock models run on flattened inputs (1, T) unchanged:
`register()` adds ours, the model is loaded with `attn_implementation=ATTENTION`, and the boundaries arrive as
`cu_seq_lens_q` (the keyword arguments of flash attention, which sentence-transformers passes on as well).

On a CPU, and for fp32 on a GPU, sequences of similar length are put into blocks and each block is three batched
matrix products inside one autograd function, which keeps the probabilities and writes every gradient row once.
Long sequences go through torch's own fused kernel, one by one, and where attention is local in pieces. On CUDA in
half precision torch's varlen kernel takes the whole batch. Attention probabilities are never dropped out, on no
device: the CUDA kernel cannot, and one rule everywhere is what makes curves comparable (docs/why.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from embedtune.encoder import rounded

ATTENTION = "embedtune_varlen"
SLACK = 1.2  # a block's padded size may exceed its real tokens by this factor
LONG = 512  # sequences longer than this are worth a fused kernel call of their own
PIECE = 64  # queries that meet their neighbourhood together, at least
# Rows x length x length of a block: on a CPU with twelve heads its scores stay in the cache of a core; a GPU has more
# to do with few large blocks than with many small ones.
CELLS = {"cpu": 1 << 15, "cuda": 1 << 22}


@dataclass(frozen=True)
class Block:
    """Sequences of similar length: where their tokens lie, and which cells of the (rows, length) grid are padding."""

    rows: int
    length: int
    gather: Tensor  # (rows * length,) token index for every cell; padding repeats a sequence's last token
    tokens: Tensor  # (real,) token indices
    cells: Tensor  # (real,) the cells they fill
    padding: Tensor | None  # (rows, length) bool; None where every cell is real


def plan_blocks(lengths: np.ndarray, device: torch.device) -> list[Block]:
    """Group sequences ((n,) lengths, in packed order) into blocks of similar length, at most 20 % padding each."""
    order = np.argsort(lengths, kind="stable")
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    blocks, first, cells = [], 0, CELLS.get(device.type, CELLS["cpu"])
    while first < len(order):
        last, real = first, 0
        while last < len(order):
            longest = int(lengths[order[last]])
            size = longest * (last - first + 1)
            if last > first and (longest > LONG or size > SLACK * (real + longest) or size * longest > cells):
                break
            real += longest
            last += 1
        blocks.append(_block(starts[order[first:last]], lengths[order[first:last]], device))
        first = last
    return blocks


def _block(starts: np.ndarray, lengths: np.ndarray, device: torch.device) -> Block:
    longest = int(lengths.max())
    columns = np.arange(longest)
    real = columns < lengths[:, None]
    gather = (starts[:, None] + np.minimum(columns, lengths[:, None] - 1)).reshape(-1)
    cells = np.flatnonzero(real)

    def put(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return Block(len(lengths), longest, put(gather), put(gather[cells]), put(cells), None if real.all() else put(~real))


def _window(length: int, window: int, device: torch.device) -> Tensor:
    """(length, length) bool: True where the key is at least `window` positions away, hence not seen."""
    at = torch.arange(length, device=device)
    return (at[:, None] - at[None, :]).abs() >= window


class BlockAttention(torch.autograd.Function):
    """softmax(q k' * scale) v inside each sequence, for packed q, k, v of shape (T, H, D)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: list[Block], scale: float, window: int | None
    ) -> Tensor:
        """Packed (T, H, D) in and out; `window`: keys this far away or farther are not seen."""
        heads = query.shape[1]
        out = _rows_like(query, blocks)
        ctx.blocks, ctx.scale, ctx.kept = blocks, scale, []
        # Not -inf: in a narrow window a padding row may see padding only, and its NaN would reach the gradients.
        unseen = torch.finfo(query.dtype).min
        for block in blocks:
            q, k, v = (_to_block(x, block) for x in (query, key, value))
            scores = torch.bmm(q * scale, k.transpose(1, 2))
            grid = scores.view(block.rows, heads, block.length, block.length)
            if block.padding is not None:
                grid.masked_fill_(block.padding[:, None, None, :], unseen)
            if window is not None and window < block.length:
                grid.masked_fill_(_window(block.length, window, out.device), unseen)
            weights = torch.softmax(scores, dim=-1)
            _from_block(torch.bmm(weights, v), block, out)
            if any(ctx.needs_input_grad):  # else the next block takes this one's memory, while it is in the cache
                ctx.kept.append((q, k, v, weights))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple:
        """Gradients of query, key and value, each row written once."""
        (grad,) = grads
        dq, dk, dv = (_rows_like(grad, ctx.blocks) for _ in range(3))
        for block, (q, k, v, weights) in zip(ctx.blocks, ctx.kept, strict=True):
            g = _to_block(grad, block)
            if block.padding is not None:
                g.view(block.rows, -1, block.length, g.shape[-1]).masked_fill_(block.padding[:, None, :, None], 0)
            _from_block(torch.bmm(weights.transpose(1, 2), g), block, dv)
            d_weights = torch.bmm(g, v.transpose(1, 2))
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype).mul_(ctx.scale)
            _from_block(torch.bmm(d_scores, k), block, dq)
            _from_block(torch.bmm(d_scores.transpose(1, 2), q), block, dk)
        return dq, dk, dv, None, None, None


def _rows_like(x: Tensor, blocks: list[Block]) -> Tensor:
    """Contiguous memory for packed rows; zeroed only where the blocks leave rows unwritten."""
    whole = sum(len(block.tokens) for block in blocks) == len(x)
    return (torch.empty if whole else torch.zeros)(x.shape, dtype=x.dtype, device=x.device)


def _to_block(x: Tensor, block: Block) -> Tensor:
    """Packed (T, H, D) to a block's (rows * H, length, D)."""
    heads, size = x.shape[1:]
    x = x.index_select(0, block.gather).view(block.rows, block.length, heads, size)
    return x.transpose(1, 2).reshape(block.rows * heads, block.length, size)


def _from_block(x: Tensor, block: Block, out: Tensor) -> None:
    """A block's (rows * H, length, D) back into the rows of packed `out` (T, H, D)."""
    heads, size = out.shape[1:]
    x = x.view(block.rows, heads, block.length, size).transpose(1, 2).reshape(-1, heads, size)
    out.index_copy_(0, block.tokens, x if block.padding is None else x.index_select(0, block.cells))


# One plan a batch, shared by its layers and dropped with the batch.
_plans: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _plan(cu_seq_lens: Tensor) -> list[Block]:
    if cu_seq_lens not in _plans:
        lengths = np.diff(cu_seq_lens.cpu().numpy().astype(np.int64))
        _plans[cu_seq_lens] = plan_blocks(lengths[lengths > 0], cu_seq_lens.device)
    return _plans[cu_seq_lens]


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_lens: Tensor,
    longest: int,
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Attention inside each packed sequence. query, key, value (T, H, D); cu_seq_lens (n + 1,) int32 boundaries.

    `window` w: position i sees j where |i - j| < w. Returns (T, H, D).
    """
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        from torch.nn.attention.varlen import varlen_attn

        reach = (-1, -1) if window is None else (window - 1, window - 1)
        attended: Any = varlen_attn(
            query, key, value, cu_seq_lens, cu_seq_lens, longest, longest, scale=scale, window_size=reach
        )
        return attended
    blocks = _plan(cu_seq_lens)
    if longest <= LONG:
        return BlockAttention.apply(query, key, value, blocks, scale, window)
    return _mixed_attention(query, key, value, blocks, scale, window)


def _mixed_attention(
    query: Tensor, key: Tensor, value: Tensor, blocks: list[Block], scale: float, window: int | None
) -> Tensor:
    """Blocks of short sequences through BlockAttention, each long sequence through torch's fused kernel."""
    out = BlockAttention.apply(query, key, value, [b for b in blocks if b.length <= LONG], scale, window)
    for block in blocks:
        if block.length <= LONG:
            continue
        q, k, v = (x.index_select(0, block.tokens).transpose(0, 1) for x in (query, key, value))
        if window is None or 2 * window >= block.length:
            seen = None if window is None or window >= block.length else ~_window(block.length, window, query.device)
            attended = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=seen, scale=scale)[0]
        else:
            attended = _banded_attention(q, k, v, scale, window)
        out = out.index_copy(0, block.tokens, attended.transpose(0, 1))
    return out


def _banded_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, window: int) -> Tensor:
    """Local attention in one sequence, (H, L, D) in and out, in time and memory of L x window rather than L x L.

    The queries are cut into pieces, and each piece meets the keys from `window` - 1 positions before it to as many
    behind it, through torch's fused kernel.
    """
    heads, length, size = query.shape
    reach = window - 1
    piece = max(PIECE, reach)
    count = -(-length // piece)
    over = count * piece - length
    q = F.pad(query, (0, 0, 0, over)).view(heads, count, piece, size).transpose(0, 1)
    k, v = (
        F.pad(x, (0, 0, reach, reach + over)).unfold(1, piece + 2 * reach, piece).permute(1, 0, 3, 2).contiguous()
        for x in (key, value)
    )
    at = torch.arange(count * piece, device=query.device).view(count, piece, 1)
    keys = at[:, :1] - reach + torch.arange(piece + 2 * reach, device=query.device)
    # Queries beyond the end, which nobody reads, see what lies there, or their softmax would be of nothing.
    seen = ((keys - at).abs() <= reach) & (((keys >= 0) & (keys < length)) | (at >= length))
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], scale=scale)
    return attended.transpose(0, 1).reshape(heads, count * piece, size)[:, :length]


def varlen_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function transformers calls: (B, H, L, D) heads in, (B, L, H, D) out.

    With `cu_seq_lens_q` the batch is packed, (1, H, T, D); without it, it is padded and torch's kernel takes it.
    """
    boundaries, window = kwargs.get("cu_seq_lens_q"), kwargs.get("sliding_window")
    if boundaries is None:
        kwargs["dropout"] = 0.0
        if attention_mask is None and window is not None:
            # Whole rows without a mask: transformers leaves the window to the attention function.
            attention_mask = ~_window(query.shape[2], window, query.device)
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return packed_attention(q, k, v, boundaries, int(kwargs["max_length_q"]), scale, window)[None], None


def varlen_mask(attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """No mask for packed batches (the boundaries say it all); the usual one for padded batches."""
    return None if attention_mask is None else sdpa_mask(attention_mask=attention_mask, **kwargs)


def register() -> None:
    """Make ATTENTION known to transformers; doing it twice does no harm."""
    AttentionInterface.register(ATTENTION, varlen_attention)
    AttentionMaskInterface.register(ATTENTION, varlen_mask)


def pack(rows: list[np.ndarray], position_offset: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Token id rows laid end to end: the keyword arguments of a stock model's forward, each (1, T) or (n + 1,)."""
    lengths = np.array([len(row) for row in rows], np.int64)
    ends = np.cumsum(lengths)
    positions = np.arange(ends[-1]) - np.repeat(ends - lengths, lengths) + position_offset
    boundaries = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)).to(device)
    return {
        "input_ids": torch.from_numpy(np.concatenate(rows).astype(np.int64))[None].to(device),
        "position_ids": torch.from_numpy(positions)[None].to(device),
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
    }


def pad(rows: list[np.ndarray], pad_id: int, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Token id rows padded to the longest: input_ids and attention_mask (n, L). For models that cannot be packed."""
    longest = max(len(row) for row in rows)
    ids = np.full((len(rows), longest), pad_id, np.int64)
    mask = np.zeros((len(rows), longest), np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = row, 1
    return {"input_ids": torch.from_numpy(ids).to(device), "attention_mask": torch.from_numpy(mask).to(device)}


def position_offset(model: torch.nn.Module) -> int:
    """0, or padding_idx + 1 where learned positions start after the padding row (the RoBERTa family)."""
    for module in model.modules():
        padding = getattr(module, "padding_idx", None)
        if isinstance(padding, int) and isinstance(getattr(module, "position_embeddings", None), torch.nn.Embedding):
            return padding + 1
    return 0


def why_padded(model: torch.nn.Module) -> str | None:
    """None where packed rows give the padded rows' hidden states, else the reason in a few words.

    Tried, not guessed: two short rows run through both ways.
    """
    backbone = getattr(model, "base_model", model)
    rows = [np.arange(7) % 5 + 5, np.arange(3) + 5]
    was_training = model.training
    model.eval()
    try:
        device = next(model.parameters()).device
        with torch.no_grad():
            packed = backbone(**pack(rows, position_offset(model), device)).last_hidden_state[0]
            alone = torch.cat([backbone(**pad([row], 0, device)).last_hidden_state[0] for row in rows])
        gap = (packed - alone).abs().max().item()
        tolerance = 1e-4 if alone.dtype == torch.float32 else 0.1
        return None if gap <= tolerance * max(1.0, alone.abs().max().item()) else "its attention cannot be packed"
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        return f"its forward refuses packed rows ({type(error).__name__})"
    finally:
        model.train(was_training)


def flatten(transformer: Any) -> str | None:
    """Make the Transformer module of a sentence-transformers model padding-free in place; the reason where it cannot.

    This is what sentence-transformers does itself where flash attention is there; assigning `unpad_inputs` later
    undoes it.
    """
    from transformers import DataCollatorWithFlattening

    register()
    transformer.model.set_attn_implementation(ATTENTION)
    reason = why_padded(transformer.model)
    if reason is not None:
        transformer.model.set_attn_implementation("sdpa")
        return reason
    rounded.steady(transformer.model)
    transformer.data_collator = DataCollatorWithFlattening(
        return_seq_idx=True, return_flash_attn_kwargs=True, return_position_ids=True
    )
    if transformer.model_forward_params is not None:
        transformer.model_forward_params |= {
            "cu_seq_lens_q",
            "cu_seq_lens_k",
            "max_length_q",
            "max_length_k",
            "seq_idx",
        }
    transformer._flatten_position_offset = transformer._infer_flatten_position_offset()
    transformer.can_flatten_inputs = True
    return None
