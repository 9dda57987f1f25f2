"""What placements come to."""

from hypothesis import given
from hypothesis import strategies as st

from testbed.results.placed import describe_hosts, describe_sharing, read_ranges, write_ranges
from testbed.results.records import Rank


def rank(host, *, cores="0-3", gpu=""):
    device = "cuda:0 NVIDIA H200" if gpu else "cpu"
    return Rank(0, host, device, "client", 0, cores, gpu)


@given(st.sets(st.integers(0, 300)))
def test_ranges_are_read_as_they_were_written(numbers):
    assert read_ranges(write_ranges(sorted(numbers))) == sorted(numbers)


def test_ranges_are_those_of_taskset():
    assert write_ranges([0, 1, 2, 3, 8, 10, 11]) == "0-3,8,10-11"
    assert read_ranges("anything-else") == read_ranges("1-2-3") == read_ranges("") == []
    assert len(read_ranges("0-99999999999")) < 100_000


def test_hosts_are_counted():
    assert describe_hosts([rank("a"), rank("b"), rank("a")]) == "3 ranks on 2 hosts: a (2), b (1)"
    many = describe_hosts([rank(f"n{number}") for number in range(20)])
    assert many.startswith("20 ranks on 20 hosts: n0 (1), ")
    assert "n3 (1), 12 more, n16 (1)" in many


def test_a_gpu_that_several_ranks_of_a_host_have_is_told():
    ranks = [rank("a", gpu="X"), rank("a", gpu="X"), rank("a", gpu="Y"), rank("b", gpu="X")]
    assert describe_sharing(ranks) == ["ranks 0-1 share a GPU of a (NVIDIA H200, X)"]


def test_cpus_that_are_too_few_are_told():
    crowded = [rank("a", cores="0-1"), rank("a", cores="0-1"), rank("b", cores="4")]
    assert describe_sharing(crowded, 1) == []
    assert describe_sharing(crowded, 2) == [
        "a: 2 CPUs for 2 ranks of 2 threads",
        "b: 1 CPU for 1 rank of 2 threads",
    ]
    assert describe_sharing([rank("a", cores="")], 64) == []
