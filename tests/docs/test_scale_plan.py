"""The plan on paper: its page is what its constants give, and its arithmetic is that of the textbook."""

from dataclasses import replace

import pytest

from support.scale_plan import PAGE, Measured, Plan, written_page

MEASURED = Measured(
    machine="",
    bytes_per_pair=100.0,
    bytes_per_token=4.0,
    requests_per_start=10.0,
    requests_per_unit=5.0,
    requests_per_part_indexed=3.0,
    index_bytes_per_part=300.0,
    start_seconds=5.0,
    sha256_bytes_per_second=1e9,
    scan_bytes_per_second=1e9,
    check_bytes_per_second=1e8,
)


def test_the_page_is_what_the_constants_give() -> None:
    assert PAGE.read_text(encoding="utf-8") == written_page()


def test_a_pair_costs_twice_its_weights_and_tokens_besides_head_and_attention() -> None:
    plan = Plan(parameters=1e9, layers_width=(10, 1), vocabulary=0, prompt_tokens=100, completion_tokens=50)
    attention = 4 * 10 * 1 * (100**2 / 2 + 2 * (100 * 50 + 50**2 / 2))
    assert plan.flops_per_pair == pytest.approx(2e9 * 200 + attention)
    # The head sees completions alone, embeddings cost nothing.
    headed = replace(plan, vocabulary=1000)
    assert headed.flops_per_pair - plan.flops_per_pair == pytest.approx(-2 * 2 * 1000 * 200 + 2 * 1000 * 100)


def test_more_preemptions_and_larger_units_lose_more_and_nothing_is_counted_twice() -> None:
    plan = Plan()
    assert plan.units * plan.rows_per_shard >= plan.pairs > (plan.units - 1) * plan.rows_per_shard
    assert plan.store_bytes(MEASURED) == plan.pairs * (100 + 4 * 2 * plan.completion_tokens)
    assert plan.lost_share(MEASURED) < replace(plan, hours_between_preemptions=1).lost_share(MEASURED)
    assert plan.lost_share(MEASURED) < replace(plan, rows_per_shard=9999).lost_share(MEASURED)
    undisturbed = replace(plan, hours_between_preemptions=1e12)
    seconds = plan.pairs * plan.flops_per_pair / (plan.gpus * plan.peak_flops * plan.utilisation)
    assert undisturbed.hours(MEASURED) == pytest.approx(seconds / 3600)
    assert undisturbed.requests(MEASURED) == pytest.approx(
        plan.workers * (10 + plan.units / 1000) + plan.units * 8, rel=1e-6
    )
