"""Launching and supervising a run: the command line, the launcher, the orchestrator."""
