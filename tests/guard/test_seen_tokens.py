"""What was seen of a request's tokens is what was judged, and is handed out as it was when the request ended."""

from __future__ import annotations

import numpy as np

from guard.seen_tokens import SeenTokens


def test_what_was_taken_is_handed_out_even_if_the_buffer_is_used_again() -> None:
    seen = SeenTokens()
    assert seen.of_prompt() is None
    assert seen.response() is None
    prompt = np.array([[0.0, 1.0, 0.0], [0.5, 0.0, 0.25]], dtype=np.float32)
    seen.prompt(np.array([1, 3]), prompt)
    buffer = np.array([0.0, 2.0, 0.0], dtype=np.float32)
    seen.token(buffer)
    buffer[:] = [9.0, 0.0, 9.0]
    seen.token(buffer)
    buffer[:] = 0.0
    seen.token(buffer)
    found = seen.of_prompt()
    assert found is not None
    assert found.segments.tolist() == [1, 3]
    np.testing.assert_array_equal(found.acts, prompt)
    answer = seen.response()
    assert answer is not None
    assert answer.acts.tolist() == [[0.0, 2.0, 0.0], [9.0, 0.0, 9.0], [0.0, 0.0, 0.0]]
    assert answer.segments.tolist() == [0, 0, 0]


def test_what_comes_after_the_end_is_not_taken() -> None:
    seen = SeenTokens()
    seen.token(np.ones(2, dtype=np.float32))
    seen.close()
    seen.token(np.ones(2, dtype=np.float32))
    answer = seen.response()
    assert answer is not None
    assert len(answer.acts) == 1
