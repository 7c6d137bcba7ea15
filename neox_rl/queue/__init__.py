"""Tickets, the staleness rule, and the socket between the orchestrator and the trainer."""
