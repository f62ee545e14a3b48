"""Floor 2: keeping KV: keys, blocks, the store, tiers and eviction. Keeps bytes it cannot read; never imports `engine/`."""
