"""A run simulated around the real TicketQueue: what a staleness rule costs, whether faults break it, what a cluster needs."""
