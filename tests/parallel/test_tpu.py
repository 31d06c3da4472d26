import pytest

from openvla_jax.parallel.tpu import GENERATIONS, compiler_options, parse_slice


@pytest.mark.parametrize(
    ("text", "chips", "hosts", "per_host"),
    [
        ("v5p:4x4x4", 64, 16, 4),
        ("v4:2x2x1", 4, 1, 4),
        ("v5e:16x16", 256, 64, 4),
        ("v5e:2x4", 8, 1, 8),
        ("v6e:8x8", 64, 16, 4),
        ("v6e:1x1", 1, 1, 1),
    ],
)
def test_chips_and_hosts(text, chips, hosts, per_host):
    tpu = parse_slice(text)
    assert (tpu.chips, tpu.hosts, tpu.chips_per_host) == (chips, hosts, per_host)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v5:4x4", "unknown TPU 'v5'"),
        ("v5p:4x4", "give 3 sizes, as v5p:4x4x4"),
        ("v5e:4x4x4", "give 2 sizes"),
        ("v5p:0x4x4", "give 3 sizes"),
        ("v5p", "give 3 sizes"),
        ("v5p:1x1x3", "3 chips, which hosts of 4 do not make up"),
    ],
)
def test_wrong_topologies(text, message):
    with pytest.raises(ValueError, match=message):
        parse_slice(text)


def test_slices_and_tori():
    tpu = parse_slice("v5p:4x4x8*3")
    assert (tpu.slices, tpu.chips, tpu.hosts, str(tpu)) == (3, 128, 32, "v5p:4x4x8*3")
    assert tpu.torus and parse_slice("v5e:16x16").torus
    assert not parse_slice("v5p:2x2x4").torus and not parse_slice("v6e:8x8").torus
    with pytest.raises(ValueError, match="number of slices"):
        parse_slice("v5e:16x16*0")


def test_compiler_options_are_none_on_other_devices():
    assert compiler_options("") == {}


def test_products_carry_all_reduces_on_v5e_alone():
    """libtpu warns of wrong results and hangs elsewhere; 0.0.50 refuses to compile."""
    carrying = "xla_tpu_enable_async_collective_fusion_fuse_all_reduce"
    assert [generation for generation in GENERATIONS if carrying in compiler_options(generation)] == ["v5e"]
