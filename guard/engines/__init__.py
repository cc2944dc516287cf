"""Adapters that connect the engine-neutral monitor to a serving engine, one module each."""
