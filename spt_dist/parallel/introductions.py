"""What ranks tell each other before they form the process group: their devices, and where they can be reached."""

import ipaddress
import json
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import psutil
import torch.distributed as dist

from spt_dist.errors import UserError


@dataclass(frozen=True)
class Introduction:
    """One rank's.

    Attributes:
        host: its host's name.
        device: what tells its GPU from all others in the world; "" for a CPU.
        address, store_address: both ends of its connection to the store; "" for the rank that holds the store.
    """

    host: str
    device: str
    address: str = ""
    store_address: str = ""

    @staticmethod
    def of(device: str, connection: socket.socket | None) -> "Introduction":
        """This process's."""
        ends = (connection.getsockname()[0], connection.getpeername()[0]) if connection else ()
        return Introduction(socket.gethostname(), device, *ends)


def exchange(store: dist.Store, rank: int, world_size: int, mine: Introduction) -> list[Introduction]:
    """The introductions of all ranks, in their order. Every rank calls it.

    Args:
        store: of this attempt alone.
    """
    store.set(f"introduction/{rank}", json.dumps(asdict(mine)))
    texts = store.multi_get([f"introduction/{other}" for other in range(world_size)])
    return [Introduction(**json.loads(text)) for text in texts]


def choose_backend(everybody: Sequence[Introduction]) -> str:
    """ "nccl" where each rank has a GPU of its own, "gloo" elsewhere; the same on all ranks.

    Raises:
        UserError: some ranks have a GPU and others have none.
    """
    devices = [one.device for one in everybody]
    if any(devices) and not all(devices):
        rank = devices.index("")
        raise UserError(
            f"environment: rank {rank} (host {everybody[rank].host}) sees no GPU, but other ranks do; look at "
            "nvidia-smi and CUDA_VISIBLE_DEVICES there, or set CUDA_VISIBLE_DEVICES='' for all"
        )
    return "nccl" if all(devices) and len(set(devices)) == len(devices) else "gloo"


def interface_between_hosts(mine: Introduction, everybody: Sequence[Introduction]) -> str | None:
    """The network interface over which this rank is reached from other hosts; ``None`` for no need or no knowledge.

    gloo takes the address that the host's own name has, which on Debian is 127.0.1.1, and elsewhere may be that of
    another network than the one on which the ranks met.
    """
    met_at = mine.address
    if _is_local(met_at):
        # On the host of the store: how the others reach it.
        met_at = next((one.store_address for one in everybody if not _is_local(one.store_address)), "")
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == met_at for address in addresses):
            return name
    return None


def _is_local(address: str) -> bool:
    return not address or ipaddress.ip_address(address.partition("%")[0]).is_loopback
