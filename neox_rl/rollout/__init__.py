"""Completions from the policy: the vLLM servers and the client that samples from them."""
