"""Child processes, and settings that belong to a process. Nothing here knows of combinations."""
