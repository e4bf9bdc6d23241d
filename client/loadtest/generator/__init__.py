"""Who sends: workers, targets, faults, and the servers that answer at once. Everything that waits lives here."""
