"""Trainer engines behind one port."""
