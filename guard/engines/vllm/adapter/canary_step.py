"""The scheduler's orders for the canary, which no scheduler has given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_CANARY = "sailguard-canary"


def canary_step(groups: Sequence[int], ids: list[int], at: int, n: int, steps: int) -> Any:
    """The scheduler's order for the canary's tokens from `at` on; none of them: that it has ended.

    groups: the size of a block in each of the cache's groups; every one gets blocks of its own.
    """
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

    new, cached = [], CachedRequestData.make_empty()
    if n and at == 0:
        needed = [-(-(len(ids) + steps) // size) for size in groups]
        starts = [1 + sum(needed[:i]) for i in range(len(needed))]
        blocks = tuple(list(range(start, start + n_blocks)) for start, n_blocks in zip(starts, needed, strict=True))
        new = [
            NewRequestData(
                req_id=_CANARY,
                prompt_token_ids=ids,
                mm_features=[],
                sampling_params=SamplingParams(temperature=0.0, max_tokens=steps + 1, ignore_eos=True),
                pooling_params=None,
                block_ids=blocks,
                num_computed_tokens=0,
                lora_request=None,
            )
        ]
    elif n:
        cached = CachedRequestData(
            req_ids=[_CANARY],
            resumed_req_ids=set(),
            new_token_ids=[],
            all_token_ids={},
            new_block_ids=[None],
            num_computed_tokens=[at],
            num_output_tokens=[max(0, at - len(ids) + 1)],
        )
    return SchedulerOutput(
        scheduled_new_reqs=new,
        scheduled_cached_reqs=cached,
        num_scheduled_tokens={_CANARY: n} if n else {},
        total_num_scheduled_tokens=n,
        scheduled_spec_decode_tokens={},
        scheduled_encoder_inputs={},
        finished_req_ids=set() if n else {_CANARY},
        free_encoder_mm_hashes=[],
    )
