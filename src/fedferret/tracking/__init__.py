"""What a run leaves behind: events as they happen, a summary, a report to read, progress on the terminal."""
