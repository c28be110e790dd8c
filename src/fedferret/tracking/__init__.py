"""The files of a run folder: event log, checkpoint, summary and report; and the live progress on the terminal."""
