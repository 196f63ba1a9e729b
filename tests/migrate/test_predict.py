"""Predictions of moves whose truth is known: the guest, the hosts and the link are arithmetic here."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from memory.layout import PAGE_BYTES
from migrate.compression import Compression
from migrate.dirtying import Curve, fit
from migrate.forecast import (
    QUANTITIES,
    Basis,
    Conditions,
    ContentSample,
    Figures,
    GuestLoad,
    Interval,
    MoveOutcome,
    PastMove,
    Prediction,
    WriteWindow,
)
from migrate.lessons import corrected, lessons, outcome_of, quantile, scores
from migrate.phases import Phase
from migrate.plan import TELLING_PAGES, OnTimeout
from migrate.predict import predict
from migrate.rehearsal import Circumstances, rehearse
from migrate.stats import DowntimeParts, PageCounts, Report, RoundStats

MIB = 1 << 20
PAGES_PER_MIB = MIB // PAGE_BYTES


def conditions(**changed: object) -> Conditions:
    values: dict[str, object] = {
        "guest_id": "g1",
        "guest_name": "web1",
        "hypervisor": "any",
        "source": "a",
        "destination": "b",
        "ram_bytes": 256 * MIB,
        "downtime_limit_s": 0.3,
        "timeout_s": 0.0,
        "on_timeout": OnTimeout.ABORT,
        "bandwidth_bytes_per_s": None,
        "goodput_bytes_per_s": 110e6,
        "is_offline": False,
        "compression": Compression.OFF,
        "audit": True,
        **changed,
    }
    return Conditions(**values)  # type: ignore[arg-type]


def curve(rate_mib_per_s: float, set_mib: float, factor: float = 1.0) -> Curve:
    """A guest that writes a working set again and again."""
    hot = max(set_mib * PAGES_PER_MIB, 1.0)
    rate = max(rate_mib_per_s * PAGES_PER_MIB, 1e-3)
    return Curve(
        hot_pages=hot, tau_s=hot / rate, rate_pages_per_s=0, cold_pages=0, total_pages=65536, factor=factor
    )


def windows_of(guest: Curve, *, probe_s: float = 1.0, noise: float = 0.0) -> tuple[WriteWindow, ...]:
    """What a probe sees of it."""
    random_ = random.Random(7)
    times = [probe_s * 2**n / 31 for n in range(5)]
    return tuple(
        WriteWindow(window_s=t, pages=max(int(guest.pages(t) * random_.gauss(1.0, noise)), 0)) for t in times
    )


def load_of(guest: Curve, *, populated_mib: int = 128, zero: float = 0.25, noise: float = 0.0) -> GuestLoad:
    zeros = int(512 * zero)
    return GuestLoad(
        populated_bytes=populated_mib * MIB,
        windows=windows_of(guest, noise=noise),
        sample=ContentSample(
            pages=512, zero_pages=zeros, duplicate_pages=0, zstd_bytes=(512 - zeros) * PAGE_BYTES // 2
        ),
        took_s=1.0,
    )


def truth(guest: Curve, **changed: object) -> Circumstances:
    values: dict[str, object] = {
        "curve": guest,
        "populated_pages": 128 * PAGES_PER_MIB,
        "data_share": 0.75,
        "zstd_share": 0.5,
        "delta_share": 0.01,
        "host_factor": 1.0,
        "path_bytes_per_s": 110e6,
        "cap_bytes_per_s": math.inf,
        "overhead_s": 0.5,
        "fixed_s": 0.008,
        "last_s": 0.003,
        "late_s": 0.03,
        "cpu_factor": 1.0,
        **changed,
    }
    return Circumstances(**values)  # type: ignore[arg-type]


def predicted(
    wanted: Conditions, load: GuestLoad | None, past: list[PastMove] | None = None, **options: int
) -> Prediction:
    return predict(wanted, load, past or [], prediction_id="p", made_at_s=0.0, **options)


# -- what a guest writes


@pytest.mark.parametrize(("rate", "set_mib"), [(20, 8), (200, 64), (50, 20)])
@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_a_working_set_that_its_windows_show_is_found(rate: float, set_mib: float, noise: float) -> None:
    guest = curve(rate, set_mib)
    model = fit(windows_of(guest, noise=noise), 65536)
    random_ = random.Random(1)
    for time_s in (0.05, 0.3, 1.0):
        drawn = sorted(model.draw(random_, 1.0).pages(time_s) for _ in range(99))
        assert drawn[49] == pytest.approx(guest.pages(time_s), rel=0.25)


def test_what_no_window_has_shown_is_not_certain() -> None:
    # It needs 64 s for its working set: one second cannot tell that from one that never ends.
    model = fit(windows_of(curve(10, 640)), 1 << 20)
    random_ = random.Random(1)
    long = sorted(model.draw(random_, 1.0).pages(120.0) for _ in range(200))
    short = sorted(model.draw(random_, 1.0).pages(0.5) for _ in range(200))
    assert long[180] / long[20] > 3
    assert short[180] / short[20] < 1.5
    assert long[-1] <= 1 << 20


def test_windows_of_an_earlier_move_show_what_a_short_probe_cannot() -> None:
    guest = curve(10, 100)
    probed = windows_of(guest)
    seen = (WriteWindow(window_s=60.0, pages=int(guest.pages(60.0))),)
    random_ = random.Random(1)

    def spread(remembered: tuple[WriteWindow, ...]) -> float:
        model = fit(probed, 1 << 20, remembered)
        drawn = sorted(model.draw(random_, 1.0).pages(60.0) for _ in range(200))
        return drawn[180] / drawn[20]

    assert spread(seen) < spread(())


@pytest.mark.parametrize("window_s", [0.0, -1.0, math.nan, math.inf])
def test_windows_that_cannot_be_are_left_out(window_s: float) -> None:
    assert fit([WriteWindow(window_s=window_s, pages=5)], 100).fits == ()
    assert fit([WriteWindow(window_s=1.0, pages=-5)], 100).fits == ()


def test_a_guest_that_writes_nothing_is_expected_to_write_nothing() -> None:
    model = fit([WriteWindow(window_s=t, pages=0) for t in (0.1, 0.5)], 65536)
    assert model.draw(random.Random(1), 1.0).pages(60.0) < 1


# -- rehearsals


def test_a_rehearsal_sends_everything_once_and_then_what_was_written() -> None:
    idle = rehearse(conditions(), truth(curve(0, 0)))
    assert idle.converges
    assert idle.wire_bytes == pytest.approx(96 * MIB, rel=0.01)
    assert idle.total_s == pytest.approx(0.5 + 96 * MIB / 110e6, rel=0.1)
    busy = rehearse(conditions(), truth(curve(60, 32)))
    assert busy.wire_bytes > idle.wire_bytes + 32 * MIB / 2
    assert busy.downtime_s > idle.downtime_s


def test_a_rehearsal_ends_as_the_planner_says() -> None:
    never = rehearse(conditions(), truth(curve(1000, 200)))
    assert not never.converges
    assert "12 rounds brought no new minimum" in never.because
    late = rehearse(conditions(timeout_s=2.0), truth(curve(1000, 200)))
    assert "the time limit of 2 s passes first" in late.because
    assert late.total_s < never.total_s
    suspended = rehearse(conditions(on_timeout=OnTimeout.SUSPEND), truth(curve(1000, 200)))
    assert suspended.downtime_s > 1


def test_an_offline_move_stands_still_for_all_of_it() -> None:
    one = rehearse(conditions(is_offline=True), truth(curve(200, 64)))
    assert one.converges
    assert one.downtime_s == pytest.approx(96 * MIB / 110e6, rel=0.1)


def test_deltas_make_a_guest_converge_that_writes_more_than_the_link_carries() -> None:
    wanted = conditions(compression=Compression.AUTO)
    given = truth(curve(200, 64), path_bytes_per_s=30e6)
    without, few = (rehearse(replace(wanted, delta_cache_bytes=MIB * mib), given) for mib in (0, 64))
    assert not without.converges
    assert few.converges
    assert few.downtime_s < 0.05
    # Pages that are written as a whole have none; neither do those that no cache has room for, nor pages that go raw.
    for same in (
        rehearse(replace(wanted, delta_cache_bytes=64 * MIB), replace(given, delta_share=0.6)),
        rehearse(replace(wanted, delta_cache_bytes=64 * MIB, compression=Compression.OFF), given),
    ):
        assert not same.converges


def test_what_a_probe_saw_of_a_pages_changes_is_foretold() -> None:
    wanted = conditions(compression=Compression.AUTO, delta_cache_bytes=64 * MIB, goodput_bytes_per_s=30e6)
    guest = load_of(curve(200, 64))
    sparse = predicted(wanted, replace(guest, rewritten_pages=100, delta_bytes=100 * 30))
    whole_pages = predicted(wanted, replace(guest, rewritten_pages=100, delta_bytes=100 * PAGE_BYTES))
    assert sparse.converges
    assert not whole_pages.converges


def test_compression_is_used_where_it_gains() -> None:
    slow = replace(truth(curve(0, 0)), path_bytes_per_s=12.5e6)
    auto, off = (rehearse(conditions(compression=one), slow) for one in (Compression.AUTO, Compression.OFF))
    assert auto.wire_bytes < 0.75 * off.wire_bytes
    fast = replace(truth(curve(0, 0)), path_bytes_per_s=10e9, data_share=1.0)
    auto, off = (rehearse(conditions(compression=one), fast) for one in (Compression.AUTO, Compression.OFF))
    assert auto.wire_bytes > 0.85 * off.wire_bytes


def test_a_cap_lets_what_it_has_saved_go_at_once() -> None:
    # 0.5 MiB of working set take 42 ms at 12.5 MB/s; in the time of the arming a bucket of 1 MiB is full again.
    given = truth(curve(50, 0.5), cap_bytes_per_s=12.5e6, late_s=0.1)
    capped = rehearse(conditions(), given)
    slow = rehearse(conditions(), replace(given, path_bytes_per_s=12.5e6, cap_bytes_per_s=math.inf))
    assert capped.downtime_s < 0.5 * slow.downtime_s
    assert capped.total_s == pytest.approx(slow.total_s, rel=0.1)


# -- predictions


@pytest.mark.parametrize(
    ("rate", "set_mib", "link"), [(0, 0, 110e6), (20, 16, 110e6), (80, 32, 110e6), (5, 64, 12.5e6)]
)
def test_the_interval_contains_the_truth_of_a_guest_with_known_rates(
    rate: float, set_mib: float, link: float
) -> None:
    guest = curve(rate, set_mib)
    wanted = conditions(goodput_bytes_per_s=link)
    true = rehearse(wanted, truth(guest, path_bytes_per_s=link))
    one = predicted(wanted, load_of(guest, noise=0.05))
    assert one.basis is Basis.MEASURED
    assert one.converges is true.converges
    for quantity in QUANTITIES:
        assert one.figures.of(quantity).holds(getattr(true, quantity)), quantity


@pytest.mark.slow
def test_the_intervals_cover_what_they_promise_of_many_worlds() -> None:
    """Worlds drawn as the model believes them: 8 of 10 must end within, give or take what 60 worlds can show."""
    random_ = random.Random(3)
    held = dict.fromkeys(QUANTITIES, 0)
    for _ in range(60):
        guest = curve(random_.uniform(1, 60), random_.uniform(4, 40))
        wanted = conditions()
        one = predicted(wanted, load_of(guest, noise=0.05), draws=60)
        true = rehearse(
            wanted,
            truth(
                replace(guest, factor=random_.lognormvariate(0, 0.4)),
                host_factor=random_.lognormvariate(0, 0.4),
                overhead_s=0.5 * random_.lognormvariate(0, 0.5),
                fixed_s=0.008 * random_.lognormvariate(0, 0.5),
                last_s=0.003 * random_.lognormvariate(0, 0.5),
                late_s=0.03 * random_.lognormvariate(0, 0.4),
                cpu_factor=random_.lognormvariate(0, 0.25),
                path_bytes_per_s=110e6 * random_.uniform(0.9, 1.1),
            ),
        )
        for quantity in QUANTITIES:
            held[quantity] += one.figures.of(quantity).holds(getattr(true, quantity))
    for quantity in ("total_s", "downtime_s", "cpu_s"):
        assert 0.65 <= held[quantity] / 60 <= 1.0, held


def test_the_same_arguments_give_the_same_prediction() -> None:
    load = load_of(curve(20, 16))
    assert predicted(conditions(), load) == predicted(conditions(), load)


def test_who_knows_less_gives_a_wider_interval() -> None:
    load = load_of(curve(20, 16))
    known = predicted(conditions(), load)
    no_path = predicted(conditions(goodput_bytes_per_s=None), load)
    nothing = predicted(conditions(goodput_bytes_per_s=None), None)
    assert nothing.basis is Basis.ASSUMED
    assert known.figures.total_s.width < no_path.figures.total_s.width
    assert known.figures.wire_bytes.width < nothing.figures.wire_bytes.width


def test_a_cap_is_the_link_where_the_path_is_faster() -> None:
    load = load_of(curve(1, 4))
    capped = predicted(conditions(bandwidth_bytes_per_s=12.5e6), load)
    assert capped.figures.total_s.median > 5 * predicted(conditions(), load).figures.total_s.median
    # A path that is known to be slower is not made faster by a cap.
    slow = conditions(bandwidth_bytes_per_s=1e9, goodput_bytes_per_s=12.5e6)
    assert predicted(slow, load).figures.total_s.median == pytest.approx(
        capped.figures.total_s.median, rel=0.3
    )


def test_ram_that_was_never_touched_costs_nothing() -> None:
    small, large = (predicted(conditions(ram_bytes=ram * MIB), load_of(curve(1, 4))) for ram in (256, 4096))
    assert small.figures.wire_bytes.median == pytest.approx(large.figures.wire_bytes.median, rel=0.05)


@pytest.mark.parametrize("cap", [None, 20e6])
def test_the_limit_that_is_named_makes_the_planner_converge(cap: float | None) -> None:
    guest = curve(300, 100)
    wanted = conditions(bandwidth_bytes_per_s=cap, goodput_bytes_per_s=None if cap else 110e6)
    one = predicted(wanted, load_of(guest))
    assert not one.converges
    assert "no new minimum" in one.because
    assert one.remedy is not None
    assert one.remedy.downtime_limit_s is not None
    assert one.remedy.downtime_limit_s > 0.3
    given = truth(guest, cap_bytes_per_s=cap or math.inf)
    assert not rehearse(wanted, given).converges
    assert rehearse(replace(wanted, downtime_limit_s=one.remedy.downtime_limit_s), given).converges
    if cap is not None:
        assert one.remedy.bandwidth_bytes_per_s is not None
        faster = truth(
            guest,
            path_bytes_per_s=one.remedy.bandwidth_bytes_per_s,
            cap_bytes_per_s=one.remedy.bandwidth_bytes_per_s,
        )
        assert rehearse(
            replace(wanted, bandwidth_bytes_per_s=one.remedy.bandwidth_bytes_per_s), faster
        ).converges
    else:
        assert one.remedy.bandwidth_bytes_per_s is None


# -- lessons


def interval(middle: float, half: float = 1.5) -> Interval:
    return Interval(low=middle / half, median=middle, high=middle * half)


def figures(middle: float, half: float = 1.5) -> Figures:
    return Figures(**{quantity: interval(middle, half) for quantity in QUANTITIES})


_BASE = predicted(conditions(), load_of(curve(5, 8)), draws=20)


def past(actual: float, *, middle: float = 1.0, number: int = 0, **changed: object) -> PastMove:
    """A move that took `actual` in everything where `middle` was modelled."""
    prediction = replace(
        _BASE,
        conditions=conditions(**changed),
        modelled=figures(middle),
        figures=figures(middle),
    )
    outcome = MoveOutcome(
        prediction_id=str(number),
        job="j",
        ended_at_s=0.0,
        phase=Phase.COMPLETE,
        total_s=actual,
        downtime_s=actual,
        wire_bytes=int(actual * 1e6),
        cpu_s=actual,
        fixed_s=0.01,
        overhead_s=0.5,
    )
    return PastMove(prediction=prediction, outcome=outcome)


def test_past_moves_that_took_longer_shift_the_interval() -> None:
    learned = lessons([past(2.0, number=n) for n in range(20)], conditions())
    shifted = corrected(figures(10.0), learned).total_s
    assert shifted.median == pytest.approx(20.0, rel=0.25)
    assert shifted.low > 10.0


def test_lessons_widen_an_interval_that_was_too_narrow_and_narrow_one_that_was_too_wide() -> None:
    random_ = random.Random(5)
    wild = [past(random_.lognormvariate(0, 1.0), number=n) for n in range(30)]
    tame = [past(random_.lognormvariate(0, 0.05), number=n) for n in range(30)]
    model = figures(10.0)
    assert corrected(model, lessons(wild, conditions())).total_s.width > 2 * model.total_s.width
    assert corrected(model, lessons(tame, conditions())).total_s.width < 0.7 * model.total_s.width


def test_how_long_a_last_round_takes_on_these_hosts_is_learned() -> None:
    def modelled_s(last_s: float | None) -> float:
        one = past(1.0)
        assert one.outcome is not None
        seen = replace(one, outcome=replace(one.outcome, last_s=last_s))
        return predicted(conditions(), load_of(curve(1, 1)), [seen] * 8).modelled.downtime_s.median

    assert modelled_s(0.04) - modelled_s(0.002) == pytest.approx(0.038, rel=0.15)
    assert modelled_s(0.002) < modelled_s(None) < modelled_s(0.04)


def test_one_lesson_does_not_overrule_the_model() -> None:
    one = corrected(figures(10.0), lessons([past(3.0)], conditions())).total_s
    assert 10.0 < one.median < 20.0
    assert one.width > figures(10.0).total_s.width


def test_an_error_made_without_lessons_widens_less_than_one_made_with_them() -> None:
    def width(learned_from: int) -> float:
        wrong = past(4.0)
        wrong = replace(wrong, prediction=replace(wrong.prediction, learned_from=learned_from))
        right = [past(1.0 + 0.02 * number, number=number) for number in range(4)]
        right = [replace(one, prediction=replace(one.prediction, learned_from=5)) for one in right]
        return corrected(figures(10.0), lessons([wrong, *right], conditions())).total_s.width

    assert width(0) < 0.8 * width(5)
    # A store may say anything.
    assert width(-2) == width(0)


def test_lessons_of_the_same_hypervisor_path_and_guest_count_more() -> None:
    alike, other = past(2.0), past(2.0, hypervisor="other", guest_id="g2", destination="c")
    first, second = lessons([other, alike], conditions())
    assert second.weight > 10 * first.weight


def test_corrections_do_not_add_up() -> None:
    """What is learned from is what was modelled: a prediction that was corrected well is no new error."""
    moves = [replace(past(2.0, number=n), prediction=past(2.0).prediction) for n in range(20)]
    shown = corrected(figures(1.0), lessons(moves, conditions()))
    again = [replace(one, prediction=replace(one.prediction, figures=shown)) for one in moves]
    assert corrected(figures(1.0), lessons(again, conditions())) == shown


@pytest.mark.parametrize("phase", [Phase.ROLLED_BACK, Phase.IN_DOUBT])
def test_a_move_that_was_not_made_teaches_nothing(phase: Phase) -> None:
    one = past(2.0)
    assert one.outcome is not None
    ended = replace(one, outcome=replace(one.outcome, phase=phase))
    assert lessons([ended, replace(one, outcome=None)], conditions()) == []
    assert all(score.moves == 0 for score in scores([ended]))


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, math.nan])
def test_nonsense_from_a_store_does_not_crash_or_poison(bad: float) -> None:
    one = past(1.0)
    poisoned = replace(one, prediction=replace(one.prediction, modelled=figures(bad)))
    learned = lessons([poisoned], conditions())
    assert corrected(figures(10.0), learned).total_s == figures(10.0).total_s
    assert one.outcome is not None
    strange = replace(
        one,
        outcome=replace(
            one.outcome,
            overhead_s=bad,
            fixed_s=bad,
            last_s=bad,
            first_s=bad,
            first_raw_bytes=1 << 30,
            first_wire_bytes=-5,
            sent_pages=-3,
            raw_pages=-(1 << 40),
            cpu_s=abs(bad),
            windows=(WriteWindow(window_s=bad, pages=1 << 60),),
        ),
    )
    made = predicted(conditions(), load_of(curve(20, 16)), [strange] * 5)
    for quantity in QUANTITIES:
        found = made.figures.of(quantity)
        assert 0 < found.low <= found.median <= found.high < math.inf


def test_a_score_counts_what_was_held() -> None:
    moves = [past(actual, number=n) for n, actual in enumerate((1.0, 1.4, 3.0, 0.9))]
    total = scores(moves)[0]
    assert (total.quantity, total.moves, total.coverage) == ("total_s", 4, 0.75)
    assert total.bias == pytest.approx(1.2)
    assert total.width == pytest.approx(2.25)


def test_quantiles_go_by_weight() -> None:
    assert quantile([(1.0, 1.0)], 0.9) == 1.0
    assert quantile([(1.0, 1.0), (2.0, 1.0)], 0.5) == pytest.approx(1.5)
    assert quantile([(1.0, 9.0), (2.0, 1.0)], 0.4) == 1.0


def test_a_repeated_move_is_remembered() -> None:
    """After one move of a guest the next needs no probe to know its RAM and its writes."""
    guest = curve(20, 16)
    first = past(1.0)
    assert first.outcome is not None
    outcome = replace(
        first.outcome,
        windows=(WriteWindow(window_s=1.0, pages=int(guest.pages(1.0))),),
        sent_pages=128 * PAGES_PER_MIB,
        zero_pages=32 * PAGES_PER_MIB,
        raw_pages=96 * PAGES_PER_MIB,
    )
    one = predicted(conditions(), None, [replace(first, outcome=outcome)])
    assert one.basis is Basis.REMEMBERED
    assert one.load is not None
    assert one.load.populated_bytes == 128 * MIB
    assert one.figures.wire_bytes.median < 200 * MIB * 1.05


def test_moves_show_what_the_hosts_take_of_the_cpu() -> None:
    """Not how much they sent, which differs from move to move, but how much of the CPU that took."""

    def moved(mib: int) -> PastMove:
        sent = mib * PAGES_PER_MIB
        went = rehearse(
            conditions(), truth(curve(0, 1), populated_pages=sent, data_share=1.0, cpu_factor=0.5)
        )
        one = past(went.total_s)
        assert one.outcome is not None
        outcome = replace(one.outcome, cpu_s=went.cpu_s, sent_pages=sent, raw_pages=sent)
        return replace(one, outcome=outcome)

    wanted, load = conditions(), load_of(curve(0, 1))
    without = predicted(wanted, load).modelled.cpu_s
    found = predicted(wanted, load, [moved(mib) for mib in (32, 200, 64, 120, 16, 240)]).modelled.cpu_s
    assert found.width < 0.8 * without.width
    assert found.median == pytest.approx(0.5 * without.median, rel=0.15)


def test_an_outcome_is_taken_from_the_report() -> None:
    rounds = tuple(
        RoundStats(
            number=n,
            duration_s=1.0 / (n + 1),
            sent_pages=1000,
            wire_bytes=2_000_000,
            dirty_pages=100 // (n + 1),
            dirty_rate_pages_per_s=100.0,
            goodput_bytes_per_s=1e6,
        )
        for n in range(12)
    )
    report = Report(
        phase=Phase.COMPLETE,
        guest_id="g1",
        guest_name="web1",
        source="a",
        destination="b",
        runs_on="b",
        error=None,
        total_s=10.0,
        downtime=DowntimeParts(
            pause_s=0.001, last_pages_s=0.02, device_state_s=0.001, load_s=0.003, resume_s=0.001
        ),
        rounds=rounds,
        counts=PageCounts(zero_pages=200, raw_pages=600, zstd_pages=200, raw_bytes=1, zstd_bytes=2),
        ram_bytes=MIB,
        wire_bytes=123,
        resent_bytes=0,
        link_breaks=0,
        tracking="x",
        source_digest=None,
        destination_digest=None,
    )
    outcome = outcome_of(report, prediction_id="p", job="j", ended_at_s=1.0, cpu_s=None)
    assert len(outcome.windows) == 8
    assert outcome.windows[0] == WriteWindow(window_s=1.0, pages=100)
    assert outcome.fixed_s == pytest.approx(0.006)
    assert outcome.first_raw_bytes == 600 * PAGE_BYTES
    assert outcome.first_zstd_bytes == 200 * PAGE_BYTES
    assert outcome.overhead_s == pytest.approx(10.0 - sum(one.duration_s for one in rounds) - 0.026)
    assert outcome.value("cpu_s") is None
    # Its rounds sent 12,000 pages: of those that are counted 56 came after them, and then too many to tell.
    few = replace(report, counts=replace(report.counts, raw_pages=11_656))
    many = replace(report, counts=replace(report.counts, raw_pages=11_600 + TELLING_PAGES + 1))
    last = [
        outcome_of(one, prediction_id="p", job="j", ended_at_s=1.0, cpu_s=None).last_s for one in (few, many)
    ]
    assert last == [0.02, None]


def test_one_wild_move_does_not_make_the_next_prediction_absurd() -> None:
    wild = lessons([past(1e6)], conditions())
    wide = Figures(**{quantity: Interval(low=1.0, median=3.0, high=20.0) for quantity in QUANTITIES})
    found = corrected(wide, wild).total_s
    assert found.median < 10
    assert 20 < found.high <= 20 * 8
