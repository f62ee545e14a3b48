"""Floor 5: experiments: what the KV cache buys, measured beside the physical limit. Never imported by the server."""
