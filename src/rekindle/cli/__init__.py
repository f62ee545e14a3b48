"""Floor 6: the `rekindle` command. Parses arguments, calls the floors below, prints for people."""
