"""Floor 5: HTTP (and later WebSocket): wire formats in, wire formats out. Decides nothing about reuse."""
