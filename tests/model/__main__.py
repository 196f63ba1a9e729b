"""`python -m tests.model`: explore the handover, then without each of its rules, then where it is known to fail."""

from tests.model.handover import RULES, Bounds, Result, explore


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
for rule in RULES:
    tell(f"without: {rule}", explore(rule))
tell("known: a claim recorded late", explore(bounds=Bounds(max_faults=0, late_claims=True)))
tell("mended: the same, fenced", explore(bounds=Bounds(max_faults=0, late_claims=True, fences=True)))
tell("known: a guest that does not start", explore(bounds=Bounds(max_faults=0, may_not_start=True)))
