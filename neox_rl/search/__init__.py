"""Tree search over steps of reasoning, trees as Meta-CoT text, demonstrations by search, and the analysis of what a policy wrote."""
