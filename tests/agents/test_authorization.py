from __future__ import annotations

import pytest

from agents.authorization import (
    RIGHT_FOR,
    RIGHTS_OF_ROLE,
    AccessPolicy,
    AccessRule,
    Action,
    GuestNames,
    Right,
)
from transport.identity import Identity, Role

EVA = Identity(role=Role.OPERATOR, name="eva")
UUID = "01234567-89ab-cdef-0123-456789abcdef"
WEB = GuestNames(name="web", guest_id=UUID)


def rule(**changed: object) -> AccessRule:
    values: dict[str, object] = {
        "key": "allow[0]",
        "role": Role.OPERATOR,
        "names": ("eva",),
        "may": frozenset({Right.MOVE}),
    }
    return AccessRule(**(values | changed))  # type: ignore[arg-type]


def policy(*rules: AccessRule) -> AccessPolicy:
    return AccessPolicy(host="host-a", rules=rules)


@pytest.mark.parametrize("action", list(Action))
@pytest.mark.parametrize("role", list(Role))
def test_without_rules_everything_is_denied(role: Role, action: Action) -> None:
    assert not policy().decide(Identity(role=role, name="eva"), action).is_allowed


@pytest.mark.parametrize("action", list(Action))
@pytest.mark.parametrize("right", sorted(RIGHTS_OF_ROLE[Role.OPERATOR]))
def test_a_right_gives_its_actions_and_a_look_and_nothing_else(right: Right, action: Action) -> None:
    verdict = policy(rule(may=frozenset({right}))).decide(EVA, action, guest=WEB)
    assert verdict.is_allowed == (RIGHT_FOR[action] in (right, Right.VIEW))


@pytest.mark.parametrize(
    ("changed", "is_allowed"),
    [
        ({}, True),
        ({"names": ("e*",)}, True),
        ({"names": ("EVA",)}, False),
        ({"role": Role.AGENT}, False),
        ({"guests": ("w?b",)}, True),
        ({"guests": (UUID,)}, True),
        ({"guests": ("db",)}, False),
        ({"sources": ("host-a",)}, True),
        ({"sources": ("host-b",)}, False),
        ({"destinations": ("host-*",)}, True),
        ({"destinations": ("other",)}, False),
    ],
)
def test_a_rule_covers_what_it_names(changed: dict[str, object], is_allowed: bool) -> None:
    verdict = policy(rule(**changed)).decide(EVA, Action.MOVE, guest=WEB, source="host-a", to="host-b")
    assert verdict.is_allowed == is_allowed
    assert verdict.rule == ("allow[0]" if is_allowed else "")


def test_a_guest_named_like_an_identity_is_not_taken_for_it() -> None:
    sham = GuestNames(name=UUID, guest_id="ffffffff-89ab-cdef-0123-456789abcdef")
    assert not policy(rule(guests=(UUID,))).decide(EVA, Action.MOVE, guest=sham).is_allowed


def test_an_unknown_guest_is_covered_by_a_rule_for_all_alone() -> None:
    unknown = GuestNames(name="", guest_id="")
    assert policy(rule()).decide(EVA, Action.MOVE, guest=unknown).is_allowed
    assert not policy(rule(guests=("web",))).decide(EVA, Action.MOVE, guest=unknown).is_allowed


def test_a_refusal_names_the_rule_that_would_help() -> None:
    reason = policy().decide(EVA, Action.MOVE, what="web", guest=WEB, to="host-b").reason
    assert reason == (
        "operator/eva may not move web to host-b: no [[allow]] in the configuration of host-a allows it; "
        'one with operators = ["eva"] and may = ["move"] would'
    )
