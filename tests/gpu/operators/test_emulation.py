"""The emulation shows the faults that it is there for."""

import ctypes
import math


def test_barriers_that_not_all_come_to(emulated):
    """They are named by line, and the next launch works."""
    emulated.barrier_fault.restype = ctypes.c_char_p
    for number in (0, 1, 2, 0):
        message = emulated.barrier_fault(number).decode()
        assert message.startswith("threads of a block do not meet: from 0 on at ")
        assert ("has ended" in message) == (number != 1)


def test_results_that_depend_on_an_order(emulated):
    """Blocks and threads take turns in another order in every launch."""
    emulated.set_order(0)
    block, thread = ctypes.c_uint(), ctypes.c_uint()
    found = []
    for _ in range(20):
        emulated.order_fault(ctypes.byref(block), ctypes.byref(thread))
        found.append((block.value, thread.value))
    assert all(len(set(numbers)) > 4 for numbers in zip(*found, strict=True))


def test_shared_memory_begins_as_garbage(emulated):
    emulated.memory_fault.restype = ctypes.c_float
    assert math.isnan(emulated.memory_fault())
