"""Live sessions: conversations whose KV is always ready.

    sessions.py   all sessions of a service, and the one thread on which everything happens to them
    session.py    one session: its state and what can be done to it
    context.py    what a session has said and heard, as tokens: a head that stays, turns, a draft
    script.py     what a model's chat template writes around them
    saved.py      sessions in files, so that they outlive the process
    news.py       what listeners are told

A session computes nothing itself. What it has heard so far is the prompt of a request that is only fed (`Generation.feed`),
with the sequence held (`Generation.hold`), so exact prefix reuse does the rest: an appended draft computes its new
tokens, a replaced one what differs, and going back, resetting, switching and forking compute nothing.
"""
