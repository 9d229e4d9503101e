"""tools/estimate.py: what it counts in machine code."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# The shape of a pass on warp-level products: a prologue with its own product, then a loop with a copy that the last
# tiles skip, a mask with a loop of its own, and a rescaling that a new maximum needs.
PORTABLE = """
        /*0000*/                   HMMA.16816.F32.BF16 R4, R8, R12, RZ ;   /* 0x000000000c08723c */
        /*0010*/                   DEPBAR.LE SB0, 0x1 ;                    /* 0x000080400000791a */
        /*0020*/              @!P0 BRA 0x40 ;                              /* 0x0000000000008947 */
        /*0030*/                   LDGSTS.E.BYPASS.128 [R3], [R4.64], P1 ; /* 0x0000000004037fae */
        /*0040*/                   LDSM.16.MT88.4 R12, [R2+0x800] ;        /* 0x000800000c02783b */
        /*0050*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;   /* 0x0000000c0804723c */
        /*0060*/               @P3 BRA 0xa0 ;                              /* 0x0000000000003947 */
        /*0070*/                   ISETP.GE.AND P2, PT, R9, R1, PT ;       /* 0x000000010900720c */
        /*0080*/               @P2 BRA 0x70 ;                              /* 0x0000000000002947 */
        /*0090*/                   FSEL R4, R4, -INF , P2 ;                /* 0xff80000004047808 */
        /*00a0*/                   FMNMX R5, R4, R5, !PT ;                 /* 0x0000000504057209 */
        /*00b0*/                   SHFL.BFLY PT, R6, R5, 0x1, 0x1f ;       /* 0x0c201f0005067f89 */
        /*00c0*/              @!P0 BRA 0xe0 ;                              /* 0x0000000000008947 */
        /*00d0*/                   FMUL R20, R20, R6 ;                     /* 0x0000000614147220 */
        /*00e0*/                   FFMA R4, R4, R7, R5 ;                   /* 0x0000000704047223 */
        /*00f0*/                   MUFU.EX2 R4, R4 ;                       /* 0x0000000400047308 */
        /*0100*/                   IMAD.MOV.U32 R7, RZ, RZ, R4 ;           /* 0x000000ffff077224 */
        /*0110*/                   UIADD3 UR4, UR4, 0x1, URZ ;             /* 0x0000000104047890 */
        /*0120*/              @!P4 BRA 0x10 ;                              /* 0x0000000000004947 */
        /*0130*/                   EXIT ;                                  /* 0x000000000000794d */
"""
# A pass on warpgroup products. The code behind EXIT waits for a copy and branches back into the loop.
HOPPER = """
        /*0000*/                   WARPGROUP.ARRIVE ;
        /*0010*/              @!P0 BRA 0x00c0 ;
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR20], RZ, !UPT, gsb0 ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R88, R152, gdesc[UR20].tnspB, R88 ;
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R88, R156, gdesc[UR20].tnspB, R88, gsb0 ;
        /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0060*/                   MUFU.EX2 R24, R24 ;
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0080*/                   FMUL R88, R88, R2 ;
        /*0090*/                   F2FP.BF16.F32.PACK_AB R152, R25, R24 ;
        /*00a0*/              @!P1 BRA 0x0000 ;
        /*00b0*/                   EXIT ;
        /*00c0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR9], R10 ;
        /*00d0*/              @!P0 BRA 0x00c0 ;
        /*00e0*/                   BRA 0x20 ;
"""


@pytest.fixture(scope="module")
def estimate():
    pytest.importorskip("setuptools", minversion="77.0.3")
    spec = importlib.util.spec_from_file_location("estimate", ROOT / "tools" / "estimate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["estimate"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_instructions_of_the_main_loop_by_pipe(estimate):
    body, rare = estimate.split_rare(estimate.find_loops(estimate.parse(PORTABLE), "HG?MMA")[0])
    assert [i.opcode for i in rare] == ["ISETP", "BRA", "FSEL", "FMUL"]
    pipes = ["other", "other", "shared", "shared", "tensor", "other", "alu", "shared", "other"]
    assert [i.pipe for i in body] == [*pipes, "fma", "mufu", "imad", "uniform", "other"]
    cycles = estimate.warp_cycles(body)
    # 16 x 8 x 16 multiply-adds at 62 % of 512 per cycle; 512 + 512 + 128 bytes, of which 128 per cycle are shared by
    # four schedulers.
    assert cycles["tensor"] == pytest.approx(2048 / 512 / 0.62)
    assert cycles["shared"] == 4 * (512 + 512 + 128) / 128
    assert {pipe: cycles[pipe] for pipe in ("fma", "alu", "mufu", "issue")} == {
        "fma": 3,
        "alu": 2,
        "mufu": 8,
        "issue": 14,
    }


def test_warpgroup_products_and_the_code_that_they_do_not_cover(estimate):
    loop = estimate.find_loops(estimate.parse(HOPPER), "HG?MMA")[0]
    assert [hex(loop[0].address), hex(loop[-1].address)] == ["0x0", "0xa0"]
    assert [i.opcode for i in estimate.exposed(loop)] == ["WARPGROUP", "BRA", "FMUL", "F2FP", "BRA"]
    cycles = estimate.warp_cycles(loop)
    assert cycles["tensor"] == pytest.approx(3 * 64 / 0.83)  # 64 x 128 x 16 multiply-adds at 2,048 per cycle
    # One product reads 64 rows and 128 rows of 32 bytes, two read only the 128; a warp counts a quarter.
    assert cycles["shared"] == 4 * (192 + 128 + 128) * 32 / 4 / 128


def test_cycles_of_a_tile(estimate):
    loops = (estimate.split_rare(estimate.find_loops(estimate.parse(PORTABLE), "HG?MMA")[0])[0], [])
    # 4 warps, one per scheduler; 16 x 8 x 16 multiply-adds each.
    cycles = estimate.tile_cycles("portable", estimate.Tile("", rows=32, keys=8), 16, 128, loops)
    assert cycles == {"bound": "shared", "low": 36, "high": pytest.approx(36 * estimate.STALLS)}
    of_two_tiles = estimate.tile_cycles("portable", estimate.Tile("", rows=16, keys=8), 16, 128, loops)
    assert of_two_tiles == {"bound": "shared", "low": 18, "high": pytest.approx(18 * estimate.STALLS)}
    with pytest.raises(SystemExit, match=r"portable: 1 products of \[64, 8, 16\]: update TILES"):
        estimate.tile_cycles("portable", estimate.Tile("", rows=64, keys=8), 16, 128, loops)


def test_splits_are_the_launchers(estimate):
    """The numbers follow from choose_splits in info_nce_launch.cuh: waves x (tiles of a block + 3) is least."""
    source = (ROOT / "csrc" / "kernels" / "cuda" / "info_nce_launch.cuh").read_text()
    assert int(re.search(r"kBlockCostTiles = (\d+);", source)[1]) == estimate.BLOCK_COST_TILES
    assert estimate.choose_splits(row_blocks=4, tiles=1024, resident=264) == 64  # 16 tiles each
    assert estimate.choose_splits(row_blocks=2, tiles=512, resident=132) == 64  # 8 tiles each
    assert estimate.choose_splits(row_blocks=300, tiles=1024, resident=264) == 3  # 4 waves


def test_a_changed_count_is_a_difference(estimate):
    committed = {"nvcc": "V13.0.88", "kernels": {"sm_90a": {"pass<1>": {"alu": 5}}}, "estimates": {}}
    assert estimate.differences(committed, committed) == []
    changed = {**committed, "kernels": {"sm_90a": {"pass<1>": {"alu": 6}}}}
    assert estimate.differences(committed, changed) == ["sm_90a pass<1>: alu 5 -> 6"]
    missing = {**committed, "kernels": {}}
    assert estimate.differences(committed, missing) == ["sm_90a pass<1>: alu 5 -> None"]
    assert "V13.1.0" in estimate.differences(committed, {**committed, "nvcc": "V13.1.0"})[0]
