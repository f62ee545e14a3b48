"""Floor 4: requests over time: scheduler, worker thread and, later, live sessions. The only place with a thread."""
