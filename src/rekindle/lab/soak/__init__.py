"""A server under mixed load and bad luck for as long as wished; afterwards nothing may be left over."""
