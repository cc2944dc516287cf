"""The guard inside vLLM: in the graph, in the scheduler and in the client's process, without a fork.

    SAILGUARD_BANK=shipped SAILGUARD_POLICY=policy.yaml vllm serve MODEL \\
        --worker-extension-cls guard.engines.vllm.required.Guarded

The plugin is installed with the package and acts where the environment asks for it.
"""
