"""Each condition of each script taken out in turn: the scenario that stands for it passes with it and fails without."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from shared.protocol.keys import Keys
from tests.integration.script_lab import NAMES, Lab, Mutation, conditions, source
from tests.integration.script_mutations import MUTATIONS, NOT_GUARDS

CRASHES = (ResponseError, IndexError, KeyError, AttributeError, TypeError)
SCENARIOS = sorted({mutation.scenario for mutation in MUTATIONS}, key=lambda scenario: scenario.__name__)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
async def test_a_scenario_holds_with_the_shipped_scripts(
    redis_client: Redis, keys: Keys, scenario: Callable[[Lab], Awaitable[None]]
) -> None:
    await scenario(Lab.with_mutation(redis_client, keys, None))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
async def test_a_scenario_fails_without_its_condition(redis_client: Redis, keys: Keys, mutation: Mutation) -> None:
    lab = Lab.with_mutation(redis_client, keys, mutation)
    with pytest.raises(CRASHES if mutation.crashes else AssertionError):
        await mutation.scenario(lab)


@pytest.mark.parametrize("name", NAMES)
def test_every_condition_is_taken_out_or_guards_nothing(name: str) -> None:
    excused = {text for script, text, _ in NOT_GUARDS if script == name}
    missing = [
        condition.text
        for condition in conditions(name)
        if condition.text not in excused and not any(mutation.takes_out(condition) for mutation in MUTATIONS)
    ]
    assert missing == [], f"{name}.lua has conditions that nothing tests"


def test_an_excuse_names_a_condition_that_exists() -> None:
    known = {(name, condition.text) for name in NAMES for condition in conditions(name)}
    assert {(script, text) for script, text, _ in NOT_GUARDS} <= known


def test_a_condition_that_nothing_takes_out_is_seen() -> None:
    """The check above sees each operand of a condition on its own."""
    mutation = Mutation("offer", "or r.state ~= 'prefill' then", "then", SCENARIOS[0])
    found = {condition.text: mutation.takes_out(condition) for condition in conditions("offer")}
    assert found == {"not owned(r, ARGV[1], ARGV[2])": False, "r.state ~= 'prefill'": True}


def test_a_fragment_must_be_in_one_place() -> None:
    with pytest.raises(AssertionError, match="should be one"):
        Mutation("offer", "r.", "", SCENARIOS[0]).apply(source("offer"))
