"""Placement is a pure function: every case is a snapshot written down."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.gateway.sessions.placement import MAX_PREFILL_CANDIDATES, Mode, Prompt, Snapshot, place
from shared.directory.records import NO_HOLDER_INDEX, TransferRecord, WorkerLoad, WorkerRecord
from shared.identity import Fingerprint, Incarnation, WorkerId

FP = Fingerprint("fp")
MEASURED = WorkerLoad(prefill_tokens_per_s=1000.0, transfer_bytes_per_s=1e9, total_blocks=1000, free_blocks=1000)


def worker(name, role="decode", **changes):
    load = WorkerLoad(**{"total_blocks": 1000, "free_blocks": 1000, **changes.pop("load", {})})
    record = WorkerRecord(
        worker_id=WorkerId(name),
        role=role,
        model="m",
        fingerprint=FP,
        incarnation=Incarnation(f"{name}-life"),
        address="127.0.0.1:1",
        pid=1,
        block_size=16,
        max_model_len=4096,
        vocab_size=100,
        block_bytes=1 << 20,
        started_at=1.0,
        load=load,
        ready=True,
    )
    return replace(record, **changes)


def transfer(name, index, fingerprint=FP):
    return TransferRecord(WorkerId(name), Incarnation(f"{name}-transfer"), fingerprint, "127.0.0.1:2", index, 1)


def names(records):
    return [record.worker_id for record in records]


def test_nobody_there_places_nowhere():
    assert place(Prompt(100), Snapshot([])) is None


@pytest.mark.parametrize("change", [{"ready": False}, {"draining": True}])
def test_worker_that_takes_nothing_new_is_passed_over(change):
    snapshot = Snapshot([worker("d0", **change), worker("d1")], [worker("p0", "prefill", **change)])
    placement = place(Prompt(100), snapshot)
    assert placement.decode.worker_id == "d1"
    assert placement.prefill_candidates == ()


def test_dead_life_of_a_restarted_worker_is_passed_over():
    old, new = worker("d0"), worker("d0", incarnation=Incarnation("new"), started_at=2.0)
    assert place(Prompt(100), Snapshot([old, new])).decode is new
    assert place(Prompt(100), Snapshot([new, old])).decode is new


def test_prompt_goes_to_a_prefill_worker_when_there_is_one():
    placement = place(Prompt(100), Snapshot([worker("d0")], [worker("p0", "prefill")]))
    assert placement.mode is Mode.REMOTE_PREFILL
    assert names(placement.prefill_candidates) == ["p0"]
    assert placement.uncached_tokens == 96


def test_no_prefill_worker_means_local():
    placement = place(Prompt(100), Snapshot([worker("d0")]))
    assert placement.mode is Mode.LOCAL
    assert placement.remote_s is None


@pytest.mark.parametrize(("num_tokens", "mode"), [(1, Mode.LOCAL), (16, Mode.LOCAL), (17, Mode.REMOTE_PREFILL)])
def test_prompt_without_a_whole_block_before_its_last_token_stays(num_tokens, mode):
    snapshot = Snapshot([worker("d0")], [worker("p0", "prefill")])
    assert place(Prompt(num_tokens), snapshot).mode is mode


@pytest.mark.parametrize(("minimum", "mode"), [(96, Mode.REMOTE_PREFILL), (97, Mode.LOCAL)])
def test_short_prompt_stays_when_told_so(minimum, mode):
    snapshot = Snapshot([worker("d0")], [worker("p0", "prefill")])
    assert place(Prompt(100), snapshot, "remote", minimum).mode is mode


def test_unequal_fingerprints_are_never_paired():
    green = worker("p1", "prefill", fingerprint=Fingerprint("green"))
    assert place(Prompt(100), Snapshot([worker("d0")], [green])).prefill_candidates == ()


def test_prefill_worker_of_another_model_is_passed_over():
    other = worker("p1", "prefill", model="other")
    assert place(Prompt(100), Snapshot([worker("d0")], [other])).prefill_candidates == ()


def test_holders_are_found_by_their_index_longest_first():
    snapshot = Snapshot(
        [worker("d0")],
        transfers=[
            transfer("p0", 3),
            transfer("d1", 5),
            transfer("d2", 6),
            transfer("green", 7, Fingerprint("green")),
            transfer("new", NO_HOLDER_INDEX),
        ],
    )
    placement = place(Prompt(100, {FP: {3: 2, 5: 50, 7: 4, 9: 6}}), snapshot)
    assert [(h.record.worker_id, h.num_blocks) for h in placement.holders] == [("d1", 6), ("p0", 2)]
    assert placement.mode is Mode.FETCHED


def test_own_cache_wins_a_tie_and_is_no_fetch():
    snapshot = Snapshot([worker("d0")], transfers=[transfer("a", 1), transfer("d0", 2)])
    placement = place(Prompt(100, {FP: {1: 6, 2: 6}}), snapshot)
    assert names(h.record for h in placement.holders) == ["d0", "a"]
    assert placement.mode is Mode.LOCAL


def test_cached_prompt_needs_no_prefill_worker():
    snapshot = Snapshot([worker("d0")], [worker("p0", "prefill")], [transfer("p0", 1)])
    placement = place(Prompt(100, {FP: {1: 6}}), snapshot)
    assert placement.mode is Mode.FETCHED
    assert placement.prefill_candidates == ()
    assert placement.uncached_tokens == 0


def test_hints_of_another_fingerprint_do_not_count():
    snapshot = Snapshot([worker("d0")], transfers=[transfer("a", 1)])
    assert place(Prompt(100, {Fingerprint("green"): {1: 6}}), snapshot).holders == ()


def test_worker_that_has_the_prompt_is_preferred():
    snapshot = Snapshot([worker("d0"), worker("d1")], transfers=[transfer("d0", 1), transfer("d1", 2)])
    assert place(Prompt(500, {FP: {2: 30}}), snapshot).decode.worker_id == "d1"


def test_load_outweighs_a_small_cached_prefix():
    busy = worker("d1", load={"queued_prefill_tokens": 20_000})
    snapshot = Snapshot([worker("d0"), busy], transfers=[transfer("d1", 2)])
    assert place(Prompt(100, {FP: {2: 2}}), snapshot).decode.worker_id == "d0"


def test_sessions_that_no_heartbeat_shows_yet_spread_a_burst():
    workers = [worker("d0"), worker("d1")]
    snapshot = Snapshot(workers, open_sessions={WorkerId("d0"): 3, WorkerId("d1"): 2})
    assert place(Prompt(10), snapshot).decode.worker_id == "d1"


def test_worker_without_room_is_avoided():
    full = worker("d0", load={"free_blocks": 2})
    assert place(Prompt(100), Snapshot([full, worker("d1", load={"running": 4})])).decode.worker_id == "d1"


def test_prefill_candidates_are_ordered_by_their_queues_and_bounded():
    prefill = [worker(f"p{i}", "prefill", load={"queued_prefill_tokens": 10_000 * (5 - i)}) for i in range(5)]
    placement = place(Prompt(1000), Snapshot([worker("d0")], prefill))
    assert names(placement.prefill_candidates) == ["p4", "p3", "p2"]
    assert len(placement.prefill_candidates) == MAX_PREFILL_CANDIDATES


def test_prompts_just_sent_count_as_queued():
    prefill = [worker("p0", "prefill"), worker("p1", "prefill")]
    snapshot = Snapshot([worker("d0")], prefill, sent_prefill_tokens={WorkerId("p0"): 5000})
    assert names(place(Prompt(1000), snapshot).prefill_candidates) == ["p1", "p0"]


def test_prompts_just_sent_to_be_computed_where_they_decode_count_as_queued():
    snapshot = Snapshot([worker("d0"), worker("d1")], sent_prefill_tokens={WorkerId("d0"): 5000})
    assert place(Prompt(1000), snapshot).decode.worker_id == "d1"


def test_sessions_that_no_heartbeat_shows_yet_would_be_stalled_as_well():
    fast = {"prefill_tokens_per_s": 1000.0, "transfer_bytes_per_s": 1e9}
    workers = [worker("d0", load=fast)], [worker("p0", "prefill", load={**fast, "queued_prefill_tokens": 100})]
    alone = place(Prompt(500), Snapshot(*workers), "auto")
    beside_others = place(Prompt(500), Snapshot(*workers, open_sessions={WorkerId("d0"): 3}), "auto")
    assert alone.mode is Mode.LOCAL
    assert beside_others.mode is Mode.REMOTE_PREFILL


def test_local_policy_never_prefills_elsewhere():
    assert place(Prompt(100), Snapshot([worker("d0")], [worker("p0", "prefill")]), "local").mode is Mode.LOCAL


def test_auto_goes_remote_until_the_rates_are_measured():
    slow = worker("p0", "prefill", load={"prefill_tokens_per_s": 1.0})
    placement = place(Prompt(100), Snapshot([worker("d0")], [slow]), "auto")
    assert placement.mode is Mode.REMOTE_PREFILL
    assert not placement.is_measured


@pytest.mark.parametrize(
    ("running", "prefill_rate", "mode"),
    [
        (0, 100.0, Mode.LOCAL),  # nobody to stall here, and slow there
        (20, 1000.0, Mode.REMOTE_PREFILL),  # twenty streams would stall
        (1, 4000.0, Mode.REMOTE_PREFILL),  # much faster there
    ],
)
def test_auto_takes_the_cheaper_way_once_the_rates_are_measured(running, prefill_rate, mode):
    decode = worker("d0").load
    snapshot = Snapshot(
        [replace(worker("d0"), load=replace(MEASURED, running=running, free_blocks=decode.free_blocks))],
        [replace(worker("p0", "prefill"), load=replace(MEASURED, prefill_tokens_per_s=prefill_rate))],
    )
    placement = place(Prompt(1000), snapshot, "auto")
    assert placement.is_measured
    assert placement.mode is mode
    assert (placement.remote_s < placement.local_s) is (mode is Mode.REMOTE_PREFILL)


def test_slow_transfer_keeps_a_prompt_local_in_auto():
    slow_link = replace(MEASURED, transfer_bytes_per_s=1e6)
    snapshot = Snapshot([replace(worker("d0"), load=slow_link)], [replace(worker("p0", "prefill"), load=MEASURED)])
    assert place(Prompt(1000), snapshot, "auto").mode is Mode.LOCAL


def test_prediction_is_the_queue_and_the_compute():
    busy = replace(worker("p0", "prefill"), load=replace(MEASURED, queued_prefill_tokens=2000))
    snapshot = Snapshot([replace(worker("d0"), load=MEASURED)], [busy])
    placement = place(Prompt(1000), snapshot)
    # 2,000 tokens queued and 992 of whole blocks at 1,000 a second, then a tail of 8 tokens.
    assert placement.predicted_s == pytest.approx(3.0, abs=0.01)


@pytest.mark.parametrize(("slowdown", "mode"), [(1.0, Mode.REMOTE_PREFILL), (2.0, Mode.LOCAL)])
def test_sending_a_prompt_away_spares_nobody_where_the_neighbour_slows_decoding(slowdown, mode):
    load = replace(MEASURED, running=4, neighbour_slowdown=slowdown)
    prefill = replace(worker("p0", "prefill"), load=replace(MEASURED, prefill_tokens_per_s=500.0))
    snapshot = Snapshot([replace(worker("d0"), load=load)], [prefill])
    assert place(Prompt(1000), snapshot, "auto").mode is mode


def test_what_ranks_decode_workers_is_no_part_of_the_prediction():
    busy = replace(worker("d0"), load=replace(MEASURED, running=10))
    assert place(Prompt(100), Snapshot([busy]), "local").predicted_s == pytest.approx(0.1)
