"""Attention over packed rows: what a dense mask, written down from the layout token by token, gives in float64."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.scoring import attention
from pipeline.scoring.packing import Kernel, Layout

Groups = tuple[tuple[int, tuple[int, ...]], ...]

MASK = attention.stand_in_mask(torch.device("cpu"))

EDGES = [1, 2, 126, 127, 128, 129, 130, 255, 256, 257]
_short = st.tuples(st.integers(1, 9), st.lists(st.integers(0, 9), min_size=1, max_size=4).map(tuple))
_blocks = st.tuples(
    st.one_of(st.sampled_from(EDGES), st.integers(1, 300)),
    st.lists(st.one_of(st.sampled_from([0, *EDGES]), st.integers(0, 300)), min_size=1, max_size=3).map(tuple),
)
_layouts = st.lists(_short, min_size=1, max_size=4).map(tuple)
_long_layouts = st.lists(st.one_of(_short, _blocks), min_size=1, max_size=5).map(tuple)
_windows = st.one_of(st.none(), st.integers(1, 20))


def dense_mask(groups: Groups, window: int | None) -> torch.Tensor:
    """[T, T] bool, who sees whom; token by token, with no thought of blocks or segments."""
    tokens = [
        (g, c, start + i)
        for g, (prompt, completions) in enumerate(groups)
        for c, start, n in ((0, 0, prompt), *((c, prompt, n) for c, n in enumerate(completions, start=1)))
        for i in range(n)
    ]
    group, completion, position = torch.tensor(tokens).unbind(dim=1)
    mine = (completion[None] == 0) | (completion[None] == completion[:, None])
    distance = position[:, None] - position[None]
    sees = (group[:, None] == group[None]) & mine & (distance >= 0)
    return sees if window is None else sees & (distance < window)


def test_the_dense_mask_is_what_is_meant() -> None:
    groups = ((2, (1, 2)), (1, (0, 1)))
    assert dense_mask(groups, None).int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]
    assert dense_mask(groups, 2)[:5].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0, 0],
        [0, 1, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0],
    ]


def dense_attention(
    tensors: tuple[torch.Tensor, ...],
    mask: torch.Tensor,
    scaling: float | None,
    softcap: float | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """[1, T, heads, size] float64."""
    query, key, value = (t.double() for t in tensors)
    repeats = query.shape[1] // key.shape[1]
    key, value = (t[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2) for t in (key, value))
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[None, :, None, None].expand(-1, -1, scores.shape[2], -1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : mask.shape[1]]
    return torch.einsum("bhqk,bhkd->bqhd", weights, value)


def make_tensors(
    total: int, *, heads: tuple[int, int], sizes: tuple[int, int], dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, ...]:
    """Query, key and value, drawn anew but always the same."""
    generator = torch.Generator().manual_seed(total)
    shapes = ((heads[0], sizes[0]), (heads[1], sizes[0]), (heads[1], sizes[1]))
    return tuple((2 * torch.randn(1, h, total, d, generator=generator)).to(dtype).requires_grad_() for h, d in shapes)


def length(groups: Groups) -> int:
    return sum(prompt + sum(completions) for prompt, completions in groups)


def check(
    groups: Groups,
    *,
    window: int | None,
    heads: tuple[int, int] = (4, 2),
    sizes: tuple[int, int] = (8, 8),
    scaling: float | None = None,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float32,
    backward: bool = True,
    flex: bool = False,
    sinks: bool = False,
) -> None:
    tensors = make_tensors(length(groups), heads=heads, sizes=sizes, dtype=dtype)
    # Above and below the scores: some heads give the sink nearly all weight, others nearly none.
    scores = torch.linspace(-4, 9, heads[0]).to(dtype).requires_grad_() if sinks else None
    expected = dense_attention(tensors, dense_mask(groups, window), scaling, softcap, scores)
    layout = Layout(groups)
    if flex:
        module = torch.nn.Identity().train(backward)
        found = attention._flex(
            module, *tensors, layout, Kernel(scaling=scaling, window=window, softcap=softcap), scores
        )
    else:
        found, weights = attention._packed(
            torch.nn.Identity(),
            *tensors,
            MASK,
            layout=layout,
            scaling=scaling,
            sliding_window=window,
            softcap=softcap,
            s_aux=scores,
        )
        assert weights is None
    assert found.dtype == dtype and found.shape == expected.shape
    # Scores of size 8 or so, rounded to 8 bits, move weights by some percent of themselves.
    loose = {torch.float32: 1e-5, torch.bfloat16: 6e-2}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=loose, atol=loose)
    if not backward:
        return
    tensors = tensors if scores is None else (*tensors, scores)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.autograd.grad(expected, tensors, upstream)
    for a, b in zip(torch.autograd.grad(found, tensors, upstream.to(dtype)), wanted, strict=True):
        assert torch.isfinite(a).all()
        # By the largest entry of the tensor: sums of many terms cancel.
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=loose * max(1.0, float(b.abs().max())))


@pytest.fixture
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_ROWS", 3)


@given(
    groups=_layouts,
    window=_windows,
    kind=st.sampled_from([{}, {"softcap": 3.0}, {"sinks": True}]),
    scaling=st.sampled_from([None, 0.25]),
    heads=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    sizes=st.sampled_from([(8, 8), (8, 4), (4, 8)]),
)
@settings(max_examples=120, deadline=None)
def test_segments_give_what_the_dense_mask_gives(groups: Groups, kind: dict[str, Any], **case: Any) -> None:
    check(groups, **kind, **case)


@given(groups=_layouts, window=_windows, kind=st.sampled_from([{}, {"softcap": 3.0}, {"sinks": True}]))
@settings(max_examples=60, deadline=None)
def test_segments_longer_than_the_rows_of_one_call_give_it_too(
    groups: Groups, window: int | None, kind: dict[str, Any]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_ROWS", 3)
        check(groups, window=window, **kind)


@pytest.mark.parametrize("kind", [{}, {"softcap": 3.0}, {"sinks": True}], ids=str)
@pytest.mark.parametrize("window", [None, 7, 40])
def test_bf16_gives_it_within_its_rounding(few_rows: None, window: int | None, kind: dict[str, Any]) -> None:
    check(((9, (20, 12, 0)), (30, (4,))), window=window, dtype=torch.bfloat16, **kind)


def test_a_row_of_real_lengths_with_its_own_number_of_rows() -> None:
    """Longer than one call's rows, in the prompt and in what follows it."""
    groups = ((attention._ROWS + 9, (attention._ROWS + 70, 30, 0)), (5, (1,)))
    check(groups, window=None, heads=(2, 1), sizes=(4, 4))
    check(groups, window=attention._ROWS // 2, heads=(2, 1), sizes=(4, 4))


def test_completions_without_tokens_in_the_row() -> None:
    check(((3, (0,)),), window=None)
    check(((1, (0,)), (3, (2, 0, 0)), (1, (0,))), window=2)


def test_no_mask_is_made_of_the_whole_row() -> None:
    """Many groups and a window: the largest tensor that is not among the inputs stays small."""
    groups = ((20, (30, 25)),) * 40
    largest = 0

    class Largest(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    tensors = make_tensors(length(groups), heads=(2, 2), sizes=(4, 4))
    with Largest():
        attention._packed(None, *tensors, MASK, layout=Layout(groups), sliding_window=8)
    assert 0 < largest <= max(t.numel() for t in tensors) < length(groups) ** 2 / 100


def test_the_layout_is_taken_from_the_mask_if_no_keyword_has_it() -> None:
    """A copy of the mask has lost it, and would hide nothing."""
    tensors, layout = make_tensors(5, heads=(2, 2), sizes=(4, 4)), Layout(((3, (2,)),))
    wanted, _ = attention._sdpa_or_packed(torch.nn.Identity(), *tensors, MASK, layout=layout)
    mask = attention.stand_in_mask(torch.device("cpu"))
    attention.carry_layout(mask, layout)
    found, _ = attention._sdpa_or_packed(torch.nn.Identity(), *tensors, mask)
    assert torch.equal(found, wanted)
    for attend in (attention._sdpa_or_packed, attention._eager_or_packed):
        with pytest.raises(NotImplementedError, match="mask"):
            attend(torch.nn.Identity(), *tensors, mask.clone())


@pytest.mark.parametrize("keyword", ["position_bias", "indices", "head_mask"])
def test_an_unknown_keyword_is_refused(keyword: str) -> None:
    tensors = make_tensors(5, heads=(2, 2), sizes=(4, 4))
    layout = Layout(((3, (2,)),))
    with pytest.raises(NotImplementedError, match=keyword):
        attention._packed(None, *tensors, MASK, layout=layout, **{keyword: torch.ones(2)})
    attention._packed(None, *tensors, MASK, layout=layout, **{keyword: None})


def test_sinks_beside_a_cap_are_refused() -> None:
    tensors = make_tensors(5, heads=(2, 2), sizes=(4, 4))
    with pytest.raises(NotImplementedError, match="sinks"):
        attention._packed(None, *tensors, MASK, layout=Layout(((3, (2,)),)), s_aux=torch.ones(2), softcap=3.0)


@pytest.mark.parametrize("mask", [None, torch.zeros(1, 1, 5, 5), torch.zeros(1, 2, 1, 5)])
def test_a_mask_of_a_layers_own_is_refused(mask: torch.Tensor | None) -> None:
    tensors = make_tensors(5, heads=(2, 2), sizes=(4, 4))
    with pytest.raises(NotImplementedError, match="mask"):
        attention._packed(None, *tensors, mask, layout=Layout(((3, (2,)),)))


def test_masks_are_kept_by_device_and_dtype() -> None:
    """A model spread over devices reads one layout on each of them."""
    layout = Layout(((3, (2, 2)),))
    there = attention._causal_mask(layout, 2, 5, None, torch.empty(1, device="meta"))
    here = attention._causal_mask(layout, 2, 5, None, torch.empty(1))
    half = attention._causal_mask(layout, 2, 5, None, torch.empty(1, dtype=torch.bfloat16))
    assert (there.device.type, here.device.type, half.dtype) == ("meta", "cpu", torch.bfloat16)
    assert attention._causal_mask(layout, 2, 5, None, torch.empty(1)) is here
    blocks = attention._block_mask(Layout(((130, (2, 2)),)), 9, torch.device("meta"))
    assert {blocks.kv_indices.device.type, blocks.full_kv_num_blocks.device.type} == {"meta"}


# The kernel of a GPU: which blocks it computes, and how much it may skip.


def listed(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """[query blocks, key blocks] bool: what a kernel reads from the lists of a BlockMask."""
    found = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for q, (count, row) in enumerate(zip(counts[0, 0].tolist(), indices[0, 0].tolist(), strict=True)):
        assert len(set(row[:count])) == count
        found[q, row[:count]] = True
    return found


def blocks_of(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each 128 x 128 block of a dense mask, whether any entry is seen, and whether all are."""
    size = -(-len(mask) // 128) * 128
    padded = torch.zeros(size, size, dtype=torch.bool)
    padded[: len(mask), : len(mask)] = mask
    blocks = padded.view(size // 128, 128, size // 128, 128)
    return blocks.any(dim=3).any(dim=1), blocks.all(dim=3).all(dim=1)


def check_blocks(groups: Groups, window: int | None) -> tuple[int, int]:
    """Compare with the dense mask; gives how many blocks are listed and how many a causal mask would list."""
    dense = dense_mask(groups, window)
    blocks = attention._block_mask(Layout(groups), window, torch.device("cpu"))
    assert blocks.seq_lengths == dense.shape
    partial = listed(blocks.kv_num_blocks, blocks.kv_indices)
    full = listed(blocks.full_kv_num_blocks, blocks.full_kv_indices)
    assert not (partial & full).any()
    q, k = (torch.arange(len(dense)).view(shape) for shape in ((-1, 1), (1, -1)))
    inside = blocks.mask_mod(0, 0, q, k)
    at = (q // 128, k // 128)
    assert torch.equal((partial[at] & inside) | full[at], dense)
    any_seen, all_seen = blocks_of(dense)
    # What lies past the end of the row may be called full: the kernel does not look there.
    ends = torch.zeros_like(any_seen)
    ends[-1] = ends[:, -1] = len(dense) % 128 != 0
    assert not (full & ~all_seen & ~ends).any()
    assert not (any_seen & ~(partial | full)).any()
    # The backward kernel goes by keys, from the transposed lists.
    if blocks.q_num_blocks is not None:
        assert torch.equal(listed(blocks.q_num_blocks, blocks.q_indices), partial.T)
        assert torch.equal(listed(blocks.full_q_num_blocks, blocks.full_q_indices), full.T)
    causal = len(partial) * (len(partial) + 1) // 2
    return int((partial | full).sum()), causal


@given(groups=_long_layouts, window=st.one_of(_windows, st.sampled_from([127, 128, 129, 200, 256, 400])))
@settings(max_examples=150, deadline=None)
def test_the_blocks_mean_the_dense_mask(groups: Groups, window: int | None) -> None:
    check_blocks(groups, window)


@pytest.mark.parametrize("window", [1, 2, 127, 128, 129, 130, 255, 256, 257, 258, 383, 384, 385])
def test_windows_that_end_with_a_block_or_a_token_beside(window: int) -> None:
    check_blocks(((640, (0,)),), window)
    check_blocks(((256, (256, 256)),), window)


def test_a_prompt_before_many_long_completions_is_full_and_they_skip_each_other() -> None:
    groups = ((256, (256, 256, 256)),)
    blocks = attention._block_mask(Layout(groups), None, torch.device("cpu"))
    assert listed(blocks.full_kv_num_blocks, blocks.full_kv_indices).int().tolist() == [
        [0, 0, 0, 0, 0, 0, 0, 0],
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 1, 0],
    ]
    assert torch.equal(listed(blocks.kv_num_blocks, blocks.kv_indices), torch.eye(8, dtype=torch.bool))


@pytest.mark.parametrize("window", [None, 128])
def test_most_blocks_of_a_row_of_many_groups_are_skipped(window: int | None) -> None:
    """A budget of 8,192 tokens of prompts near 110 and completions near 215."""
    generator = torch.Generator().manual_seed(0)

    def around(median: int) -> int:
        return int(median * torch.randn((), generator=generator).mul(0.6).exp())

    groups: list[tuple[int, tuple[int, ...]]] = []
    while length(tuple(groups)) < 8192:
        groups.append((around(110) + 1, (around(215), around(215))))
    found, causal = check_blocks(tuple(groups), window)
    any_seen, _ = blocks_of(dense_mask(tuple(groups), window))
    assert found < causal / 5
    # Where a block holds ends of several parts, distances within it are not looked at one by one.
    assert found <= (1.05 if window is None else 1.7) * int(any_seen.sum())


_flex_ways: list[dict[str, Any]] = [
    {},
    {"window": 50},
    {"softcap": 3.0},
    {"scaling": 0.1},
    {"heads": (6, 2)},
    {"dtype": torch.bfloat16},
    {"sinks": True},
    {"sinks": True, "window": 50, "heads": (6, 2), "scaling": 0.1},
]


@pytest.fixture
def eager_flex(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Flex attention as torch writes it down, which compiles nothing: the kernel of a GPU is another."""
    from torch.nn.attention import flex_attention
    from transformers.integrations import flex_attention as integration

    monkeypatch.setattr(
        integration, "compile_friendly_flex_attention", lambda *a, training, **k: flex_attention.flex_attention(*a, **k)
    )
    library = attention.ALL_ATTENTION_FUNCTIONS["flex_attention"]

    def with_log_sums(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        """The library's function, which asks for the log-sums on a GPU alone."""
        scale, gqa = options["scaling"], query.shape[1] != key.shape[1]
        asked = integration.get_flex_attention_lse_kwargs(True)
        _, found = flex_attention.flex_attention(
            query, key, value, block_mask=mask, scale=scale, enable_gqa=gqa, **asked
        )
        log_sums = getattr(found, "lse", found)
        return library(module, query, key, value, mask, **options)[0], log_sums.to(value.dtype)

    monkeypatch.setitem(attention.ALL_ATTENTION_FUNCTIONS._global_mapping, "flex_attention", with_log_sums)
    # Refuses gradients on a CPU, for which there is no kernel; what is written down has them.
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    yield


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("way", _flex_ways, ids=str)
def test_flex_attention_reads_the_blocks_as_they_are_meant(eager_flex: None, way: dict[str, Any]) -> None:
    """Uncompiled: mask and keywords, not a kernel. Those of a GPU run on none of the machines that test this."""
    check(((140, (130, 60, 0)), (3, (2,)), (90, (129,))), **{"window": None, "sizes": (16, 16), **way}, flex=True)


def test_layers_share_what_was_made_of_the_layout(eager_flex: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = attention._block_mask
    monkeypatch.setattr(attention, "_block_mask", lambda *a: made.append(a) or real(*a))
    layout = Layout(((140, (130, 60)),))
    tensors = make_tensors(330, heads=(2, 2), sizes=(16, 16))
    for window in (None, 9, None, 9):
        attention._flex(torch.nn.Identity(), *tensors, layout, Kernel(window=window))
    assert [window for _, window, _ in made] == [None, 9]


# The switch.


def tiny_llama(implementation: str) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation=implementation).eval()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_without_a_layout_the_model_is_as_it_was(implementation: str) -> None:
    model = tiny_llama(implementation)
    ids = torch.arange(3, 15).view(2, 6)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    with torch.no_grad():
        before = model(input_ids=ids, attention_mask=mask).logits
        assert attention.switch_attention(model)
        assert attention.switch_attention(model)
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)


def test_a_part_that_supports_less_does_not_stop_the_text_from_getting_its_attention_back() -> None:
    asked = []

    class Whole:
        def set_attn_implementation(self, implementation: Any) -> None:
            asked.append(implementation)
            if isinstance(implementation, str):
                raise ValueError("its part for sound does not support it")

    attention.restore_attention(Whole(), "sdpa")
    assert asked == ["sdpa", {"text_config": "sdpa"}]


@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention", "paged|sdpa", None])
def test_what_else_there_is_is_left_alone(implementation: str | None) -> None:
    model = tiny_llama("sdpa")
    model.config._attn_implementation_internal = implementation
    assert not attention.switch_attention(model)
    assert model.config._attn_implementation == implementation
