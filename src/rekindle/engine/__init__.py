"""Floor 2: computing KV. One protocol of seven verbs; llama.cpp, torch and a toy speak it.

The engine makes and reads payload bytes without knowing where they are kept; it never imports `kv/`.
"""
