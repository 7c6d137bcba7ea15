"""How a policy version reaches the vLLM servers: snapshot, publisher, stager, watcher and the vLLM transfer engine."""
