"""`python -m tests.model`: explore the handover, then without each of its rules."""

from tests.model.handover import NEEDS, RULES, Bounds, Result, explore


def tell(name: str, seen: Result) -> None:
    """Print the counts of one exploration, and how its violation comes about."""
    print(
        f"{name}: {seen.states} states, {seen.transitions} transitions, depth {seen.depth}, {seen.seconds:.1f} s, "
        f"violation: {seen.violation or 'none'}"
    )
    for number, step in enumerate(seen.trace, 1):
        print(f"  {number:2} {step}")


tell("all rules, one crash", explore(bounds=Bounds(max_faults=1)))
tell("all rules, two crashes", explore(bounds=Bounds(max_faults=2)))
late = Bounds(max_faults=1, late_claims=True, may_not_start=True)
tell("all rules, one crash, records that come late, guests that do not start", explore(bounds=late))
for rule in RULES:
    tell(f"without: {rule}", explore(rule, NEEDS.get(rule, Bounds())))
