"""Child processes, process-wide settings, and locks. Nothing here knows about combinations."""
