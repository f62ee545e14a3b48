"""Floor 5: HTTP (and later WebSocket): wire formats in, wire formats out. Decides nothing about reuse.

A request passes the door (`door.py`: its time of arrival, its key, its size; `keys.py` knows the keys), is read into a
wire model (`wire.py`: types and text), becomes one `Generation` or several (`chat.py`, `completions.py`, `generate.py`),
is run (`answers.py`, within the limits of `load.py`) and is written in the shape of the API it came by (`openai.py`,
`logprobs.py`, `sse.py`). All refusals, wherever they arise, are written in one place (`refusals.py`). `server.py` puts
the app on a socket, and says how that ends.
"""
