"""Ctrl-C while something must not be cut in two."""

from __future__ import annotations

import signal

import pytest

from placement.cli.demo_cluster import uninterrupted


def test_an_interrupt_waits_for_the_end_of_the_block() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        done.append("the rest of the block")
    assert ["the rest of the block"] == done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_is_let_through_where_it_does_no_harm() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), uninterrupted() as let_through:
        let_through()
        done.append("first node")
        signal.raise_signal(signal.SIGINT)
        let_through()
        done.append("second node")
    assert ["first node"] == done


def test_an_error_of_the_block_is_not_hidden_by_an_interrupt() -> None:
    with pytest.raises(ValueError, match="broken"), uninterrupted():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("broken")
