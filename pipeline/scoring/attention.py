"""Attention over a packed row, in which the completions of a group share their prompt.

`switch_attention` registers an attention function with transformers under a name of its own, and has the model use
it. If a call carries a layout, the function attends group by group. Otherwise it calls the function that the model
had before. No model is patched: transformers passes unknown keywords of forward down to its attention. Layers of a
few families drop them (StableLM, Nemotron), so the mask that they pass on carries the layout, too.

On a GPU, one flex-attention kernel serves the whole row and skips blocks in which nothing is visible. On a CPU, each
sequence is one scaled-dot-product call. Neither builds a mask of the whole row.
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipeline.scoring.packing import Kernel, Layout

__all__ = ["carry_layout", "restore_attention", "stand_in_mask", "switch_attention"]

_PREFIX = "refshard_"

_SHAPE, _DTYPE = (1, 1, 1, 1), torch.int8

# Queries of one masked call. Memory then grows with the sequence's length, not with its square.
_ROWS = 512

# Keywords from transformers that do not change which tokens see each other.
_HARMLESS = {"position_ids", "cache_position", "use_cache", "output_attentions", "output_router_logits", "is_causal"}

# Keywords that a kernel is made of.
_KNOWN = {"scaling", "dropout", "sliding_window", "softcap"}


def stand_in_mask(device: torch.device) -> torch.Tensor:
    """Make the mask argument of a packed row, [1, 1, 1, 1], which no attention reads.

    The library takes a mask of four dimensions as ready-made. No mask of its own has this dtype, and FSDP casts only
    floating-point tensors.
    """
    return torch.zeros(_SHAPE, dtype=_DTYPE, device=device)


def carry_layout(mask: torch.Tensor, layout: Layout) -> None:
    """Attach the layout to the row's stand-in mask, for layers that pass on no other keyword."""
    mask.packed_layout = layout  # type: ignore[attr-defined]


def switch_attention(model: Any) -> bool:
    """Let the model's attention accept `layout=...`; without that argument it stays as it is.

    Return False if the model's class does not take its attention from transformers' interface.
    """
    current = model.config.get_text_config()._attn_implementation
    if str(current).startswith(_PREFIX):
        return True
    if current not in ("sdpa", "eager"):
        return False
    AttentionInterface.register(f"{_PREFIX}{current}", {"sdpa": _sdpa_or_packed, "eager": _eager_or_packed}[current])
    # Calls without a layout get the masks of the original implementation.
    AttentionMaskInterface.register(f"{_PREFIX}{current}", ALL_MASK_ATTENTION_FUNCTIONS[current])
    try:
        model.set_attn_implementation(f"{_PREFIX}{current}")
    except (AttributeError, ValueError, KeyError):
        return False
    return bool(model.config.get_text_config()._attn_implementation == f"{_PREFIX}{current}")


def restore_attention(model: Any, implementation: str) -> None:
    """Give the model the attention that it had before the switch."""
    try:
        model.set_attn_implementation(implementation)
    except ValueError:
        # A part beside the text, for sound or pictures, supports less. No text reaches it.
        model.set_attn_implementation({"text_config": implementation})


def _layout_of(mask: torch.Tensor | None) -> Layout | None:
    """Give the layout that a mask carries; None for the library's masks.

    Raises NotImplementedError if a stand-in mask has lost it: it hides nothing.
    """
    layout: Layout | None = getattr(mask, "packed_layout", None)
    if layout is None and mask is not None and mask.dtype == _DTYPE:
        raise NotImplementedError("packed attention does not support layers that copy their mask")
    return layout


def _sdpa_or_packed(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, *, layout: Any = None, **kwargs: Any
) -> Any:
    plain, tensors = ALL_ATTENTION_FUNCTIONS["sdpa"], (query, key, value, attention_mask)
    layout = layout or _layout_of(attention_mask)
    if layout is None:
        return plain(module, *tensors, **kwargs)
    if kwargs.get("softcap") is not None and "softcap" not in inspect.signature(plain).parameters:
        # transformers 5.17 ignores the cap in padded rows; packed rows with it would be another model.
        raise NotImplementedError("this attention caps no scores")
    return _packed(module, *tensors, layout=layout, **kwargs)


def _eager_or_packed(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, *, layout: Any = None, **kwargs: Any
) -> Any:
    tensors = (query, key, value, attention_mask)
    layout = layout or _layout_of(attention_mask)
    if layout is None:
        # Each family has an eager function of its own, beside its attention.
        return sys.modules[type(module).__module__].eager_attention_forward(module, *tensors, **kwargs)
    return _packed(module, *tensors, layout=layout, **kwargs)


# Not traced by torch.compile: the layout decides what is computed, so every batch would be compiled anew.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def _packed(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    layout: Layout,
    s_aux: torch.Tensor | None = None,
    **keywords: Any,
) -> tuple[torch.Tensor, None]:
    """Attend over a packed row: query [1, heads, T, size], key and value [1, heads or fewer, T, size].

    `s_aux` are the attention sinks of a layer, one score a head, [heads]. Give [1, T, heads, size], and None in place
    of the attention weights.

    Raises:
        NotImplementedError: The layer uses a keyword or a mask that packed rows do not support.
    """
    unknown = {name for name, given in keywords.items() if given is not None and given is not False}
    unknown -= _HARMLESS | _KNOWN
    if unknown:
        raise NotImplementedError(f"packed attention does not support {', '.join(sorted(unknown))}")
    if attention_mask is None or attention_mask.shape != _SHAPE:
        # A layer changed the mask or made one of its own: a bias by distance, a choice of the best keys.
        raise NotImplementedError("packed attention does not support a mask that a layer made itself")
    kernel = Kernel(
        scaling=keywords.get("scaling"),
        dropout=keywords.get("dropout", 0.0),
        window=keywords.get("sliding_window"),
        softcap=keywords.get("softcap"),
    )
    if s_aux is not None and kernel.softcap is not None:
        raise NotImplementedError("packed attention does not support sinks beside a cap")
    if layout.kernels is not None:
        layout.kernels.add(kernel)
    if query.device.type == "cuda":
        return _flex(module, query, key, value, layout, kernel, s_aux), None
    heads, key_heads = query.shape[1], key.shape[1]
    if heads != key_heads:
        key, value = (tensor.repeat_interleave(heads // key_heads, dim=1) for tensor in (key, value))
    # A prompt is computed together with its first completion. Splitting, unlike slicing, gives backward one tensor.
    sizes = [n for prompt, (first, *others) in layout.groups for n in (prompt + first, *others)]
    pieces = zip(*(torch.split(tensor, sizes, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = []
    for prompt, (_, *others) in layout.groups:
        q, k, v = next(pieces)
        outputs.append(_attend(q, k, v, layout, kernel, s_aux))
        k_prompt, v_prompt = k[:, :, :prompt], v[:, :, :prompt]
        for _ in others:
            q, k, v = next(pieces)
            if q.shape[2]:
                k, v = torch.cat([k_prompt, k], dim=2), torch.cat([v_prompt, v], dim=2)
            outputs.append(_attend(q, k, v, layout, kernel, s_aux))
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    kernel: Kernel,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend causally; the queries are the last tokens of the sequence of keys: [1, heads, queries, size]."""
    queries, keys = query.shape[2], key.shape[2]
    if queries == 0:
        return query[..., :0].new_zeros((*query.shape[:3], value.shape[3]))
    window = None if kernel.window is not None and keys <= kernel.window else kernel.window
    if queries == keys and window is None and kernel.softcap is None:
        return _dot_product(query, key, value, None, kernel, sinks)
    outputs = []
    for start in range(0, queries, _ROWS):
        q = query[:, :, start : start + _ROWS]
        rows = q.shape[2]
        end = keys - queries + start + rows
        first = 0 if window is None else max(0, end - rows - window + 1)
        k, v = key[:, :, first:end], value[:, :, first:end]
        mask = _causal_mask(layout, rows, end - first, window, q)
        if kernel.softcap is None:
            outputs.append(_dot_product(q, k, v, mask, kernel, sinks))
        else:
            outputs.append(_softcapped(q, k, v, mask, kernel, kernel.softcap))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _dot_product(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    kernel: Kernel,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Call the library's attention, with a layer's sinks, [heads], if it has them; causal without a mask.

    A sink is a key before all others, of value zero, whose score no query changes. It has a feature of its own, which
    is 1 in every query.
    """
    size, value_size, scale, causal = query.shape[3], value.shape[3], kernel.scaling, mask is None
    if sinks is not None:
        scale = size**-0.5 if scale is None else scale
        key = pad(key, (0, 1, 1, 0))
        key[:, :, 0, size] = (sinks / scale).to(key.dtype)
        # Fused kernels take values of the keys' size only.
        value = pad(value, (0, max(size + 1 - value_size, 0), 1, 0))
        query = pad(query, (0, 1), value=1.0)
        if mask is None:
            # The first query sees the sink alone, so the next one sees the sink and the first token.
            query = pad(query, (0, 0, 1, 0))
        else:
            mask = pad(mask, (1, 0))
    output = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, dropout_p=kernel.dropout, scale=scale
    )
    return output if sinks is None else output[:, :, int(causal) :, :value_size]


def _causal_mask(layout: Layout, rows: int, columns: int, window: int | None, like: torch.Tensor) -> torch.Tensor:
    """Make the mask added to scores, in which the last query sees the last key: [rows, columns], 0 or -inf."""
    name = (rows, columns, window, like.dtype, like.device)
    if name not in layout.masks:
        distance = torch.arange(columns - rows, columns, device=like.device)[:, None]
        distance = distance - torch.arange(columns, device=like.device)
        hidden = distance < 0 if window is None else (distance < 0) | (distance >= window)
        zeros = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
        layout.masks[name] = zeros.masked_fill_(hidden, float("-inf"))
    mask: torch.Tensor = layout.masks[name]
    return mask


def _softcapped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, kernel: Kernel, softcap: float
) -> torch.Tensor:
    """Attend with scores softcap * tanh(scores / softcap), as Gemma 2 does; no fused kernel here supports it."""
    scale = query.shape[-1] ** -0.5 if kernel.scaling is None else kernel.scaling
    scores = (query @ key.transpose(2, 3)) * scale  # [1, heads, rows, columns]
    scores = torch.tanh(scores / softcap) * softcap + mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.dropout(weights, kernel.dropout, train=kernel.dropout > 0) @ value


def _flex(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: Layout,
    kernel: Kernel,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    # A model may be spread over several devices.
    name = ("blocks", kernel.window, query.device)
    if name not in layout.masks:
        layout.masks[name] = _block_mask(layout, kernel.window, query.device)
    attend: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS["flex_attention"]
    options = {"scaling": kernel.scaling, "dropout": kernel.dropout, "softcap": kernel.softcap}
    # [1, T, heads, size], and the log of each token's summed weights, [1, heads, T], which only a GPU's kernel gives.
    output, log_sums = attend(module, query, key, value, layout.masks[name], **options)
    if sinks is not None:
        # The sink's weight joins the sum: exp(log_sum) / (exp(log_sum) + exp(sink)) of the output is left.
        left = torch.sigmoid(log_sums - sinks[:, None])
        output = output * left.transpose(1, 2)[..., None].to(output.dtype)
    given: torch.Tensor = output
    return given


_BLOCK = 128


def _block_mask(layout: Layout, window: int | None, device: torch.device) -> Any:
    """List the blocks of 128 queries and 128 keys to compute, and those of them that need no mask.

    The lists are made from the layout, so a mask of all T * T queries and keys never exists.
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
    # Each token's group, its completion in that group (0 is the prompt), and its position: each [T], padded to whole
    # blocks with the last value.
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
    # Blocks in different completions of one group do not see each other.
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
    """Give the smallest and the largest value of each block: [blocks] and [blocks]."""
    rows = values.view(-1, _BLOCK)
    return rows.amin(dim=1), rows.amax(dim=1)


def _listed(wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Count each query block's key blocks, and list them first: [1, 1, blocks] and [1, 1, blocks, blocks]."""
    order = torch.argsort(wanted.int(), dim=1, descending=True, stable=True).int()
    return wanted.sum(dim=1).int()[None, None], order[None, None]
