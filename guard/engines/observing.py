"""What a request's observer and keeper are told: of every token, what the guard itself has judged it by.

Neither has a say in what is answered: an error of its own, or in what is made for it, does not stop the answer, it is
logged, and whoever failed is told no more.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from guard.engines.requests import Request
from guard.events import TraceToken
from guard.judge import on_host
from guard.text_judging import active_features, trace_tokens

logger = logging.getLogger(__name__)


def show_prompt(request: Request, hidden: Mapping[str, Float[Tensor, "n d_in"]]) -> None:
    """Show a prompt that has been judged whole by these activations."""
    with _let_go_on_error(request):
        assert request.observer is not None
        judging, monitor = request.judging, request.judging.monitor
        observed, segment = judging.place(request.prompt)
        positions = observed.nonzero().flatten()
        acts = on_host(monitor.encoder.encode({name: x[positions] for name, x in hidden.items()}))
        segments = on_host(segment)
        tokens = trace_tokens(
            monitor,
            request.prompt,
            judging.decode,
            positions=on_host(positions),
            logits=monitor.judge(acts, segments).logits,
            feature_acts=acts,
            segments=segments,
        )
        request.observer.prompt(tokens)


def show_token(request: Request, token_id: int, *, observed: bool) -> None:
    """Show a token of the answer that has been judged by now, or is not judged as a special token is not."""
    with _let_go_on_error(request):
        assert request.observer is not None
        monitor, state = request.judging.monitor, request.begin()
        count = int(state.count[0])
        index = count - 1 if observed else count
        acts = on_host(state.recent[0, (count - 1) % state.recent.shape[1]])
        request.observer.token(
            TraceToken(
                index=index,
                token_id=token_id,
                text="",
                observed=observed,
                scores=monitor.scores(state, 0) if observed else {},
                features=active_features(monitor, acts, streaming=True) if observed else (),
                segment=0 if observed else None,
            )
        )


def keep_prompt(request: Request, hidden: Mapping[str, Float[Tensor, "n d_in"]]) -> None:
    """Give the keeper a prompt that has been judged whole by these activations."""
    with _let_go_on_error(request, "keeper"):
        assert request.keeper is not None
        judging, monitor = request.judging, request.judging.monitor
        observed, segment = judging.place(request.prompt)
        positions = observed.nonzero().flatten()
        acts = on_host(monitor.encoder.encode({name: x[positions] for name, x in hidden.items()}))
        request.keeper.prompt(on_host(segment), acts)


def keep_token(request: Request) -> None:
    """Give the keeper the token of the answer that was judged last."""
    with _let_go_on_error(request, "keeper"):
        assert request.keeper is not None
        state = request.begin()
        request.keeper.token(on_host(state.recent[0, (int(state.count[0]) - 1) % state.recent.shape[1]]))


@contextmanager
def _let_go_on_error(request: Request, who: Literal["observer", "keeper"] = "observer") -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever it is, the guard has done its work
        setattr(request, who, None)
        logger.error("a request is observed no further: %s", type(error).__name__, exc_info=error)
