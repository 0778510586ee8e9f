import pytest

from truetune.host import left_of_container

GIB = 2**30


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_is_not_filled(tmp_path, version):
    names = ("memory.max", "memory.current", "file") if version == 2 else (
        "memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "cache")  # fmt: skip
    limit, used, cache = names
    assert left_of_container(tmp_path) == float("inf")
    (tmp_path / "memory").mkdir()
    (tmp_path / limit).write_text(f"{8 * GIB}\n")
    (tmp_path / used).write_text(f"{3 * GIB}\n")
    (tmp_path / limit).with_name("memory.stat").write_text(f"anon {GIB}\n{cache} {GIB}\n")
    assert left_of_container(tmp_path) == 6 * GIB
    (tmp_path / limit).write_text("max\n" if version == 2 else f"{2**63 - 4096}\n")
    assert left_of_container(tmp_path) > 2**62
