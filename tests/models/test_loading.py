"""What is said while a model is loaded."""

from __future__ import annotations

import logging
import warnings

import pytest

from ratchet.models.loading import quiet


@pytest.mark.parametrize("library", ["bitsandbytes", "peft"])
def test_a_library_says_nothing_within_the_block_and_what_it_said_before_behind_it(library, caplog):
    below = logging.getLogger(f"{library}.some.module")
    below.warning("before")
    with quiet():
        with quiet():
            below.warning("within two")
        below.warning("within one")
        warnings.warn("of its own", stacklevel=1)
        below.error("a fault")
    below.warning("behind")
    assert caplog.messages == ["before", "a fault", "behind"]
