"""Attention over a packed row, in which the completions of a group share their prompt.

`switch_attention` registers an attention function with transformers under a name of its own and has the model use
it. Where a call carries a layout, the function attends group by group; where it carries none, it is the function
that the model had before. No model is patched: transformers hands unknown keywords of forward down to its attention.

On a GPU one flex-attention kernel serves the whole row and skips the blocks in which nothing is seen; elsewhere each
sequence is one scaled-dot-product call. Neither makes a mask of the whole row.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipeline.scoring.packing import Layout

__all__ = [
    "NOT_A_MASK",
    "switch_attention",
]

_PREFIX = "refshard_"


# A mask of four dimensions is taken by transformers as made already, and this one is never looked at.
NOT_A_MASK = torch.zeros((1, 1, 1, 1))


# Queries of one call where a mask is needed: what it takes grows with the sequence's length, not with its square.
_ROWS = 512


# What transformers hands down that changes nothing about how much a token sees of another.
_HARMLESS = {"position_ids", "cache_position", "use_cache", "output_attentions", "output_router_logits", "is_causal"}


def switch_attention(model: Any) -> bool:
    """Let the model's attention answer `layout=...`; without that argument it stays as it is.

    False where the model's class does not take its attention from transformers' interface.
    """
    current = model.config.get_text_config()._attn_implementation
    if str(current).startswith(_PREFIX):
        return True
    if current not in ("sdpa", "eager"):
        return False
    AttentionInterface.register(f"{_PREFIX}{current}", {"sdpa": _sdpa_or_packed, "eager": _eager_or_packed}[current])
    # Without a layout, masks are those of the implementation that stands behind.
    AttentionMaskInterface.register(f"{_PREFIX}{current}", ALL_MASK_ATTENTION_FUNCTIONS[current])
    try:
        model.set_attn_implementation(f"{_PREFIX}{current}")
    except (AttributeError, ValueError, KeyError):
        return False
    return bool(model.config.get_text_config()._attn_implementation == f"{_PREFIX}{current}")


def _sdpa_or_packed(module: Any, *tensors: Any, layout: Layout | None = None, **kwargs: Any) -> Any:
    if layout is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *tensors, **kwargs)
    if (
        kwargs.get("softcap") is not None
        and "softcap" not in inspect.signature(ALL_ATTENTION_FUNCTIONS["sdpa"]).parameters
    ):
        # transformers 5.17 goes on without the cap; packed rows with it would be another model than padded ones.
        raise NotImplementedError("this attention caps no scores")
    return _packed(module, *tensors, layout=layout, **kwargs)


def _eager_or_packed(module: Any, *tensors: Any, layout: Layout | None = None, **kwargs: Any) -> Any:
    if layout is None:
        # Each family has an eager function of its own, beside its attention.
        return sys.modules[type(module).__module__].eager_attention_forward(module, *tensors, **kwargs)
    return _packed(module, *tensors, layout=layout, **kwargs)


# Not traced by torch.compile: what is computed follows from the layout, so every batch would be compiled anew.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _packed(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    layout: Layout,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attend over a packed row: query [1, heads, T, size], key and value [1, fewer heads, T, size].

    Returns:
        [1, T, heads, size], and None in the place of the attention's weights.

    Raises:
        NotImplementedError: The family asks for something that a packed row is not known to give.
    """
    asked = {name for name, given in kwargs.items() if given is not None and given is not False} - _HARMLESS
    if asked:
        raise NotImplementedError(f"packed attention knows nothing of {', '.join(sorted(asked))}")
    if attention_mask is None or attention_mask.shape != NOT_A_MASK.shape:
        # A layer put something into it, or made one of its own: a bias by distance, a choice of the best keys.
        raise NotImplementedError("packed attention knows nothing of a mask that a layer made itself")
    if sliding_window is not None:
        layout.memo["window"] = sliding_window
    if query.device.type == "cuda":
        return _flex(module, query, key, value, layout, scaling, dropout, sliding_window, softcap), None
    heads, key_heads = query.shape[1], key.shape[1]
    if heads != key_heads:
        key, value = (tensor.repeat_interleave(heads // key_heads, dim=1) for tensor in (key, value))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return _attend(q, k, v, layout, scaling, dropout, sliding_window, softcap)

    # The prompt goes with its first completion. Split, not sliced: the gradient is then put together in one piece.
    sizes = [n for prompt, (first, *others) in layout.groups for n in (prompt + first, *others)]
    pieces = zip(*(torch.split(tensor, sizes, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = []
    for prompt, (_, *others) in layout.groups:
        q, k, v = next(pieces)
        outputs.append(attend(q, k, v))
        k_prompt, v_prompt = k[:, :, :prompt], v[:, :, :prompt]
        for _ in others:
            q, k, v = next(pieces)
            if q.shape[2]:
                k, v = torch.cat([k_prompt, k], dim=2), torch.cat([v_prompt, v], dim=2)
            outputs.append(attend(q, k, v))
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attend causally, queries being the last ones of the sequence that the keys are: [1, heads, queries, size]."""
    queries, keys = query.shape[2], key.shape[2]
    if queries == 0:
        return query[..., :0].new_zeros((*query.shape[:3], value.shape[3]))
    if window is not None and keys <= window:
        window = None
    if queries == keys and window is None and softcap is None:
        return scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scaling)
    outputs = []
    for start in range(0, queries, _ROWS):
        q = query[:, :, start : start + _ROWS]
        rows = q.shape[2]
        end = keys - queries + start + rows
        first = 0 if window is None else max(0, end - rows - window + 1)
        k, v = key[:, :, first:end], value[:, :, first:end]
        mask = _causal_mask(layout, rows, end - first, window, q)
        if softcap is None:
            outputs.append(scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scaling))
        else:
            outputs.append(_softcapped(q, k, v, mask, scaling, dropout, softcap))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _causal_mask(layout: Layout, rows: int, columns: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
    """Make what is added to scores where the last query sees the last key: [rows, columns], 0 or minus infinity."""
    name = (rows, columns, window, like.dtype, like.device)
    if name not in layout.memo:
        distance = torch.arange(columns - rows, columns, device=like.device)[:, None]
        distance = distance - torch.arange(columns, device=like.device)
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        layout.memo[name] = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(
            hidden, float("-inf")
        )
    mask: torch.Tensor = layout.memo[name]
    return mask


def _softcapped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
    dropout: float,
    softcap: float,
) -> torch.Tensor:
    """Attend with scores softcap * tanh(scores / softcap), as Gemma 2 does, which no fused kernel here knows."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query @ key.transpose(2, 3)) * scale  # [1, heads, rows, columns]
    scores = torch.tanh(scores / softcap) * softcap + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.dropout(weights, dropout, train=dropout > 0) @ value


def _flex(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    scaling: float | None,
    dropout: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    # A model may be spread over several devices.
    name = ("blocks", window, query.device)
    if name not in layout.memo:
        layout.memo[name] = _block_mask(layout, window, query.device)
    attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS["flex_attention"]
    output: torch.Tensor = attend(
        module, query, key, value, layout.memo[name], scaling=scaling, dropout=dropout, softcap=softcap
    )[0]
    return output


_BLOCK = 128


def _block_mask(layout: Layout, window: int | None, device: torch.device) -> Any:
    """Say which blocks of 128 queries and 128 keys have anything to compute, and which need no mask at all.

    Made from the layout, block by block: a mask of every query and key, T * T of them, never exists.
    """
    from torch.nn.attention.flex_attention import BlockMask

    parts = [
        (g, c, start, n)
        for g, (prompt, completions) in enumerate(layout.groups)
        for c, start, n in ((0, 0, prompt), *((c, prompt, n) for c, n in enumerate(completions, start=1)))
    ]
    total = sum(n for *_, n in parts)
    blocks = -(-total // _BLOCK)
    sizes = torch.tensor([n for *_, n in parts])
    # Each [T], filled up to whole blocks with what stands last: the token's group, its completion there (0 is the
    # prompt), its position.
    group, completion = (torch.tensor([part[i] for part in parts]).repeat_interleave(sizes) for i in (0, 1))
    position = torch.cat([torch.arange(start, start + n) for _, _, start, n in parts])
    group, completion, position = (
        torch.cat([values, values[-1:].expand(blocks * _BLOCK - total)]).to(device)
        for values in (group, completion, position)
    )

    def sees(batch: Any, head: Any, q: Any, k: Any) -> Any:
        related = (group[q] == group[k]) & ((completion[k] == 0) | (completion[k] == completion[q])) & (k <= q)
        return related if window is None else related & (position[q] - position[k] < window)

    (first_group, last_group), (low, high) = _extremes(group), _extremes(completion)
    one_group, one_part = first_group == last_group, (first_group == last_group) & (low == high)
    index = torch.arange(blocks, device=device)
    before = index[:, None] > index  # [query blocks, key blocks]
    meet = (first_group[:, None] <= last_group) & (first_group <= last_group[:, None])
    # Two blocks that lie in different completions of one group see nothing of each other.
    apart = one_part[:, None] & one_part & (first_group[:, None] == first_group) & (low != 0) & (low[:, None] != low)
    some = (before | (index[:, None] == index)) & meet & ~apart
    alike = (first_group[:, None] == first_group) & one_group[:, None] & one_part
    full = before & alike & ((low == 0) | (one_part[:, None] & (low[:, None] == low)))
    if window is not None:
        near, far = _extremes(position)
        full &= far[:, None] - near < window
        some &= ~(alike & one_part[:, None] & (near[:, None] - far >= window))
    partial = some & ~full
    return BlockMask.from_kv_blocks(
        *_listed(partial), *_listed(full), BLOCK_SIZE=_BLOCK, mask_mod=sees, seq_lengths=(total, total)
    )


def _extremes(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest value of each block: [blocks] and [blocks]."""
    rows = values.view(-1, _BLOCK)
    return rows.amin(dim=1), rows.amax(dim=1)


def _listed(wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many key blocks each query block wants, and which, those first: [1, 1, blocks] and [1, 1, blocks, blocks]."""
    order = torch.argsort(wanted.int(), dim=1, descending=True, stable=True).int()
    return wanted.sum(dim=1).int()[None, None], order[None, None]
