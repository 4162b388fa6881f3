"""Reading what the TPU compiler writes: files made here by hand in its form."""

import re

import pytest

from mmi_jax.aot.bundles import dump_flags, read_schedules

SCHEDULE = """= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = inlined_call_operand.vmem [shape: s32[6,1,8]] }
   0x1   :  { %15 = vsyncpa [#allocation16], 0 } /* Start region 1 */
   0x2 LB: > { %v1 = vmatmul.bf16 %v0  ;;  %v2 = vadd.f32 %v1, %v0 }
   0x3   : > { %v3 = vmatmul.bf16 %v0 }
   0x4   : > { %4 = sbr.rel (%p1) target bundleno = 2 (0x2), region = 6 }
   0x5   :  { %v9 = vadd.f32 %v3, %v3 }
   0x6 PF:  { %v8 = vadd.f32 %v3, %v3 }
"""
UNITS = """== CAPACTIY:
MXU, XLU, VALU
    4     3     2
== UTILIZATION:
0 0 0
0 0 0
4 0 1
2 3 0
0 0 0
0 0 2
0 0 0
"""


@pytest.fixture
def dump(tmp_path):
    """Two kernels and a fusion; the files of one run, with the compiler's other files among them."""
    for stamp, kernel in (("17", "block_sparse_attention.1"), ("18", "block_sparse_attention.2"), ("19", "fusion.3")):
        (tmp_path / f"{stamp}-{kernel}-72-final_bundles.txt").write_text(SCHEDULE)
        (tmp_path / f"{stamp}-{kernel}-70-final_hlo-static-per-bundle-utilization.txt").write_text(UNITS)
        (tmp_path / f"{stamp}-{kernel}-68-pre-delay_hlo-static-per-bundle-utilization.txt").write_text("")
        (tmp_path / f"{stamp}-{kernel}-71-schedule-analysis_final_bundles.txt").write_text("")
    return tmp_path


def test_regions_begin_at_marks_and_end_at_branches(dump):
    first, second = read_schedules(dump, "block_sparse_attention")
    assert (first.kernel, second.kernel) == ("block_sparse_attention.1", "block_sparse_attention.2")
    assert [(r.first, r.bundles, r.is_loop_body) for r in first.regions] == [
        (0, 2, False),
        (2, 3, True),
        (5, 1, False),
        (6, 1, False),
    ]
    assert first.bundles == 7


def test_slots_are_counted_per_region(dump):
    loop = read_schedules(dump, "block_sparse_attention.2")[0].regions[1]
    assert loop.used == {"MXU": 6, "XLU": 3, "VALU": 1}
    assert loop.utilization("MXU") == 6 / 12 and loop.utilization("XLU") == 3 / 9 and loop.utilization("VALU") == 1 / 6


def test_a_kernel_that_is_not_there_names_those_that_are(dump):
    with pytest.raises(ValueError, match=r"of a kernel 'splash': got \['block_sparse_attention.1'.*'fusion"):
        read_schedules(dump, "splash")


def test_a_schedule_without_its_table_is_an_error(dump):
    (dump / "17-block_sparse_attention.1-70-final_hlo-static-per-bundle-utilization.txt").unlink()
    message = "one table of units: 17-block_sparse_attention.1-72-final_bundles.txt has 0"
    with pytest.raises(ValueError, match=re.escape(message)):
        read_schedules(dump, "block_sparse_attention")


def test_the_flags_name_the_directory(tmp_path):
    assert f"--xla_jf_dump_to={tmp_path} " in dump_flags(tmp_path)
