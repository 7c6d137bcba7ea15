"""What follows from a host name: whom it reaches, and whether its sockets need keys."""

from __future__ import annotations

import ipaddress

from neox_rl.config.schema import NetworkConfig

WILDCARD = "0.0.0.0"
"""An address to bind to, but not to connect to: every process connects to the host that the others bind."""


def is_loopback(host: str) -> bool:
    """Whether ``host`` means the machine that uses it. Names other than localhost are not looked up."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def is_address(host: str) -> bool:
    """Whether ``host`` is an IP address, and no name."""
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def is_unreachable(host: str) -> bool:
    """Whether another machine cannot connect to what is bound to ``host``, under this name."""
    return is_loopback(host) or host == WILDCARD


def curve_on(network: NetworkConfig) -> bool:
    """Whether the ZeroMQ sockets of the run have keys."""
    return network.curve == "always" or (network.curve == "auto" and not is_loopback(network.bind_host))
