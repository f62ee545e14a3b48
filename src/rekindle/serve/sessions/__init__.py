"""Live sessions: conversations whose KV is always ready.

    sessions.py   all sessions of a service, and the one thread on which everything happens to them
    session.py    one session: its state and what can be done to it
    context.py    what a session has said and heard, as tokens: a head that stays, turns, a draft
    window.py     how much of that is remembered
    options.py    as its owner wishes
    reader.py     what of it is read, and when
    line.py       one request at a time, each going on where the last one was
    script.py     what a model's chat template writes around what is said
    saved.py      sessions in files, so that they outlive the process
    news.py       what listeners are told
    gate.py       who may have another answer

A session computes nothing itself. What it has heard so far is the prompt of a request that is only fed (`Generation.feed`),
with the sequence held (`Generation.hold`), so exact prefix reuse does the rest: an appended draft computes its new
tokens, a replaced one what differs, and going back, resetting, switching and forking compute nothing.
"""
