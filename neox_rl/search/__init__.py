"""Searches over arithmetic problems, their linearization to Meta-CoT, and the analysis of what a policy wrote."""
