"""Meta-RL: several solution attempts in one context, and what their rewards train (arXiv 2501.04682, section 6.3; RL^2, 1611.02779)."""
