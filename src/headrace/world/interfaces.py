"""Which network interface of this machine has an address, for libraries that are told interfaces.

In: a host as people write it. Out: an interface's name. It must not know who asks.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

_SIOCGIFADDR = 0x8915
"""Asks Linux for an interface's IPv4 address (netdevice(7))."""
_INTERFACES_V6 = Path("/proc/net/if_inet6")
_RDMA = Path("/sys/class/infiniband")


def interface_of(host: str) -> str:
    """The interface that has the address of `host`. Raises OSError where none has."""
    wanted = {
        ipaddress.ip_address(str(info[4][0]).partition("%")[0]) for info in socket.getaddrinfo(host, None)
    }
    for name, address in _addresses():
        if address in wanted or (address.is_loopback and all(each.is_loopback for each in wanted)):
            return name
    raise OSError(f"no network interface of this machine has the address of {host}")


def rdma_ports() -> list[str]:
    """Ports of RDMA devices, as UCX names them: mlx5_0:1."""
    return sorted(f"{port.parent.parent.name}:{port.name}" for port in _RDMA.glob("*/ports/*"))


def _addresses() -> list[tuple[str, ipaddress.IPv4Address | ipaddress.IPv6Address]]:
    found: list[tuple[str, ipaddress.IPv4Address | ipaddress.IPv6Address]] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has none
                answer = fcntl.ioctl(sock.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found.append((name, ipaddress.IPv4Address(answer[20:24])))
    if _INTERFACES_V6.exists():
        for line in _INTERFACES_V6.read_text().splitlines():
            digits, *_, name = line.split()
            found.append((name, ipaddress.IPv6Address(bytes.fromhex(digits))))
    return found
