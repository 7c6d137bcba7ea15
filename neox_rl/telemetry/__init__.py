"""What a run leaves behind: events, metrics, status, rollouts, the summary and the report. See ``paths.RunPaths`` for the files."""
