"""Floor 6: the web page (to come). It will speak to `api/` over HTTP like any other client."""
