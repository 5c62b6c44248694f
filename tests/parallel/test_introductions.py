"""Which backend and which network the ranks choose from what they tell each other."""

import socket
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch.distributed as dist

from spt_dist import UserError
from spt_dist.parallel.introductions import Introduction, choose_backend, exchange, interface_between_hosts


def addresses_of_this_host() -> dict[str, str]:
    """Interface -> an IPv4 address."""
    return {
        name: address.address
        for name, addresses in psutil.net_if_addrs().items()
        for address in addresses
        if address.family is socket.AF_INET
    }


def test_every_rank_reads_all_introductions() -> None:
    store = dist.HashStore()
    told = [Introduction(f"n{rank}", f"GPU-{rank}", f"10.0.0.{rank}", "10.0.0.9") for rank in range(3)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda rank: exchange(store, rank, 3, told[rank]), range(3)))
    assert found == [told, told, told]


def test_both_ends_of_the_connection_are_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as connection:
        mine = Introduction.of("", connection)
    assert (mine.address, mine.store_address) == ("127.0.0.1", "127.0.0.1")
    assert Introduction.of("", None) == Introduction(socket.gethostname(), "")


@pytest.mark.parametrize(
    ("devices", "backend"),
    [
        (["GPU-a", "GPU-b", "GPU-c", "GPU-d"], "nccl"),
        # More ranks than GPUs; and two ranks that were both told to take the first one.
        (["GPU-a", "GPU-b", "GPU-a", "GPU-b"], "gloo"),
        (["GPU-a", "GPU-a"], "gloo"),
        (["", ""], "gloo"),
        (["GPU-a"], "nccl"),
        ([""], "gloo"),
    ],
)
def test_nccl_where_each_rank_has_a_gpu_of_its_own(devices: list[str], backend: str) -> None:
    """However many GPUs a process sees: SLURM's --gpus-per-task shows each task only its own."""
    assert choose_backend([Introduction("n1", device) for device in devices]) == backend


def test_a_host_that_has_lost_its_gpu_is_named() -> None:
    everybody = [Introduction("n1", "GPU-a"), Introduction("n2", "GPU-b"), Introduction("n3", "")]
    with pytest.raises(UserError, match=r"rank 2 \(host n3\) sees no GPU"):
        choose_backend(everybody)


def test_the_interface_is_the_one_of_the_connection_to_the_store() -> None:
    for name, address in addresses_of_this_host().items():
        if name != "lo":
            assert interface_between_hosts(Introduction("n2", "", address, "10.1.2.3"), []) == name


def test_on_the_store_s_host_it_is_the_one_by_which_the_others_came() -> None:
    """Rank 0 has no connection, its neighbours have one over the loopback, or over 127.0.1.1 on Debian."""
    name, address = max(addresses_of_this_host().items(), key=lambda item: item[0] != "lo")
    other = Introduction("n2", "", "10.9.9.9", address if name != "lo" else "10.9.9.8")
    for mine in (Introduction("n1", ""), Introduction("n1", "", "127.0.0.1", "127.0.1.1")):
        found = interface_between_hosts(mine, [mine, other])
        assert found == (name if name != "lo" else None)


def test_on_one_host_nothing_is_chosen() -> None:
    mine = Introduction("n1", "", "127.0.0.1", "127.0.1.1")
    assert interface_between_hosts(Introduction("n1", ""), [Introduction("n1", ""), mine]) is None
    assert interface_between_hosts(mine, [Introduction("n1", ""), mine]) is None


def test_an_address_that_no_interface_has_is_left_to_gloo() -> None:
    """As within a container behind a translated address."""
    assert interface_between_hosts(Introduction("n2", "", "203.0.113.7", "203.0.113.8"), []) is None
