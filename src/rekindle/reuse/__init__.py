"""Floor 3: what to reuse. Pure decision: takes what is known of a prompt and returns a plan; no clock, thread or socket.

Here live `prompt`, `plan`, and `blend` with `blend_select`; `window` and `explain` will join them.
"""
