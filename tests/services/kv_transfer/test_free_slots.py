"""Slots that may be written, and those that a full disk has no room for."""

from services.kv_transfer.free_slots import FreeSlots


def taken(slots):
    return [slots.take() for _ in range(len(slots))]


def test_slots_are_taken_in_the_order_given():
    assert taken(FreeSlots(range(3))) == [0, 1, 2]


def test_what_is_set_aside_is_not_taken_until_there_is_room():
    slots = FreeSlots(range(4))
    assert slots.take() == 0
    slots.set_aside()
    assert (len(slots), slots.num_without_room) == (0, 3)
    slots.give([0])
    assert taken(slots) == [0]
    slots.take_back(2)
    assert (len(slots), slots.num_without_room) == (2, 1)
    slots.take_back(5)
    assert sorted(taken(slots)) == [1, 2, 3]
