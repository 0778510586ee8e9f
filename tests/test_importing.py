"""Garbage is not looked for while libraries are imported, and is afterwards as before."""

import gc

import pytest

from truetune.importing import uncollected


def test_the_collector_is_afterwards_what_it_was():
    assert gc.isenabled()
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), uncollected():
        raise ImportError
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off():
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
