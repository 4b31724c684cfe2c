"""The inference engine, one for all roles: block pool, scheduler, model runner, sampler.

Reading order: `sequence`, `block_pool`, `scheduler`, `step`, `runner`, `engine`.
"""
